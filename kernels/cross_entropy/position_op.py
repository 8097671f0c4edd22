# SPDX-License-Identifier: Apache-2.0
"""The operator `rewriter::linear_cross_entropy`; importing this module registers it with torch.

What it computes, and the gradient, are written in `rewriter.kernels.cross_entropy.reference`. log Z is a second result
because the way back needs it, and because penalties on it (z-loss) are common. Gradients flow to x, weight, bias and class
weights. The way back is `rewriter::linear_cross_entropy_backward`; where its own derivative is asked for on a CPU, it is
differentiable aten of saved inputs and results instead, so second derivatives are right too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.batching import leading
from rewriter.kernels.cross_entropy import reference
from rewriter.kernels.cross_entropy.gradient import Gradients, gradients
from rewriter.kernels.cross_entropy.reference import Pair, loss_dtype
from rewriter.kernels.spec import Cost, KernelSpec, tensor_bytes
from rewriter.kernels.vq_logits.shared import positions

_ACTIVATIONS = (0, 3)  # x and target: what may have more leading dimensions
_DIFFERENTIABLE = (0, 1, 2, 4)  # x, weight, bias, class weights


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk: int,
) -> Pair:
    reference.check(x, weight, bias, target, class_weight, label_smoothing, softcap, chunk)
    empty = x.new_empty(x.shape[:-1], dtype=loss_dtype(x))
    return empty, torch.empty_like(empty)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:]


def _backward(ctx: Any, grad: Tensor, grad_log_z: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, log_z = ctx.saved_tensors
    needed = [bool(ctx.needs_input_grad[i]) for i in _DIFFERENTIABLE]
    function: Callable[..., Gradients] = linear_cross_entropy_backward if is_last(grad) else gradients
    found = function(grad, grad_log_z, *inputs, log_z, *ctx.options, needed)
    to_x, to_weight, to_bias, to_class = (g if need else None for g, need in zip(found, needed, strict=True))
    return to_x, to_weight, to_bias, None, to_class, *(None for _ in ctx.options)


def is_last(grad: Tensor) -> bool:
    """Whether gradients are computed by an operator with kernels instead of differentiable aten."""
    return grad.is_cuda or not (torch.is_grad_enabled() or torch._C._functorch.is_batchedtensor(grad))


def _gradients_fake(grad: Tensor, grad_log_z: Tensor, *args: Any) -> Gradients:
    x, weight, bias, target, class_weight, log_z, _, smoothing, softcap, chunk, needed = args
    reference.check(x, weight, bias, target, class_weight, smoothing, softcap, chunk)
    for name, values in (("grad", grad), ("grad_log_z", grad_log_z), ("log_z", log_z)):
        torch._check(values.shape == target.shape, lambda name=name: f"{name} must be of the target's shape")
    to_x, to_weight, to_bias, to_class = (
        x.new_empty(0) if like is None or not need else like.new_empty(like.shape)
        for like, need in zip((x, weight, bias, class_weight), needed, strict=True)
    )
    return to_x, to_weight, to_bias, to_class


def _gradients_cost(grad: Tensor, grad_log_z: Tensor, *args: Any) -> Cost:
    """The logits once more; a product for each of x and weight; per logit about 6 operations beside."""
    x, weight, bias, target, class_weight, log_z, *_, needed = args
    products = 1 + bool(needed[0]) + bool(needed[1])
    read = tensor_bytes(grad, grad_log_z, x, weight, bias, target, class_weight, log_z)
    likes = (like for like, need in zip((x, weight, bias, class_weight), needed, strict=True) if need)
    flops = positions(x) * (2 * products * weight.numel() + 6 * weight.shape[0])
    return Cost(flops, read, tensor_bytes(*likes))


def _cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk: int,
) -> Cost:
    """Per logit: the product; and bias, soft-cap (3), exponential and sum (3), smoothing (2) as there are."""
    per_logit = 3 + (bias is not None) + 3 * (softcap is not None) + 2 * (label_smoothing > 0)
    flops = positions(x) * (2 * weight.numel() + per_logit * weight.shape[0])
    read = tensor_bytes(x, weight, bias, target, class_weight)
    return Cost(flops, read, 2 * positions(x) * loss_dtype(x).itemsize)


linear_cross_entropy: OpOverload = KernelSpec(
    name="linear_cross_entropy",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index,"
        " float label_smoothing, float? softcap, int chunk) -> (Tensor, Tensor)"
    ),
    reference=reference.linear_cross_entropy,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    vmap=leading(lambda: linear_cross_entropy, _ACTIVATIONS),
    cost=_cost,
    autocast=("x",),
    implementations={
        "cpu": "rewriter.kernels.cross_entropy.blocked:linear_cross_entropy",
        "cuda": "rewriter.kernels.cross_entropy.launch:linear_cross_entropy",
    },
).register()

linear_cross_entropy_backward: OpOverload = KernelSpec(
    name="linear_cross_entropy_backward",
    schema=(
        "(Tensor grad, Tensor grad_log_z, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight,"
        " Tensor log_z, int ignore_index, float label_smoothing, float? softcap, int chunk, bool[] needed)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    reference=gradients,
    fake=_gradients_fake,
    cost=_gradients_cost,
    implementations={
        "cpu": "rewriter.kernels.cross_entropy.blocked:linear_cross_entropy_backward",
        "cuda": "rewriter.kernels.cross_entropy.launch:linear_cross_entropy_backward",
    },
).register()
