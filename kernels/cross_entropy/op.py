# SPDX-License-Identifier: Apache-2.0
"""The operator `rewriter::linear_cross_entropy`; importing this module registers it with torch.

What it computes, and the gradient, are written in `rewriter.kernels.cross_entropy.reference`. log Z is a second result
because the way back needs it, and because penalties on it (z-loss) are common. Gradients flow to x, weight, bias and class
weights; the backward is differentiable aten of saved inputs and results, so second derivatives are right too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.cross_entropy import reference
from rewriter.kernels.cross_entropy.reference import Pair, Targets, loss_dtype
from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits.shared import positions, tensor_bytes

_ACTIVATIONS = (0, 3)  # x and target: what may have more leading dimensions


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
    x, weight, bias, target, class_weight, log_z = ctx.saved_tensors
    ignore_index, smoothing, softcap, chunk = ctx.options
    classes, flat = weight.shape[0], x.reshape(-1, x.shape[-1])
    which = Targets.of(x, target, class_weight, classes, ignore_index)
    kept = torch.where(which.counted, grad, 0.0)
    to_own = (1.0 - smoothing) * kept * which.own
    to_each = (smoothing / classes * kept).unsqueeze(-1)
    to_share = (to_own + grad_log_z).unsqueeze(-1) + to_each * which.weights.sum()
    to_x, to_weight, to_bias, to_class = None, [], [], []
    for start, logits in reference.chunks(x, weight, bias, softcap, chunk):
        through = to_share * (logits - log_z.unsqueeze(-1)).exp()
        inside, local = which.place(logits, start)
        through = through.scatter_add(-1, local, torch.where(inside, -to_own.unsqueeze(-1), 0.0))
        if smoothing:
            through = through - to_each * which.weights[start : start + chunk]
        if softcap is not None:
            through = through * (1.0 - (logits / softcap).square())
        narrow = through.to(x.dtype)
        if ctx.needs_input_grad[0]:
            part = (narrow @ weight[start : start + chunk].to(x.dtype)).to(through.dtype)
            to_x = part if to_x is None else to_x + part
        if ctx.needs_input_grad[1]:
            to_weight.append((narrow.reshape(-1, narrow.shape[-1]).t() @ flat).to(weight.dtype))
        if ctx.needs_input_grad[2]:
            to_bias.append(through.reshape(-1, through.shape[-1]).sum(0))
        if ctx.needs_input_grad[4]:
            to_class.append(_to_class_weights(which, logits, log_z, start, (1.0 - smoothing) * kept, to_each))
    return (
        None if to_x is None else to_x.to(x.dtype),
        torch.cat(to_weight) if to_weight else None,
        torch.cat(to_bias).to(bias.dtype) if to_bias else None,
        None,
        torch.cat(to_class).to(class_weight.dtype) if to_class else None,
        *(None for _ in ctx.options),
    )


def _to_class_weights(
    which: Targets, logits: Tensor, log_z: Tensor, start: int, to_nll: Tensor, to_each: Tensor
) -> Tensor:
    """Σ over positions of g (1 − ε) [i = y] (log Z − l_i) + g ε/V (log Z − l_i), ``[≤ chunk]``."""
    missing = log_z.unsqueeze(-1) - logits
    inside, local = which.place(logits, start)
    own = torch.where(inside, to_nll.unsqueeze(-1), 0.0)
    per_position = missing * torch.zeros_like(missing).scatter_add(-1, local, own) + missing * to_each
    return per_position.reshape(-1, per_position.shape[-1]).sum(0)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Pair, tuple[int, int]]:
    """Batched inputs and targets are one more leading dimension; with other tensors batched, one call per example."""
    front = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims, strict=True)]
    batched = [d is not None for d in in_dims]
    if not any(on for i, on in enumerate(batched) if i not in _ACTIVATIONS):
        for i in _ACTIVATIONS:
            if not batched[i]:
                front[i] = front[i].unsqueeze(0).expand(info.batch_size, *front[i].shape)
        return linear_cross_entropy(*front), (0, 0)
    if info.batch_size == 0:
        raise NotImplementedError("linear_cross_entropy: vmap over weights needs at least one example")
    examples = [
        linear_cross_entropy(*(a[n] if on else a for a, on in zip(front, batched, strict=True)))
        for n in range(info.batch_size)
    ]
    losses, log_zs = zip(*examples, strict=True)
    return (torch.stack(losses), torch.stack(log_zs)), (0, 0)


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
    vmap=_vmap,
    cost=_cost,
    autocast=("x",),
).register()
