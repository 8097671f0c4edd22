# SPDX-License-Identifier: Apache-2.0
"""Dense linear layer on a GPU: the product of an activation tile with a weight tile, over the features.

Alone it does nothing that torch's own does not. It is the template the code generator fuses neighbours into
(`rewriter.codegen.emitting`): what stands at the two hooks is computed while the tile is in registers.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear_tile(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # out[m, n] = Σ_k x[m, k] · weight[n, k] + bias[n];  x [M, K], weight [N, K], out [M, N], all contiguous.
    # Programs that read the same weight rows are neighbours, so that these come from the cache.
    blocks = tl.cdiv(M, BM)
    rows = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    columns = (tl.program_id(0) // blocks) * BN + tl.arange(0, BN)
    x_rows = x_ptr + rows[:, None].to(tl.int64) * K
    weight_rows = weight_ptr + columns[None, :].to(tl.int64) * K
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        features = start + tl.arange(0, BK)
        x = tl.load(x_rows + features[None, :], mask=(rows[:, None] < M) & (features[None, :] < K), other=0.0)
        # hook: prologue(x, rows, features)
        weight_mask = (columns[None, :] < N) & (features[:, None] < K)
        weight = tl.load(weight_rows + features[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    # hook: epilogue(acc, rows, columns, inside)
    out = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
