# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the additive rule, backward; the notation is that of `kernels`.

With G = dO the gradient of the outputs, w the sums of weights the forward divided by, and per query the numbers
ρ = scale / w and ω = −scale (G·o) / w (without normaliser ρ = scale and ω = 0), the gradient of the scores is
A_ij = D_ij (ρ_i G_i·v_j + ω_i) for j ≤ i, and with dS the gradient arriving at the end of a chunk:

    dS ← e^{b_C} dS + (Q ⊙ e^b)ᵀ (ρ G),              dz ← e^{b_C} dz + (Q ⊙ e^b)ᵀ ω             chunks in reverse
    dV = (Q Kᵀ ⊙ D)ᵀ (ρ G) + (K ⊙ e^{b_C − b}) dS
    dQ = A K + e^b ⊙ (ρ G Sᵀ + ω zᵀ)
    dK = Aᵀ Q + e^{b_C − b} ⊙ (V dSᵀ + 1 dzᵀ)
    dg_t = Σ_{i ≥ t} (q_i·dq_i − k_i·(Aᵀ Q)_i) + Σ_{i < t} k_i·(dk_i − (Aᵀ Q)_i) + e^{b_C} ⟨dS, S⟩

The last line because b_i multiplies q_i and divides k_i wherever they meet in the chunk, e^{b_C − b_i} multiplies k_i on
its way into the next state, and e^{b_C} the state itself; sums end with the chunk, so that roundings of distant
positions do not add up.
"""

# mypy: ignore-errors
# (Device code: the syntax of Python, the types of Triton.)

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.linear_attention.kernels import (
    feature_decays,
    feature_pair_weights,
    pair_weights,
    place,
    power_of,
    real_rows,
    step_decays,
    store_tile,
    tile,
)


@triton.jit
def state_gradients_kernel(
    q_ptr, do_ptr, g_ptr, keep_ptr, rho_ptr, omega_ptr, dlast_ptr, dlast_z_ptr, dstates_ptr, dzs_ptr, dfirst_ptr,
    dfirst_z_ptr,
    q_b, q_h, q_t, do_b, do_h, do_t, g_b, g_h, g_t, keep_b,
    heads, group, q_length, q_chunks, features, values, g_share,
    DECAY: tl.constexpr, CAUSAL: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dS and dz at the end of every chunk (if CAUSAL) and before the first. Grid: (B · Hs, tiles of F, tiles of Dv)."""
    row, batch, head = place(tl.program_id(0), heads)
    columns = tl.program_id(1) * BF + tl.arange(0, BF)
    value_columns = tl.program_id(2) * BV + tl.arange(0, BV)
    size, here, first_tile = features * values, columns < features, tl.program_id(2) == 0
    if DECAY > 0:
        g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h

    ds = tile(dlast_ptr + row * size, values, columns, here, value_columns, values)
    dz = tl.load(dlast_z_ptr + row * features + columns, mask=here, other=0.0)
    for back in range(0, q_chunks):
        n = q_chunks - 1 - back
        if CAUSAL:
            chunk = row * q_chunks + n
            store_tile(dstates_ptr + chunk * size, values, columns, here, value_columns, values, ds)
            tl.store(dzs_ptr + chunk * features + columns, dz, mask=here & first_tile)
        rows = n * BT + tl.arange(0, BT)
        valid = rows < q_length
        if DECAY == 1:
            g = step_decays(g_ptr, g_t, rows, real_rows(keep_ptr, batch * keep_b, rows, q_length))
            start = tl.exp(tl.cumsum(g, 0))[:, None]
            ds *= tl.exp(tl.sum(g, 0))
            dz *= tl.exp(tl.sum(g, 0))
        if DECAY == 2:
            real = real_rows(keep_ptr, batch * keep_b, rows, q_length)
            g = feature_decays(g_ptr, g_t, rows, real, columns, features)
            start = tl.exp(tl.cumsum(g, 0))
            ds *= tl.exp(tl.sum(g, 0))[:, None]
            dz *= tl.exp(tl.sum(g, 0))
        for member in range(0, group):
            query = head * group + member
            at = (batch * heads * group + query) * q_length + rows
            q = tile(q_ptr + batch * q_b + query.to(tl.int64) * q_h, q_t, rows, valid, columns, features)
            do = tile(do_ptr + batch * do_b + query.to(tl.int64) * do_h, do_t, rows, valid, value_columns, values)
            do = do.to(q.dtype)
            rho = tl.load(rho_ptr + at, mask=valid, other=0.0)
            omega = tl.load(omega_ptr + at, mask=valid, other=0.0)
            early = q.to(tl.float32)
            if DECAY > 0:
                early *= start
            dz += tl.sum(early * omega[:, None], 0)
            early = tl.trans(early * rho[:, None])
            power = power_of(early, do, 1)
            ds += tl.dot((early / power).to(do.dtype), do, input_precision=PRECISION) * power
    store_tile(dfirst_ptr + row * size, values, columns, here, value_columns, values, ds)
    tl.store(dfirst_z_ptr + row * features + columns, dz, mask=here & first_tile)


