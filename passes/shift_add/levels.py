# SPDX-License-Identifier: Apache-2.0
"""The levels that some binary bases give a group, and what the group's weights say about better ones."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rewriter.kernels.shift_add import codec
from rewriter.passes.shift_add.groups import WIDE, Groups


@lru_cache(maxsize=codec.MAX_BASES)
def _half_signs(bits: int) -> Tensor:
    """The ±1 patterns whose first sign is +, ``[bits, 2^(bits-1)]``; the other half are their negatives."""
    patterns = itertools.product((1.0, -1.0), repeat=bits - 1)
    return torch.tensor([(1.0, *p) for p in patterns], dtype=WIDE).t().contiguous()


class Levels(NamedTuple):
    """Level magnitudes of each group: ``values`` ascending; ``order`` leads back to the sign patterns."""

    values: Tensor  # [n, m]
    order: Tensor  # [n, m] index of the pattern
    negative: Tensor  # [n, m] in pattern order: the pattern gives minus the magnitude

    @classmethod
    def of(cls, alpha: Tensor) -> Levels:
        signed = alpha @ _half_signs(alpha.shape[1]).to(alpha.device)
        values, order = signed.abs().sort(dim=-1, stable=True)
        return cls(values, order, signed < 0)


class Fitness(NamedTuple):
    """Error of some scales and the normal equations of better ones under the codes they choose, by importance."""

    error: Tensor  # [n]
    gram: Tensor  # [n, bits, bits]  CᵀC
    moment: Tensor  # [n, bits]       Cᵀw


def judge(groups: Groups, alpha: Tensor) -> Fitness:
    """Give every weight its nearest level under ``alpha [n, bits]``, and collect error, CᵀC and Cᵀw."""
    bits = alpha.shape[1]
    signs = _half_signs(bits).to(alpha.device)
    levels = Levels.of(alpha)
    bins = groups.bins(levels.values)
    counts = torch.zeros_like(bins.counts).scatter(-1, levels.order, bins.counts)
    sums = torch.zeros_like(bins.sums).scatter(-1, levels.order, bins.sums)
    products = (signs.unsqueeze(0) * signs.unsqueeze(1)).flatten(0, 1)  # c cᵀ is the same for c and -c
    gram = (counts @ products.t()).reshape(-1, bits, bits)
    moment = torch.where(levels.negative, -sums, sums) @ signs.t()
    cross, square = (levels.values * bins.sums).sum(-1), (levels.values.square() * bins.counts).sum(-1)
    return Fitness(groups.error(cross, square, levels.values[:, -1]), gram, moment)


def words_of(levels: Levels, bits: int) -> tuple[Tensor, Tensor]:
    """The code words of the levels and of minus the levels, both ``int64 [n, m]``; bit b is basis b."""
    every_bit = (1 << bits) - 1
    places = 2.0 ** torch.arange(bits, dtype=WIDE)
    pattern = (((_half_signs(bits) + 1) / 2 * places.unsqueeze(-1)).sum(0)).to(torch.int64).to(levels.order.device)
    positive = torch.where(levels.negative, every_bit - pattern, pattern).gather(-1, levels.order)
    return positive, every_bit - positive
