# SPDX-License-Identifier: Apache-2.0
"""What the ShiftAdd operators share: gradients of dense layers and lookups, the cost of decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.shift_add import codec
from rewriter.kernels.spec import Cost, tensor_bytes

Gradients = tuple[Tensor | None, ...]


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """∂L/∂W ``[out, in]`` of a dense layer, accumulated in ``dtype``."""
    return grad.to(dtype).reshape(-1, grad.shape[-1]).t() @ x.to(dtype).reshape(-1, x.shape[-1])


def bias_gradient(ctx: Any, grad: Tensor, position: int) -> Tensor | None:
    if ctx.bias_dtype is None or not ctx.needs_input_grad[position]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=at_least_float(grad.dtype)).to(ctx.bias_dtype)


def at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def row_gradients(grad: Tensor, ids: Tensor, scale: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    return ids.flatten(), grad.to(codec.compute_dtype(scale)).reshape(-1, in_features)


def scatter_rows(per_row: Tensor, flat: Tensor, scale: Tensor) -> Tensor:
    total = torch.zeros(scale.shape, dtype=per_row.dtype, device=scale.device)
    return total.index_add(0, flat, per_row).to(scale.dtype)


def linear_cost(x: Tensor, out_features: int, decode_flops: int, *read: Tensor | None) -> Cost:
    """Work of one dense layer plus the decoding of its weight; bytes as packed."""
    tokens = x.numel() // x.shape[-1]
    flops = 2 * tokens * out_features * x.shape[-1] + decode_flops
    return Cost(flops, tensor_bytes(x, *read), tokens * out_features * x.element_size())


def embedding_cost(ids: Tensor, flops_per_weight: int, in_features: int, scale: Tensor, *tables: Tensor | None) -> Cost:
    """Only the rows asked for are read."""
    rows = scale.shape[0]
    read = tensor_bytes(ids) + ids.numel() * (tensor_bytes(scale, *tables) // rows if rows else 0)
    return Cost(flops_per_weight * ids.numel() * in_features, read, ids.numel() * in_features * scale.element_size())
