# SPDX-License-Identifier: Apache-2.0
"""The operators `rewriter::linear_cross_entropy_reduced` and `rewriter::linear_cross_entropy_sum`, for a summed or mean loss.

A graph holds the former. Where no gradient is asked for it is `linear_cross_entropy`, reduced. Where one is, it becomes the
latter, which computes the gradients of the sum on the way there; the way back multiplies them by a number, and rounds them
once. Only a second derivative computes anything anew, from the differentiable gradient of `linear_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.cross_entropy import gradient, reference
from rewriter.kernels.cross_entropy.gradient import Summed, gradients
from rewriter.kernels.cross_entropy.position_op import linear_cross_entropy
from rewriter.kernels.cross_entropy.reference import loss_dtype
from rewriter.kernels.spec import REGISTRY, Cost, KernelSpec
from rewriter.kernels.vq_logits.shared import positions

_TENSORS = 5  # arguments before the options: x, weight, bias, target, class weights


def _sum_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Summed:
    target, class_weight, _, smoothing, softcap, chunk, needed = rest
    reference.check(x, weight, bias, target, class_weight, smoothing, softcap, chunk)
    wide = loss_dtype(x)
    to_x, to_weight, to_bias = (
        x.new_empty(like.shape if like is not None and need else 0, dtype=wide)
        for like, need in zip((x, weight, bias), needed, strict=True)
    )
    return x.new_empty((), dtype=wide), to_x, to_weight, to_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Summed) -> None:
    *ctx.options, ctx.needed = inputs[_TENSORS:]
    for place, need in zip((0, 1, 2, 4), (*ctx.needed, False), strict=True):
        if ctx.needs_input_grad[place] and not need:
            name = ("x", "weight", "bias", "target", "class_weight")[place]
            raise RuntimeError(
                f"linear_cross_entropy_sum was not asked for the gradient of {name}, which requires one: say so in needed,"
                " or call linear_cross_entropy_reduced, which decides by itself"
            )
    ctx.set_materialize_grads(False)  # the gradients' own would be zeros as large as they are
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    inputs: Sequence[Any] = ctx.saved_tensors[:_TENSORS]
    found: Sequence[Tensor] = ctx.saved_tensors[_TENSORS:]
    nothing = (None,) * (len(ctx.options) + 1)
    if grad is None:
        return *(None for _ in inputs), *nothing
    if torch.is_grad_enabled():  # the gradient of the gradient is asked for
        log_z = linear_cross_entropy(*inputs, *ctx.options)[1]
        seeds = grad.expand(log_z.shape), torch.zeros_like(log_z)
        arguments: Sequence[Any] = (*inputs, log_z, *ctx.options, [*ctx.needed, False])
        scaled: Sequence[Tensor] = gradients(*seeds, *arguments)
    else:
        scaled = [
            (grad * one).to(like.dtype) if need else one
            for one, like, need in zip(found, inputs[:3], ctx.needed, strict=True)
        ]
    to_x, to_weight, to_bias = (one if need else None for one, need in zip(scaled[:3], ctx.needed, strict=True))
    return to_x, to_weight, to_bias, None, None, *nothing


def _sum_cost(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Cost:
    """The loss of each position, a product for each of x and weight, and per logit about 3 operations beside."""
    *arguments, needed = rest
    loss = REGISTRY[linear_cross_entropy].cost(x, weight, bias, *arguments)
    asked = [like for like, need in zip((x, weight, bias), needed, strict=True) if need and like is not None]
    products = bool(needed[0]) + bool(needed[1])
    flops = positions(x) * (2 * products * weight.numel() + 3 * bool(asked) * weight.shape[0])
    size = loss_dtype(x).itemsize
    return Cost(loss.flops + flops, loss.bytes_read, size * (1 + sum(like.numel() for like in asked)))


linear_cross_entropy_sum: OpOverload = KernelSpec(
    name="linear_cross_entropy_sum",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index,"
        " float label_smoothing, float? softcap, int chunk, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    reference=gradient.linear_cross_entropy_sum,
    fake=_sum_fake,
    setup_context=_save,
    backward=_backward,
    cost=_sum_cost,
    autocast=("x",),
    implementations={
        "cpu": "rewriter.kernels.cross_entropy.summed:linear_cross_entropy_sum",
        "cuda": "rewriter.kernels.cross_entropy.launch:linear_cross_entropy_sum",
    },
).register()


def _composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
    chunk: int,
) -> Tensor:
    """`linear_cross_entropy_sum` with the gradients that are asked for; `linear_cross_entropy` where it cannot."""
    reference.check_reduction(reduction)
    arguments = (x, weight, bias, target, class_weight, ignore_index, label_smoothing, softcap, chunk)
    needed = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (x, weight, bias)]
    # The sum has no gradient for class weights, and no batching rule.
    learns = class_weight is not None and class_weight.requires_grad
    whole = learns or torch._C._are_functorch_transforms_active()
    if whole:
        total = linear_cross_entropy(*arguments)[0].sum()
    else:
        total = linear_cross_entropy_sum(*arguments, needed)[0]
    return reference.reduced(total, target, class_weight, ignore_index, reduction)


def _reduced_fake(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> Tensor:
    class_weight, _, smoothing, softcap, reduction, chunk = rest
    reference.check(x, weight, bias, target, class_weight, smoothing, softcap, chunk)
    reference.check_reduction(reduction)
    return x.new_empty((), dtype=loss_dtype(x))


def _reduced_cost(x: Tensor, *rest: Any) -> Cost:
    """Of the losses, which stay where they are."""
    *arguments, _, chunk = rest
    loss = REGISTRY[linear_cross_entropy].cost(x, *arguments, chunk)
    return Cost(loss.flops, loss.bytes_read, loss_dtype(x).itemsize)


linear_cross_entropy_reduced: OpOverload = KernelSpec(
    name="linear_cross_entropy_reduced",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index,"
        " float label_smoothing, float? softcap, str reduction, int chunk) -> Tensor"
    ),
    reference=reference.linear_cross_entropy_reduced,
    fake=_reduced_fake,
    cost=_reduced_cost,
    autocast=("x",),
    implementations={
        "cpu": "rewriter.kernels.cross_entropy.summed:linear_cross_entropy_reduced",
        "cuda": "rewriter.kernels.cross_entropy.launch:linear_cross_entropy_reduced",
    },
    composite=_composite,
).register()
