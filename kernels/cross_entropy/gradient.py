# SPDX-License-Identifier: Apache-2.0
"""Gradient of `linear_cross_entropy` in plain aten, from the logits computed anew; the formula is in `reference`.

Each chunk of classes has its part of the weight's gradient finished at once, so nothing of the weight's size is added up.
All of it is differentiable, so second derivatives are right too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.kernels.cross_entropy.reference import Targets, chunks, linear_cross_entropy, loss_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
Summed = tuple[Tensor, Tensor, Tensor, Tensor]


def gradients(
    grad: Tensor,
    grad_log_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    log_z: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk: int,
    needed: Sequence[bool],
) -> Gradients:
    """Gradients of x, weight, bias and class weights in their dtypes, given those of the loss and of log Z ``[...]``.

    ``needed`` says for each of the four whether it is asked for; an empty tensor stands for one that is not.
    """
    classes, flat = weight.shape[0], x.reshape(-1, x.shape[-1])
    which = Targets.of(x, target, class_weight, classes, ignore_index)
    kept = torch.where(which.counted, grad, 0.0)
    to_own = (1.0 - label_smoothing) * kept * which.own
    to_each = (label_smoothing / classes * kept).unsqueeze(-1)
    to_share = (to_own + grad_log_z).unsqueeze(-1) + to_each * which.weights.sum()
    to_x, to_weight, to_bias, to_class = None, [], [], []
    for start, logits in chunks(x, weight, bias, softcap, chunk):
        through = to_share * (logits - log_z.unsqueeze(-1)).exp()
        inside, local = which.place(logits, start)
        through = through.scatter_add(-1, local, torch.where(inside, -to_own.unsqueeze(-1), 0.0))
        if label_smoothing:
            through = through - to_each * which.weights[start : start + chunk]
        if softcap is not None:
            through = through * (1.0 - (logits / softcap).square())
        narrow = through.to(x.dtype)
        if needed[0]:
            part = (narrow @ weight[start : start + chunk].to(x.dtype)).to(through.dtype)
            to_x = part if to_x is None else to_x + part
        if needed[1]:
            to_weight.append((narrow.reshape(-1, narrow.shape[-1]).t() @ flat).to(weight.dtype))
        if needed[2]:
            to_bias.append(through.reshape(-1, through.shape[-1]).sum(0))
        if needed[3]:
            to_class.append(_to_class_weights(which, logits, log_z, start, (1.0 - label_smoothing) * kept, to_each))
    return (
        x.new_empty(0) if to_x is None else to_x.to(x.dtype),
        torch.cat(to_weight) if to_weight else x.new_empty(0),
        x.new_empty(0) if bias is None or not to_bias else torch.cat(to_bias).to(bias.dtype),
        x.new_empty(0) if class_weight is None or not to_class else torch.cat(to_class).to(class_weight.dtype),
    )


def linear_cross_entropy_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk: int,
    needed: Sequence[bool],
) -> Summed:
    """The loss summed, and its gradients with respect to x, weight and bias, in plain aten.

    Args: as `reference.linear_cross_entropy`, and
        needed: which of the three gradients are asked for; an empty tensor stands for one that is not.

    Returns:
        Σ loss ``[]`` and the gradients in the shapes of x, weight and bias, all in float32 at least: they are yet to be
        multiplied by what the sum receives, and rounded once then.
    """
    args = (x, weight, bias, target, class_weight)
    options = (ignore_index, label_smoothing, softcap, chunk)
    losses, log_z = linear_cross_entropy(*args, *options)
    if not any(needed):
        return losses.sum(), *no_gradients(x)
    ones, zeros = torch.ones_like(losses), torch.zeros_like(losses)
    found = gradients(ones, zeros, *args, log_z, *options, [*needed, False])
    to_x, to_weight, to_bias = (g.to(losses.dtype, copy=True) for g in found[:3])
    return losses.sum(), to_x, to_weight, to_bias


def no_gradients(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three empty tensors, of memory of their own, as results of an operator must be."""
    first, second, third = (x.new_empty(0, dtype=loss_dtype(x)) for _ in range(3))
    return first, second, third


def _to_class_weights(
    which: Targets, logits: Tensor, log_z: Tensor, start: int, to_nll: Tensor, to_each: Tensor
) -> Tensor:
    """Σ over positions of g (1 − ε) [i = y] (log Z − l_i) + g ε/V (log Z − l_i), ``[≤ chunk]``."""
    missing = log_z.unsqueeze(-1) - logits
    inside, local = which.place(logits, start)
    own = torch.where(inside, to_nll.unsqueeze(-1), 0.0)
    per_position = missing * torch.zeros_like(missing).scatter_add(-1, local, own) + missing * to_each
    return per_position.reshape(-1, per_position.shape[-1]).sum(0)
