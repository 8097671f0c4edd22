# SPDX-License-Identifier: Apache-2.0
"""The gradients of the ShiftAdd dense layers on GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, launch, precision
from rewriter.kernels.shift_add import codec
from rewriter.kernels.shift_add.gradient_kernels import input_gradient, level_gradient, scale_gradient
from rewriter.kernels.shift_add.launch_common import Weight, bcq, level, meta, pot, refuse_float64, unit_stride

LEVELS = 16  # of which one program computes the gradient
SMALLEST = 16  # of a dimension of tl.dot


def bcq_linear_backward_x(
    grad: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    """∂L/∂x of `bcq_linear`."""
    return _input_gradient(grad, bcq(codes, scale, shift, group, in_features))


def pot_linear_backward_x(
    grad: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    """∂L/∂x of `pot_linear`."""
    return _input_gradient(grad, pot(codes, scale, bits, terms, group, in_features))


def level_linear_backward_x(
    grad: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    """∂L/∂x of `level_linear`."""
    return _input_gradient(grad, level(codes, scale, levels, bits, group, in_features))


def bcq_linear_backward_scale(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    """∂L/∂scale of `bcq_linear`."""
    return _scale_gradient(grad, x, bcq(codes, scale, shift, group, in_features))


def pot_linear_backward_scale(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    """∂L/∂scale of `pot_linear`."""
    return _scale_gradient(grad, x, pot(codes, scale, bits, terms, group, in_features))


def level_linear_backward_scale(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    """∂L/∂scale of `level_linear`."""
    return _scale_gradient(grad, x, level(codes, scale, levels, bits, group, in_features))


def level_linear_backward_levels(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    """∂L/∂levels of `level_linear`. ∂W is computed once for every 16 levels."""
    weight = level(codes, scale, levels, bits, group, in_features)
    config = Config({"BM": 32, "BN": 16, "BK": 32, "SHARE": weight.share(32)}, num_warps=4, num_stages=2)
    blocks = codec.ceil_div(weight.out_features, 16)
    out = torch.empty((blocks, 1 << bits), dtype=torch.float32, device=grad.device)
    launch(
        level_gradient,
        lambda c: (blocks, codec.ceil_div(1 << bits, LEVELS)),
        {**_activations(grad, x, weight), "codes_ptr": weight.codes, "scale_ptr": weight.scale, "out_ptr": out},
        {"BITS": bits, "GROUP": weight.group, "LEVELS": LEVELS, "PRECISION": precision(x.dtype)},
        [config],
    )
    return out.sum(0).to(levels.dtype)


def _input_gradient(grad: Tensor, weight: Weight) -> Tensor:
    refuse_float64(grad)
    rows, width = _rows(grad, weight), weight.in_features
    count = rows.shape[0]
    out = grad.new_empty((count, width))
    launch(
        input_gradient,
        lambda c: (codec.ceil_div(width, c["BK"]), codec.ceil_div(count, c["BM"])),
        {"grad_ptr": rows, **weight.pointers, "out_ptr": out, "count": count, **weight.sizes},
        {**weight.layout, "PRECISION": precision(rows.dtype)},
        [
            Config({"BM": bm, "BN": bn, "BK": bk, "SHARE": weight.share(bk)}, warps, stages)
            for bm, bn, bk, warps, stages in _input_tiles(count, rows.dtype, weight)
        ],
    )
    return out.reshape(*grad.shape[:-1], width)


def _input_tiles(count: int, dtype: torch.dtype, weight: Weight) -> Sequence[tuple[int, int, int, int, int]]:
    """BM, BN, BK, warps, stages."""
    if dtype is torch.float32:  # as in the forward
        return [(16, 32, 64, 4, 2) if count <= 16 else (32, 32, 64, 4, 2)]
    if count <= 64:
        return [(16 if count <= 16 else 64, 32, 64, 4, 3)]
    if weight.crosses_bytes or weight.format == "level":  # what is looked up waits in shared memory
        return [(128, 32, 128, 8, 2)]
    return [(128, 64, 128, 8, 3)]


def _scale_gradient(grad: Tensor, x: Tensor, weight: Weight) -> Tensor:
    block = min(max(1 << (weight.group - 1).bit_length(), SMALLEST), 64)
    low = x.dtype is not torch.float32
    config = Config({"BM": 64 if low else 32, "BN": 64 if low else 32, "BK": block}, 8 if low else 4, num_stages=2)
    planes = 1 << (weight.bits - 1).bit_length() if weight.format == "bcq" else 1
    out = torch.empty(weight.scale.shape, dtype=torch.float32, device=grad.device)
    launch(
        scale_gradient,
        lambda c: (codec.ceil_div(weight.out_features, c["BN"]), weight.scale.shape[1]),
        {
            **_activations(grad, x, weight), "codes_ptr": weight.codes, "table_ptr": weight.table, "out_ptr": out,
        },
        {**weight.layout, "PLANES": planes, "PRECISION": precision(x.dtype)},
        [config],
    )  # fmt: skip
    return out.to(weight.scale.dtype)


def _activations(grad: Tensor, x: Tensor, weight: Weight) -> dict[str, Any]:
    refuse_float64(grad, x)
    rows = unit_stride(x.reshape(-1, weight.in_features))
    return {
        "grad_ptr": _rows(grad.to(x.dtype), weight), "x_ptr": rows,
        "count": rows.shape[0], **weight.sizes, "x_stride": rows.stride(0),
    }  # fmt: skip


def _rows(grad: Tensor, weight: Weight) -> Tensor:
    return grad.reshape(math.prod(grad.shape[:-1]), weight.out_features).contiguous()


# -------------------------------------------------------------------------------------------- what is compiled beforehand


def _case(format: str, dtype: torch.dtype, count: int, *, x: bool) -> Sequence[Any]:
    size, bits = 4096, 4
    scale = meta((size, size // 128), torch.float16)
    activations = (meta((count, size), dtype),) * (2 if x else 1)
    if format == "bcq":
        shift = meta((size, size // 128, 2), torch.uint8)
        return *activations, meta((size, bits, size // 8), torch.uint8), scale, shift, 128, size
    codes = meta((size, size * bits // 8), torch.uint8)
    if format == "level":
        return *activations, codes, scale, meta((1 << bits,), torch.float32), bits, 128, size
    return *activations, codes, scale, bits, 1, 128, size


BF16, FP32 = torch.bfloat16, torch.float32

SHIPPED: tuple[Shipped, ...] = (
    Shipped("bcq ∂x, 8 rows, bf16", bcq_linear_backward_x, lambda: _case("bcq", BF16, 8, x=False), "mma"),
    Shipped("bcq ∂x, 4096 rows, bf16", bcq_linear_backward_x, lambda: _case("bcq", BF16, 4096, x=False)),
    Shipped("bcq ∂x, 4096 rows, fp32", bcq_linear_backward_x, lambda: _case("bcq", FP32, 4096, x=False), "none"),
    Shipped("pot ∂x, 4096 rows, bf16", pot_linear_backward_x, lambda: _case("pot", BF16, 4096, x=False)),
    Shipped("level ∂x, 4096 rows, bf16", level_linear_backward_x, lambda: _case("level", BF16, 4096, x=False)),
    Shipped("bcq ∂scale, 4096 rows, bf16", bcq_linear_backward_scale, lambda: _case("bcq", BF16, 4096, x=True)),
    Shipped("bcq ∂scale, 4096 rows, fp32", bcq_linear_backward_scale, lambda: _case("bcq", FP32, 4096, x=True), "none"),
    Shipped("pot ∂scale, 4096 rows, bf16", pot_linear_backward_scale, lambda: _case("pot", BF16, 4096, x=True)),
    Shipped("level ∂scale, 4096 rows, bf16", level_linear_backward_scale, lambda: _case("level", BF16, 4096, x=True)),
    Shipped(
        "level ∂levels, 4096 rows, bf16",
        level_linear_backward_levels,
        lambda: _case("level", BF16, 4096, x=True),
        "mma",
    ),
)
