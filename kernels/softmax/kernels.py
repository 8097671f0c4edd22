# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Softmax and log-softmax of rows of any width in two passes, and the running maximum and sum others build on.

    m' = max(m, max_i x_i)          s' = s exp(m − m') + Σ_i exp(x_i − m')          log Σ exp = m + log s

("Online normalizer calculation for softmax", Milakov and Gimelshein, arXiv 1805.02867.) A row is read once for m and s and
once more for its results; the second time it comes from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def running(maximum, total, tile):
    """m and s ``[BM]`` after the columns of ``tile`` ``[BM, BN]``, float32; where a column does not count it is −inf.

    They begin as −inf and 0. A NaN makes the sum NaN, whatever the maximum is.
    """
    larger = tl.maximum(maximum, tl.max(tile, 1))
    base = finite(larger)
    total = total * tl.exp(maximum - base) + tl.sum(tl.exp(tile - base[:, None]), 1)
    return larger, total


@triton.jit
def finite(maximum):
    """What to subtract before the exponential: m, but 0 where it is infinite, since ∞ − ∞ is NaN."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def logsumexp(maximum, total):
    """m + log s; −inf of nothing or of −inf alone, inf where there is an inf."""
    return finite(maximum) + tl.log(total)


@triton.jit
def softmax_rows(x_ptr, out_ptr, count, width, LOG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """out = softmax(x), or its logarithm, of ``count`` contiguous rows. Grid: blocks of BM rows."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    places = rows.to(tl.int64)[:, None]
    maximum = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, width, BN):
        features = start + tl.arange(0, BN)
        inside = (rows < count)[:, None] & (features < width)[None, :]
        x = tl.load(x_ptr + places * width + features[None, :], mask=inside, other=0.0).to(tl.float32)
        # hook: prologue(x, rows, features)
        maximum, total = running(maximum, total, tl.where(inside, x, float("-inf")))
    # Rows of −inf alone, or with an inf, are NaN, as they are in torch.
    total = tl.where(tl.abs(maximum) == float("inf"), float("nan"), total)
    base = finite(maximum)[:, None]
    for start in range(0, width, BN):
        features = start + tl.arange(0, BN)
        columns = features
        inside = (rows < count)[:, None] & (columns < width)[None, :]
        x = tl.load(x_ptr + places * width + features[None, :], mask=inside, other=0.0).to(tl.float32)
        # hook: prologue(x, rows, features)
        if LOG:
            acc = x - base - tl.log(total)[:, None]
        else:
            acc = tl.exp(x - base) / total[:, None]
        # hook: epilogue(acc, rows, columns, inside)
        tl.store(out_ptr + places * width + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_gradient_rows(
    grad_ptr, y_ptr, out_ptr, count, width, LOG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """∂x = y (g − Σ g y) of softmax, g − exp(y) Σ g of log-softmax; y is the result. Grid: blocks of BM rows."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    places = rows.to(tl.int64)[:, None]
    total = tl.zeros([BM], tl.float32)
    for start in range(0, width, BN):
        columns = start + tl.arange(0, BN)
        inside = (rows < count)[:, None] & (columns < width)[None, :]
        g = tl.load(grad_ptr + places * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if LOG:
            total += tl.sum(g, 1)
        else:
            y = tl.load(y_ptr + places * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(g * y, 1)
    for start in range(0, width, BN):
        columns = start + tl.arange(0, BN)
        inside = (rows < count)[:, None] & (columns < width)[None, :]
        g = tl.load(grad_ptr + places * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + places * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if LOG:
            acc = g - tl.exp(y) * total[:, None]
        else:
            acc = y * (g - total[:, None])
        # hook: epilogue(acc, rows, columns, inside)
        tl.store(out_ptr + places * width + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
