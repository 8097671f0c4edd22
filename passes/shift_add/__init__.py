# SPDX-License-Identifier: Apache-2.0
"""ShiftAdd: dense weights become sums of signed bases whose scales are shifts of one group scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.errors import PlanError
from rewriter.passes.shift_add.rules import EmbeddingRule, LinearRule
from rewriter.registry import nearest, register
from rewriter.rules import CALIBRATED, Contract, Pass, Rule

_MODES = ("bcq", "pot")
_SCALES = ("pot", "fp16")


@register
@dataclass(frozen=True)
class ShiftAdd(Pass):
    """Store linear weights as sums of signed bases (bcq) or signed powers of two (pot), fitted in closed form.

    Attributes:
        bits: stored code width per weight, all terms and signs together, without scales; 1 to 8.
        group: weights per scale along the input dimension; a last ragged group is fine.
        mode: ``"bcq"``: `bits` binary bases ±1 under one scale each; ``"pot"``: `terms` signed powers of two.
        terms: powers of two per weight (mode pot); `bits` must be a multiple with at least 2 bits a term.
        scale: of bcq's bases: ``"pot"``: power-of-two multiples of one fp16 group scale (4.25 bits per weight at the
            defaults), ``"fp16"``: free (4.5 bits).
        embeddings: also the input embeddings.
    """

    name: ClassVar[str] = "shift_add"
    contract: ClassVar[Contract] = CALIBRATED("closed form from the weights")
    bits: int = 4
    group: int = 128
    mode: str = "bcq"
    terms: int = 1
    scale: str = "pot"
    embeddings: bool = False

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise PlanError(
                f"shift_add: unknown mode {self.mode!r}{nearest(self.mode, _MODES)}; one of {', '.join(_MODES)}"
            )
        if self.scale not in _SCALES:
            raise PlanError(f"shift_add: unknown scale {self.scale!r}; one of {', '.join(_SCALES)}")
        if self.group < 1:
            raise PlanError(f"shift_add: group={self.group} must be at least 1 (weights per scale)")
        if not 1 <= self.bits <= 8:
            raise PlanError(f"shift_add: bits={self.bits} must be 1 to 8 (stored bits per weight)")
        if self.mode == "bcq" and self.terms != 1:
            raise PlanError(f"shift_add: terms={self.terms} belongs to mode pot; in mode bcq the bits are the terms")
        if self.mode == "pot" and (self.terms < 1 or self.bits % self.terms or self.bits // self.terms < 2):
            raise PlanError(
                f"shift_add: bits={self.bits} and terms={self.terms} contradict each other: bits must be a multiple of "
                "terms, with at least 2 bits (a sign and an exponent) per term"
            )

    def rules(self) -> tuple[Rule, ...]:
        return (LinearRule(self), *([EmbeddingRule(self)] if self.embeddings else []))
