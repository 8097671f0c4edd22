# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Triton kernels of ``y = x Wᵀ + b`` on packed weights: a matrix product, a product with one row, and that by tables;
and of look-ups of rows of W.

The weight is decoded tile by tile in registers and never written to memory. x is ``[count, in]`` with unit stride along
``in``, all else is contiguous. What lies beyond ``in`` meets weight zero, so what a prologue makes of x = 0 must be finite.
"""

import triton
import triton.language as tl

from rewriter.kernels.shift_add.decode_kernels import fields, octet_scales, octets, weights


@triton.jit
def matmul(
    x_ptr, codes_ptr, scale_ptr, table_ptr, bias_ptr, out_ptr,
    count, out_features, in_features, x_stride, row_bytes, groups,
    FORMAT: tl.constexpr, BITS: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile ``[BM, BN]`` of the result per program; the weight tile is rounded to x's dtype, as the reference does."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (rows < count)[:, None] & (columns < out_features)[None, :]
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, in_features, BK):
        features = start + tl.arange(0, BK)
        x = tl.load(
            x_rows + features[None, :], mask=(rows < count)[:, None] & (features < in_features)[None, :], other=0.0
        )
        # hook: prologue(x, rows, features)
        w = weights(
            codes_ptr, scale_ptr, table_ptr, columns.to(tl.int64), columns < out_features,
            start, in_features, row_bytes, groups, FORMAT, BITS, TERMS, GROUP, SHARE, BN, BK,
        )  # fmt: skip
        operand = x_ptr.dtype.element_ty
        acc = tl.dot(x.to(operand), tl.trans(w.to(operand)), acc, input_precision=PRECISION)
    acc += biases(bias_ptr, x_ptr, columns, out_features)
    # hook: epilogue(acc, rows, columns, inside)
    place = rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def matvec(
    x_ptr, codes_ptr, scale_ptr, table_ptr, bias_ptr, out_ptr,
    out_features, in_features, x_stride, row_bytes, groups,
    FORMAT: tl.constexpr, BITS: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``BN`` outputs of one row of x per program, multiplied and added in float32; ``STAGES`` tiles are on their way."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) + tl.arange(0, 1)
    inside = (columns < out_features)[None, :]
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    partial = tl.zeros([BN, BK], dtype=tl.float32)
    for start in tl.range(0, in_features, BK, num_stages=STAGES):
        features = start + tl.arange(0, BK)
        x = tl.load(x_rows + features[None, :], mask=(features < in_features)[None, :], other=0.0)
        # hook: prologue(x, rows, features)
        w = weights(
            codes_ptr, scale_ptr, table_ptr, columns.to(tl.int64), columns < out_features,
            start, in_features, row_bytes, groups, FORMAT, BITS, TERMS, GROUP, SHARE, BN, BK,
        )  # fmt: skip
        partial += w * x.to(tl.float32)
    acc = tl.sum(partial, axis=1)[None, :] + biases(bias_ptr, x_ptr, columns, out_features)
    # hook: epilogue(acc, rows, columns, inside)
    place = rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def lookup_matvec(
    x_ptr, codes_ptr, scale_ptr, table_ptr, bias_ptr, out_ptr,
    out_features, in_features, x_stride, row_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`matvec` for binary bases, ``Σ_b alpha_b Σ_j ±x_j``, with the inner sums of four x each from a table.

    A table has the 16 sums ``±x_j ±x_{j+1} ±x_{j+2} ±x_{j+3}``, and half a byte of a plane says which one is meant: one
    look-up and one multiplication for four signs instead of four selections and four additions (after LUT-GEMM, Park et
    al. 2022, whose tables of 256 sums pay for themselves only where more rows share them). An octet lies in one group.
    """
    nibbles: tl.constexpr = BK // 4
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) + tl.arange(0, 1)
    weight_rows, known = columns.to(tl.int64), columns < out_features
    inside = known[None, :]
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    every_nibble = tl.arange(0, 16)[:, None] >> tl.arange(0, 4)[None, :]
    four_signs = tl.where((every_nibble & 1) != 0, 1.0, -1.0)
    partial = tl.zeros([BN, nibbles], dtype=tl.float32)
    for start in tl.range(0, in_features, BK, num_stages=STAGES):
        features = start + tl.arange(0, BK)
        x = tl.load(x_rows + features[None, :], mask=(features < in_features)[None, :], other=0.0)
        # hook: prologue(x, rows, features)
        x = tl.where((features < in_features)[None, :], x, 0.0).to(tl.float32)
        sums = tl.sum(tl.reshape(x, [nibbles, 1, 4]) * four_signs[None, :, :], axis=2)
        for basis in tl.static_range(BITS):
            packed = octets(codes_ptr, weight_rows * BITS + basis, known, start, row_bytes, BK // 8)
            picked = tl.gather(sums, tl.trans(fields(packed, 4, BN, nibbles)), axis=1)
            alpha = octet_scales(
                scale_ptr, table_ptr, weight_rows, known, start, in_features, groups, basis, BITS, GROUP, BK // 8
            )
            partial += tl.trans(picked) * tl.reshape(tl.join(alpha, alpha), [BN, nibbles])
    acc = tl.sum(partial, axis=1)[None, :] + biases(bias_ptr, x_ptr, columns, out_features)
    # hook: epilogue(acc, rows, columns, inside)
    place = rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rows_of(
    ids_ptr, codes_ptr, scale_ptr, table_ptr, out_ptr, count, out_features, in_features, row_bytes, groups,
    FORMAT: tl.constexpr, BITS: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of W by index, a tile ``[BN, BK]`` per program. A device cannot raise: a wrong index gives a row of NaN."""
    picks = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * BK
    features = start + tl.arange(0, BK)
    rows = tl.load(ids_ptr + picks, mask=picks < count, other=0).to(tl.int64)
    exists = (rows >= 0) & (rows < out_features)
    w = weights(
        codes_ptr, scale_ptr, table_ptr, rows, (picks < count) & exists,
        start, in_features, row_bytes, groups, FORMAT, BITS, TERMS, GROUP, SHARE, BN, BK,
    )  # fmt: skip
    w = tl.where(exists[:, None], w, float("nan"))
    place = picks.to(tl.int64)[:, None] * in_features + features[None, :]
    inside = (picks < count)[:, None] & (features < in_features)[None, :]
    tl.store(out_ptr + place, w.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def biases(bias_ptr, x_ptr, columns, out_features):
    """Float32 ``[1, BN]``, rounded to x's dtype as the reference does; zero where there is none."""
    if bias_ptr is None:
        found = tl.zeros_like(columns).to(tl.float32)
    else:
        found = tl.load(bias_ptr + columns, mask=columns < out_features, other=0.0)
        found = found.to(x_ptr.dtype.element_ty).to(tl.float32)
    return found[None, :]
