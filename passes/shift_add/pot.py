# SPDX-License-Identifier: Apache-2.0
"""Dense weights as sums of signed powers of two under a group scale.

    w[o, i] ≈ scale[o, g] · Σ_t v_t,  v_t ∈ {0, ±2^-o_t, ±2^-o_t-1, …},  g = i // group

One term is the code of DeepShift-Q. All sums a weight can take form one fixed table of levels, so a weight is rounded
to the nearest of them in the linear domain: between 2^e and 2^(e+1) the threshold is 1.5·2^e. (DeepShift rounds the
logarithm, which puts it at √2·2^e; under the same scale that is never nearer and leaves up to 0.414 of the weight
instead of 1/3.) Zero is a level, so zeros stay exactly zero.

Several terms: one term leaves at most a third of what it rounds, so the exponents of term t start o_t = round(t·log2 3)
lower than those of the first. With a common start (o_t = 0) half of the sums would only be others' with the terms
swapped: 8 bits in two terms then lose 0.033 of a Gaussian weight instead of 0.0305.

Single terms: Elhoushi et al., "DeepShift", 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, cast

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.shift_add import codec
from rewriter.kernels.shift_add.reference import pot_settings_fault
from rewriter.passes.shift_add import modes
from rewriter.passes.shift_add.codes import LevelCodes, PotCodes
from rewriter.passes.shift_add.groups import WIDE
from rewriter.passes.shift_add.modes import Codes
from rewriter.passes.shift_add.tables import Table, TableMode


@dataclass(frozen=True)
class Pot(TableMode):
    """``terms`` signed powers of two in ``bits`` bits; one term is stored as `PotCodes`, more as `LevelCodes`.

    Raises:
        PlanError: ``bits`` and ``terms`` contradict.
    """

    name: ClassVar[str] = "pot"
    bits: int = 4
    terms: int = 1
    scale: str = "fp16"

    @property
    def powers(self) -> int:
        return self.terms

    def __post_init__(self) -> None:
        fault = pot_settings_fault(self.bits, self.terms)
        if fault is not None:
            raise PlanError(f"shift_add: {fault}")

    @property
    def table(self) -> Table:
        return level_table(self.bits, self.terms)

    def assemble(self, words: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Codes:
        if self.terms > 1:
            return super().assemble(words, scales, group, dtype)
        codes, scale = codec.pack_stream(words, self.bits), scales.squeeze(-1).to(dtype)
        return PotCodes(codes, scale, self.bits, group, words.shape[-1])


def offsets(terms: int) -> tuple[int, ...]:
    """How many octaves below the first each term starts."""
    return tuple(round(t * math.log2(3)) for t in range(terms))


@lru_cache(maxsize=32)
def level_table(bits: int, terms: int) -> Table:
    """All sums of ``terms`` terms; a word holds their fields low to high, each its sign above its magnitude field."""
    words = torch.arange(1 << bits, dtype=torch.int32)
    width = bits // terms
    fields = [torch.bitwise_and(torch.bitwise_right_shift(words, t * width), (1 << width) - 1) for t in range(terms)]
    values = sum(codec.pot_values(f, width, 1, WIDE) * 2.0**-o for f, o in zip(fields, offsets(terms), strict=True))
    used = sum((f != 0).to(torch.int32) for f in fields)  # a negative zero counts as used, so zero is word 0
    return Table.of(cast(Tensor, values), cast(Tensor, used))


def fit(
    weight: Tensor,
    *,
    bits: int,
    terms: int = 1,
    group: int = 128,
    scale: str = "fp16",
    importance: Tensor | None = None,
    rows_per_chunk: int | None = None,
) -> PotCodes | LevelCodes:
    """`modes.fit` of a `Pot` mode; arguments, rounding of the scales and errors as there."""
    mode = Pot(bits, terms, scale)
    fitted = modes.fit(weight, mode, group=group, importance=importance, rows_per_chunk=rows_per_chunk)
    return cast("PotCodes | LevelCodes", fitted)
