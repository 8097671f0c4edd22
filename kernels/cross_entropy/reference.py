# SPDX-License-Identifier: Apache-2.0
"""The cross entropy of a dense head in plain aten, some classes at a time: no tensor of positions times classes.

    l_i = cap(w_i·x + b_i),  cap(l) = c tanh(l / c) or l      log Z = log Σ_i exp l_i
    loss = (1 − ε) m_y (log Z − l_y) + ε/V Σ_i m_i (log Z − l_i)      ε the smoothing, m class weights; 0 where y is ignored

With respect to the logits, for a gradient g of the loss and z of log Z:

    ∂l_i = (g ((1 − ε) m_y + ε/V Σ_j m_j) + z) exp(l_i − log Z) − g (1 − ε) m_y [i = y] − g ε/V m_i

The classes are walked in chunks both ways, and the logits computed anew on the way back. Each chunk of the weight is read
once and has its gradient finished at once, so nothing of the weight's size is accumulated.
"Cut cross-entropy" (Wijmans et al., arXiv 2411.09009) and Liger's fused linear cross-entropy do the same in one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.after_head.shared import check_linear, check_smoothing
from rewriter.kernels.vq_logits.shared import check_per_token, check_target

Pair = tuple[Tensor, Tensor]
_AT_ONCE, _ROWS = 4096, 128


def loss_dtype(x: Tensor) -> torch.dtype:
    """Losses are float32 at least: sums over thousands of classes."""
    return torch.promote_types(x.dtype, torch.float32)


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
    """Losses of ``x Wᵀ + b`` against class numbers, not reduced, and their log Z.

    Args:
        x: ``[..., d]``, floating.
        weight: ``[V, d]``; bias: ``[V]`` or None. Both are read in the dtype of ``x``, as a linear's would be.
        target: int64 ``[...]``.
        class_weight: ``[V]`` or None.
        ignore_index: the target whose positions have loss 0.
        label_smoothing: ε in [0, 1].
        softcap: c > 0, or None for logits as they are.
        chunk: classes whose logits are formed at a time.

    Returns:
        loss and log Z, both ``[...]`` in float32 at least. log Z is that of the position, also where it is ignored.

    Raises:
        RuntimeError: tensors or options that do not fit.
        IndexError: a target outside the classes that is not ignored.
    """
    check(x, weight, bias, target, class_weight, label_smoothing, softcap, chunk)
    which = Targets.of(x, target, class_weight, weight.shape[0], ignore_index)
    parts = []
    picked = smooth = torch.zeros_like(which.own)
    for start, logits in chunks(x, weight, bias, softcap, chunk):
        parts.append(torch.logsumexp(logits, -1))
        picked = picked + which.pick(logits, start)
        if label_smoothing:
            smooth = smooth + (logits * which.weights[start : start + chunk]).sum(-1)
    log_z = torch.logsumexp(torch.stack(parts, -1), -1)
    loss = which.own * (log_z - picked)
    if label_smoothing:
        rest = (log_z * which.weights.sum() - smooth) / weight.shape[0]
        loss = (1.0 - label_smoothing) * loss + label_smoothing * rest
    return torch.where(which.counted, loss, 0.0).contiguous(), log_z.contiguous()


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
    """`linear_cross_entropy` as ``F.cross_entropy`` reduces it, ``[]`` in float32 at least.

    Args: as there, and
        reduction: ``"sum"``, or ``"mean"``: the sum over the weights m_y of all positions that are not ignored.
    """
    check_reduction(reduction)
    losses, _ = linear_cross_entropy(
        x, weight, bias, target, class_weight, ignore_index, label_smoothing, softcap, chunk
    )
    return reduced(losses.sum(), target, class_weight, ignore_index, reduction)


def reduced(total: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """The sum of all losses as the reduction wants it."""
    if reduction == "sum":
        return total
    # Σ loss / Σ m_y; NaN where nothing is counted, and then without a gradient, as torch has it
    counted = target != ignore_index
    if class_weight is not None:
        own = F.embedding(torch.where(counted, target, 0), class_weight.to(total.dtype).unsqueeze(-1)).squeeze(-1)
        number = torch.where(counted, own, 0.0).sum()
    else:
        number = counted.sum()
    nothing = number == 0
    return torch.where(nothing, torch.nan, total / torch.where(nothing, 1, number))


def chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    """(first class, logits ``[..., ≤ chunk]``): the product in the dtype of x, the rest in float32 at least."""
    for start in range(0, weight.shape[0], chunk):
        rows = weight[start : start + chunk].to(x.dtype)
        offsets = None if bias is None else bias[start : start + chunk].to(x.dtype)
        logits = F.linear(x, rows, offsets).to(loss_dtype(x))
        yield start, logits if softcap is None else softcap * torch.tanh(logits / softcap)


@dataclass(frozen=True)
class Targets:
    """Which class each position wants, and what that weighs.

    Attributes:
        counted: bool ``[...]``, False where the target is ignored.
        token: the targets, 0 where ignored.
        weights: m ``[V]``, ones where the caller gave none.
        own: m_y ``[...]``.
    """

    counted: Tensor
    token: Tensor
    weights: Tensor
    own: Tensor

    @classmethod
    def of(cls, x: Tensor, target: Tensor, class_weight: Tensor | None, classes: int, ignore_index: int) -> Targets:
        counted = target != ignore_index
        token = torch.where(counted, target, 0)
        wide = loss_dtype(x)
        ones = torch.ones(classes, dtype=wide, device=x.device)
        weights = ones if class_weight is None else class_weight.to(wide)
        # As an embedding, because that refuses a token outside the classes where indexing would wrap around.
        return cls(counted, token, weights, F.embedding(token, weights.unsqueeze(-1)).squeeze(-1))

    def place(self, logits: Tensor, start: int) -> Pair:
        """Whether a position's class is in a chunk of logits, bool ``[..., 1]``, and where, int64 ``[..., 1]``."""
        local = self.token - start
        inside = (local >= 0) & (local < logits.shape[-1])
        return inside.unsqueeze(-1), torch.where(inside, local, 0).unsqueeze(-1)

    def pick(self, logits: Tensor, start: int) -> Tensor:
        """l_y ``[...]`` where the class is in this chunk of logits, else 0."""
        inside, local = self.place(logits, start)
        return torch.where(inside, logits.gather(-1, local), 0.0).squeeze(-1)


def block_rows(classes: int, chunk: int) -> int:
    """Positions at a time where all classes are at once: as many logits as `_AT_ONCE` positions have in a chunk of classes.

    Products of fewer than `_ROWS` positions would read the weight more often than they use it.
    """
    return max(_ROWS, _AT_ONCE * chunk // classes)


def check_reduction(reduction: str) -> None:
    torch._check(reduction in ("mean", "sum"), lambda: f"reduction must be 'mean' or 'sum', not {reduction!r}")


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    chunk: int,
) -> None:
    """Refuse arguments that do not fit (RuntimeError)."""
    check_linear(x, weight, bias)
    check_target(x, target)
    check_per_token("class_weight", class_weight, weight)
    check_smoothing(label_smoothing)
    torch._check(softcap is None or softcap > 0, lambda: f"softcap must be positive or None, not {softcap}")
    torch._check(chunk >= 1, lambda: f"chunk must be at least 1, not {chunk}")
