# SPDX-License-Identifier: Apache-2.0
"""Bits per layer: the ones whose rounding hurts most get more, under a budget of bits per weight on average.

    minimise Σ_l C_l · 4^-b_l   subject to   Σ_l n_l b_l ≤ mean_bits · Σ_l n_l
    C = ‖S‖_F · std(S)² / tr(W H Wᵀ)^(3/2),  S = W / diag(U),  H⁻¹ = Uᵀ U

Its numerator is ShiftAddLLM's sensitivity score: S_oj² is what rounding weight (o, j) to zero costs after the columns behind it
made up for it as well as they can, so its norm says how much there is to lose and its spread how unevenly. The numerator
grows with the cube of the layer's outputs, by which it says nothing about layers whose outputs are of other sizes: it gave
the first layers of a small language model one bit and ruined it. So it is taken relative to the outputs' energy. One more
bit halves the error of any of the modes, nearly; so its square, and with it the cost, falls by 4. n_l counts weights.

With convex costs the greedy rule is optimal but for what is left of the budget in the end: again and again one more
bit for the layer in which it saves most per stored bit.

You et al., "ShiftAddLLM", 2024, section 4.3 (which solves the same kind of problem by integer programming).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from rewriter.passes.shift_add.groups import WIDE
from rewriter.passes.shift_add.hessian import Metric

SPREAD = 1  # bits a layer may lie below or above the mean


def sensitivity(weight: Tensor, metric: Metric) -> float:
    """C of a weight ``[out, in]`` under the metric of its inputs; a number without unit, 0 for a weight of zeros."""
    wide = weight.detach().to(WIDE)
    score = wide[:, metric.order] / metric.factor.diagonal()
    energy = metric.cost(wide).sum()
    return float(score.norm() * score.var(correction=0) / energy**1.5) if energy > 0 else 0.0


def allocate(
    sensitivities: Sequence[float], sizes: Sequence[int], mean_bits: float, *, least: int = 1, most: int = 8
) -> list[int]:
    """Bits of each layer, within ``SPREAD`` of the mean and within ``least`` to ``most``.

    Args:
        sensitivities: C of each layer, not negative.
        sizes: weights of each.
        mean_bits: stored bits per weight, on average over all weights, without scales.
        least, most: what the mode can store.

    Ties go to the earlier layer. The budget is never exceeded.
    """
    low = max(least, math.ceil(mean_bits) - SPREAD)
    high = min(most, math.floor(mean_bits) + SPREAD)
    bits = [low] * len(sizes)
    left = mean_bits * sum(sizes) - sum(low * size for size in sizes)
    while True:
        # 4^-b - 4^-(b+1), the saving of one more bit, over what it stores
        gains = [
            (c * 0.75 * 4.0**-b / size if b < high and size <= left + 1e-9 else -1.0)
            for c, b, size in zip(sensitivities, bits, sizes, strict=True)
        ]
        best = max(range(len(gains)), key=gains.__getitem__, default=None)
        if best is None or gains[best] < 0:
            return bits
        bits[best] += 1
        left -= sizes[best]
