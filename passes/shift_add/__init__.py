# SPDX-License-Identifier: Apache-2.0
"""ShiftAdd: dense weights become sums of signed bases or powers of two under one scale per group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from rewriter.errors import PlanError
from rewriter.passes.shift_add.apot import Apot
from rewriter.passes.shift_add.bcq import BCQ, ScaleKind, Uniform
from rewriter.passes.shift_add.dense import Dense
from rewriter.passes.shift_add.modes import Mode
from rewriter.passes.shift_add.pointwise import PointwiseRule
from rewriter.passes.shift_add.pot import Pot
from rewriter.passes.shift_add.rules import EmbeddingRule, LinearRule
from rewriter.registry import nearest, register
from rewriter.rules import CALIBRATED, Contract, Pass, Rule

_MODES = ("bcq", "uniform", "pot", "apot", "dense")
_SCALES = ("auto", "pot", "fp16")


@register
@dataclass(frozen=True)
class ShiftAdd(Pass):
    """Store linear weights in a few bits, as sums of signed bases or powers of two, fitted in closed form.

    Attributes:
        bits: stored code width per weight, all terms and signs together, without scales; 1 to 8.
        group: weights per scale along the input dimension; a last ragged group is fine.
        mode: ``"bcq"``: `bits` binary bases ±1, the nearest of all modes; ``"uniform"``: the integer grid, spelled in
            binary bases; ``"pot"``: `terms` signed powers of two (DeepShift); ``"apot"``: additive powers of two;
            ``"dense"``: one signed power of two, never zero (DenseShift).
        terms: powers of two per weight (mode pot); `bits` must be a multiple with at least 2 bits a term.
        scale: what a group's scale is. Mode bcq: ``"pot"``: bases are powers of two apart under one fp16 scale (4.25
            bits per weight at the defaults), ``"fp16"``: each basis has its own (4.5 bits). Other modes: ``"fp16"``,
            or ``"pot"``: the scale itself is a power of two. ``"auto"``: "pot" in mode bcq, "fp16" in the others.
        embeddings: also the input embeddings.
        compensate: ``True``: fit codes and scales to the outputs on calibration data (GPTQ's compensated rounding, then
            descent), an error without such data; ``"auto"``: where there is such data; ``False``: to the weights alone.
        act_order: compensate in the order of the inputs' energy instead of the columns' numbers.
        damping: what is added to the diagonal of E[x xᵀ] before compensation, as a share of its mean.
        awq: multiply inputs by powers of two that make weights of large activations finer, chosen on calibration data.
            They stay in the model: one more parameter and one multiplication per input.
        mean_bits: bits per weight on average over the linear layers, the sensitive ones getting more (needs calibration
            data); None: `bits` everywhere.
    """

    name: ClassVar[str] = "shift_add"
    contract: ClassVar[Contract] = CALIBRATED("closed form from the weights")
    bits: int = 4
    group: int = 128
    mode: str = "bcq"
    terms: int = 1
    scale: str = "auto"
    embeddings: bool = False
    compensate: bool | str = "auto"
    act_order: bool = True
    damping: float = 0.01
    awq: bool = False
    mean_bits: float | None = None

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
        if self.mode != "pot" and self.terms != 1:
            raise PlanError(f"shift_add: terms={self.terms} belongs to mode pot, not to mode {self.mode}")
        if self.mode == "pot" and (self.terms < 1 or self.bits % self.terms or self.bits // self.terms < 2):
            raise PlanError(
                f"shift_add: bits={self.bits} and terms={self.terms} contradict each other: bits must be a multiple of "
                "terms, with at least 2 bits (a sign and an exponent) per term"
            )
        self.spelling()  # a mode refuses the bits it cannot use
        self._check_calibration()

    def rules(self) -> tuple[Rule, ...]:
        return (LinearRule(self), PointwiseRule(self), *([EmbeddingRule(self)] if self.embeddings else []))

    def _check_calibration(self) -> None:
        if not isinstance(self.compensate, bool) and self.compensate != "auto":
            raise PlanError(f"shift_add: compensate={self.compensate!r} must be True, False or 'auto'")
        if not 0 <= self.damping <= 1:
            raise PlanError(f"shift_add: damping={self.damping} must be 0 to 1 (a share of the mean input energy)")
        if self.mean_bits is None:
            return
        if self.terms != 1:
            raise PlanError(
                f"shift_add: mean_bits={self.mean_bits:g} and terms={self.terms} contradict each other: "
                "bits of several terms come in multiples; use terms=1 or give bits"
            )
        if not self.least_bits <= self.mean_bits <= 8:
            raise PlanError(
                f"shift_add: mean_bits={self.mean_bits:g} must be {self.least_bits} to 8 in mode {self.mode}"
            )

    @property
    def least_bits(self) -> int:
        """The fewest bits the mode can use."""
        return next(bits for bits in range(1, 9) if _accepts(replace(self, mean_bits=None), bits))

    def spelling(self, bits: int | None = None) -> Mode:
        """The mode with its settings, at ``bits`` per weight (by default those of the options)."""
        if bits is not None:
            return replace(self, bits=bits, mean_bits=None).spelling()
        if self.mode == "bcq":
            return BCQ(self.bits, "fp16" if self.scale == "fp16" else "pot")
        scale: ScaleKind = "pot" if self.scale == "pot" else "fp16"
        if self.mode == "pot":
            return Pot(self.bits, self.terms, scale)
        if self.mode == "uniform":
            return Uniform(self.bits, scale)
        return Apot(self.bits, scale) if self.mode == "apot" else Dense(self.bits, scale)


def _accepts(options: ShiftAdd, bits: int) -> bool:
    try:
        options.spelling(bits)
    except PlanError:
        return False
    return True
