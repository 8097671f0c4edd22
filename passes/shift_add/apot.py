# SPDX-License-Identifier: Apache-2.0
"""Additive powers of two: every term has a set of exponents of its own, interleaved with those of the others.

    w[o, i] ≈ scale[o, g] · s · Σ_{t<n} p_t,  s = ±1,  p_t ∈ {0, 2^-t, 2^-(t+n), 2^-(t+2n)}

The magnitude takes bits - 1 bits: n two-bit terms, and for an odd number of bits one more of one bit, {0, 2^-2n},
behind whose exponent the last choice of each term then starts. So all sums differ, the levels are much closer to
uniform than single powers of two, and each weight costs n shifts and adds under one sign.

Li, Dong, Wang, "Additive Powers-of-Two Quantization", 2020, base bits k = 2. The paper learns the clipping point in
training; here it is the group scale, searched in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from rewriter.errors import PlanError
from rewriter.passes.shift_add.groups import WIDE
from rewriter.passes.shift_add.tables import Table, TableMode

MAX_BITS = 8


@dataclass(frozen=True)
class Apot(TableMode):
    """A sign bit and bits - 1 bits of additive powers of two.

    Raises:
        PlanError: ``bits`` outside 2 to 8.
    """

    name: ClassVar[str] = "apot"
    bits: int = 4
    scale: str = "fp16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= MAX_BITS:
            raise PlanError(
                f"shift_add: bits={self.bits} in mode apot must be 2 to {MAX_BITS}: a sign and at least one bit of "
                'magnitude; for 1 bit take mode "bcq" or "dense"'
            )

    @property
    def powers(self) -> int:
        return len(exponents(self.bits))

    @property
    def table(self) -> Table:
        return level_table(self.bits)


def exponents(bits: int) -> tuple[tuple[int, ...], ...]:
    """Of each term, from low to high field, the e of its powers 2^-e; a field of value 0 is no power."""
    magnitude_bits = bits - 1
    n, odd = divmod(magnitude_bits, 2)
    terms = [(t, t + n, t + 2 * n + odd) for t in range(n)]
    return (*terms, *([(2 * n,)] if odd else []))


@lru_cache(maxsize=MAX_BITS)
def level_table(bits: int) -> Table:
    """Sign-magnitude words: the top bit is the sign, below it the terms' fields from low to high."""
    words = torch.arange(1 << bits)
    total = torch.zeros(1 << bits, dtype=WIDE)
    used = torch.zeros(1 << bits, dtype=torch.int64)
    place = 0
    for powers in exponents(bits):
        width = len(powers).bit_length()
        field = (words >> place) & ((1 << width) - 1)
        total += torch.tensor([0.0, *(2.0**-e for e in powers)], dtype=WIDE)[field]
        used += (field > 0).to(torch.int64)
        place += width
    negative = (words >> (bits - 1)) == 1
    return Table.of(torch.where(negative, -total, total), used)
