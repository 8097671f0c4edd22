# SPDX-License-Identifier: Apache-2.0
"""What an error somewhere inside a program costs at its outputs: the Gauss-Newton metric, sampled by one backward pass.

    an error e at a node moves the outputs y by J e and costs ½ eᵀ(JᵀMJ)e;   g = Jᵀu with E[uuᵀ] = M has E[ggᵀ] = JᵀMJ

    logits          KL divergence:  M = diag(p) - ppᵀ,  u = onehot(k) - p with k drawn from p = softmax(y)
    other outputs   squared error:  M = I,              u = ±1, each with probability one half

Only the outputs' own distribution is used, so data needs no labels. Rows of a batch and positions of a sequence draw
independently; their cross terms vanish in expectation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.program import Program
from rewriter.views import HEAD
from rewriter.views.linear import features


def vocabulary(program: Program) -> int | None:
    """The number of logits of a program that ends in a head."""
    head = next(iter(HEAD.find(program)), None)
    return None if head is None else features(program.facts, head)[1]


def probe(outputs: Sequence[Tensor], vocabulary: int | None, generator: torch.Generator) -> Tensor | None:
    """Σ y·u over all outputs that carry a gradient, u drawn as above and constant; None where none does.

    Args:
        outputs: of one run, under autograd.
        vocabulary: an output of this last size holds logits.
        generator: on the CPU; rows draw in order, so batches of other sizes draw the same.
    """
    total: Tensor | None = None
    for y in outputs:
        if not y.requires_grad:
            continue
        u = _logit_probe(y.detach(), generator) if y.shape[-1:] == (vocabulary,) else _sign_probe(y, generator)
        part = (y * u).sum()
        total = part if total is None else total + part
    return total


def _logit_probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    p = logits.double().softmax(-1) if logits.dtype is torch.float64 else logits.float().softmax(-1)
    rows = p.flatten(0, -2)
    drawn = torch.rand((len(rows), 1), generator=generator, dtype=torch.float64).to(p)
    # Inverse transform; a draw above the rounded sum of all probabilities takes the last class.
    chosen = torch.searchsorted(rows.cumsum(-1), drawn, right=True).clamp_max(rows.shape[-1] - 1)
    return (-rows).scatter_add(-1, chosen, torch.ones_like(drawn)).view_as(logits).to(logits.dtype)


def _sign_probe(y: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(y.shape, generator=generator, dtype=torch.float64) < 0.5).to(y) * 2 - 1
