# SPDX-License-Identifier: Apache-2.0
"""Modes whose grid is one fixed table of levels under a group scale: w[o, i] ≈ scale[o, g] · u(code[o, i]).

    pot     u = Σ_t ± 2^(-e_t - o_t) or 0, o_t = round(t · log2 3)    (`rewriter.passes.shift_add.pot`)
    apot    u = ± Σ_i p_i, p_i ∈ {0, 2^-i, 2^-i-n, …}                 (`rewriter.passes.shift_add.apot`)
    dense   u = ± 2^-e, never zero                                    (`rewriter.passes.shift_add.dense`)

A weight goes to the nearest level in the linear domain; the scale of a group is searched over clipping points and
alternated with least squares, scale = Σ|w|·u / Σu² (`rewriter.passes.shift_add.search`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from rewriter.kernels.shift_add import codec
from rewriter.passes.shift_add.codes import LevelCodes
from rewriter.passes.shift_add.groups import WIDE, Groups, Rounding
from rewriter.passes.shift_add.modes import Codes, Grid, Mode
from rewriter.passes.shift_add.search import best_scale


class Table(NamedTuple):
    """The values of a code at unit scale."""

    values: Tensor  # [2^bits] float64, by code word
    levels: Tensor  # [m] float64, ascending magnitudes
    positive: Tensor  # [m] int64, the word of each level
    negative: Tensor  # [m] int64, the word of minus the level

    @classmethod
    def of(cls, values: Tensor, effort: Tensor) -> Table:
        """The table of ``values [2^bits]``; of several words for one value the one of least ``effort [2^bits]``.

        The values must be symmetric about zero.
        """
        levels, positive = _words(values, effort)
        _, negative = _words(-values, effort)
        return cls(values, levels, positive, negative)


def _words(values: Tensor, effort: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct non-negative values, ascending, and the first word of least effort for each."""
    words = torch.nonzero(values >= 0).squeeze(-1)
    words = words[torch.argsort(effort[words], stable=True)]
    words = words[torch.argsort(values[words], stable=True)]
    levels, inverse = torch.unique_consecutive(values[words], return_inverse=True)
    return levels, words[torch.searchsorted(inverse, torch.arange(len(levels)))]


class TableMode(Mode):
    """A fixed table under one scale per group; ``scale``: "fp16", or "pot" for powers of two."""

    scale: str

    @property
    @abstractmethod
    def table(self) -> Table:
        """The levels, on the CPU."""

    @property
    def powers(self) -> int:
        """Powers of two added up for one weight, at most."""
        return 1

    @property
    def power_of_two(self) -> bool:
        return self.scale == "pot"

    @property
    def level_count(self) -> int:
        return len(self.table.levels)

    def best(self, groups: Groups, rounding: Rounding) -> Tensor:
        scale, _ = best_scale(groups, self.table.levels.to(groups.values.device), rounding)
        return scale.unsqueeze(-1)

    def grid(self, scales: Tensor) -> Grid:
        table = self.table
        levels, positive, negative = (t.to(scales.device) for t in (table.levels, table.positive, table.negative))
        return Grid(scales * levels, positive.unsqueeze(0), negative.unsqueeze(0))

    def design(self, words: Tensor, scales: Tensor) -> Tensor:
        return self.table.values.to(words.device)[words].unsqueeze(-1)

    def refit(self, scales: Tensor, coefficients: Tensor, rounding: Rounding) -> Tensor:
        wide = coefficients.to(WIDE).clamp_min(0)
        return rounding(wide, torch.zeros_like(wide, dtype=torch.int32))

    def assemble(self, words: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Codes:
        levels = self.table.values.to(device=words.device, dtype=torch.float32)
        codes, scale = codec.pack_stream(words, self.bits), scales.squeeze(-1).to(dtype)
        return LevelCodes(codes, scale, levels, self.bits, group, words.shape[-1])

    def scales_of(self, codes: Codes) -> Tensor:
        scale = codes.scale.detach().to(WIDE)
        if bool((scale < 0).any()):
            raise ValueError("shift_add: codes are nearest only under non-negative scales")
        return scale.unsqueeze(-1)
