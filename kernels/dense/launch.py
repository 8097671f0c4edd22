# SPDX-License-Identifier: Apache-2.0
"""The dense linear layer on a GPU: checks, allocation, start.

Roofline: 2·M·N·K operations over (M·K + N·K + M·N) elements. In bfloat16 on an H200 (790 TFLOP/s, 4.8 TB/s) the
bandwidth binds below M ≈ 165 rows, on an MI300X (1300 TFLOP/s, 5.3 TB/s) below M ≈ 245.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.dense.kernels import linear_tile
from rewriter.kernels.launching import Config, Shipped, Unsupported, launch, precision

# By rows: one tile of 16 for a decoding step, tall ones for training. The first fits every chip.
_FEW = (Config({"BM": 16, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),)
_MANY = (
    Config({"BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=3),
    Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=2),
    Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=4, only="cuda"),
)
# Products of float32 need no matrix instructions, but registers.
_MANY_WIDE = (Config({"BM": 32, "BN": 64, "BK": 16}, num_warps=4, num_stages=2),)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for x ``[..., in]``, weight ``[out, in]``, bias ``[out]``; ``[..., out]`` in x's dtype.

    Sums in float32. Operands that are not contiguous are copied.

    Raises:
        Unsupported: float64, or operands of different dtypes.
    """
    if x.dtype not in _DTYPES:
        raise Unsupported(f"x is {x.dtype}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise Unsupported("x, weight and bias have different dtypes")
    (columns, features), rows = weight.shape, x.numel() // max(x.shape[-1], 1)
    if features == 0:
        raise Unsupported("there are no features to sum over")
    out = x.new_empty((*x.shape[:-1], columns))

    def grid(constants: Mapping[str, Any]) -> tuple[int]:
        return (_ceil_div(rows, constants["BM"]) * _ceil_div(columns, constants["BN"]),)

    args = {
        "x_ptr": x.contiguous(),
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "out_ptr": out,
        "M": rows,
        "N": columns,
        "K": features,
    }
    launch(linear_tile, grid, args, {"PRECISION": precision(x.dtype)}, _configs(rows, x.dtype))
    return out


def _configs(rows: int, dtype: torch.dtype) -> Sequence[Config]:
    if rows <= 16:
        return _FEW
    return _MANY_WIDE if dtype is torch.float32 else _MANY


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _shipped(rows: int, dtype: torch.dtype, bias: bool) -> Sequence[Any]:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return meta(rows, 4096), meta(11008, 4096), meta(11008) if bias else None


SHIPPED: tuple[Shipped, ...] = (
    Shipped("linear, 1 row, bf16", linear, lambda: _shipped(1, torch.bfloat16, False), matrix="mma"),
    Shipped("linear, 4096 rows, bf16", linear, lambda: _shipped(4096, torch.bfloat16, True)),
    Shipped("linear, 4096 rows, fp32", linear, lambda: _shipped(4096, torch.float32, True), matrix="none"),
)
