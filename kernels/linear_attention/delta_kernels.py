# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the delta rule, forward, in the WY form of `delta`:

    T = (I + tril(diag(β)(K Kᵀ ⊙ D), −1))⁻¹ diag(β),    N = T V,    W = T (K ⊙ e^b)            all chunks at once
    U = N − W S,    S ← e^{b_C} S + (K ⊙ e^{b_C − b})ᵀ U                                        chunk after chunk
    o = (Q ⊙ e^b) S + (Q Kᵀ ⊙ D) U                                                             all chunks at once

The last line is the additive rule's with U for the values, so its kernel is `kernels.outputs_kernel`. The triangular
inverse is made by doubling: with X the inverse of the diagonal blocks of a size and M what is below them in pairs,
[[L₁, 0], [M, L₂]]⁻¹ = X − X M X. It is done in float32 and without TF32, for its errors multiply.
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
def unit_lower_inverse(strict, BT: tl.constexpr, DOUBLINGS: tl.constexpr):
    """(I + A)⁻¹ for strictly lower triangular A ``[BT, BT]``, BT = 2^DOUBLINGS."""
    order = tl.arange(0, BT)
    row, column = order[:, None], order[None, :]
    inverse = tl.where(row == column, 1.0, 0.0)
    for level in tl.static_range(DOUBLINGS):
        odd_row, its_column = row >> level, column >> level
        below = (odd_row % 2 == 1) & (odd_row - 1 == its_column)
        pairs = tl.where(below, strict, 0.0)
        if level == 0:
            inverse -= pairs
        else:
            step = tl.dot(inverse, pairs, input_precision="ieee")
            inverse -= tl.dot(step, inverse, input_precision="ieee")
    return inverse


