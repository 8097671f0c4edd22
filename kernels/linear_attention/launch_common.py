# SPDX-License-Identifier: Apache-2.0
"""What the device implementations of linear attention share: dtypes, strides, sizes of tiles, one reading of decays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Unsupported

NARROW = (torch.bfloat16, torch.float16)
SMALLEST, WIDEST_FEATURES = 16, 256


def operands(*tensors: Tensor) -> list[Tensor]:
    """Tensors as a kernel multiplies them: of one dtype unless it does the cast itself, dense in the last dimension.

    Raises:
        Unsupported: float64, which has no kernels, or nothing to compute.
    """
    for x in tensors:
        if x.dtype is torch.float64:
            raise Unsupported("float64 runs the reference")
        if x.numel() == 0:
            raise Unsupported("a tensor without elements runs the reference")
    common = tensors[0].dtype
    for x in tensors[1:]:
        common = torch.promote_types(common, x.dtype)
    return [dense(x.to(common)) for x in tensors]


def dense(x: Tensor) -> Tensor:
    """x, copied only where its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def pointer(name: str, x: Tensor) -> dict[str, Any]:
    """A ``[B, h, T, ·]`` or ``[B, h, T]`` argument with its strides, as the kernels name them."""
    return {f"{name}_ptr": x, f"{name}_b": x.stride(0), f"{name}_h": x.stride(1), f"{name}_t": x.stride(2)}


def block(size: int, most: int) -> int:
    """The power of two that covers ``size``, between 16, the least ``tl.dot`` takes, and ``most``."""
    return max(SMALLEST, min(most, triton.next_power_of_2(size)))


@dataclass(frozen=True)
class Decay:
    """Log decays as the kernels read them: ``form`` 0 (none), 1 (per step; fixed ones have stride 0), 2 (per feature)."""

    form: int
    tensor: Tensor | None
    heads: int

    def arguments(self) -> dict[str, Any]:
        """Pointer and strides."""
        if self.tensor is None:
            return {"g_ptr": None, "g_b": 0, "g_h": 0, "g_t": 0}
        return pointer("g", self.tensor)


def decay_of(log_decay: Tensor | None, batch: int, length: int) -> Decay:
    """``[h]``, ``[B, h, T]`` or ``[B, h, T, F]``; float64 ones, which fixed decays may be, are read as float32."""
    if log_decay is None:
        return Decay(0, None, 1)
    g = log_decay.float() if log_decay.dtype is torch.float64 else log_decay
    if g.dim() == 1:
        return Decay(1, g[None, :, None].expand(batch, -1, length), len(g))
    return Decay(1, g, g.shape[1]) if g.dim() == 3 else Decay(2, dense(g), g.shape[1])


def keep_arguments(keep: Tensor | None) -> dict[str, Any]:
    """The padding mask with the stride of its batch."""
    if keep is None:
        return {"keep_ptr": None, "keep_b": 0}
    keep = dense(keep)
    return {"keep_ptr": keep, "keep_b": keep.stride(0)}


def only(arguments: Mapping[str, Any], kernel: Any) -> dict[str, Any]:
    """Those of the arguments that the kernel has."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}


def summed(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, Hs, ...]`` -> ``[B, heads, ...]``: gradients of the states that share a head of k, v or the decay."""
    if x.shape[1] != heads:
        x = x.unflatten(1, (heads, -1)).sum(2)
    return x.to(dtype)
