# SPDX-License-Identifier: Apache-2.0
"""Zero-free powers of two: every code is a sign and a shift, none is spent on zero.

    w[o, i] ≈ scale[o, g] · ±2^-e,  e ∈ {0, …, 2^(bits-1) - 1}

Without a zero the exponent needs no escape value, so hardware shifts unconditionally, and two bits give four levels
where a signed power of two with a zero gives three. Exact zeros of the weight (pruning) are lost: they become the
smallest level.

Li et al., "DenseShift: Towards Accurate and Efficient Low-Bit Power-of-Two Quantization", 2023. The paper trains sign
and exponent as separate latents; here the codes are fitted in closed form to trained weights.
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
class Dense(TableMode):
    """A sign bit and bits - 1 bits of exponent.

    Raises:
        PlanError: ``bits`` outside 1 to 8.
    """

    name: ClassVar[str] = "dense"
    bits: int = 4
    scale: str = "fp16"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise PlanError(f"shift_add: bits={self.bits} in mode dense must be 1 to {MAX_BITS}")

    @property
    def table(self) -> Table:
        return level_table(self.bits)


@lru_cache(maxsize=MAX_BITS)
def level_table(bits: int) -> Table:
    """The top bit is the sign, the others the exponent e."""
    words = torch.arange(1 << bits)
    count = 1 << (bits - 1)
    magnitude = torch.exp2(-(words % count).to(WIDE))
    return Table.of(torch.where(words < count, magnitude, -magnitude), torch.zeros_like(words))