@triton.jit
def chunk_inverses_kernel(
    k_ptr, beta_ptr, g_ptr, keep_ptr, inverses_ptr, raw_ptr,
    k_b, k_h, k_t, beta_b, beta_h, beta_t, g_b, g_h, g_t, keep_b,
    heads, length, chunks, features, k_share, beta_share, g_share,
    DECAY: tl.constexpr, BT: tl.constexpr, DOUBLINGS: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T of every chunk, float32 ``[B, Hs, N, BT, BT]``, and the inverse in it if wanted. Grid: (B · Hs, chunks)."""
    row, batch, head = place(tl.program_id(0), heads)
    n, order = tl.program_id(1), tl.arange(0, BT)
    rows = n * BT + order
    real = real_rows(keep_ptr, batch * keep_b, rows, length)
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    at_beta = batch * beta_b + (head // beta_share).to(tl.int64) * beta_h + rows.to(tl.int64) * beta_t
    beta = tl.load(beta_ptr + at_beta, mask=real, other=0.0).to(tl.float32)

    products = tl.zeros([BT, BT], tl.float32)
    for begin in range(0, features, BF):
        k = tile(k_ptr, k_t, rows, real, begin + tl.arange(0, BF), features)
        products += tl.dot(k, tl.trans(k), input_precision=PRECISION)
    earlier = order[:, None] > order[None, :]
    if DECAY > 0:
        g = step_decays(g_ptr + batch * g_b + (head // g_share).to(tl.int64) * g_h, g_t, rows, real)
        products *= pair_weights(tl.cumsum(g, 0), earlier)
    strict = tl.where(earlier, products * beta[:, None], 0.0)
    inverse = unit_lower_inverse(strict, BT, DOUBLINGS)
    chunk = (row * chunks + n) * BT * BT
    store_tile(inverses_ptr + chunk, BT, order, order < BT, order, BT, inverse * beta[None, :])
    if raw_ptr is not None:
        store_tile(raw_ptr + chunk, BT, order, order < BT, order, BT, inverse)


@triton.jit
def written_kernel(
    x_ptr, g_ptr, keep_ptr, inverses_ptr, out_ptr,
    x_b, x_h, x_t, g_b, g_h, g_t, keep_b,
    heads, length, chunks, width, x_share, g_share,
    DECAY: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T X, or with DECAY T (X ⊙ e^b), ``[B, Hs, T, width]``: N from V and W from K. Grid: (B · Hs, chunks, tiles)."""
    row, batch, head = place(tl.program_id(0), heads)
    n, order = tl.program_id(1), tl.arange(0, BT)
    rows, columns = n * BT + order, tl.program_id(2) * BX + tl.arange(0, BX)
    real = real_rows(keep_ptr, batch * keep_b, rows, length)
    x = tile(x_ptr + batch * x_b + (head // x_share).to(tl.int64) * x_h, x_t, rows, real, columns, width)
    inverse = tile(inverses_ptr + (row * chunks + n) * BT * BT, BT, order, order < BT, order, BT)
    if DECAY > 0:
        g = step_decays(g_ptr + batch * g_b + (head // g_share).to(tl.int64) * g_h, g_t, rows, real)
        inverse *= tl.exp(tl.cumsum(g, 0))[None, :]
    power = power_of(inverse, x, 1)
    inverse = inverse / power
    high = inverse.to(x.dtype)
    made = tl.dot(high, x, input_precision=PRECISION)
    if x.dtype != tl.float32:
        # What the narrow dtype loses of T: V − W S would otherwise lose the errors of what is being corrected.
        made += tl.dot((inverse - high.to(tl.float32)).to(x.dtype), x, input_precision=PRECISION)
    made *= power
    store_tile(out_ptr + row * length * width, width, rows, rows < length, columns, width, made)


@triton.jit
def delta_states_kernel(
    k_ptr, new_ptr, old_ptr, g_ptr, keep_ptr, first_ptr, states_ptr, written_ptr, last_ptr,
    k_b, k_h, k_t, g_b, g_h, g_t, keep_b,
    heads, length, chunks, features, values, k_share, g_share,
    DECAY: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S at the start of every chunk and after the last, and U ``[B, Hs, T, Dv]``. BF ≥ F. Grid: (B · Hs, tiles of Dv)."""
    row, batch, head = place(tl.program_id(0), heads)
    at, columns = tl.arange(0, BF), tl.program_id(1) * BV + tl.arange(0, BV)
    here, size = at < features, features * values
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    if DECAY > 0:
        g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h
    state = tl.zeros([BF, BV], tl.float32)
    if first_ptr is not None:
        state += tile(first_ptr + row * size, values, at, here, columns, values).to(tl.float32)
    for n in range(0, chunks):
        store_tile(states_ptr + (row * chunks + n) * size, values, at, here, columns, values, state)
        rows = n * BT + tl.arange(0, BT)
        valid, real = rows < length, real_rows(keep_ptr, batch * keep_b, rows, length)
        old = tile(old_ptr + row * length * features, features, rows, valid, at, features)
        new = tile(new_ptr + row * length * values, values, rows, valid, columns, values).to(tl.float32)
        k = tile(k_ptr, k_t, rows, real, at, features)
        power = power_of(state, k, 0)
        taken = tl.dot(old.to(k.dtype), (state / power).to(k.dtype), input_precision=PRECISION) * power
        written = new - taken
        store_tile(written_ptr + row * length * values, values, rows, valid, columns, values, written)
        if DECAY > 0:
            g = step_decays(g_ptr, g_t, rows, real)
            total = tl.sum(g, 0)
            k = (k.to(tl.float32) * tl.exp(total - tl.cumsum(g, 0))[:, None]).to(k.dtype)
            state *= tl.exp(total)
        power = power_of(written, k, 0)
        update = (written / power).to(k.dtype)
        if k.dtype == tl.float32:
            # The other way round: a product of 64 rows in float32 becomes one in TF32 on sm_100 (Triton 3.7).
            state += tl.trans(tl.dot(tl.trans(update), k, input_precision=PRECISION)) * power
        else:
            state += tl.dot(tl.trans(k), update, input_precision=PRECISION) * power
    store_tile(last_ptr + row * size, values, at, here, columns, values, state)


@triton.jit
def delta_recurrent_kernel(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, keep_ptr, first_ptr, out_ptr, last_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, beta_b, beta_h, beta_t, g_b, g_h, g_t, keep_b,
    heads, group, length, features, values, k_share, v_share, beta_share, g_share, scale,
    DECAY: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A few steps one after another, the state in registers meanwhile. BF ≥ F. Grid: (B · Hs, tiles of Dv)."""
    row, batch, head = place(tl.program_id(0), heads)
    at, columns = tl.arange(0, BF), tl.program_id(1) * BV + tl.arange(0, BV)
    here, there, size = at < features, columns < values, features * values
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    beta_ptr += batch * beta_b + (head // beta_share).to(tl.int64) * beta_h
    if DECAY > 0:
        g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h
    state = tl.zeros([BF, BV], tl.float32)
    if first_ptr is not None:
        state += tile(first_ptr + row * size, values, at, here, columns, values).to(tl.float32)
    for t in range(0, length):
        now = t + tl.arange(0, 1)
        real = tl.max(real_rows(keep_ptr, batch * keep_b, now, length).to(tl.int32), 0) != 0
        k = tl.load(k_ptr + t * k_t + at, mask=here & real, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + t * v_t + columns, mask=there & real, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + t * beta_t, mask=real, other=0.0).to(tl.float32)
        if DECAY > 0:
            state *= tl.exp(tl.max(step_decays(g_ptr, g_t, now, real), 0))
        error = v - tl.sum(k[:, None] * state, 0)
        state += (beta * k)[:, None] * error[None, :]
        for member in range(0, group):
            query = head * group + member
            of_query = q_ptr + batch * q_b + query.to(tl.int64) * q_h
            q = tl.load(of_query + t * q_t + at, mask=here, other=0.0).to(tl.float32) * scale
            acc = tl.sum(q[:, None] * state, 0)
            out_row = (batch * heads * group + query) * length + t
            tl.store(out_ptr + out_row * values + columns, acc.to(out_ptr.dtype.element_ty), mask=there)
    store_tile(last_ptr + row * size, values, at, here, columns, values, state)
