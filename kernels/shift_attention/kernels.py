# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Triton kernels of attention by additions; the formulas are those of `rewriter.kernels.shift_attention.reference`.

Both products over tokens are summed before anything of size tokens × tokens could arise: S = b(k)ᵀ v is ``[D, Dv]`` per
head. Codes are 0 or 1, exact in bfloat16; what is multiplied with them is split into two bfloat16 parts, three for
float32 inputs, so that tensor cores add what the reference adds in float32.

Programs are per head (axis 0 of the grid, batch · heads) and tile of tokens (axis 1). Inputs come as pointers with strides
of batch, head and token; the head dim lies contiguous. What is computed here is contiguous ``[batch · heads, ...]``.
"""

import triton
import triton.language as tl


@triton.jit
def summed_products(
    x_ptr, v_ptr, keep_ptr, out_ptr, heads, tokens, dim, width, span,
    x_batch, x_head, x_token, v_batch, v_head, v_token,
    FACTOR: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """FACTOR · b(x)ᵀ v, ``[batch · heads, spans, D, Dv]``: each program sums ``span`` tokens."""
    pair, part = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    dims, columns = tl.arange(0, DP), tl.arange(0, VP)
    total = tl.zeros([DP, VP], dtype=tl.float32)
    for first in range(0, span, BT):
        steps = part * span + first + tl.arange(0, BT)
        seen = seen_tokens(keep_ptr, batch, steps, tokens)
        x = rows(x_ptr, batch, head, steps, dims, x_batch, x_head, x_token, tokens, dim)
        v = rows(v_ptr, batch, head, steps, columns, v_batch, v_head, v_token, tokens, width) * seen[:, None]
        total = coded_product(tl.trans(binary_codes(x, dims, dim)), v, total, WIDE)
    place = ((pair * tl.num_programs(1) + part).to(tl.int64) * dim + dims)[:, None] * width + columns[None, :]
    tl.store(out_ptr + place, total * FACTOR, mask=(dims < dim)[:, None] & (columns < width)[None, :])


@triton.jit
def attend(
    q_ptr, v_ptr, sums_ptr, keep_ptr, gain_ptr, conv_ptr, out_ptr, heads, tokens, dim, width,
    q_batch, q_head, q_token, v_batch, v_head, v_token,
    TAPS: tl.constexpr, RESIDUAL: tl.constexpr, ANGLE: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """y = gain · a / ‖a‖ + the convolution of v along tokens, a = ½ v + 1/π · b(q) S."""
    pair = tl.program_id(0)
    batch, head = pair // heads, pair % heads
    steps = tl.program_id(1) * BT + tl.arange(0, BT)
    dims, columns = tl.arange(0, DP), tl.arange(0, VP)
    q = rows(q_ptr, batch, head, steps, dims, q_batch, q_head, q_token, tokens, dim)
    seen = seen_tokens(keep_ptr, batch, steps, tokens)
    v = rows(v_ptr, batch, head, steps, columns, v_batch, v_head, v_token, tokens, width) * seen[:, None]
    sums = head_matrix(sums_ptr, pair, dims, columns, dim, width)
    mixed = coded_product(binary_codes(q, dims, dim), sums, tl.zeros([BT, VP], dtype=tl.float32), WIDE)
    acc = RESIDUAL * v + ANGLE * mixed
    acc = acc / tl.maximum(tl.sqrt(tl.sum(acc * acc, axis=1)), 1e-12)[:, None]
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + head).to(tl.float32)
    if conv_ptr is not None:
        for tap in range(TAPS):
            near = steps + tap - TAPS // 2
            seen = seen_tokens(keep_ptr, batch, near, tokens)
            v = rows(v_ptr, batch, head, near, columns, v_batch, v_head, v_token, tokens, width)
            acc += tl.load(conv_ptr + head * TAPS + tap).to(tl.float32) * (v * seen[:, None])
    store_rows(out_ptr, pair, steps, columns, acc, tokens, width)


@triton.jit
def query_gradients(
    grad_ptr, q_ptr, v_ptr, sums_ptr, keep_ptr, gain_ptr, to_sum_ptr, to_q_ptr, to_gain_ptr, to_conv_ptr,
    heads, tokens, dim, width, q_batch, q_head, q_token, v_batch, v_head, v_token,
    TAPS: tl.constexpr, RESIDUAL: tl.constexpr, ANGLE: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """∂a (float32) and ∂q of some tokens, and what they add to ∂gain and ∂conv (``[batch · heads, tiles(, taps)]``)."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    steps = tile * BT + tl.arange(0, BT)
    dims, columns = tl.arange(0, DP), tl.arange(0, VP)
    q = rows(q_ptr, batch, head, steps, dims, q_batch, q_head, q_token, tokens, dim)
    seen = seen_tokens(keep_ptr, batch, steps, tokens)
    v = rows(v_ptr, batch, head, steps, columns, v_batch, v_head, v_token, tokens, width) * seen[:, None]
    sums = head_matrix(sums_ptr, pair, dims, columns, dim, width)
    mixed = coded_product(binary_codes(q, dims, dim), sums, tl.zeros([BT, VP], dtype=tl.float32), WIDE)
    unit = RESIDUAL * v + ANGLE * mixed
    length = tl.maximum(tl.sqrt(tl.sum(unit * unit, axis=1)), 1e-12)[:, None]
    unit = unit / length
    grad = own_rows(grad_ptr, pair, steps, columns, tokens, width)
    for tap in range(TAPS):
        near = steps + tap - TAPS // 2
        seen = seen_tokens(keep_ptr, batch, near, tokens)
        v = rows(v_ptr, batch, head, near, columns, v_batch, v_head, v_token, tokens, width) * seen[:, None]
        tl.store(
            to_conv_ptr + (pair * tl.num_programs(1) + tile) * TAPS + tap, tl.sum(tl.sum(grad * v, axis=1), axis=0)
        )
    if gain_ptr is not None:
        tl.store(to_gain_ptr + pair * tl.num_programs(1) + tile, tl.sum(tl.sum(grad * unit, axis=1), axis=0))
        grad *= tl.load(gain_ptr + head).to(tl.float32)
    to_sum = (grad - unit * tl.sum(unit * grad, axis=1)[:, None]) / length
    store_rows(to_sum_ptr, pair, steps, columns, to_sum, tokens, width)
    to_bits = ANGLE * product(to_sum, tl.trans(sums), tl.zeros([BT, DP], dtype=tl.float32), WIDE)
    store_rows(to_q_ptr, pair, steps, dims, through(q, to_bits), tokens, dim)


