# SPDX-License-Identifier: Apache-2.0
"""PUMA: GELU and softmax from additions, multiplications and comparisons alone, within bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.errors import PlanError
from rewriter.passes.puma.gelu import GELU_ERROR, PumaGELU
from rewriter.passes.puma.softmax import EXP_ERROR, PumaSoftmax
from rewriter.registry import register
from rewriter.rules import BOUNDED, Contract, Pass, Rule


@register
@dataclass(frozen=True)
class Puma(Pass):
    """Replace GELU by piecewise polynomials and the exponential of softmax by a power: no erf, tanh or exp is left.

    For targets that have none of these: secure computation on shares, fixed-point hardware. On a CPU or GPU it is slower.
    Constants from PUMA (arXiv 2307.12533).

    Attributes:
        gelu: GELU, exact or by tanh, under any spelling; each value is off by 0.02 at most.
        softmax: each exponential is off by 0.0086 at most, the row's largest being 1. The longer a row, the more its
            probabilities may be off: by 0.04 for 16 values, by 0.21 for 1024, in the worst rows known.
    """

    name: ClassVar[str] = "puma"
    contract: ClassVar[Contract] = BOUNDED("absolute error of a GELU, or of an exponential", max(GELU_ERROR, EXP_ERROR))
    gelu: bool = True
    softmax: bool = True

    def __post_init__(self) -> None:
        if not (self.gelu or self.softmax):
            raise PlanError("puma: gelu=False and softmax=False leave nothing to do; keep one of them")

    def rules(self) -> tuple[Rule, ...]:
        wanted: tuple[tuple[bool, Rule], ...] = ((self.gelu, PumaGELU()), (self.softmax, PumaSoftmax()))
        return tuple(rule for is_wanted, rule in wanted if is_wanted)
