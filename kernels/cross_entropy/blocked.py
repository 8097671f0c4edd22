# SPDX-License-Identifier: Apache-2.0
"""`linear_cross_entropy` and its gradient on a CPU: the reference, in blocks that stay in the cache, and in place.

The reference's chunks are all positions times some classes, megabytes that go to memory and back for each operation on
them. Here a chunk of classes meets `ROWS` positions at a time; the maximum and the sum of exponentials are carried along:

    m' = max(m, max_i l_i)          s' = s exp(m − m') + Σ_i exp(l_i − m')          log Z = m + log s

Running the way back costs a product more than eager code, which keeps the logits: four instead of three. Where the losses
are summed, `summed` needs three as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.cross_entropy.gradient import Gradients
from rewriter.kernels.cross_entropy.reference import Pair, Targets, check, loss_dtype
from rewriter.kernels.launching import Unsupported

ROWS = 1024  # positions whose logits exist at a time


def linear_cross_entropy(
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
    """As the reference."""
    check(x, weight, bias, target, class_weight, label_smoothing, softcap, chunk)
    flat = x.reshape(target.numel(), x.shape[-1])
    which = Targets.of(flat, target.reshape(-1), class_weight, weight.shape[0], ignore_index)
    picked, total, smooth = (torch.zeros_like(which.own) for _ in range(3))
    maximum = torch.full_like(which.own, -torch.inf)
    for start, rows, logits in _blocks(flat, weight, bias, softcap, chunk):
        inside, local = _place(which, rows, start, logits)
        picked[rows] += torch.where(inside, logits.gather(1, local), 0.0).squeeze(1)
        if label_smoothing:
            smooth[rows] += logits @ which.weights[start : start + logits.shape[1]]
        larger = torch.maximum(maximum[rows], logits.amax(1))
        base = _finite(larger)
        total[rows] = total[rows] * (maximum[rows] - base).exp() + logits.sub_(base.unsqueeze(1)).exp_().sum(1)
        maximum[rows] = larger
    log_z = _finite(maximum) + total.log()
    loss = which.own * (log_z - picked)
    if label_smoothing:
        rest = (log_z * which.weights.sum() - smooth) / weight.shape[0]
        loss = (1.0 - label_smoothing) * loss + label_smoothing * rest
    return torch.where(which.counted, loss, 0.0).reshape(target.shape), log_z.reshape(target.shape)


def linear_cross_entropy_backward(
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
    """As `gradient.gradients`; not for class weights that learn."""
    if needed[3]:
        raise Unsupported("gradients of class weights")
    flat = x.reshape(target.numel(), x.shape[-1])
    classes, wide = weight.shape[0], loss_dtype(x)
    which = Targets.of(flat, target.reshape(-1), class_weight, classes, ignore_index)
    kept = torch.where(which.counted, grad.reshape(-1), 0.0)
    to_own = (1.0 - label_smoothing) * kept * which.own
    to_each = label_smoothing / classes * kept
    to_share = (to_own + grad_log_z.reshape(-1) + to_each * which.weights.sum()).unsqueeze(1)
    shift = log_z.reshape(-1, 1)
    to_x = torch.zeros_like(flat, dtype=wide) if needed[0] else None
    to_weight = torch.zeros(weight.shape, dtype=wide) if needed[1] else None
    to_bias = torch.zeros(classes, dtype=wide) if needed[2] else None
    for start, rows, logits in _blocks(flat, weight, bias, softcap, chunk):
        part = slice(start, start + logits.shape[1])
        slope = None if softcap is None else 1.0 - (logits / softcap).square()
        # ∂l_i = (g ((1 − ε) m_y + ε/V Σ_j m_j) + z) exp(l_i − log Z) − g (1 − ε) m_y [i = y] − g ε/V m_i
        through = logits.sub_(shift[rows]).exp_().mul_(to_share[rows])
        inside, local = _place(which, rows, start, logits)
        through.scatter_add_(1, local, torch.where(inside, -to_own[rows].unsqueeze(1), 0.0))
        if label_smoothing:
            through.addr_(to_each[rows], which.weights[part], alpha=-1.0)
        if slope is not None:
            through.mul_(slope)
        narrow = through.to(x.dtype)
        if to_x is not None:
            add_product(to_x[rows], narrow, weight[part].to(x.dtype))
        if to_weight is not None:
            add_product(to_weight[part], narrow.t(), flat[rows])
        if to_bias is not None:
            to_bias[part] += through.sum(0)
    return (
        x.new_empty(0) if to_x is None else to_x.to(x.dtype).reshape(x.shape),
        x.new_empty(0) if to_weight is None else to_weight.to(weight.dtype),
        x.new_empty(0) if to_bias is None or bias is None else to_bias.to(bias.dtype),
        x.new_empty(0),
    )


def _blocks(
    x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, chunk: int
) -> Iterator[tuple[int, slice, Tensor]]:
    """(first class, positions, logits ``[≤ ROWS, ≤ chunk]`` to overwrite), positions fastest."""
    wide = loss_dtype(x)
    for start in range(0, weight.shape[0], chunk):
        classes = weight[start : start + chunk].to(x.dtype)
        offsets = None if bias is None else bias[start : start + chunk].to(x.dtype)
        for first in range(0, x.shape[0], ROWS):
            rows = slice(first, min(first + ROWS, x.shape[0]))
            logits = F.linear(x[rows], classes, offsets).to(wide)
            yield start, rows, logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _place(which: Targets, rows: slice, start: int, logits: Tensor) -> Pair:
    """Whether a position's class is in this block ``[rows, 1]``, and where."""
    local = which.token[rows] - start
    inside = (local >= 0) & (local < logits.shape[1])
    return inside.unsqueeze(1), torch.where(inside, local, 0).unsqueeze(1)


def _finite(maximum: Tensor) -> Tensor:
    """What to subtract before the exponential: m, but 0 where it is infinite, since ∞ − ∞ is NaN."""
    return torch.where(maximum.isinf(), 0.0, maximum)


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total += first @ second, of 16-bit factors too, whose product is rounded once."""
    if first.dtype is total.dtype:
        total.addmm_(first, second)
    else:
        total += first @ second
