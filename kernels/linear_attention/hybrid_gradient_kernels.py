# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of hybrid attention, backward: what belongs to queries, and the states; keys are in another file.

With G = dO, w_i the sum of weights the forward divided by, ρ = 1 / w, ω = −ρ (G·o), the gradient of an unnormalised
weight is the same for both kinds of keys,

    δ_ij = ρ_i G_i·v_j + ω_i

so that with p = e^{s − c}, E_ij = e^{λ(i − j)} and a the anchor (in ρ' = a ρ, ω' = a ω, δ' = a δ)

    dq_i = scale (Σ_W γ p_ij δ_ij k_j − γ e_i k_*),    e_i = Σ_W p_ij δ_ij,    dγ = Σ_i e_i                       window
    dφ_i = m (Σ_swept E_ij δ'_ij φ_j + E_i (ρ'_i S G_i + ω'_i z))                                               before it
    dm = Σ_i φ_i·dφ_i / m,    dλ = Σ (distance) × (each product above)
    dS ← E_C dS + Σ_i m E_i φ_i (ρ'_i G_i)ᵀ,    dz ← E_C dz + Σ_i m E_i ω'_i φ_i                      chunks in reverse

k_* is the key with the largest score: with the anchor "max" the linear terms are measured against it, so that c has a
gradient, −γ e_i. Where keys tie for the largest, the last has it all (the reference divides it). The absolute anchor
cancels. dλ multiplies by distances within a chunk and its window only: a distance across chunks is counted where the
state passes each of them, so that roundings are not multiplied by positions.
"""

# mypy: ignore-errors
# (Device code: the syntax of Python, the types of Triton.)

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.linear_attention.hybrid_kernels import pair_masks
from rewriter.kernels.linear_attention.kernels import LOWEST, place, power_of, real_rows, store_tile, tile


@triton.jit
def products(
    a_ptr, a_t, rows, a_mask, b_ptr, b_t, keys, b_mask, width, like_ptr,
    BA: tl.constexpr, BB: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A Bᵀ ``[rows, keys]`` over tiles of their columns, multiplied in the dtype of ``like_ptr``."""
    total = tl.zeros([BA, BB], tl.float32)
    for begin in range(0, width, BW):
        at = begin + tl.arange(0, BW)
        a = tile(a_ptr, a_t, rows, a_mask, at, width).to(like_ptr.dtype.element_ty)
        b = tile(b_ptr, b_t, keys, b_mask, at, width).to(like_ptr.dtype.element_ty)
        total += tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return total


@triton.jit
def head_decay(decay_ptr, head, share):
    """λ of a state, at least `LOWEST`; NaN stays."""
    decay = tl.load(decay_ptr + head // share).to(tl.float32)
    return tl.where(decay < LOWEST, LOWEST, decay)


@triton.jit
def scaled_dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y for float32 x, which becomes an operand of y's dtype."""
    power = power_of(x, y, 1)
    return acc + tl.dot((x / power).to(y.dtype), y, input_precision=PRECISION) * power


@triton.jit
def hybrid_query_gradients_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, gate_ptr, keep_ptr, rank_ptr, sink_k_ptr, sink_v_ptr, sink_keep_ptr,
    top_ptr, rho_ptr, omega_ptr, best_ptr, dq_ptr, soft_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    sink_k_b, sink_k_h, sink_k_t, sink_v_b, sink_v_h, sink_v_t, keep_b, rank_b, sink_keep_b,
    heads, group, length, offset, reach, window, sinks, width, values, k_share, v_share, scale,
    TERRACE: tl.constexpr, SINKS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq ``[B, H, T, D]`` and e ``[B, H, T]``. Grid: (B · H, chunks of queries, tiles of D)."""
    row, batch, query = place(tl.program_id(0), heads * group)
    n, head = tl.program_id(1), query // group
    columns = tl.program_id(2) * BD + tl.arange(0, BD)
    rows = n * BT + tl.arange(0, BT)
    valid = rows < length
    q_ptr += batch * q_b + query.to(tl.int64) * q_h
    do_ptr += batch * do_b + query.to(tl.int64) * do_h
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    own = rows
    if TERRACE or SINKS:
        own = tl.load(rank_ptr + batch * rank_b + offset + rows, mask=valid, other=0)
    top = tl.load(top_ptr + row * length + rows, mask=valid, other=0.0)
    rho = tl.load(rho_ptr + row * length + rows, mask=valid, other=0.0)
    omega = tl.load(omega_ptr + row * length + rows, mask=valid, other=0.0)
    gate = tl.load(gate_ptr + query).to(tl.float32)

    dq = tl.zeros([BT, BD], tl.float32)
    soft = tl.zeros([BT], tl.float32)
    first = offset - reach + n * BT
    for begin in range(0, reach + BT, BK):
        keys = first + begin + tl.arange(0, BK)
        real = real_rows(keep_ptr, batch * keep_b, keys, offset + length)
        rank = keys
        if TERRACE or SINKS:
            rank = tl.load(rank_ptr + batch * rank_b + keys, mask=real, other=0)
        _, near, _ = pair_masks(rows + offset, valid, own, keys, real, rank, window, sinks, TERRACE, SINKS)
        scores = products(q_ptr, q_t, rows, valid, k_ptr, k_t, keys, real, width, q_ptr, BT, BK, BD, PRECISION)
        grads = products(do_ptr, do_t, rows, valid, v_ptr, v_t, keys, real, values, q_ptr, BT, BK, BV, PRECISION)
        weights = tl.exp(tl.where(near, scores * scale - top[:, None], -float("inf")))
        grads = tl.where(near, (grads * rho[:, None] + omega[:, None]) * weights, 0.0)
        soft += tl.sum(grads, 1)
        k = tile(k_ptr, k_t, keys, real, columns, width).to(q_ptr.dtype.element_ty)
        dq = scaled_dot(grads * gate, k, dq, PRECISION)
    ends = offset + length
    if SINKS:
        sink_k_ptr += batch * sink_k_b + (head // k_share).to(tl.int64) * sink_k_h
        sink_v_ptr += batch * sink_v_b + (head // v_share).to(tl.int64) * sink_v_h
        for begin in range(0, sinks, BK):
            number = begin + tl.arange(0, BK)
            real = real_rows(sink_keep_ptr, batch * sink_keep_b, number, sinks)
            near = (own[:, None] >= number[None, :]) & real[None, :] & valid[:, None]
            scores = products(
                q_ptr, q_t, rows, valid, sink_k_ptr, sink_k_t, number, real, width, q_ptr, BT, BK, BD, PRECISION
            )
            grads = products(
                do_ptr, do_t, rows, valid, sink_v_ptr, sink_v_t, number, real, values, q_ptr, BT, BK, BV, PRECISION
            )
            weights = tl.exp(tl.where(near, scores * scale - top[:, None], -float("inf")))
            grads = tl.where(near, (grads * rho[:, None] + omega[:, None]) * weights, 0.0)
            soft += tl.sum(grads, 1)
            k = tile(sink_k_ptr, sink_k_t, number, real, columns, width).to(q_ptr.dtype.element_ty)
            dq = scaled_dot(grads * gate, k, dq, PRECISION)
    if best_ptr is not None:
        best = tl.load(best_ptr + row * length + rows, mask=valid, other=-1)
        k = tile(k_ptr, k_t, best, (best >= 0) & (best < ends), columns, width).to(tl.float32)
        if SINKS:
            k += tile(sink_k_ptr, sink_k_t, best - ends, best >= ends, columns, width).to(tl.float32)
        dq -= (gate * soft)[:, None] * k
    store_tile(dq_ptr + row * length * width, width, rows, valid, columns, width, dq * scale)
    tl.store(soft_ptr + row * length + rows, soft, mask=valid & (tl.program_id(2) == 0))


@triton.jit
def hybrid_query_map_gradients_kernel(
    q_map_ptr, k_map_ptr, v_ptr, do_ptr, map_scale_ptr, decay_ptr, keep_ptr, rank_ptr, rho_ptr, omega_ptr,
    states_ptr, zs_ptr, dq_map_ptr, scaled_ptr, shifted_ptr,
    q_map_b, q_map_h, q_map_t, k_map_b, k_map_h, k_map_t, v_b, v_h, v_t, do_b, do_h, do_t, keep_b, rank_b,
    batches, heads, group, length, offset, reach, window, sinks, chunks, features, values, map_share, v_share,
    decay_share,
    TERRACE: tl.constexpr, SINKS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dφ_q ``[B, H, T, F]``; what is summed to dm and dλ, ``[tiles of F, B, H, T]``. Grid: (B · H, chunks, tiles of F)."""
    row, batch, query = place(tl.program_id(0), heads * group)
    n, head, part = tl.program_id(1), query // group, tl.program_id(2)
    columns = part * BF + tl.arange(0, BF)
    here = columns < features
    rows = n * BT + tl.arange(0, BT)
    valid = rows < length
    q_map_ptr += batch * q_map_b + query.to(tl.int64) * q_map_h
    k_map_ptr += batch * k_map_b + (head // map_share).to(tl.int64) * k_map_h
    do_ptr += batch * do_b + query.to(tl.int64) * do_h
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    own = rows
    if TERRACE or SINKS:
        own = tl.load(rank_ptr + batch * rank_b + offset + rows, mask=valid, other=0)
    rho = tl.load(rho_ptr + row * length + rows, mask=valid, other=0.0)
    omega = tl.load(omega_ptr + row * length + rows, mask=valid, other=0.0)
    q = tile(q_map_ptr, q_map_t, rows, valid, columns, features).to(tl.float32)
    chunk = (batch * heads + head) * chunks + n
    states_ptr += chunk * features * values

    # From the state: E_i (ρ S G + ω z).
    dq = tl.zeros([BT, BF], tl.float32)
    for begin in range(0, values, BV):
        at = begin + tl.arange(0, BV)
        s = tile(states_ptr, values, columns, here, at, values)
        do = tile(do_ptr, do_t, rows, valid, at, values).to(s.dtype)
        dq += tl.dot(do, tl.trans(s), input_precision=PRECISION)
    z = tl.load(zs_ptr + chunk * features + columns, mask=here, other=0.0)
    dq = dq * rho[:, None] + omega[:, None] * z[None, :]
    shifted = tl.zeros([BT], tl.float32)
    if decay_ptr is not None:
        decay = head_decay(decay_ptr, head, decay_share)
        distance = tl.arange(0, BT) + reach + 1
        dq *= tl.exp(decay * distance)[:, None]
        shifted += tl.sum(q * dq, 1) * distance

    # From the keys at hand that are before the window.
    first = offset - reach + n * BT
    for begin in range(0, reach + BT, BK):
        keys = first + begin + tl.arange(0, BK)
        real = real_rows(keep_ptr, batch * keep_b, keys, offset + length)
        rank = keys
        if TERRACE or SINKS:
            rank = tl.load(rank_ptr + batch * rank_b + keys, mask=real, other=0)
        distance, _, far = pair_masks(rows + offset, valid, own, keys, real, rank, window, sinks, TERRACE, SINKS)
        grads = products(do_ptr, do_t, rows, valid, v_ptr, v_t, keys, real, values, states_ptr, BT, BK, BV, PRECISION)
        grads = tl.where(far, grads * rho[:, None] + omega[:, None], 0.0)
        k = tile(k_map_ptr, k_map_t, keys, real, columns, features).to(states_ptr.dtype.element_ty)
        if decay_ptr is not None:
            grads *= tl.exp(decay * tl.maximum(distance, 0))
            weights = tl.dot(q.to(k.dtype), tl.trans(k), input_precision=PRECISION)
            shifted += tl.sum(grads * weights * distance, 1)
        dq += tl.dot(grads.to(k.dtype), k, input_precision=PRECISION)

    factor = 1.0
    if map_scale_ptr is not None:
        factor = tl.load(map_scale_ptr + query).to(tl.float32)
    store_tile(dq_map_ptr + row * length * features, features, rows, valid, columns, features, dq * factor)
    numbers = (part * batches * heads * group + row) * length + rows
    if scaled_ptr is not None:
        tl.store(scaled_ptr + numbers, tl.sum(q * dq, 1), mask=valid)
    if shifted_ptr is not None:
        tl.store(shifted_ptr + numbers, shifted * factor, mask=valid)


@triton.jit
def hybrid_state_gradients_kernel(
    q_map_ptr, do_ptr, map_scale_ptr, decay_ptr, rho_ptr, omega_ptr, dlast_ptr, dlast_z_ptr, dstates_ptr, dzs_ptr,
    dfirst_ptr, dfirst_z_ptr,
    q_map_b, q_map_h, q_map_t, do_b, do_h, do_t,
    heads, group, length, reach, chunks, features, values, decay_share,
    BF16: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS and dz after every chunk's keys and before the first. Grid: (B · Hs, tiles of F, tiles of Dv)."""
    row, batch, head = place(tl.program_id(0), heads)
    columns = tl.program_id(1) * BF + tl.arange(0, BF)
    value_columns = tl.program_id(2) * BV + tl.arange(0, BV)
    size, here, first_tile = features * values, columns < features, tl.program_id(2) == 0
    ds = tl.zeros([BF, BV], tl.float32)
    dz = tl.zeros([BF], tl.float32)
    if dlast_ptr is not None:
        ds += tile(dlast_ptr + row * size, values, columns, here, value_columns, values)
        dz += tl.load(dlast_z_ptr + row * features + columns, mask=here, other=0.0)
    order = tl.arange(0, BT)
    if decay_ptr is not None:
        decay = head_decay(decay_ptr, head, decay_share)
        since = tl.exp(decay * (order + reach + 1))
    for back in range(0, chunks):
        n = chunks - 1 - back
        chunk = row * chunks + n
        store_tile(dstates_ptr + chunk * size, values, columns, here, value_columns, values, ds)
        tl.store(dzs_ptr + chunk * features + columns, dz, mask=here & first_tile)
        rows = n * BT + order
        valid = rows < length
        if decay_ptr is not None:
            passed = tl.exp(decay * tl.minimum(length - n * BT, BT))
            ds *= passed
            dz *= passed
        for member in range(0, group):
            query = head * group + member
            at = (batch * heads * group + query) * length + rows
            q = tile(q_map_ptr + batch * q_map_b + query.to(tl.int64) * q_map_h, q_map_t, rows, valid, columns, features)
            do = tile(do_ptr + batch * do_b + query.to(tl.int64) * do_h, do_t, rows, valid, value_columns, values)
            do = do.to(tl.bfloat16 if BF16 else tl.float32)
            rho = tl.load(rho_ptr + at, mask=valid, other=0.0)
            omega = tl.load(omega_ptr + at, mask=valid, other=0.0)
            early = q.to(tl.float32)
            if decay_ptr is not None:
                early *= since[:, None]
            if map_scale_ptr is not None:
                early *= tl.load(map_scale_ptr + query).to(tl.float32)
            dz += tl.sum(early * omega[:, None], 0)
            early = tl.trans((early * rho[:, None]).to(do.dtype))
            ds += tl.dot(early, do, input_precision=PRECISION)
    store_tile(dfirst_ptr + row * size, values, columns, here, value_columns, values, ds)
    tl.store(dfirst_z_ptr + row * features + columns, dz, mask=here & first_tile)
