# SPDX-License-Identifier: Apache-2.0
"""The sum of `linear_cross_entropy` over all positions, with its gradients at once: three products instead of four.

What a sum (or mean) hands back to every position is one number, so the gradients are those of the sum times that number,
and the way there can already form them while a block of logits exists:

    P = softmax(L)     ∂L = s P − o [i = y] − e m     ∂X = ∂L W     ∂W = Σ_blocks ∂Lᵀ X     ∂b = Σ ∂L

with o = (1 − ε) m_y, e = ε/V and s = o + e Σ_i m_i. Nothing is left to recompute on the way back. Liger's fused linear cross
entropy (arXiv 2410.10989) and Apple's cut cross-entropy (Wijmans et al., arXiv 2411.09009) discuss both ways.

On a CPU a block is some positions times all classes, in one buffer that is overwritten from logits to gradients. Positions
whose target is ignored are left out from the start, and cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.cross_entropy.blocked import add_product
from rewriter.kernels.cross_entropy.gradient import Summed
from rewriter.kernels.cross_entropy.reference import Targets, block_rows, check, check_reduction, loss_dtype, reduced


def linear_cross_entropy_reduced(
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
    """As the reference: the sum below, without gradients."""
    check_reduction(reduction)
    total, *_ = linear_cross_entropy_sum(
        x, weight, bias, target, class_weight, ignore_index, label_smoothing, softcap, chunk, (False, False, False)
    )
    return reduced(total, target, class_weight, ignore_index, reduction)


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
    """As `gradient.linear_cross_entropy_sum`; a block has at most 4096 · ``chunk`` logits, or 128 positions."""
    check(x, weight, bias, target, class_weight, label_smoothing, softcap, chunk)
    classes, wide = weight.shape[0], loss_dtype(x)
    flat, tokens = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1)
    Targets.of(flat, tokens, class_weight, classes, ignore_index)  # refuses targets outside the classes
    places = (tokens != ignore_index).nonzero().squeeze(1)
    some = len(places) < len(tokens)
    kept, tokens = (flat[places], tokens[places]) if some else (flat, tokens)
    which = Targets.of(kept, tokens, class_weight, classes, ignore_index)
    to_own, to_each = (1.0 - label_smoothing) * which.own, label_smoothing / classes
    to_share = (to_own + to_each * which.weights.sum()).unsqueeze(1)
    plain = class_weight is None and not label_smoothing  # s = 1
    losses = torch.zeros_like(which.own)
    narrow_weight = weight.to(x.dtype)
    to_x = torch.empty(kept.shape, dtype=wide) if needed[0] else None
    to_weight = torch.zeros(weight.shape, dtype=wide) if needed[1] else None
    to_bias = torch.zeros(classes, dtype=wide) if needed[2] else None
    for rows, logits in _blocks(kept, narrow_weight, bias, block_rows(classes, chunk)):
        slope = None
        if softcap is not None:
            logits.div_(softcap).tanh_()
            slope = 1.0 - logits.square()
            logits.mul_(softcap)
        own, maximum = tokens[rows].unsqueeze(1), logits.amax(1)
        below = maximum - logits.gather(1, own).squeeze(1)
        smooth = logits @ which.weights if label_smoothing else None
        # One exponential for loss and gradient, and a vectorised one: exp_ takes ten times as long where it underflows.
        through = torch.softmax(logits, 1, out=logits)
        log_total = -through.amax(1).log()  # of Σ exp(l − m): the largest probability is exp(0) over it
        losses[rows] = to_own[rows] * (log_total + below)
        if smooth is not None:
            losses[rows] += to_each * ((maximum + log_total) * which.weights.sum() - smooth)
        if not any(needed):
            continue
        # ∂L = s P − o [i = y] − e m
        if not plain:
            through.mul_(to_share[rows])
        through.scatter_add_(1, own, -to_own[rows].unsqueeze(1))
        if label_smoothing:
            through.sub_(to_each * which.weights)
        if slope is not None:
            through.mul_(slope)
        narrow = through.to(x.dtype)
        if to_x is not None:
            to_x[rows] = narrow @ narrow_weight
        if to_weight is not None:
            add_product(to_weight, narrow.t(), kept[rows])
        if to_bias is not None:
            to_bias += through.sum(0)
    empty = torch.empty(0, dtype=wide)
    if to_x is not None and some:
        to_x = torch.zeros(flat.shape, dtype=wide).index_copy_(0, places, to_x)
    return (
        losses.sum(),
        empty if to_x is None else to_x.reshape(x.shape),
        empty.clone() if to_weight is None else to_weight,
        empty.clone() if to_bias is None else to_bias,
    )


def _blocks(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """(positions, logits ``[≤ rows, V]`` to overwrite); memory that is used again need not be mapped again."""
    offsets = None if bias is None else bias.to(x.dtype)
    count = x.shape[0]
    buffer = torch.empty(min(rows, count), weight.shape[0], dtype=loss_dtype(x))
    for first in range(0, count, rows):
        block = slice(first, min(first + rows, count))
        logits = buffer[: block.stop - first]
        if buffer.dtype is not x.dtype:
            logits.copy_(F.linear(x[block], weight, offsets))
        elif offsets is None:
            torch.mm(x[block], weight.t(), out=logits)
        else:
            torch.addmm(offsets, x[block], weight.t(), out=logits)
        yield block, logits
