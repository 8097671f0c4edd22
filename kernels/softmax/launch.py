# SPDX-License-Identifier: Apache-2.0
"""The softmax family on a GPU. Rows are the last dimension; another one is made last first, by a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, Unsupported, launch
from rewriter.kernels.softmax import kernels

# A tile per program: many short rows, some, or a part of one.
_CONFIGS = {
    256: (Config({"BM": 16, "BN": 256}, 4, 2),),
    1024: (Config({"BM": 4, "BN": 1024}, 4, 2),),
    None: (Config({"BM": 1, "BN": 4096}, 8, 2), Config({"BM": 1, "BN": 2048}, 4, 2)),
}


def softmax(x: Tensor, dim: int) -> Tensor:
    return _forward(x, dim, log=False)


def log_softmax(x: Tensor, dim: int) -> Tensor:
    return _forward(x, dim, log=True)


def softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    return _backward(grad, y, dim, log=False)


def log_softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    return _backward(grad, y, dim, log=True)


def _forward(x: Tensor, dim: int, log: bool) -> Tensor:
    rows = _rows(x, dim)
    out = torch.empty_like(rows)
    launch(
        kernels.softmax_rows,
        _blocks(rows),
        {"x_ptr": rows, "out_ptr": out, **_sizes(rows)},
        {"LOG": log},
        _configs(rows.shape[1]),
    )
    return _back(out, x, dim)


def _backward(grad: Tensor, y: Tensor, dim: int, log: bool) -> Tensor:
    g, rows = _rows(grad, dim), _rows(y, dim)
    out, width = torch.empty_like(rows), rows.shape[1]
    launch(
        kernels.softmax_gradient_rows,
        _blocks(rows),
        {"grad_ptr": g, "y_ptr": rows, "out_ptr": out, **_sizes(rows)},
        {"LOG": log},
        _configs(width),
    )
    return _back(out, y, dim)


def _rows(x: Tensor, dim: int) -> Tensor:
    """``x`` as contiguous rows ``[count, width]`` along ``dim``."""
    if x.dtype is torch.float64:
        raise Unsupported("float64: the kernels compute in float32")
    if not x.dim():
        return x.reshape(1, 1)
    width = x.shape[dim]
    return x.movedim(dim, -1).reshape(-1 if width else 0, width).contiguous()


def _back(rows: Tensor, x: Tensor, dim: int) -> Tensor:
    """Rows in the shape of ``x``, contiguous as the fake kernel says."""
    if not x.dim():
        return rows.reshape(())
    moved = x.movedim(dim, -1).shape
    return rows.reshape(moved).movedim(-1, dim).contiguous()


def _sizes(rows: Tensor) -> dict[str, int]:
    return {"count": rows.shape[0], "width": rows.shape[1]}


def _blocks(rows: Tensor) -> Any:
    count = rows.shape[0] if rows.shape[1] else 0
    return lambda constants: (triton.cdiv(count, constants["BM"]),)


def _configs(width: int) -> Sequence[Config]:
    return next(configs for limit, configs in _CONFIGS.items() if limit is None or width <= limit)


def _case(width: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return torch.empty(4096, width, dtype=dtype, device="meta"), -1


def _gradient_case(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    return _case(width, dtype)[0], *_case(width, dtype)


_SIZES: Mapping[str, int] = {"short": 128, "medium": 1024, "vocabulary": 50257}

SHIPPED: tuple[Shipped, ...] = (
    *(Shipped(f"softmax {name} bf16", softmax, partial(_case, w, torch.bfloat16), "none") for name, w in _SIZES.items()),
    Shipped("softmax vocabulary fp32", softmax, lambda: _case(50257, torch.float32), "none"),
    Shipped("log_softmax vocabulary bf16", log_softmax, lambda: _case(50257, torch.bfloat16), "none"),
    Shipped("softmax_backward vocabulary bf16", softmax_backward, lambda: _gradient_case(50257, torch.bfloat16), "none"),
    Shipped("log_softmax_backward short bf16", log_softmax_backward, lambda: _gradient_case(128, torch.bfloat16), "none"),
)  # fmt: skip