@triton.jit
def value_gradients_kernel(
    q_ptr, k_ptr, do_ptr, g_ptr, keep_ptr, rho_ptr, dstates_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, do_b, do_h, do_t, g_b, g_h, g_t, keep_b,
    heads, group, length, chunks, features, values, k_share, g_share,
    DECAY: tl.constexpr, CAUSAL: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dV ``[B, Hs, T, Dv]``, without dS only what later queries of the chunk want of it.

    Grid: (B · Hs, chunks of keys, tiles of Dv).
    """
    row, batch, head = place(tl.program_id(0), heads)
    n = tl.program_id(1)
    chunk = row * chunks + n if CAUSAL else row
    columns = tl.program_id(2) * BV + tl.arange(0, BV)
    rows = n * BT + tl.arange(0, BT)
    valid, real = rows < length, real_rows(keep_ptr, batch * keep_b, rows, length)
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    if DECAY > 0:
        g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h
    if DECAY == 1:
        g = step_decays(g_ptr, g_t, rows, real)
        running = tl.cumsum(g, 0)

    dv = tl.zeros([BT, BV], tl.float32)
    if CAUSAL:
        order = tl.arange(0, BT)
        later = order[None, :] >= order[:, None]  # [keys, queries]
        for member in range(0, group):
            query = head * group + member
            scores = tl.zeros([BT, BT], tl.float32)
            for begin in range(0, features, BF):
                at = begin + tl.arange(0, BF)
                k = tile(k_ptr, k_t, rows, real, at, features)
                q = tile(q_ptr + batch * q_b + query.to(tl.int64) * q_h, q_t, rows, valid, at, features)
                if DECAY == 2:
                    b = tl.cumsum(feature_decays(g_ptr, g_t, rows, real, at, features), 0)
                    products = k.to(tl.float32)[:, None, :] * q.to(tl.float32)[None, :, :]
                    exponent = tl.where(later[:, :, None], b[None, :, :] - b[:, None, :], -float("inf"))
                    scores += tl.sum(products * tl.exp(exponent), 2)
                else:
                    scores += tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if DECAY == 1:
                scores *= tl.exp(tl.where(later, running[None, :] - running[:, None], -float("inf")))
            of_query = (batch * heads * group + query) * length + rows
            rho = tl.load(rho_ptr + of_query, mask=valid, other=0.0)
            scores = tl.where(later, scores, 0.0) * rho[None, :]
            do = tile(do_ptr + batch * do_b + query.to(tl.int64) * do_h, do_t, rows, valid, columns, values)
            do = do.to(q_ptr.dtype.element_ty)
            power = power_of(scores, do, 1)
            dv += tl.dot((scores / power).to(do.dtype), do, input_precision=PRECISION) * power
    if dstates_ptr is not None:
        for begin in range(0, features, BF):
            at = begin + tl.arange(0, BF)
            here = at < features
            late = tile(k_ptr, k_t, rows, real, at, features)
            if DECAY == 1:
                late = (late.to(tl.float32) * tl.exp(tl.sum(g, 0) - running)[:, None]).to(late.dtype)
            if DECAY == 2:
                gs = feature_decays(g_ptr, g_t, rows, real, at, features)
                late = (late.to(tl.float32) * tl.exp(tl.sum(gs, 0)[None, :] - tl.cumsum(gs, 0))).to(late.dtype)
            ds = tile(dstates_ptr + chunk * features * values, values, at, here, columns, values).to(tl.float32)
            power = power_of(ds, late, 0)
            dv += tl.dot(late, (ds / power).to(late.dtype), input_precision=PRECISION) * power
    dv = tl.where(real[:, None], dv, 0.0)
    store_tile(dv_ptr + row * length * values, values, rows, valid, columns, values, dv)


@triton.jit
def key_gradients_kernel(  # noqa: C901 - a branch for each form of decay
    q_ptr, k_ptr, v_ptr, do_ptr, g_ptr, keep_ptr, rho_ptr, omega_ptr, states_ptr, zs_ptr, dstates_ptr, dzs_ptr,
    dq_ptr, dk_ptr, dg_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, g_b, g_h, g_t, keep_b,
    batches, heads, group, length, q_length, chunks, features, values, k_share, v_share, g_share,
    DECAY: tl.constexpr, CAUSAL: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ ``[B, H, T, F]``, dK ``[B, Hs, T, F]`` and dg. Grid: (B · Hs, chunks, tiles of F).

    dg is ``[B, Hs, T, F]`` for a decay per feature, else ``[tiles of F, B, Hs, T]``, to be summed over the tiles.
    """
    row, batch, head = place(tl.program_id(0), heads)
    n, part = tl.program_id(1), tl.program_id(2)
    chunk = row * chunks + n if CAUSAL else row
    columns = part * BF + tl.arange(0, BF)
    here = columns < features
    rows = n * BT + tl.arange(0, BT)
    valid, asked, real = rows < length, rows < q_length, real_rows(keep_ptr, batch * keep_b, rows, length)
    k = tile(k_ptr + batch * k_b + (head // k_share).to(tl.int64) * k_h, k_t, rows, real, columns, features)
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    states_ptr += chunk * features * values
    dstates_ptr += chunk * features * values
    z = tl.load(zs_ptr + chunk * features + columns, mask=here, other=0.0)
    dz = tl.load(dzs_ptr + chunk * features + columns, mask=here, other=0.0)
    if DECAY > 0:
        g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h
        turned = tl.zeros([BT, BF], tl.float32)  # q_i dq_i − k_i dk_i
    if DECAY == 1:
        g = step_decays(g_ptr, g_t, rows, real)
        running, total = tl.cumsum(g, 0), tl.sum(g, 0)
        start, rest = tl.exp(running)[:, None], tl.exp(total - running)[:, None]
    if DECAY == 2:
        g = feature_decays(g_ptr, g_t, rows, real, columns, features)
        running, total = tl.cumsum(g, 0), tl.sum(g, 0)
        start, rest = tl.exp(running), tl.exp(total[None, :] - running)

    order = tl.arange(0, BT)
    seen = order[:, None] >= order[None, :]
    dk = tl.zeros([BT, BF], tl.float32)
    for member in range(0, group):
        query = head * group + member
        q = tile(q_ptr + batch * q_b + query.to(tl.int64) * q_h, q_t, rows, asked, columns, features)
        of_query = (batch * heads * group + query) * q_length
        rho = tl.load(rho_ptr + of_query + rows, mask=asked, other=0.0)
        omega = tl.load(omega_ptr + of_query + rows, mask=asked, other=0.0)
        pairs = tl.zeros([BT, BT], tl.float32)
        dq = tl.zeros([BT, BF], tl.float32)
        for begin in range(0, values, BV):
            at = begin + tl.arange(0, BV)
            do = tile(do_ptr + batch * do_b + query.to(tl.int64) * do_h, do_t, rows, asked, at, values).to(q.dtype)
            s = tl.trans(tile(states_ptr, values, columns, here, at, values).to(tl.float32))
            power = power_of(s, do, 0)
            dq += tl.dot(do, (s / power).to(do.dtype), input_precision=PRECISION) * power
            if CAUSAL:
                v = tile(v_ptr, v_t, rows, real, at, values).to(q.dtype)
                pairs += tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dq = dq * rho[:, None] + omega[:, None] * z[None, :]
        if DECAY > 0:
            dq *= start
        if CAUSAL:
            pairs = tl.where(seen, pairs * rho[:, None] + omega[:, None], 0.0)
            if DECAY == 2:
                weights = pairs[:, :, None] * feature_pair_weights(running, seen)
                dq += tl.sum(weights * k.to(tl.float32)[None, :, :], 1)
                dk += tl.sum(weights * q.to(tl.float32)[:, None, :], 0)
            else:
                if DECAY == 1:
                    pairs *= pair_weights(running, seen)
                power = power_of(pairs, k, 1)
                dq += tl.dot((pairs / power).to(k.dtype), k, input_precision=PRECISION) * power
                pairs = tl.trans(pairs)
                power = power_of(pairs, q, 1)
                dk += tl.dot((pairs / power).to(q.dtype), q, input_precision=PRECISION) * power
        store_tile(dq_ptr + of_query * features, features, rows, asked, columns, features, dq)
        if DECAY > 0:
            turned += q.to(tl.float32) * dq

    late = tl.zeros([BT, BF], tl.float32)
    crossing = tl.zeros([BF], tl.float32)
    for begin in range(0, values, BV):
        at = begin + tl.arange(0, BV)
        v = tile(v_ptr, v_t, rows, real, at, values).to(k.dtype)
        ds = tile(dstates_ptr, values, columns, here, at, values).to(tl.float32)
        if DECAY > 0:
            crossing += tl.sum(ds * tile(states_ptr, values, columns, here, at, values).to(tl.float32), 1)
        ds = tl.trans(ds)
        power = power_of(ds, v, 0)
        late += tl.dot(v, (ds / power).to(v.dtype), input_precision=PRECISION) * power
    late += dz[None, :]
    if DECAY > 0:
        late *= rest
        passed = k.to(tl.float32) * late
        turned -= k.to(tl.float32) * dk
        crossing = (crossing + dz * z) * tl.exp(total)
    dk = tl.where(real[:, None], dk + late, 0.0)
    store_tile(dk_ptr + row * length * features, features, rows, valid, columns, features, dk)
    if DECAY == 1:
        step = tl.sum(passed, 1)
        dg = tl.cumsum(tl.sum(turned, 1), 0, reverse=True) + tl.cumsum(step, 0) - step + tl.sum(crossing, 0)
        tl.store(dg_ptr + (part * batches * heads + row) * length + rows, dg, mask=valid)
    if DECAY == 2:
        dg = tl.cumsum(turned, 0, reverse=True) + tl.cumsum(passed, 0) - passed + crossing[None, :]
        store_tile(dg_ptr + row * length * features, features, rows, valid, columns, features, dg)
