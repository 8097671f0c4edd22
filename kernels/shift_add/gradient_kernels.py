# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Triton kernels of the gradients of ``y = x Wᵀ + b`` on packed weights. Neither W nor ∂W is ever written to memory.

Common arguments are those of `rewriter.kernels.shift_add.decode_kernels`; grad is ``[count, out]``, contiguous, x is
``[count, in]`` with unit stride along ``in``.
"""

import triton
import triton.language as tl

from rewriter.kernels.shift_add.decode_kernels import shared_scales, signs, stream_words, unit, weights


@triton.jit
def input_gradient(
    grad_ptr, codes_ptr, scale_ptr, table_ptr, out_ptr, count, out_features, in_features, row_bytes, groups,
    FORMAT: tl.constexpr, BITS: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """∂x = ∂y W: a tile ``[BM, BK]`` per program, over all rows of the weight."""
    start = tl.program_id(0) * BK
    features = start + tl.arange(0, BK)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    grad_rows = grad_ptr + rows.to(tl.int64)[:, None] * out_features
    acc = tl.zeros([BM, BK], dtype=tl.float32)
    for first in range(0, out_features, BN):
        columns = first + tl.arange(0, BN)
        known = columns < out_features
        grad = tl.load(grad_rows + columns[None, :], mask=(rows < count)[:, None] & known[None, :], other=0.0)
        w = weights(
            codes_ptr, scale_ptr, table_ptr, columns.to(tl.int64), known,
            start, in_features, row_bytes, groups, FORMAT, BITS, TERMS, GROUP, SHARE, BN, BK,
        )  # fmt: skip
        acc = tl.dot(grad, w.to(grad.dtype), acc, input_precision=PRECISION)
    place = rows.to(tl.int64)[:, None] * in_features + features[None, :]
    inside = (rows < count)[:, None] & (features < in_features)[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_gradient(
    grad_ptr, x_ptr, codes_ptr, table_ptr, out_ptr,
    count, out_features, in_features, x_stride, row_bytes, groups,
    FORMAT: tl.constexpr, BITS: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The scales' gradient of ``BN`` rows in one group per program, float32 ``[out, groups(, bits)]``.

    ∂scale = Σ_{i in the group} ∂W[o, i] · ∂W/∂scale: the signs of each basis (folded by 2**-k where scales share), or the
    value of the code word. ``PLANES`` is a power of two, at least the number of bases, 1 for code words.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    known, weight_rows = columns < out_features, columns.to(tl.int64)
    group = tl.program_id(1)
    planes = tl.arange(0, PLANES)
    total = tl.zeros([BN, PLANES], dtype=tl.float32)
    for offset in range(0, GROUP, BK):
        features = group * GROUP + offset + tl.arange(0, BK)
        held = (offset + tl.arange(0, BK) < GROUP) & (features < in_features)
        dense = weight_gradient(
            grad_ptr, x_ptr, columns, known, features, held, count, out_features, x_stride, PRECISION, BM, BN, BK
        )
        if FORMAT == "bcq":
            for basis in tl.static_range(BITS):
                sign = signs(codes_ptr, weight_rows, known, features, row_bytes, basis, BITS)
                total += tl.where((planes == basis)[None, :], tl.sum(dense * sign, axis=1)[:, None], 0.0)
        else:
            words = stream_words(codes_ptr, weight_rows, known, features, row_bytes, BITS)
            total += tl.sum(dense * unit(words, table_ptr, FORMAT, BITS, TERMS), axis=1)[:, None]
    place = weight_rows * groups + group
    if FORMAT == "bcq" and table_ptr is None:
        inside = known[:, None] & (planes < BITS)[None, :]
        tl.store(out_ptr + place[:, None] * BITS + planes[None, :], total, mask=inside)
    else:
        if FORMAT == "bcq":
            pairs: tl.constexpr = (BITS + 1) // 2
            inside = known[:, None] & (planes < BITS)[None, :]
            nibbles = tl.load(table_ptr + place[:, None] * pairs + (planes // 2)[None, :], mask=inside, other=0)
            k = (nibbles.to(tl.int32) >> (4 * (planes % 2))[None, :]) & 15
            total *= ((127 - k) << 23).to(tl.float32, bitcast=True)  # the bits of 2**-k
        tl.store(out_ptr + place, tl.sum(total, axis=1), mask=known)


@triton.jit
def level_gradient(
    grad_ptr, x_ptr, codes_ptr, scale_ptr, out_ptr,
    count, out_features, in_features, x_stride, row_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What ``BN`` rows add to the gradient of ``LEVELS`` levels, ``∂levels[c] = Σ_{word = c} ∂W · scale``.

    ``out_ptr``: float32 ``[programs along the rows, 2**bits]``, to be summed over the first.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    known, weight_rows = columns < out_features, columns.to(tl.int64)
    levels = tl.program_id(1) * LEVELS + tl.arange(0, LEVELS)
    total = tl.zeros([LEVELS], dtype=tl.float32)
    for start in range(0, in_features, BK):
        features = start + tl.arange(0, BK)
        held = features < in_features
        dense = weight_gradient(
            grad_ptr, x_ptr, columns, known, features, held, count, out_features, x_stride, PRECISION, BM, BN, BK
        )
        dense *= shared_scales(
            scale_ptr, None, weight_rows, known, start, in_features, groups, 0, 1, GROUP, SHARE, BN, BK
        )
        dense = tl.where(known[:, None] & held[None, :], dense, 0.0)
        words = stream_words(codes_ptr, weight_rows, known, features, row_bytes, BITS)
        chosen = tl.where(words[:, :, None] == levels[None, None, :], dense[:, :, None], 0.0)
        total += tl.sum(tl.sum(chosen, axis=1), axis=0)
    tl.store(out_ptr + tl.program_id(0) * (1 << BITS) + levels, total, mask=levels < (1 << BITS))


@triton.jit
def weight_gradient(
    grad_ptr, x_ptr, columns, known, features, held, count, out_features, x_stride,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of ∂W = ∂yᵀ x, float32 ``[BN, BK]``, over all rows of x; zero where there is no weight."""
    dense = tl.zeros([BN, BK], dtype=tl.float32)
    for first in range(0, count, BM):
        rows = first + tl.arange(0, BM)
        long, there = rows.to(tl.int64)[:, None], (rows < count)[:, None]
        grad = tl.load(grad_ptr + long * out_features + columns[None, :], mask=there & known[None, :], other=0.0)
        x = tl.load(x_ptr + long * x_stride + features[None, :], mask=there & held[None, :], other=0.0)
        dense = tl.dot(tl.trans(grad), x, dense, input_precision=PRECISION)
    return tl.where(known[:, None] & held[None, :], dense, 0.0)
