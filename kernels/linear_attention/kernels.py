# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the additive rule, forward: states between chunks, outputs of all chunks at once, single steps.

    states      S_{n+1} = e^{b_C} S_n + (K ⊙ e^{b_C − b})ᵀ V     one program walks the chunks of a tile of the state
    outputs     o = (Q ⊙ e^b) S_n + (Q Kᵀ ⊙ D) V                 every chunk on its own
    recurrent   S_t = e^{g_t} S_{t−1} + k_t v_tᵀ                   decoding: the state is read and written once

b is the running sum of the log decays g inside a chunk, so that every exponent formed is a sum of decays, never a
difference of large positives; D_ij = e^{b_i − b_j} for j ≤ i. The split into two kernels is that of
flash-linear-attention: the first is sequential but small, the second has all the work and is parallel over chunks.

Common to all: rows of a program are positions, columns features; a tensor is addressed by the strides of its batch,
head and time (its last dimension is dense); state s is shared by ``group`` heads of q and takes its key from head
s // k_share of k, likewise values and decays. Products are of the operands' dtype and summed in float32. DECAY is 0
(none), 1 (a number per step; fixed ones have stride 0), 2 (one per feature) or 3 (as 1, but padding decays too).
"""

# mypy: ignore-errors
# (Device code: the syntax of Python, the types of Triton.)

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.linear_attention.layout import LOWEST_LOG_DECAY

LOWEST = tl.constexpr(LOWEST_LOG_DECAY)


@triton.jit
def place(row, heads):
    """Row of ``[batch, heads]`` -> row and batch, 64 bits wide for offsets, and head. Dividing 64 bits would be a call."""
    batch = row // heads
    return row.to(tl.int64), batch.to(tl.int64), row - batch * heads


@triton.jit
def tile(base, step, rows, row_mask, columns, width):
    """``[rows, columns]`` of a matrix with dense rows ``step`` apart; 0 outside. Offsets pass 2³¹."""
    offsets = rows.to(tl.int64)[:, None] * step + columns[None, :]
    return tl.load(base + offsets, mask=row_mask[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_tile(base, step, rows, row_mask, columns, width, x):
    """The inverse of `tile`, rounded to the dtype of the memory."""
    offsets = rows.to(tl.int64)[:, None] * step + columns[None, :]
    tl.store(base + offsets, x.to(base.dtype.element_ty), mask=row_mask[:, None] & (columns < width)[None, :])


@triton.jit
def real_rows(keep_ptr, keep_row, rows, length):
    """Which positions exist and are no padding."""
    real = (rows >= 0) & (rows < length)
    if keep_ptr is not None:
        real = real & (tl.load(keep_ptr + keep_row + rows, mask=real, other=0) != 0)
    return real


@triton.jit
def step_decays(base, step, rows, real):
    """Log decays per position ``[rows]``, float32, at least `LOWEST`; 0 for padding. NaN stays."""
    g = tl.load(base + rows.to(tl.int64) * step, mask=real, other=0.0).to(tl.float32)
    return tl.where(g < LOWEST, LOWEST, g)


@triton.jit
def feature_decays(base, step, rows, real, columns, width):
    """Log decays per position and feature ``[rows, columns]``, as `step_decays`."""
    g = tile(base, step, rows, real, columns, width).to(tl.float32)
    return tl.where(g < LOWEST, LOWEST, g)


@triton.jit
def power_of(x, like, axis: tl.constexpr):
    """What to divide float32 ``x`` by before it becomes an operand of the dtype of ``like``: one number per row (1) or
    column (0).

    float16 has not the range of sums: there it is the power of two next to the largest magnitude, which loses nothing.
    """
    if like.dtype == tl.float16:
        top = tl.max(tl.abs(x), axis, keep_dims=True)
        usual = (top > 0) & (top < float("inf"))
        return tl.where(usual, tl.exp2(tl.floor(tl.log2(tl.where(usual, top, 1.0)))), 1.0)
    else:
        return 1.0


@triton.jit
def pair_weights(running, seen):
    """D_ij = e^{b_i − b_j} where ``seen [rows, rows]``, else 0."""
    return tl.exp(tl.where(seen, running[:, None] - running[None, :], -float("inf")))


@triton.jit
def feature_pair_weights(running, seen):
    """e^{b_if − b_jf} where ``seen``, else 0: ``[rows, rows, features]``."""
    exponent = running[:, None, :] - running[None, :, :]
    return tl.exp(tl.where(seen[:, :, None], exponent, -float("inf")))


@triton.jit
def states_kernel(
    k_ptr, v_ptr, g_ptr, keep_ptr, first_ptr, first_z_ptr, states_ptr, zs_ptr, last_ptr, last_z_ptr,
    k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, keep_b,
    heads, start, length, chunks, features, values, k_share, v_share, g_share,
    DECAY: tl.constexpr, STORE: tl.constexpr, BF16: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """S and z at the start of every chunk (``states [B, Hs, N, F, Dv]``, if STORE) and after the last.

    The first chunk begins at row ``start``, which may be negative: there is nothing before row 0. With BF16 products
    are of bfloat16 whatever the dtype of the features. Grid: (B · Hs, tiles of F, tiles of Dv).
    """
    row, batch, head = place(tl.program_id(0), heads)
    columns = tl.program_id(1) * BF + tl.arange(0, BF)
    value_columns = tl.program_id(2) * BV + tl.arange(0, BV)
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    if DECAY > 0:
        g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h
    size, here, first_tile = features * values, columns < features, tl.program_id(2) == 0

    state = tl.zeros([BF, BV], tl.float32)
    z = tl.zeros([BF], tl.float32)
    if first_ptr is not None:
        state += tile(first_ptr + row * size, values, columns, here, value_columns, values).to(tl.float32)
        z += tl.load(first_z_ptr + row * features + columns, mask=here, other=0.0).to(tl.float32)
    for n in range(0, chunks):
        if STORE:
            chunk = row * chunks + n
            store_tile(states_ptr + chunk * size, values, columns, here, value_columns, values, state)
            tl.store(zs_ptr + chunk * features + columns, z, mask=here & first_tile)
        rows = start + n * BT + tl.arange(0, BT)
        real = real_rows(keep_ptr, batch * keep_b, rows, length)
        x = tile(k_ptr, k_t, rows, real, columns, features)
        # hook: prologue(x, rows, features)
        k = tl.where(real[:, None] & here[None, :], x, 0.0).to(k_ptr.dtype.element_ty)
        if BF16:
            k = k.to(tl.bfloat16)
        v = tile(v_ptr, v_t, rows, real, value_columns, values).to(k.dtype)
        late = k.to(tl.float32)
        if DECAY == 1 or DECAY == 3:
            g = step_decays(g_ptr, g_t, rows, real if DECAY == 1 else rows < length)
            total = tl.sum(g, 0)
            late *= tl.exp(total - tl.cumsum(g, 0))[:, None]
            state *= tl.exp(total)
            z *= tl.exp(total)
        if DECAY == 2:
            g = feature_decays(g_ptr, g_t, rows, real, columns, features)
            totals = tl.sum(g, 0)
            late *= tl.exp(totals[None, :] - tl.cumsum(g, 0))
            state *= tl.exp(totals)[:, None]
            z *= tl.exp(totals)
        z += tl.sum(late, 0)
        state += tl.dot(tl.trans(late.to(k.dtype)), v, input_precision=PRECISION)
    store_tile(last_ptr + row * size, values, columns, here, value_columns, values, state)
    tl.store(last_z_ptr + row * features + columns, z, mask=here & first_tile)


@triton.jit
def outputs_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, keep_ptr, states_ptr, zs_ptr, out_ptr, weight_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, keep_b,
    heads, group, length, chunks, features, values, k_share, v_share, g_share, scale,
    DECAY: tl.constexpr, CAUSAL: tl.constexpr, NORMALISE: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs ``[B, H, T, Dv]`` of every chunk, and the sums of weights ``[B, H, T]`` if wanted.

    Grid: (B · H, chunks of queries, tiles of Dv). Without CAUSAL the state is that of all keys.
    """
    row, batch, query = place(tl.program_id(0), heads * group)
    n, head = tl.program_id(1), query // group
    state = batch * heads + head
    chunk = state * chunks + n if CAUSAL else state
    columns = tl.program_id(2) * BV + tl.arange(0, BV)
    rows = n * BT + tl.arange(0, BT)
    valid = rows < length
    q_ptr += batch * q_b + query.to(tl.int64) * q_h
    states_ptr += chunk * features * values

    acc = tl.zeros([BT, BV], tl.float32)
    weight = tl.zeros([BT], tl.float32)
    if CAUSAL:
        k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
        v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
        real = real_rows(keep_ptr, batch * keep_b, rows, length)
        order = tl.arange(0, BT)
        seen = order[:, None] >= order[None, :]
        scores = tl.zeros([BT, BT], tl.float32)
        if DECAY > 0:
            g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h
    for begin in range(0, features, BF):
        at = begin + tl.arange(0, BF)
        here = at < features
        x = tile(q_ptr, q_t, rows, valid, at, features)
        # hook: prologue(x, rows, features)
        q = tl.where(valid[:, None] & here[None, :], x, 0.0).to(q_ptr.dtype.element_ty)
        early = q
        if CAUSAL:
            x = tile(k_ptr, k_t, rows, real, at, features)
            # hook: prologue(x, rows, features)
            k = tl.where(real[:, None] & here[None, :], x, 0.0).to(q.dtype)
            if DECAY == 2:
                running = tl.cumsum(feature_decays(g_ptr, g_t, rows, real, at, features), 0)
                products = q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :]
                scores += tl.sum(products * feature_pair_weights(running, seen), 2)
                early = (q.to(tl.float32) * tl.exp(running)).to(q.dtype)
            else:
                scores += tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tile(states_ptr, values, at, here, columns, values)
        power = power_of(s, q, 0)
        acc += tl.dot(early, (s / power).to(q.dtype), input_precision=PRECISION) * power
        if NORMALISE:
            z = tl.load(zs_ptr + chunk * features + at, mask=here, other=0.0)
            weight += tl.sum(early.to(tl.float32) * z[None, :], 1)
    if CAUSAL:
        if DECAY == 1:
            running = tl.cumsum(step_decays(g_ptr, g_t, rows, real), 0)
            acc *= tl.exp(running)[:, None]
            weight *= tl.exp(running)
            scores *= pair_weights(running, seen)
        scores = tl.where(seen, scores, 0.0)
        v = tile(v_ptr, v_t, rows, real, columns, values).to(q_ptr.dtype.element_ty)
        power = power_of(scores, v, 1)
        scores = (scores / power).to(v.dtype)
        # The sum of the weights as they are multiplied: where one key has all the weight, the output is its value.
        weight += tl.sum(scores.to(tl.float32) * power, 1)
        acc += tl.dot(scores, v, input_precision=PRECISION) * power
    acc *= scale
    if NORMALISE:
        weight *= scale
        acc = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
        if weight_ptr is not None:
            tl.store(weight_ptr + row * length + rows, weight, mask=valid & (tl.program_id(2) == 0))
    inside = valid[:, None] & (columns < values)[None, :]
    # hook: epilogue(acc, rows, columns, inside)
    offsets = (row * length + rows)[:, None] * values + columns[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def recurrent_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, keep_ptr, first_ptr, first_z_ptr, out_ptr, last_ptr, last_z_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, keep_b,
    heads, group, length, features, values, k_share, v_share, g_share, scale,
    DECAY: tl.constexpr, NORMALISE: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A few steps one after another, the state in registers meanwhile. Grid: (B · Hs, tiles of Dv); BF ≥ F."""
    row, batch, head = place(tl.program_id(0), heads)
    at = tl.arange(0, BF)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    here, there, size = at < features, columns < values, features * values
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    if DECAY > 0:
        g_ptr += batch * g_b + (head // g_share).to(tl.int64) * g_h

    state = tl.zeros([BF, BV], tl.float32)
    z = tl.zeros([BF], tl.float32)
    if first_ptr is not None:
        state += tile(first_ptr + row * size, values, at, here, columns, values).to(tl.float32)
        z += tl.load(first_z_ptr + row * features + at, mask=here, other=0.0).to(tl.float32)
    for t in range(0, length):
        real = True
        if keep_ptr is not None:
            real = tl.load(keep_ptr + batch * keep_b + t) != 0
        k = tl.load(k_ptr + t * k_t + at, mask=here & real, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + t * v_t + columns, mask=there & real, other=0.0).to(tl.float32)
        if DECAY == 1:
            g = tl.load(g_ptr + t * g_t, mask=real, other=0.0).to(tl.float32)
            decay = tl.exp(tl.where(g < LOWEST, LOWEST, g))
            state *= decay
            z *= decay
        if DECAY == 2:
            gs = tl.load(g_ptr + t * g_t + at, mask=here & real, other=0.0).to(tl.float32)
            decays = tl.exp(tl.where(gs < LOWEST, LOWEST, gs))
            state *= decays[:, None]
            z *= decays
        state += k[:, None] * v[None, :]
        z += k
        for member in range(0, group):
            query = head * group + member
            of_query = q_ptr + batch * q_b + query.to(tl.int64) * q_h
            q = tl.load(of_query + t * q_t + at, mask=here, other=0.0).to(tl.float32) * scale
            acc = tl.sum(q[:, None] * state, 0)
            if NORMALISE:
                weight = tl.sum(q * z, 0)
                acc = acc / tl.where(weight == 0.0, 1.0, weight)
            out_row = (batch * heads * group + query) * length + t
            tl.store(out_ptr + out_row * values + columns, acc.to(out_ptr.dtype.element_ty), mask=there)
    store_tile(last_ptr + row * size, values, at, here, columns, values, state)
    tl.store(last_z_ptr + row * features + at, z, mask=here & (tl.program_id(1) == 0))
