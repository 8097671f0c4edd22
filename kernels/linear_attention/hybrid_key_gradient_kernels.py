# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of hybrid attention, backward, for keys, values and key features; notation of `hybrid_gradient_kernels`.

    dk_j = scale Σ_i (γ p_ij δ_ij q_i − [j = *_i] γ e_i q_i)
    dv_j = Σ_i (γ p_ij ρ_i + m ℓ_ij ρ'_i) G_i + E_j dSᵀ φ_j
    dφ_j = Σ_i m E_ij δ'_ij φ_i + E_j (dS v_j + dz)

A program has a block of keys that enters the state together (it begins ``reach`` before a chunk of queries) and walks
the chunks of queries whose windows reach it. After the last of these the block is part of the state, whose gradient dS
has what all later queries want of it; E_j = e^{λ (distance to the end of the block)}.
"""

# mypy: ignore-errors
# (Device code: the syntax of Python, the types of Triton.)

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.linear_attention.hybrid_gradient_kernels import head_decay, products, scaled_dot
from rewriter.kernels.linear_attention.hybrid_kernels import pair_masks
from rewriter.kernels.linear_attention.kernels import place, real_rows, store_tile, tile


@triton.jit
def hybrid_key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, gate_ptr, keep_ptr, rank_ptr, top_ptr, rho_ptr, omega_ptr, best_ptr, soft_ptr, dk_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, keep_b, rank_b,
    heads, group, length, offset, reach, window, sinks, chunks, width, values, k_share, v_share, scale,
    TERRACE: tl.constexpr, SINKS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk ``[B, Hs, offset + T, D]``. Grid: (B · Hs, blocks of keys, tiles of D)."""
    row, batch, head = place(tl.program_id(0), heads)
    n, order = tl.program_id(1), tl.arange(0, BT)
    columns = tl.program_id(2) * BD + tl.arange(0, BD)
    keys, ends = offset - reach + n * BT + order, offset + length
    real = real_rows(keep_ptr, batch * keep_b, keys, ends)
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    rank = keys
    if TERRACE or SINKS:
        rank = tl.load(rank_ptr + batch * rank_b + keys, mask=real, other=0)

    dk = tl.zeros([BT, BD], tl.float32)
    for m in range(tl.maximum(n - (reach + BT - 1) // BT, 0), tl.minimum(n + 1, chunks)):
        rows = m * BT + order
        valid = rows < length
        own = rows
        if TERRACE or SINKS:
            own = tl.load(rank_ptr + batch * rank_b + offset + rows, mask=valid, other=0)
        _, near, _ = pair_masks(rows + offset, valid, own, keys, real, rank, window, sinks, TERRACE, SINKS)
        for member in range(0, group):
            query = head * group + member
            at = (batch * heads * group + query) * length + rows
            of_q = q_ptr + batch * q_b + query.to(tl.int64) * q_h
            of_do = do_ptr + batch * do_b + query.to(tl.int64) * do_h
            rho = tl.load(rho_ptr + at, mask=valid, other=0.0)
            omega = tl.load(omega_ptr + at, mask=valid, other=0.0)
            top = tl.load(top_ptr + at, mask=valid, other=0.0)
            gate = tl.load(gate_ptr + query).to(tl.float32)
            scores = products(of_q, q_t, rows, valid, k_ptr, k_t, keys, real, width, q_ptr, BT, BT, BD, PRECISION)
            grads = products(of_do, do_t, rows, valid, v_ptr, v_t, keys, real, values, q_ptr, BT, BT, BV, PRECISION)
            weights = tl.exp(tl.where(near, scores * scale - top[:, None], -float("inf")))
            grads = tl.where(near, (grads * rho[:, None] + omega[:, None]) * weights, 0.0)
            if best_ptr is not None:
                best = tl.load(best_ptr + at, mask=valid, other=-1)
                soft = tl.load(soft_ptr + at, mask=valid, other=0.0)
                grads -= tl.where(best[:, None] == keys[None, :], soft[:, None], 0.0)
            q = tile(of_q, q_t, rows, valid, columns, width)
            dk = scaled_dot(tl.trans(grads * gate), q, dk, PRECISION)
    dk = tl.where(real[:, None], dk * scale, 0.0)
    inside = (keys >= 0) & (keys < ends)
    store_tile(dk_ptr + row * ends * width, width, keys, inside, columns, width, dk)


@triton.jit
def hybrid_value_gradients_kernel(  # noqa: C901 - a branch for each option
    q_ptr, k_ptr, q_map_ptr, k_map_ptr, do_ptr, gate_ptr, map_scale_ptr, decay_ptr, keep_ptr, rank_ptr, top_ptr, rho_ptr,
    linear_rho_ptr, dstates_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, q_map_b, q_map_h, q_map_t, k_map_b, k_map_h, k_map_t, do_b, do_h, do_t, keep_b, rank_b,
    heads, group, length, offset, reach, window, sinks, chunks, width, features, values, k_share, map_share, decay_share,
    scale,
    MAPS: tl.constexpr, TERRACE: tl.constexpr, SINKS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv ``[B, Hs, offset + T, Dv]``. Grid: (B · Hs, blocks of keys, tiles of Dv)."""
    row, batch, head = place(tl.program_id(0), heads)
    n, order = tl.program_id(1), tl.arange(0, BT)
    columns = tl.program_id(2) * BV + tl.arange(0, BV)
    keys, ends = offset - reach + n * BT + order, offset + length
    real = real_rows(keep_ptr, batch * keep_b, keys, ends)
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    rank = keys
    if TERRACE or SINKS:
        rank = tl.load(rank_ptr + batch * rank_b + keys, mask=real, other=0)
    if MAPS:
        k_map_ptr += batch * k_map_b + (head // map_share).to(tl.int64) * k_map_h
        if decay_ptr is not None:
            decay = head_decay(decay_ptr, head, decay_share)

    dv = tl.zeros([BT, BV], tl.float32)
    for m in range(tl.maximum(n - (reach + BT - 1) // BT, 0), tl.minimum(n + 1, chunks)):
        rows = m * BT + order
        valid = rows < length
        own = rows
        if TERRACE or SINKS:
            own = tl.load(rank_ptr + batch * rank_b + offset + rows, mask=valid, other=0)
        distance, near, far = pair_masks(rows + offset, valid, own, keys, real, rank, window, sinks, TERRACE, SINKS)
        for member in range(0, group):
            query = head * group + member
            at = (batch * heads * group + query) * length + rows
            of_q = q_ptr + batch * q_b + query.to(tl.int64) * q_h
            rho = tl.load(rho_ptr + at, mask=valid, other=0.0)
            top = tl.load(top_ptr + at, mask=valid, other=0.0)
            gate = tl.load(gate_ptr + query).to(tl.float32)
            scores = products(of_q, q_t, rows, valid, k_ptr, k_t, keys, real, width, q_ptr, BT, BT, BD, PRECISION)
            scores = tl.exp(tl.where(near, scores * scale - top[:, None], -float("inf")))
            weights = scores * (gate * rho)[:, None]
            if MAPS:
                of_map = q_map_ptr + batch * q_map_b + query.to(tl.int64) * q_map_h
                linear = products(
                    of_map, q_map_t, rows, valid, k_map_ptr, k_map_t, keys, real, features, dstates_ptr,
                    BT, BT, BF, PRECISION,
                )  # fmt: skip
                if decay_ptr is not None:
                    linear *= tl.exp(decay * tl.maximum(distance, 0))
                if map_scale_ptr is not None:
                    linear *= tl.load(map_scale_ptr + query).to(tl.float32)
                linear_rho = tl.load(linear_rho_ptr + at, mask=valid, other=0.0)
                weights += tl.where(far, linear * linear_rho[:, None], 0.0)
            do = tile(do_ptr + batch * do_b + query.to(tl.int64) * do_h, do_t, rows, valid, columns, values)
            dv = scaled_dot(tl.trans(weights), do.to(q_ptr.dtype.element_ty), dv, PRECISION)
    if MAPS:  # noqa: SIM102 - decided by the compiler, unlike the next
        if n < chunks:
            taken = real & (n * BT + order < length)
            if SINKS:
                taken = taken & (rank >= sinks)
            count = tl.minimum(length - n * BT, BT)
            after = dstates_ptr + (row * chunks + n) * features * values
            late = tl.zeros([BT, BV], tl.float32)
            for begin in range(0, features, BF):
                feature = begin + tl.arange(0, BF)
                ds = tile(after, values, feature, feature < features, columns, values)
                k = tile(k_map_ptr, k_map_t, keys, taken, feature, features).to(ds.dtype)
                late += tl.dot(k, ds, input_precision=PRECISION)
            if decay_ptr is not None:
                late *= tl.exp(decay * tl.maximum(count - 1 - order, 0))[:, None]
            dv += late
    dv = tl.where(real[:, None], dv, 0.0)
    inside = (keys >= 0) & (keys < ends)
    store_tile(dv_ptr + row * ends * values, values, keys, inside, columns, values, dv)


@triton.jit
def hybrid_key_map_gradients_kernel(  # noqa: C901 - a branch for each option
    q_map_ptr, k_map_ptr, v_ptr, do_ptr, map_scale_ptr, decay_ptr, keep_ptr, rank_ptr, rho_ptr, omega_ptr,
    states_ptr, zs_ptr, dstates_ptr, dzs_ptr, dk_map_ptr, passed_ptr,
    q_map_b, q_map_h, q_map_t, k_map_b, k_map_h, k_map_t, v_b, v_h, v_t, do_b, do_h, do_t, keep_b, rank_b,
    heads, group, length, offset, reach, window, sinks, chunks, features, values, map_share, v_share, decay_share,
    TERRACE: tl.constexpr, SINKS: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dφ_k ``[B, Hs, offset + T, F]``; what the state's passing adds to dλ, ``[B, Hs, blocks, tiles of F]``.

    Grid: (B · Hs, blocks of keys, tiles of F).
    """
    row, batch, head = place(tl.program_id(0), heads)
    n, order, part = tl.program_id(1), tl.arange(0, BT), tl.program_id(2)
    columns = part * BF + tl.arange(0, BF)
    here = columns < features
    keys, ends = offset - reach + n * BT + order, offset + length
    real = real_rows(keep_ptr, batch * keep_b, keys, ends)
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    rank = keys
    if TERRACE or SINKS:
        rank = tl.load(rank_ptr + batch * rank_b + keys, mask=real, other=0)
    if decay_ptr is not None:
        decay = head_decay(decay_ptr, head, decay_share)

    dk = tl.zeros([BT, BF], tl.float32)
    for m in range(tl.maximum(n - (reach + BT - 1) // BT, 0), tl.minimum(n + 1, chunks)):
        rows = m * BT + order
        valid = rows < length
        own = rows
        if TERRACE or SINKS:
            own = tl.load(rank_ptr + batch * rank_b + offset + rows, mask=valid, other=0)
        distance, _, far = pair_masks(rows + offset, valid, own, keys, real, rank, window, sinks, TERRACE, SINKS)
        for member in range(0, group):
            query = head * group + member
            at = (batch * heads * group + query) * length + rows
            of_do = do_ptr + batch * do_b + query.to(tl.int64) * do_h
            rho = tl.load(rho_ptr + at, mask=valid, other=0.0)
            omega = tl.load(omega_ptr + at, mask=valid, other=0.0)
            grads = products(
                of_do, do_t, rows, valid, v_ptr, v_t, keys, real, values, states_ptr, BT, BT, BV, PRECISION
            )
            grads = tl.where(far, grads * rho[:, None] + omega[:, None], 0.0)
            if decay_ptr is not None:
                grads *= tl.exp(decay * tl.maximum(distance, 0))
            if map_scale_ptr is not None:
                grads *= tl.load(map_scale_ptr + query).to(tl.float32)
            q = tile(q_map_ptr + batch * q_map_b + query.to(tl.int64) * q_map_h, q_map_t, rows, valid, columns, features)
            q = q.to(states_ptr.dtype.element_ty)
            dk += tl.dot(tl.trans(grads.to(q.dtype)), q, input_precision=PRECISION)

    late = tl.zeros([BT, BF], tl.float32)
    crossing = tl.zeros([BF], tl.float32)
    if n < chunks:
        taken = real & (n * BT + order < length)
        if SINKS:
            taken = taken & (rank >= sinks)
        count = tl.minimum(length - n * BT, BT)
        chunk = row * chunks + n
        for begin in range(0, values, BV):
            at = begin + tl.arange(0, BV)
            ds = tile(dstates_ptr + chunk * features * values, values, columns, here, at, values)
            v = tile(v_ptr, v_t, keys, taken, at, values).to(ds.dtype)
            late += tl.dot(v, tl.trans(ds), input_precision=PRECISION)
            if decay_ptr is not None:
                s = tile(states_ptr + chunk * features * values, values, columns, here, at, values)
                crossing += tl.sum(ds.to(tl.float32) * s.to(tl.float32), 1)
        dz = tl.load(dzs_ptr + chunk * features + columns, mask=here, other=0.0)
        late += tl.where(taken[:, None], dz[None, :], 0.0)
        if decay_ptr is not None:
            remaining = tl.maximum(count - 1 - order, 0)
            late *= tl.exp(decay * remaining)[:, None]
            z = tl.load(zs_ptr + chunk * features + columns, mask=here, other=0.0)
            crossing = (crossing + dz * z) * tl.exp(decay * count) * count
            of_map = k_map_ptr + batch * k_map_b + (head // map_share).to(tl.int64) * k_map_h
            k = tile(of_map, k_map_t, keys, taken, columns, features).to(tl.float32)
            crossing += tl.sum(k * late * remaining[:, None], 0)
    dk = tl.where(real[:, None], dk + late, 0.0)
    inside = (keys >= 0) & (keys < ends)
    store_tile(dk_map_ptr + row * ends * features, features, keys, inside, columns, features, dk)
    if passed_ptr is not None:
        number = (row * tl.num_programs(1) + n) * tl.num_programs(2) + part
        tl.store(passed_ptr + number, tl.sum(crossing, 0))


@triton.jit
def hybrid_sink_gradients_kernel(
    q_ptr, sink_k_ptr, sink_v_ptr, sink_keep_ptr, do_ptr, gate_ptr, rank_ptr, top_ptr, rho_ptr, omega_ptr, best_ptr,
    soft_ptr, dsink_k_ptr, dsink_v_ptr,
    q_b, q_h, q_t, sink_k_b, sink_k_h, sink_k_t, sink_v_b, sink_v_h, sink_v_t, do_b, do_h, do_t, rank_b, sink_keep_b,
    heads, group, length, offset, sinks, per_part, width, values, k_share, v_share, scale,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk ``[B, Hs, parts, s, D]`` and dv of the sinks, from ``per_part`` chunks of queries each.

    Grid: (B · Hs, parts, tiles of sinks); BD ≥ D, BV ≥ Dv.
    """
    row, batch, head = place(tl.program_id(0), heads)
    part = row * tl.num_programs(1) + tl.program_id(1)
    number = tl.program_id(2) * BS + tl.arange(0, BS)
    real = real_rows(sink_keep_ptr, batch * sink_keep_b, number, sinks)
    at_k, at_v = tl.arange(0, BD), tl.arange(0, BV)
    sink_k_ptr += batch * sink_k_b + (head // k_share).to(tl.int64) * sink_k_h
    sink_v_ptr += batch * sink_v_b + (head // v_share).to(tl.int64) * sink_v_h
    k = tile(sink_k_ptr, sink_k_t, number, real, at_k, width).to(q_ptr.dtype.element_ty)
    v = tile(sink_v_ptr, sink_v_t, number, real, at_v, values).to(q_ptr.dtype.element_ty)
    dk = tl.zeros([BS, BD], tl.float32)
    dv = tl.zeros([BS, BV], tl.float32)
    for step in range(0, per_part):
        rows = (tl.program_id(1) * per_part + step) * BT + tl.arange(0, BT)
        valid = rows < length
        own = tl.load(rank_ptr + batch * rank_b + offset + rows, mask=valid, other=0)
        near = (own[:, None] >= number[None, :]) & real[None, :] & valid[:, None]
        for member in range(0, group):
            query = head * group + member
            at = (batch * heads * group + query) * length + rows
            q = tile(q_ptr + batch * q_b + query.to(tl.int64) * q_h, q_t, rows, valid, at_k, width)
            do = tile(do_ptr + batch * do_b + query.to(tl.int64) * do_h, do_t, rows, valid, at_v, values).to(q.dtype)
            rho = tl.load(rho_ptr + at, mask=valid, other=0.0)
            omega = tl.load(omega_ptr + at, mask=valid, other=0.0)
            top = tl.load(top_ptr + at, mask=valid, other=0.0)
            gate = tl.load(gate_ptr + query).to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            weights = tl.exp(tl.where(near, scores - top[:, None], -float("inf")))
            grads = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            grads = tl.where(near, (grads * rho[:, None] + omega[:, None]) * weights, 0.0)
            if best_ptr is not None:
                best = tl.load(best_ptr + at, mask=valid, other=-1)
                soft = tl.load(soft_ptr + at, mask=valid, other=0.0)
                grads -= tl.where(best[:, None] - offset - length == number[None, :], soft[:, None], 0.0)
            dk = scaled_dot(tl.trans(grads * gate), q, dk, PRECISION)
            dv = scaled_dot(tl.trans(weights * (gate * rho)[:, None]), do, dv, PRECISION)
    store_tile(dsink_k_ptr + part * sinks * width, width, number, number < sinks, at_k, width, dk * scale)
    store_tile(dsink_v_ptr + part * sinks * values, values, number, number < sinks, at_v, values, dv)
