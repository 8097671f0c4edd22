# SPDX-License-Identifier: Apache-2.0
"""Codes for a weight that make its *outputs* right: rounding in sequence, then descent over scales and codes.

    minimise over codes and scales   Σ_o e_o H e_oᵀ,   e = W - Ŵ,   H = E[x xᵀ]

1.  Columns are rounded one after another; those not rounded yet move to make up for the error made so far
    (`rewriter.passes.shift_add.hessian`). Updates of far columns wait until a block is done. In the inputs' order of
    energy all scales are fitted beforehand, else each group's when its first column is reached, on the weights as
    compensated so far. A row whose plain rounding costs less is taken back to that.

2.  Groups are visited in turn, a few times. With T = E H (the gradient) a visit takes

        scales:  c += (Dᵀ H_gg D)⁻¹ Dᵀ T_gᵀ        D: what a group's codes multiply its scales with
        codes:   ŵ_j = the level nearest to ŵ_j + T_j / H_jj,   column by column

    The first is least squares in the metric H, kept where it still pays once scales are rounded as stored; the second
    is the exact minimum over one code, all others fixed. So the cost of a row never grows.

The mode only says what the levels of a group are and how they depend on its scales (`rewriter.passes.shift_add.modes`),
so this is one code for all of them.

Frantar et al., "GPTQ", 2022, for the first step; the second is coordinate descent as in Behdin et al., "QuantEase",
2023, here with the scales in the loop.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rewriter.kernels.shift_add.codec import ceil_div, group_width
from rewriter.passes.shift_add.codes import joined
from rewriter.passes.shift_add.groups import GAIN, WIDE, Rounding, check_group, check_weight
from rewriter.passes.shift_add.hessian import Metric
from rewriter.passes.shift_add.modes import Codes, Grid, Mode

VISITS = 3  # the first brings most of what there is to gain; a fourth would take another half percent off the error
BLOCK = 128  # columns between two updates of all that follow
CHUNK_ELEMENTS = 1 << 21  # weights whose rows are worked on together: about 100 MB


@torch.no_grad()
def fit(
    weight: Tensor,
    mode: Mode,
    metric: Metric,
    *,
    group: int = 128,
    visits: int = VISITS,
    rows_per_chunk: int | None = None,
) -> Codes:
    """Fit a dense weight in the metric of its inputs; deterministic.

    In that metric the result is never worse than `modes.fit` of the same weight, row by row. Where the metric is a
    multiple of the identity, ``visits=0`` gives the very same codes.

    Args:
        weight: ``[out, in]``, floating and finite.
        mode: how to spell it.
        metric: of the inputs ``[in, in]``.
        group: weights along ``in`` that share scales; wider than the row means the row.
        visits: of every group after rounding in sequence.
        rows_per_chunk: rows worked on at once.

    Raises:
        PlanError: ``group`` out of range.
        ValueError: the weight is not a finite floating matrix, or the metric is of another width.
    """
    check_group(group)
    check_weight(weight)
    if metric.form.shape[0] != weight.shape[1]:
        raise ValueError(f"a metric of {metric.form.shape[0]} inputs does not fit a weight {list(weight.shape)}")
    rounding = mode.rounding(weight, group)
    parts = []
    for rows in torch.split(weight.detach(), rows_per_chunk or max(1, CHUNK_ELEMENTS // weight.shape[1])):
        part = _Rows(rows, mode, metric, group, rounding)
        part.round_in_sequence()
        for _ in range(visits):
            part.visit_all()
        parts.append(mode.assemble(part.words, torch.stack(part.scales, dim=1), group, weight.dtype))
    return cast(Codes, joined(parts))


class _Rows:
    """Some rows on their way: per group scales and grid, per weight code word and value."""

    def __init__(self, rows: Tensor, mode: Mode, metric: Metric, group: int, rounding: Rounding) -> None:
        self.dense = rows
        self.target = rows.to(WIDE)
        self.mode, self.metric, self.rounding = mode, metric, rounding
        self.width = group_width(group, rows.shape[1])
        self.scales = [self._fitted(rows[:, self.columns(g)]) for g in range(ceil_div(rows.shape[1], self.width))]
        self.grids = [mode.grid(s) for s in self.scales]
        self.values, self.words = self._plain()
        self._fit_to_inputs()

    def columns(self, group: int) -> slice:
        return slice(group * self.width, min((group + 1) * self.width, self.dense.shape[1]))

    def _fitted(self, weight: Tensor) -> Tensor:
        return self.mode.fit_group(weight, self.rounding)

    def _fit_to_inputs(self) -> None:
        """Scales that count each weight by its input's energy, in every row where plain rounding then costs less.

        A grid fitted to the weights alone clips the few that outlying inputs read, and no compensation makes up for it.
        """
        energy = self.metric.form.diagonal()
        parts = [self.columns(g) for g in range(len(self.scales))]
        scales = [self.mode.fit_group(self.dense[:, part], self.rounding, energy[part]) for part in parts]
        start = self.scales, self.values, self.words
        self.grids = [self.mode.grid(s) for s in scales]
        values, words = self._plain()
        better = (self.metric.cost(self.target - values) < self.metric.cost(self.target - start[1]) * GAIN).unsqueeze(
            -1
        )
        self.scales = [torch.where(better, new, old) for new, old in zip(scales, start[0], strict=True)]
        self.values, self.words = torch.where(better, values, start[1]), torch.where(better, words, start[2])
        self.grids = [self.mode.grid(s) for s in self.scales]

    def _plain(self) -> tuple[Tensor, Tensor]:
        found = [grid.nearest(self.target[:, self.columns(g)]) for g, grid in enumerate(self.grids)]
        return torch.cat([values for values, _ in found], dim=1), torch.cat([words for _, words in found], dim=1)

    # ------------------------------------------------------------------------------ rounding in sequence

    def round_in_sequence(self) -> None:
        """Replace plain rounding by compensated rounding in every row where that costs less."""
        scales, values, words = self._compensated()
        cost = self.metric.cost(self.target - values)
        better = (cost < self.metric.cost(self.target - self.values) * GAIN).unsqueeze(-1)
        self.values = torch.where(better, values, self.values)
        self.words = torch.where(better, words, self.words)
        self.scales = [torch.where(better, new, old) for new, old in zip(scales, self.scales, strict=True)]
        self.grids = [self.mode.grid(s) for s in self.scales]

    def _compensated(self) -> tuple[list[Tensor], Tensor, Tensor]:
        order, factor = self.metric.order, self.metric.factor
        rest = self.target[:, order]  # what is still to be rounded, in the order of rounding
        scales, grids = list(self.scales), list(self.grids)
        values, words = torch.empty_like(self.values), torch.empty_like(self.words)
        groups = (order // self.width).tolist()
        for first in range(0, len(order), BLOCK):
            block = slice(first, min(first + BLOCK, len(order)))
            errors = torch.empty_like(rest[:, block])
            for j in range(block.start, block.stop):
                g, column = groups[j], order[j]
                if not self.metric.sorted and j > 0 and j % self.width == 0:
                    # Later columns of the group lie in this block up to its end only: bring them up to date first.
                    ahead = slice(block.stop, min(j + self.width, len(order)))
                    pending = rest[:, j : ahead.stop].clone()
                    pending[:, block.stop - j :] -= errors[:, : j - first] @ factor[first:j, ahead]
                    scales[g] = self._fitted(pending.to(self.dense.dtype))
                    grids[g] = self.mode.grid(scales[g])
                value, word = grids[g].nearest(rest[:, j, None])
                values[:, column], words[:, column] = value[:, 0], word[:, 0]
                error = (rest[:, j] - value[:, 0]) / factor[j, j]
                rest[:, j + 1 : block.stop] -= error.unsqueeze(-1) * factor[j, j + 1 : block.stop]
                errors[:, j - first] = error
            rest[:, block.stop :] -= errors @ factor[block, block.stop :]
        return scales, values, words

    # ------------------------------------------------------------------------------ visits

    def visit_all(self) -> None:
        """Visit every group once: its scales, then its codes."""
        for g in range(len(self.scales)):
            self._visit_scales(g)
            here = self.columns(g)
            for first in range(here.start, here.stop, BLOCK):
                self._visit_codes(self.grids[g], slice(first, min(first + BLOCK, here.stop)))

    def _gradient(self, here: slice) -> Tensor:
        """T = E H in some columns."""
        return (self.target - self.values) @ self.metric.form[:, here]

    def _visit_scales(self, g: int) -> None:
        here = self.columns(g)
        own, gradient = self.metric.form[here, here], self._gradient(here)
        words, old = self.words[:, here], self.values[:, here]
        design = self.mode.design(words, self.scales[g])
        gram = design.transpose(1, 2) @ (own @ design)
        pull = (design * gradient.unsqueeze(-1)).sum(1)
        count = design.shape[-1]  # of a group's scales the first are the coefficients of its design
        scales = self.mode.refit(self.scales[g], self.scales[g][:, :count] + _solve(gram, pull), self.rounding)
        values = (design @ scales[:, :count].unsqueeze(-1)).squeeze(-1)
        step = values - old
        change = ((step @ own) * step).sum(-1) - 2 * (step * gradient).sum(-1)
        better = (change < 0).unsqueeze(-1)  # False also where a scale overflowed
        self.values[:, here] = torch.where(better, values, old)
        self.scales[g] = torch.where(better, scales, self.scales[g])
        self.grids[g] = self.mode.grid(self.scales[g])

    def _visit_codes(self, grid: Grid, here: slice) -> None:
        gradient = self._gradient(here)
        form = self.metric.form
        for j in range(here.start, here.stop):
            old, at = self.values[:, j].clone(), j - here.start
            value, word = grid.nearest((old + gradient[:, at] / form[j, j]).unsqueeze(-1))
            self.values[:, j], self.words[:, j] = value[:, 0], word[:, 0]
            gradient[:, at:].addcmul_((old - value[:, 0]).unsqueeze(-1), form[j, j : here.stop])


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Least squares ``gram [rows, d, d] · x = right [rows, d]``; a light ridge where codes leave scales undecided."""
    size = gram.shape[-1]
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(torch.finfo(WIDE).tiny)
    ridge = 1e-6 * mean[:, None, None] * torch.eye(size, dtype=WIDE, device=gram.device)
    return torch.linalg.solve(gram + ridge, right)
