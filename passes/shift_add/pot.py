# SPDX-License-Identifier: Apache-2.0
"""Dense weights as sums of signed powers of two under a group scale.

    w[o, i] ≈ scale[o, g] · Σ_t v_t,  v_t ∈ {0, ±2^0, ±2^-1, …},  g = i // group

All sums a weight can take form one fixed table of levels, so a weight is rounded to the nearest of them in
the linear domain: between 2^e and 2^(e+1) the threshold is 1.5·2^e (rounding the logarithm would put it at
√2·2^e, which is worse: largest relative error 0.414 instead of 1/3). The group scale is searched over
clipping points and alternated with least squares, scale = Σ|w|·u / Σu². Zero is a level, so zeros stay
exactly zero.

Single terms: Elhoushi et al., "DeepShift", 2019; sums of terms: Li et al., "Additive Powers-of-Two
Quantization", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.shift_add import codec
from rewriter.kernels.shift_add.reference import pot_settings_fault
from rewriter.passes.shift_add import measures
from rewriter.passes.shift_add.groups import (
    CHUNK_ELEMENTS,
    WIDE,
    Groups,
    Rounding,
    check_group,
    check_weight,
    chunks,
    times_power_of_two,
)
from rewriter.passes.shift_add.search import best_scale


@dataclass(frozen=True, eq=False)
class PotCodes:
    """A weight as sums of signed powers of two, laid out as `rewriter.kernels.shift_add.codec` describes.

    Attributes:
        codes: ``uint8 [out, ceil(in * bits / 8)]``.
        scale: ``[out, G]`` in the weight's dtype.
        bits: stored code bits per weight, all terms and signs together.
        terms: signed powers of two per weight.
        group: weights per group; the last may be ragged.
        in_features: columns of the weight.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    terms: int
    group: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the dense weight."""
        return self.codes.shape[0], self.in_features

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        out, width = self.shape
        return measures.bits_per_weight(self.codes, self.scale, None, weights=out * width)

    def rows(self, start: int, end: int) -> PotCodes:
        """The codes of rows ``start`` to ``end - 1``, sharing memory."""
        return replace(self, codes=self.codes[start:end], scale=self.scale[start:end])

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[out, in]`` in ``dtype`` (the scales' by default)."""
        layout = (self.bits, self.terms, self.group, self.in_features)
        dense = codec.decode_pot(self.codes, self.scale, *layout, codec.compute_dtype(self.scale))
        return dense.to(self.scale.dtype if dtype is None else dtype)


def fit(weight: Tensor, *, bits: int, terms: int = 1, group: int = 128, rows_per_chunk: int | None = None) -> PotCodes:
    """Fit a dense weight in closed form; deterministic, and independent of ``rows_per_chunk``.

    Scales are rounded as in `rewriter.passes.shift_add.bcq.fit`.

    Args:
        weight: ``[out, in]``, floating and finite.
        bits: stored bits per weight, a multiple of ``terms``, at least two per term.
        terms: signed powers of two per weight.
        group: weights along ``in`` under one scale; wider than the row means the row.
        rows_per_chunk: rows fitted at once; by default about ten MB of working memory.

    Raises:
        PlanError: ``bits`` and ``terms`` contradict, or ``group`` is out of range.
        ValueError: the weight is not a finite floating matrix.
    """
    table = _checked_table(weight, bits, terms, group)
    rounding = Rounding.of(weight, group)
    rows = _rows(weight, group, table, rows_per_chunk)
    codes, scales = [], []
    for groups in chunks(weight, group, rows):
        scale, _ = best_scale(groups, table.levels, rounding)
        codes.append(_encode(groups, scale, table, bits, weight.shape[1]))
        scales.append(groups.by_row(rounding.stored(scale, groups.exponent)))
    return PotCodes(torch.cat(codes), torch.cat(scales), bits, terms, group, weight.shape[1])


