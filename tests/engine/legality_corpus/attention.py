# SPDX-License-Identifier: Apache-2.0
"""Attention: masks, padding, scales"""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Refused, Rewritten, case, numbers
from .rules import ATTENTION

heads = lambda *more: (*(numbers(2, 3, 5, 4, seed=i).requires_grad_() for i in range(3)), *more)  # noqa: E731
LOWEST = torch.finfo(torch.float64).min


def left_padding(lowest: float) -> Tensor:
    """[2, 1, 1, 5]: the first row of the batch has two padding positions on the left."""
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    mask[0, ..., :2] = lowest
    return mask


def nothing_seen(lowest: float) -> Tensor:
    """[5, 5]: causal, and the first query sees not even itself."""
    return torch.full((5, 5), lowest, dtype=torch.float64).triu(1).where(torch.arange(5)[:, None] > 0, lowest)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * 0.5


@case(ATTENTION, Rewritten(), heads)
def attention_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No mask."""
    return torch.softmax(scores(q, k), -1) @ v


@case(ATTENTION, Rewritten(), lambda: heads(left_padding(LOWEST)))
def left_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """An additive mask of the lowest number, broadcast over heads and queries."""
    return torch.softmax(scores(q, k) + mask, -1) @ v


@case(ATTENTION, Rewritten(), lambda: heads(left_padding(LOWEST)))
def mask_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """mask + scores, and the scale on the left."""
    return torch.softmax(mask + 0.5 * (q @ k.transpose(-2, -1)), -1) @ v


@case(ATTENTION, Rewritten(), lambda: (*(t.detach() for t in heads()), nothing_seen(LOWEST)))
def row_that_sees_nothing(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """With the lowest number added everywhere it sees everything alike; an additive mask keeps that.

    Values only: in such rows the gradients of torch's fused kernels are wrong, with or without a rewrite.
    """
    return torch.softmax(scores(q, k) + mask, -1) @ v


@case(ATTENTION, Refused("guard", "-inf"), heads)
def row_that_sees_nothing_at_minus_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax of −∞ everywhere is NaN; the fused operator says zero."""
    rows = torch.arange(5)
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(rows[:, None] <= rows, float("-inf"))
    return torch.softmax(scores(q, k) + mask, -1) @ v


@case(ATTENTION, Refused("pattern", ""), lambda: heads(torch.ones(5, 5, dtype=torch.bool).tril()))
def boolean_mask_that_is_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """True adds 1; the fused operator reads True as "keep"."""
    return torch.softmax(scores(q, k) + mask, -1) @ v


@case(ATTENTION, Refused("pattern", ""), lambda: heads(numbers(4, 1, 1, 5, 5, seed=9)))
def mask_that_makes_the_scores_larger(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A mask with a dimension more."""
    return torch.softmax(scores(q, k) + mask, -1) @ v


@case(ATTENTION, Refused("guard", "fewer than two dimensions", possible=True), lambda: heads(numbers(5, seed=9)))
def mask_of_one_dimension(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """It broadcasts when added; the fused operator does not take it."""
    return torch.softmax(scores(q, k) + mask, -1) @ v


@case(ATTENTION, Refused("pattern", "dim"), heads)
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The other of two dimensions of one size."""
    return torch.softmax(scores(q, k), -2) @ v


@case(ATTENTION, Refused("pattern", ""), heads)
def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """output_attentions=True"""
    p = torch.softmax(scores(q, k), -1)
    return p @ v, p


@case(ATTENTION, Refused("pattern", "detach"), heads)
def weights_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No gradient for q and k."""
    return torch.softmax(scores(q, k), -1).detach() @ v


@case(ATTENTION, Refused("pattern", ""), lambda: heads(torch.tensor(0.5, dtype=torch.float64).requires_grad_()))
def learned_scale(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """The scale is a tensor that wants a gradient."""
    return torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v


@case(ATTENTION, Refused("pattern", ""), heads)
def key_not_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q times a square slice of k as it is."""
    return torch.softmax(q @ k[..., :4, :] * 0.5, -1) @ v[..., :4, :]
