# SPDX-License-Identifier: Apache-2.0
"""The best scale of a group for a fixed table of levels.

The error as a function of the scale is piecewise quadratic with many local minima, the more the finer the
table. So clipping points are tried over a few octaves, then closely around the best, each followed by the
least-squares scale of the codes it leads to, Σ|w|·u / Σu², which is the bottom of its piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.passes.shift_add.groups import GAIN, WIDE, Groups, Rounding

COARSE = 24
OCTAVES = (-3.0, 0.5)  # clipping points relative to the group's largest magnitude, as powers of two
CLOSE = (-0.08, 0.08)
ROUNDS = 8  # alternations of codes and scale after the search


def best_scale(groups: Groups, unit: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Scale and squared error ``[n]`` of levels ``scale · unit``, normalised, with the scale as stored.

    Args:
        groups: the groups to fit.
        unit: ascending non-negative levels ``[m]`` at unit scale, float64.
        rounding: how scales are stored.
    """
    best = torch.zeros_like(groups.energy)
    least = torch.full_like(groups.energy, float("inf"))

    def offer(scale: Tensor) -> Tensor:
        nonlocal best, least
        stored = rounding(scale, groups.exponent)
        cross, square = groups.moments(stored, unit)
        error = groups.error(stored * cross, stored.square() * square, stored * unit[-1])
        better = error < least * GAIN
        best, least = torch.where(better, stored, best), torch.where(better, error, least)
        return cross / square.clamp_min(torch.finfo(WIDE).tiny)

    for factor in _geometric(*OCTAVES, COARSE):
        offer(offer(groups.largest * (factor / unit[-1])))
    coarse = best
    for factor in _geometric(*CLOSE, min(32, max(4, len(unit) // 4))):
        offer(offer(coarse * factor))
    for _ in range(ROUNDS):
        offer(offer(best))
    return best, least


def _geometric(low: float, high: float, count: int) -> list[float]:
    """``count`` factors from ``2**low`` to ``2**high`` in equal ratios."""
    return [2.0 ** (low + (high - low) * i / (count - 1)) for i in range(count)]
