# SPDX-License-Identifier: Apache-2.0
"""The operators `rewriter::softmax` and `rewriter::log_softmax`; importing this module registers them with torch.

A rewritten model keeps aten's. These exist for code that is generated around them (a scale and a mask before, a product
after), for which one needs an operator whose kernel is ours; they are equal to aten's in value, dtype and gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.spec import Cost, KernelSpec


def on_device(x: Tensor) -> bool:
    """Whether gradients are computed by operators with kernels instead of differentiable aten."""
    return x.is_cuda


def _fake(x: Tensor, dim: int) -> Tensor:
    _check(x, dim)
    return x.new_empty(x.shape)


def _gradient_fake(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    _check(y, dim)
    torch._check(grad.shape == y.shape, lambda: f"grad {list(grad.shape)} and y {list(y.shape)} must have one shape")
    return y.new_empty(y.shape)


def _check(x: Tensor, dim: int) -> None:
    torch._check(x.is_floating_point(), lambda: f"x must be floating, not {x.dtype}")
    dims = max(1, x.dim())
    torch._check_index(-dims <= dim < dims, lambda: f"dim must lie in [{-dims}, {dims - 1}], not {dim}")


def _softmax(x: Tensor, dim: int) -> Tensor:
    """exp x_i / Σ_j exp x_j along ``dim``, computed in float32 at least, in the dtype of ``x``."""
    _check(x, dim)
    return torch.softmax(x, dim).contiguous()


def _log_softmax(x: Tensor, dim: int) -> Tensor:
    """x_i − log Σ_j exp x_j along ``dim``, computed in float32 at least, in the dtype of ``x``."""
    _check(x, dim)
    return torch.log_softmax(x, dim).contiguous()


def _softmax_gradient(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    """∂x = y (g − Σ g y)."""
    wide, share = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (grad, y))
    return (share * (wide - (wide * share).sum(dim, keepdim=True))).to(y.dtype).contiguous()


def _log_softmax_gradient(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    """∂x = g − exp(y) Σ g."""
    wide, logs = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (grad, y))
    return (wide - logs.exp() * wide.sum(dim, keepdim=True)).to(y.dtype).contiguous()


def _save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.dim = inputs[1]


def _backward(name: str, gradient: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def rule(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        chosen = getattr(torch.ops.rewriter, f"{name}_backward") if on_device(y) else gradient
        return chosen(grad, y, ctx.dim), None

    return rule


def _vmap(name: str) -> Callable[..., tuple[Tensor, int]]:
    """A batched input is one more leading dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, dim: int) -> tuple[Tensor, int]:
        front = x.movedim(in_dims[0] or 0, 0)
        if front.dim() == 1:  # of numbers: each is a row of its own
            return getattr(torch.ops.rewriter, name)(front.unsqueeze(1), 1).squeeze(1), 0
        return getattr(torch.ops.rewriter, name)(front, dim if dim < 0 else dim + 1), 0

    return rule


def _cost(x: Tensor, dim: int) -> Cost:
    """Per value: compare, subtract, exponential, add, divide."""
    return Cost(5 * x.numel(), x.numel() * x.element_size(), x.numel() * x.element_size())


def _gradient_cost(grad: Tensor, y: Tensor, dim: int) -> Cost:
    """Per value: product and sum, subtract, product."""
    size = y.numel() * y.element_size()
    return Cost(4 * y.numel(), grad.numel() * grad.element_size() + size, size)


def _register(name: str, reference: Callable[..., Tensor], gradient: Callable[..., Tensor]) -> OpOverload:
    address = f"rewriter.kernels.softmax.launch:{name}"
    KernelSpec(
        name=f"{name}_backward", schema="(Tensor grad, Tensor y, int dim) -> Tensor", reference=gradient,
        fake=_gradient_fake, cost=_gradient_cost, implementations={"cuda": f"{address}_backward"},
    ).register()  # fmt: skip
    return KernelSpec(
        name=name, schema="(Tensor x, int dim) -> Tensor", reference=reference, fake=_fake, cost=_cost,
        setup_context=_save, backward=_backward(name, gradient), vmap=_vmap(name),
        implementations={"cuda": address},
    ).register()  # fmt: skip


softmax: OpOverload = _register("softmax", _softmax, _softmax_gradient)
log_softmax: OpOverload = _register("log_softmax", _log_softmax, _log_softmax_gradient)
