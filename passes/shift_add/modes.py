# SPDX-License-Identifier: Apache-2.0
"""What every ShiftAdd mode offers: scales for a group, the grid they span, and packed codes.

    scales  = mode.fit_group(w[:, g])            a few numbers per row and group
    grid    = mode.grid(scales)                  the values a weight of the group can take
    values, words = grid.nearest(w[:, i])        round anything to it, any columns at any time
    codes   = mode.assemble(words, scales)       pack

`fit` does this for a whole weight. A calibrated fit (error compensation, coordinate descent) does the same group
by group or column by column, with weights of its own, and so works for every mode by the same code.

All modes are symmetric: with w a grid holds -w. So a grid is a table of magnitudes and the code words of either sign.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from rewriter.kernels.shift_add import codec
from rewriter.passes.shift_add.codes import joined
from rewriter.passes.shift_add.groups import (
    CHUNK_ELEMENTS,
    WIDE,
    Groups,
    Rounding,
    check_group,
    check_weight,
    chunks,
    split,
    thresholds,
    times_power_of_two,
)


class Codes(Protocol):
    """A packed weight ``[out, in]``."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def bits_per_weight(self) -> float: ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by role: ``weight_codes``, ``weight_scale`` and the mode's own."""

    def rows(self, start: int, end: int) -> Codes:
        """The codes of rows ``start`` to ``end - 1``, sharing memory."""

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[out, in]`` in ``dtype`` (the scales' by default)."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that weights of one group can take, row by row.

    Attributes:
        levels: ``[rows, m]`` float64, ascending magnitudes.
        positive: ``int64 [rows, m]`` or ``[1, m]``: code word of each level.
        negative: the code words of minus the levels.
    """

    levels: Tensor
    positive: Tensor
    negative: Tensor

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Values (float64) and code words (int64) of the levels nearest to ``weight [rows, k]``.

        Decided in float64. On a midpoint the larger magnitude wins; -0.0 counts as negative where zero is no level.
        """
        wide = weight.to(WIDE)
        chosen = torch.searchsorted(thresholds(self.levels, WIDE), wide.abs(), right=True)
        chosen = chosen.masked_fill(self.levels[:, -1:] == 0, 0)  # one word for the zeros of a zero group
        negative = torch.signbit(wide)
        rows = self.levels.shape[0]
        words = torch.where(
            negative,
            self.negative.expand(rows, -1).gather(-1, chosen),
            self.positive.expand(rows, -1).gather(-1, chosen),
        )
        values = self.levels.gather(-1, chosen)
        return torch.where(negative, -values, values), words


class Mode(ABC):
    """How weights are spelled in a few bits. Implementations are frozen dataclasses of their settings.

    *Scales* of a group are ``[rows, p]`` float64, real-valued and already rounded as they are stored; p and their
    meaning belong to the mode.
    """

    name: ClassVar[str]
    bits: int

    # What a mode defines ------------------------------------------------------------------------------

    @abstractmethod
    def best(self, groups: Groups, rounding: Rounding) -> Tensor:
        """The best scales ``[n, p]`` of all groups, normalised as the groups are."""

    @abstractmethod
    def grid(self, scales: Tensor) -> Grid:
        """The grid of ``scales [rows, p]``, in the same units."""

    @abstractmethod
    def design(self, words: Tensor, scales: Tensor) -> Tensor:
        """``D [rows, k, d]`` with decoded values ``D @ c``: c are the d coefficients that `refit` sets.

        One coefficient per group (d = 1, the group scale itself), or one per basis where the bases have scales of
        their own.
        """

    @abstractmethod
    def refit(self, scales: Tensor, coefficients: Tensor, rounding: Rounding) -> Tensor:
        """Scales with other coefficients ``[rows, d]``, rounded as they are stored; words keep their meaning.

        A group scale is never negative: a negative coefficient becomes 0.
        """

    @abstractmethod
    def assemble(self, words: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Codes:
        """Pack ``words [rows, in]`` under ``scales [rows, G, p]``; stored scales have ``dtype``."""

    @abstractmethod
    def scales_of(self, codes: Codes) -> Tensor:
        """The scales ``[rows, G, p]`` a packed weight of this mode was assembled from."""

    @property
    def power_of_two(self) -> bool:
        """Whether group scales are powers of two (otherwise fp16 values)."""
        return False

    @property
    def coefficients(self) -> int:
        """Numbers a group's scales depend on, d of `design`: 1, or one per basis."""
        return 1

    @property
    def level_count(self) -> int:
        """Magnitudes in a grid: it sets how many rows are fitted at once."""
        return 1 << max(self.bits - 1, 0)

    # What follows -------------------------------------------------------------------------------------

    def rounding(self, weight: Tensor, group: int) -> Rounding:
        """How scales of ``weight [out, in]`` are stored; one decision for the whole weight."""
        return Rounding.of(weight, group, power_of_two=self.power_of_two)

    def fit_group(self, weight: Tensor, rounding: Rounding, importance: Tensor | None = None) -> Tensor:
        """Scales ``[rows, p]`` of one group ``weight [rows, n]``, minimising Σ importance·(w - ŵ)².

        Args:
            weight: any floating dtype, finite.
            rounding: of the whole weight, see `rounding`.
            importance: non-negative, ``[n]`` or ``[rows, n]``; None weighs all alike.
        """
        groups = split(weight, weight.shape[1], importance)
        return times_power_of_two(self.best(groups, rounding), groups.exponent.unsqueeze(-1))


def fit(
    weight: Tensor,
    mode: Mode,
    *,
    group: int = 128,
    importance: Tensor | None = None,
    rows_per_chunk: int | None = None,
) -> Codes:
    """Fit a dense weight in closed form; deterministic, and independent of ``rows_per_chunk``.

    Scales are rounded to fp16 values and returned in the weight's dtype; where a non-zero group's largest
    magnitude lies outside [2^-12, 2^15] the scales of the whole weight keep the precision of its dtype.

    Args:
        weight: ``[out, in]``, floating and finite.
        mode: how to spell it.
        group: weights along ``in`` that share scales; wider than the row means the row.
        importance: ``[in]`` or ``[out, in]``, non-negative: what a weight's squared error counts.
        rows_per_chunk: rows fitted at once; by default about ten MB of working memory.

    Raises:
        PlanError: ``group`` out of range.
        ValueError: the weight is not a finite floating matrix, or the importance does not fit it.
    """
    check_group(group)
    check_weight(weight)
    rounding = mode.rounding(weight, group)
    parts = []  # packed at once: code words of the whole weight would take more than the weight
    for groups in chunks(weight, group, _rows(weight, group, mode, rows_per_chunk), importance):
        normalised = mode.best(groups, rounding)
        words = _words(groups, normalised, mode, weight.shape[1])
        scales = groups.by_row(times_power_of_two(normalised, groups.exponent.unsqueeze(-1)))
        parts.append(mode.assemble(words, scales, group, weight.dtype))
    return cast(Codes, joined(parts))


def nearest(weight: Tensor, like: Codes, mode: Mode, rows_per_chunk: int | None = None) -> Codes:
    """Code ``weight [out, in]`` anew under the scales of ``like``: each weight's nearest level; idempotent.

    Raises:
        ValueError: the weight is not a finite floating matrix of ``like``'s shape, or a group scale is negative.
    """
    check_weight(weight)
    if tuple(weight.shape) != like.shape:
        raise ValueError(f"weight {list(weight.shape)} does not fit the scales of a {list(like.shape)} weight")
    scales = mode.scales_of(like)
    parts, done = [], 0
    for groups in chunks(weight, like.group, _rows(weight, like.group, mode, rows_per_chunk)):
        part = scales.flatten(0, 1)[done : done + groups.count]
        done += groups.count
        normalised = times_power_of_two(part, -groups.exponent.unsqueeze(-1))
        words = _words(groups, normalised, mode, weight.shape[1])
        parts.append(mode.assemble(words, groups.by_row(part), like.group, like.scale.dtype))
    return cast(Codes, joined(parts))


def _words(groups: Groups, scales: Tensor, mode: Mode, in_features: int) -> Tensor:
    """Nearest code words under normalised scales, ``[rows, in]``."""
    return codec.from_groups(groups.by_row(mode.grid(scales).nearest(groups.values)[1]), in_features)


def _rows(weight: Tensor, group: int, mode: Mode, rows_per_chunk: int | None) -> int | None:
    """A grid with more levels than a group has weights sets the size of a chunk."""
    if rows_per_chunk is not None:
        return rows_per_chunk
    per_row = codec.ceil_div(weight.shape[1], group)
    width = codec.group_width(group, weight.shape[1])
    return max(1, CHUNK_ELEMENTS // (per_row * max(width, mode.level_count)))
