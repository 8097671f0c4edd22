# SPDX-License-Identifier: Apache-2.0
"""Exact canonical forms: what is written out becomes the one operator that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.passes.canonical.cross_entropy import CanonicalCrossEntropy
from rewriter.passes.canonical.gelu import CanonicalGELU
from rewriter.passes.canonical.norms import CanonicalLayerNorm, CanonicalRMSNorm
from rewriter.passes.canonical.silu import CanonicalSiLU
from rewriter.passes.canonical.softmax import CanonicalLogSoftmax, CanonicalSoftmax
from rewriter.registry import register
from rewriter.rules import EXACT, Contract, Pass, Rule


@register
@dataclass(frozen=True)
class Canonical(Pass):
    """Replace written-out norms, activations, softmaxes and losses by single operators.

    Attributes:
        layer_norm: (x − μ) / √(σ² + ε) · w + b → ``layer_norm``
        rms_norm: x / √(mean(x²) + ε) · w → ``rms_norm``
        gelu: x/2 · (1 + erf(x/√2)) and its tanh approximation → ``gelu``
        silu: x · σ(x) → ``silu``
        softmax: exp(x − max x) / Σ exp(x − max x) → ``softmax``
        log_softmax: x − logsumexp(x) → ``log_softmax``
        cross_entropy: −log_softmax(x)[target] → ``cross_entropy_loss``
        stabilise: also softmaxes that do not subtract the maximum, and logarithms of softmaxes. Where these overflow
            or underflow they yield inf, -inf or NaN, and the operators the limit: not the same function there.
    """

    name: ClassVar[str] = "canonical"
    contract: ClassVar[Contract] = EXACT
    layer_norm: bool = True
    rms_norm: bool = True
    gelu: bool = True
    silu: bool = True
    softmax: bool = True
    log_softmax: bool = True
    cross_entropy: bool = True
    stabilise: bool = False

    def rules(self) -> tuple[Rule, ...]:
        wanted: tuple[tuple[bool, Rule], ...] = (
            (self.layer_norm, CanonicalLayerNorm()),
            (self.rms_norm, CanonicalRMSNorm()),
            (self.gelu, CanonicalGELU()),
            (self.silu, CanonicalSiLU()),
            (self.softmax, CanonicalSoftmax(self.stabilise)),
            (self.log_softmax, CanonicalLogSoftmax(self.stabilise)),
            (self.cross_entropy, CanonicalCrossEntropy()),
        )
        return tuple(rule for is_wanted, rule in wanted if is_wanted)