@triton.jit
def key_gradients(
    grad_ptr, k_ptr, v_ptr, to_sum_ptr, mixed_ptr, keep_ptr, conv_ptr, to_k_ptr, to_v_ptr, heads, tokens, dim, width,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    TAPS: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of some tokens, from ∂a and M = 1/π · b(q)ᵀ ∂a."""
    pair = tl.program_id(0)
    batch, head = pair // heads, pair % heads
    steps = tl.program_id(1) * BT + tl.arange(0, BT)
    dims, columns = tl.arange(0, DP), tl.arange(0, VP)
    k = rows(k_ptr, batch, head, steps, dims, k_batch, k_head, k_token, tokens, dim)
    seen = seen_tokens(keep_ptr, batch, steps, tokens)
    v = rows(v_ptr, batch, head, steps, columns, v_batch, v_head, v_token, tokens, width) * seen[:, None]
    mixed = head_matrix(mixed_ptr, pair, dims, columns, dim, width)
    to_sum = own_rows(to_sum_ptr, pair, steps, columns, tokens, width)
    bits = binary_codes(k, dims, dim) * seen[:, None]
    to_v = coded_product(bits, mixed, RESIDUAL * to_sum, WIDE)
    if conv_ptr is not None:
        for tap in range(TAPS):
            near = steps + TAPS // 2 - tap
            grad = own_rows(grad_ptr, pair, near, columns, tokens, width)
            to_v += tl.load(conv_ptr + head * TAPS + tap).to(tl.float32) * grad
    store_rows(to_v_ptr, pair, steps, columns, to_v * seen[:, None], tokens, width)
    to_bits = product(v, tl.trans(mixed), tl.zeros([BT, DP], dtype=tl.float32), WIDE) * seen[:, None]
    store_rows(to_k_ptr, pair, steps, dims, through(k, to_bits), tokens, dim)


# ------------------------------------------------------------------------------------------------------ what they share


@triton.jit
def rows(ptr, batch, head, steps, columns, by_batch, by_head, by_token, tokens, width):
    """Float32 ``[BT, columns]`` of one head; zero beyond its ends."""
    place = batch.to(tl.int64) * by_batch + head.to(tl.int64) * by_head + steps.to(tl.int64)[:, None] * by_token
    inside = ((steps >= 0) & (steps < tokens))[:, None] & (columns < width)[None, :]
    return tl.load(ptr + place + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def own_rows(ptr, pair, steps, columns, tokens, width):
    """Likewise, of what is contiguous ``[batch · heads, tokens, width]``."""
    place = (pair.to(tl.int64) * tokens + steps)[:, None] * width + columns[None, :]
    inside = ((steps >= 0) & (steps < tokens))[:, None] & (columns < width)[None, :]
    return tl.load(ptr + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, pair, steps, columns, values, tokens, width):
    place = (pair.to(tl.int64) * tokens + steps)[:, None] * width + columns[None, :]
    inside = (steps < tokens)[:, None] & (columns < width)[None, :]
    tl.store(ptr + place, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def head_matrix(ptr, pair, dims, columns, dim, width):
    place = (pair.to(tl.int64) * dim + dims)[:, None] * width + columns[None, :]
    return tl.load(ptr + place, mask=(dims < dim)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def seen_tokens(keep_ptr, batch, steps, tokens):
    """1 where a token is there and no padding, else 0. The reference multiplies by it, too: NaN stays NaN."""
    inside = (steps >= 0) & (steps < tokens)
    if keep_ptr is not None:
        kept = tl.load(keep_ptr + batch.to(tl.int64) * tokens + steps, mask=inside, other=0)
        inside = inside & (kept != 0)
    return tl.where(inside, 1.0, 0.0)


@triton.jit
def binary_codes(x, dims, dim):
    # 1[x > mean x]; x / ‖x‖ less itself is zero, and NaN where the reference's code is
    total = tl.sum(x, axis=1)
    mean = tl.div_rn(total, tl.zeros_like(total) + dim)  # rounded once, or equal entries might exceed their mean
    unit = x / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)[:, None]
    return tl.where((x > mean[:, None]) & (dims < dim)[None, :], 1.0, 0.0) + (unit - unit)


@triton.jit
def through(x, grad):
    # the gradient of clamp(x / ‖x‖, 0, 1), which stands in for that of the code
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)[:, None]
    unit = x / length
    passed = tl.where(unit >= 0, grad, grad * 0.0)
    return (passed - unit * tl.sum(unit * passed, axis=1)[:, None]) / length


@triton.jit
def coded_product(codes, b, acc, WIDE: tl.constexpr):
    """acc + codes · b, where codes are exact in bfloat16 and b is float32: its two or, if ``WIDE``, all three parts."""
    left, high = codes.to(tl.bfloat16), b.to(tl.bfloat16)
    low = rest(b, high)
    if WIDE:
        acc = tl.dot(left, rest(b - high.to(tl.float32), low), acc)
    return tl.dot(left, high, tl.dot(left, low, acc))


@triton.jit
def product(a, b, acc, WIDE: tl.constexpr):
    """acc + a b of float32: in float32 if ``WIDE``, else the three larger products of bfloat16 halves."""
    if WIDE:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        acc = tl.dot(a_high, rest(b, b_high), acc)
        acc = tl.dot(rest(a, a_high), b_high, acc)
        acc = tl.dot(a_high, b_high, acc)
    return acc


@triton.jit
def rest(x, high):
    """What rounding left, as bfloat16; nothing of what is infinite."""
    wide = high.to(tl.float32)
    return tl.where(tl.abs(wide) == float("inf"), 0.0, x - wide).to(tl.bfloat16)
