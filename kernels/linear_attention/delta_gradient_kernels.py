# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the delta rule, backward, in the WY form of Yang et al. (2024), "Parallelizing Linear Transformers
with the Delta Rule over Sequence Length" (arXiv 2406.06484), with decays; the notation is that of `delta_kernels`.

Forward, in a chunk that begins with S and with L = (I + A)⁻¹, A = tril(diag(β)(K Kᵀ ⊙ D), −1), T = L diag(β):

    R = V − (K ⊙ e^b) S,    U = T R,    O = scale ((Q ⊙ e^b) S + (Q Kᵀ ⊙ D) U),    S' = e^{b_C} S + (K ⊙ e^{b_C − b})ᵀ U

Backward, from G = scale dO and dS' that arrives at the end of the chunk:

    dU = (Q Kᵀ ⊙ D)ᵀ G + (K ⊙ e^{b_C − b}) dS'
    X = Lᵀ dU,    Y = diag(β) X      U = L diag(β) R, so that X is the gradient of diag(β) R and −X Uᵀ that of A
    dV = Y                           R = V − …
    dS = e^{b_C} dS' + (Q ⊙ e^b)ᵀ G − (K ⊙ e^b)ᵀ Y,    where (K ⊙ e^b)ᵀ Y = Wᵀ dU with the forward's W = T (K ⊙ e^b)
    dβ_i = X_i·E_i,    E = R − tril(K Kᵀ ⊙ D, −1) U      both places of β: that of β R, X·R, and that of A; U = β E
    dQ = scale (e^b ⊙ (dO Sᵀ) + (dO Uᵀ ⊙ D) K)
    dK = row + column + late, with M = −tril(Y Uᵀ ⊙ D, −1) the gradient of K Kᵀ in A:
        row = M K − e^b ⊙ (Y Sᵀ),    column = (G Uᵀ ⊙ D)ᵀ Q + Mᵀ K,    late = e^{b_C − b} ⊙ (U dS'ᵀ)
    dg_t = Σ_{i ≥ t} (q_i·dq_i + k_i·row_i − k_i·column_i) + Σ_{i < t} k_i·late_i + e^{b_C} ⟨dS', S⟩

The last line because b_i multiplies q_i and, in R and the rows of A, k_i, and divides k_i where it is a column.
"""

# mypy: ignore-errors
# (Device code: the syntax of Python, the types of Triton.)

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.linear_attention.kernels import (
    pair_weights,
    place,
    power_of,
    real_rows,
    step_decays,
    store_tile,
    tile,
)


@triton.jit
def split_dot(a, b, PRECISION: tl.constexpr):
    """a b for float32 a and b ``[·, ·]`` of which b comes in its own dtype: of narrow ones, a in two parts.

    What a narrow dtype loses of a is not small beside the differences that a is multiplied with.
    """
    power = power_of(a, b, 1)
    a = a / power
    high = a.to(b.dtype)
    made = tl.dot(high, b, input_precision=PRECISION)
    if b.dtype != tl.float32:
        made += tl.dot((a - high.to(tl.float32)).to(b.dtype), b, input_precision=PRECISION)
    return made * power


@triton.jit
def delta_state_gradients_kernel(
    q_ptr, k_ptr, do_ptr, old_ptr, g_ptr, keep_ptr, dlast_ptr, du_ptr, dstates_ptr, dfirst_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, do_b, do_h, do_t, g_b, g_h, g_t, keep_b,
    heads, group, length, chunks, features, values, k_share, g_share, scale,
    DECAY: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS at the end of every chunk and before the first; adds the state's part to dU. BF ≥ F. Grid: (B · Hs, tiles of Dv)."""
    row, batch, head = place(tl.program_id(0), heads)
    at, columns = tl.arange(0, BF), tl.program_id(1) * BV + tl.arange(0, BV)
    here, size = at < features, features * values
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    du_ptr += row * length * values
    if DECAY > 0:
        g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h
    ds = tile(dlast_ptr + row * size, values, at, here, columns, values)
    for back in range(0, chunks):
        n = chunks - 1 - back
        store_tile(dstates_ptr + (row * chunks + n) * size, values, at, here, columns, values, ds)
        rows = n * BT + tl.arange(0, BT)
        valid, real = rows < length, real_rows(keep_ptr, batch * keep_b, rows, length)
        k = tile(k_ptr, k_t, rows, real, at, features)
        old = tile(old_ptr + row * length * features, features, rows, valid, at, features).to(k.dtype)
        late = k
        if DECAY > 0:
            g = step_decays(g_ptr, g_t, rows, real)
            total, running = tl.sum(g, 0), tl.cumsum(g, 0)
            late = (k.to(tl.float32) * tl.exp(total - running)[:, None]).to(k.dtype)
        power = power_of(ds, k, 0)
        du = tile(du_ptr, values, rows, valid, columns, values)
        du += tl.dot(late, (ds / power).to(k.dtype), input_precision=PRECISION) * power
        store_tile(du_ptr, values, rows, valid, columns, values, du)
        if DECAY > 0:
            ds *= tl.exp(total)
        power = power_of(du, k, 0)
        narrow = (du / power).to(k.dtype)
        if k.dtype == tl.float32:
            # The other way round: a product of 64 rows in float32 becomes one in TF32 on sm_100 (Triton 3.7).
            ds -= tl.trans(tl.dot(tl.trans(narrow), old, input_precision=PRECISION))
        else:
            ds -= tl.dot(tl.trans(old), narrow, input_precision=PRECISION) * power
        for member in range(0, group):
            query = head * group + member
            q = tile(q_ptr + batch * q_b + query.to(tl.int64) * q_h, q_t, rows, valid, at, features)
            do = tile(do_ptr + batch * do_b + query.to(tl.int64) * do_h, do_t, rows, valid, columns, values)
            early = q.to(tl.float32) * scale
            if DECAY > 0:
                early *= tl.exp(running)[:, None]
            if k.dtype == tl.float32:
                ds += tl.trans(tl.dot(tl.trans(do.to(tl.float32)), early, input_precision=PRECISION))
            else:
                early = tl.trans(early)
                power = power_of(early, k, 1)
                ds += tl.dot((early / power).to(k.dtype), do.to(k.dtype), input_precision=PRECISION) * power
    store_tile(dfirst_ptr + row * size, values, at, here, columns, values, ds)


@triton.jit
def delta_value_gradients_kernel(
    k_ptr, v_ptr, beta_ptr, g_ptr, keep_ptr, inverses_ptr, states_ptr, written_ptr, du_ptr, dv_ptr, dbeta_ptr,
    k_b, k_h, k_t, v_b, v_h, v_t, beta_b, beta_h, beta_t, g_b, g_h, g_t, keep_b,
    batches, heads, length, chunks, features, values, k_share, v_share, beta_share, g_share,
    DECAY: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y, which is dV, ``[B, Hs, T, Dv]``, and X·E ``[tiles of Dv, B, Hs, T]``, to be summed to dβ.

    Grid: (B · Hs, chunks, tiles of Dv).
    """
    row, batch, head = place(tl.program_id(0), heads)
    n, part, order = tl.program_id(1), tl.program_id(2), tl.arange(0, BT)
    rows, columns = n * BT + order, part * BV + tl.arange(0, BV)
    valid, real = rows < length, real_rows(keep_ptr, batch * keep_b, rows, length)
    chunk = row * chunks + n
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    states_ptr += chunk * features * values
    at_beta = batch * beta_b + (head // beta_share).to(tl.int64) * beta_h + rows.to(tl.int64) * beta_t
    beta = tl.load(beta_ptr + at_beta, mask=real, other=0.0).to(tl.float32)

    products = tl.zeros([BT, BT], tl.float32)
    given = tl.zeros([BT, BV], tl.float32)  # (K ⊙ e^b) S
    for begin in range(0, features, BF):
        at = begin + tl.arange(0, BF)
        k = tile(k_ptr, k_t, rows, real, at, features)
        s = tile(states_ptr, values, at, at < features, columns, values).to(tl.float32)
        power = power_of(s, k, 0)
        given += tl.dot(k, (s / power).to(k.dtype), input_precision=PRECISION) * power
        products += tl.dot(k, tl.trans(k), input_precision=PRECISION)
    earlier = order[:, None] > order[None, :]
    if DECAY > 0:
        g = step_decays(g_ptr + batch * g_b + (head // g_share).to(tl.int64) * g_h, g_t, rows, real)
        running = tl.cumsum(g, 0)
        products *= pair_weights(running, earlier)
        given *= tl.exp(running)[:, None]
    products = tl.where(earlier, products, 0.0)
    written = tile(written_ptr + row * length * values, values, rows, valid, columns, values).to(k_ptr.dtype.element_ty)
    of_v = v_ptr + batch * v_b + (head // v_share).to(tl.int64) * v_h
    error = tile(of_v, v_t, rows, real, columns, values).to(tl.float32) - given
    error -= split_dot(products, written, PRECISION)

    inverse = tl.trans(tile(inverses_ptr + chunk * BT * BT, BT, order, order < BT, order, BT))
    du = tile(du_ptr + row * length * values, values, rows, valid, columns, values)
    power = power_of(du, written, 0)
    x = split_dot(inverse, (du / power).to(written.dtype), PRECISION) * power
    x = tl.where(real[:, None], x, 0.0)
    tl.store(dbeta_ptr + (part * batches * heads + row) * length + rows, tl.sum(x * error, 1), mask=valid)
    store_tile(dv_ptr + row * length * values, values, rows, valid, columns, values, x * beta[:, None])


@triton.jit
def delta_key_gradients_kernel(
    q_ptr, k_ptr, do_ptr, g_ptr, keep_ptr, states_ptr, written_ptr, dv_ptr, dstates_ptr, dq_ptr, dk_ptr, dg_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, do_b, do_h, do_t, g_b, g_h, g_t, keep_b,
    batches, heads, group, length, chunks, features, values, k_share, g_share, scale,
    DECAY: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ ``[B, H, T, F]``, dK ``[B, Hs, T, F]`` and dg ``[tiles of F, B, Hs, T]``. Grid: (B · Hs, chunks, tiles of F)."""
    row, batch, head = place(tl.program_id(0), heads)
    n, part, order = tl.program_id(1), tl.program_id(2), tl.arange(0, BT)
    rows, columns = n * BT + order, part * BF + tl.arange(0, BF)
    here = columns < features
    valid, real = rows < length, real_rows(keep_ptr, batch * keep_b, rows, length)
    chunk = (row * chunks + n) * features * values
    states_ptr += chunk
    dstates_ptr += chunk
    written_ptr += row * length * values
    dv_ptr += row * length * values
    k = tile(k_ptr + batch * k_b + (head // k_share).to(tl.int64) * k_h, k_t, rows, real, columns, features)
    seen, earlier = order[:, None] >= order[None, :], order[:, None] > order[None, :]
    if DECAY > 0:
        g = step_decays(g_ptr + batch * g_b + (head // g_share).to(tl.int64) * g_h, g_t, rows, real)
        running, total = tl.cumsum(g, 0), tl.sum(g, 0)
        between = pair_weights(running, seen)

    # Of K as it corrects the values (row), is corrected (column) and enters the next state (late).
    pairs = tl.zeros([BT, BT], tl.float32)
    of_row = tl.zeros([BT, BF], tl.float32)
    late = tl.zeros([BT, BF], tl.float32)
    crossing = tl.zeros([BF], tl.float32)
    for begin in range(0, values, BV):
        at = begin + tl.arange(0, BV)
        u = tile(written_ptr, values, rows, valid, at, values).to(k.dtype)
        y = tile(dv_ptr, values, rows, valid, at, values)
        s = tl.trans(tile(states_ptr, values, columns, here, at, values).to(tl.float32))
        ds = tl.trans(tile(dstates_ptr, values, columns, here, at, values).to(tl.float32))
        if DECAY > 0:
            crossing += tl.sum(ds * s, 0)
        y_power, power = power_of(y, k, 1), power_of(s, k, 0)
        y = (y / y_power).to(k.dtype)
        of_row -= tl.dot(y, (s / power).to(k.dtype), input_precision=PRECISION) * power * y_power
        pairs -= tl.dot(y, tl.trans(u), input_precision=PRECISION) * y_power
        power = power_of(ds, k, 0)
        late += tl.dot(u, (ds / power).to(k.dtype), input_precision=PRECISION) * power
    if DECAY > 0:
        of_row *= tl.exp(running)[:, None]
        late *= tl.exp(total - running)[:, None]
        pairs *= between
    pairs = tl.where(earlier, pairs, 0.0)
    power = power_of(pairs, k, 1)
    of_row += tl.dot((pairs / power).to(k.dtype), k, input_precision=PRECISION) * power
    pairs = tl.trans(pairs)
    power = power_of(pairs, k, 1)
    column = tl.dot((pairs / power).to(k.dtype), k, input_precision=PRECISION) * power

    turned = tl.zeros([BT, BF], tl.float32)
    for member in range(0, group):
        query = head * group + member
        q = tile(q_ptr + batch * q_b + query.to(tl.int64) * q_h, q_t, rows, valid, columns, features)
        of_do = do_ptr + batch * do_b + query.to(tl.int64) * do_h
        dq = tl.zeros([BT, BF], tl.float32)
        pairs = tl.zeros([BT, BT], tl.float32)
        for begin in range(0, values, BV):
            at = begin + tl.arange(0, BV)
            do = tile(of_do, do_t, rows, valid, at, values).to(k.dtype)
            s = tl.trans(tile(states_ptr, values, columns, here, at, values).to(tl.float32))
            power = power_of(s, k, 0)
            dq += tl.dot(do, (s / power).to(k.dtype), input_precision=PRECISION) * power
            u = tile(written_ptr, values, rows, valid, at, values).to(k.dtype)
            pairs += tl.dot(do, tl.trans(u), input_precision=PRECISION)
        pairs = tl.where(seen, pairs, 0.0)
        if DECAY > 0:
            dq *= tl.exp(running)[:, None]
            pairs *= between
        power = power_of(pairs, k, 1)
        dq += tl.dot((pairs / power).to(k.dtype), k, input_precision=PRECISION) * power
        dq *= scale
        pairs = tl.trans(pairs)
        power = power_of(pairs, k, 1)
        column += tl.dot((pairs / power).to(k.dtype), q, input_precision=PRECISION) * power * scale
        out_row = (batch * heads * group + query) * length
        store_tile(dq_ptr + out_row * features, features, rows, valid, columns, features, dq)
        if DECAY > 0:
            turned += q.to(tl.float32) * dq
    dk = tl.where(real[:, None], of_row + column + late, 0.0)
    store_tile(dk_ptr + row * length * features, features, rows, valid, columns, features, dk)
    if DECAY > 0:
        turned += k.to(tl.float32) * (of_row - column)
        passed = tl.sum(k.to(tl.float32) * late, 1)
        dg = tl.cumsum(tl.sum(turned, 1), 0, reverse=True) + tl.cumsum(passed, 0) - passed
        dg += tl.sum(crossing, 0) * tl.exp(total)
        tl.store(dg_ptr + (part * batches * heads + row) * length + rows, dg, mask=valid)