def nearest(weight: Tensor, like: PotCodes, rows_per_chunk: int | None = None) -> PotCodes:
    """Code ``weight [out, in]`` anew under the scales of ``like``: each weight's nearest level; idempotent.

    Raises:
        ValueError: the weight is not a finite floating matrix of ``like``'s shape, or a scale is negative.
    """
    table = _checked_table(weight, like.bits, like.terms, like.group)
    if tuple(weight.shape) != like.shape:
        raise ValueError(f"weight {list(weight.shape)} does not fit the scales of a {list(like.shape)} weight")
    if bool((like.scale < 0).any()):
        raise ValueError("shift_add: codes are nearest only under non-negative scales")
    scales = like.scale.detach().to(WIDE).flatten()
    codes, done = [], 0
    for groups in chunks(weight, like.group, _rows(weight, like.group, table, rows_per_chunk)):
        scale = times_power_of_two(scales[done : done + groups.count], -groups.exponent)
        done += groups.count
        codes.append(_encode(groups, scale, table, like.bits, weight.shape[1]))
    return PotCodes(torch.cat(codes), like.scale, like.bits, like.terms, like.group, like.in_features)


class LevelTable(NamedTuple):
    """The magnitudes a weight can take at unit scale, ascending from 0, and their codes of either sign."""

    levels: Tensor  # [m] float64
    positive: Tensor  # [m] int64
    negative: Tensor  # [m] int64


@lru_cache(maxsize=32)
def level_table(bits: int, terms: int) -> LevelTable:
    """The levels of ``bits`` bits in ``terms`` terms; of several codes for a level the one with fewest terms.

    A negative level has the sign bits of its non-zero terms flipped, so zero has a single code, 0.
    """
    words = torch.arange(1 << bits, dtype=torch.int32)
    values = codec.pot_values(words, bits, terms, WIDE)
    field_bits = bits // terms
    half = 1 << (field_bits - 1)
    magnitudes = torch.stack([(words >> (t * field_bits)) & (half - 1) for t in range(terms)])
    signs = torch.stack([(words >> (t * field_bits)) & half for t in range(terms)])
    used = (magnitudes > 0).sum(0)
    canonical = ((magnitudes > 0) | (signs == 0)).all(0) & (values >= 0)
    words, values, used = words[canonical], values[canonical], used[canonical]
    order = torch.argsort(used, stable=True)
    order = order[torch.argsort(values[order], stable=True)]
    levels, inverse = torch.unique_consecutive(values[order], return_inverse=True)
    first = torch.searchsorted(inverse, torch.arange(len(levels)))
    positive = words[order][first].to(torch.int64)
    flips = sum(
        torch.where(((positive >> (t * field_bits)) & (half - 1)) > 0, half << (t * field_bits), 0)
        for t in range(terms)
    )
    return LevelTable(levels, positive, positive ^ flips)


def _checked_table(weight: Tensor, bits: int, terms: int, group: int) -> LevelTable:
    fault = pot_settings_fault(bits, terms)
    if fault is not None:
        raise PlanError(f"shift_add: {fault}")
    check_group(group)
    check_weight(weight)
    return LevelTable(*(t.to(weight.device) for t in level_table(bits, terms)))


def _rows(weight: Tensor, group: int, table: LevelTable, rows_per_chunk: int | None) -> int | None:
    """A table with more levels than a group has weights sets the size of a chunk."""
    if rows_per_chunk is not None:
        return rows_per_chunk
    per_row = codec.ceil_div(weight.shape[1], group)
    width = codec.group_width(group, weight.shape[1])
    return max(1, CHUNK_ELEMENTS // (per_row * max(width, len(table.levels))))


def _encode(groups: Groups, scale: Tensor, table: LevelTable, bits: int, in_features: int) -> Tensor:
    """Nearest codes under normalised scales ``[n]``, packed: ``uint8 [rows, ceil(in * bits / 8)]``."""
    chosen = groups.nearest(scale.unsqueeze(-1) * table.levels)
    chosen = chosen.masked_fill((scale == 0).unsqueeze(-1), 0)
    words = torch.where(groups.values < 0, table.negative[chosen], table.positive[chosen])
    rows = codec.from_groups(groups.by_row(words), in_features)
    return codec.pack_stream(rows, bits)
