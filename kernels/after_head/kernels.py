# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the largest logits: numbers whose order is that of logits, then of tokens.

A key has the bits of the logit, as an integer in the same order, above 2^31 − 1 − token: of two keys the larger belongs
to the larger logit, of equals to the smaller token, so that any selection of keys gives one result.
"""

# mypy: ignore-errors
# The language of kernels has no types that Python knows.

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.vq_logits.kernels import dot_tile


@triton.jit
def keys_of(logit, token):
    """Keys of float32 logits; the lowest number for negative tokens."""
    logit = tl.where(logit == 0, 0.0, logit)  # -0 and 0 are equal
    logit = tl.where(logit != logit, float("nan"), logit)  # above all numbers, whatever its sign
    bits = logit.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    return tl.where(token < 0, -(1 << 63), key)


@triton.jit
def tile_keys(
    h, table, offset, ids, logits, out, positions, entries, width, first_id, out_stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[n, j] = key of h_n·row_j + offset_j for the token ids[j] (first_id + j without ids), ``[positions, entries]``
    int64 with rows of ``out_stride``; rounded to h's dtype. With ``logits`` ``[positions, entries]`` in that dtype the
    products are rounded on their own, before the offset, and kept there.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_entry = columns < entries
    inside = (rows < positions)[:, None] & is_entry[None, :]
    dtype = h.dtype.element_ty
    x = dot_tile(h, table, rows, columns, positions, entries, width, PRECISION, ROWS, COLUMNS, WIDTH)
    if logits is not None:
        rounded = x.to(dtype)
        tl.store(logits + rows.to(tl.int64)[:, None] * entries + columns[None, :], rounded, mask=inside)
        x = rounded.to(tl.float32)
    if offset is not None:
        x += tl.load(offset + columns, mask=is_entry, other=0.0).to(tl.float32)[None, :]
    if ids is None:
        token = first_id + columns
    else:
        token = tl.load(ids + columns, mask=is_entry, other=-1).to(tl.int32)
    key = keys_of(x.to(dtype).to(tl.float32), tl.broadcast_to(token[None, :], (ROWS, COLUMNS)))
    tl.store(out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :], key, mask=inside)


@triton.jit
def candidate_keys(
    logits, picked, order, first, count, bias, out, positions, entries, picks, k,
    PLACES: tl.constexpr,
):  # fmt: skip
    """out[n, p, r] = key of the r-th best token of the p-th picked code of position n; int64 ``[positions, picks, k]``.

    Args:
        logits: of the codes, ``[positions, entries]``.
        picked: codes int64 ``[positions, picks]``.
        order: tokens by code, then falling bias, then number, int64 ``[V]``; first, count: of each code's, int64.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    inside = place < picks * k
    code = tl.load(picked + row * picks + place // k, mask=inside, other=0)
    rank = place % k
    exists = inside & (rank < tl.load(count + code, mask=inside, other=0))
    token = tl.load(order + tl.load(first + code, mask=inside, other=0) + rank, mask=exists, other=-1)
    logit = tl.load(logits + row * entries + code, mask=exists, other=0.0)
    x = logit.to(tl.float32)
    if bias is not None:
        x += tl.load(bias + token, mask=exists, other=0.0).to(tl.float32)
    key = keys_of(x.to(logit.dtype).to(tl.float32), token.to(tl.int32))
    tl.store(out + row * picks * k + place, key, mask=inside)


@triton.jit
def read_keys(keys, values, tokens, total, PLACES: tl.constexpr):
    """The logits, in the dtype of ``values``, and tokens int64 of ``total`` keys."""
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    key = tl.load(keys + place, mask=place < total, other=0)
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    tl.store(values + place, bits.to(tl.float32, bitcast=True).to(values.dtype.element_ty), mask=place < total)
    tl.store(tokens + place, 0x7FFFFFFF - (key & 0x7FFFFFFF), mask=place < total)
