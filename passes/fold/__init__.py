# SPDX-License-Identifier: Apache-2.0
"""Exact folds of parameters into neighbouring parameters: fewer tensors, fewer operators, the same function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.passes.fold.batch_norm import FoldBatchNorm, FoldBatchNormBack, FoldRepNorm
from rewriter.passes.fold.linear import FoldLinears
from rewriter.passes.fold.norms import FoldLayerNorm, FoldRMSNorm
from rewriter.passes.fold.smooth import SmoothKeys
from rewriter.registry import register
from rewriter.rules import EXACT, Contract, Pass, Rule


@register
@dataclass(frozen=True)
class Fold(Pass):
    """Fold norms and linears into the linears next to them; new weights are computed in float64 and rounded once.

    Attributes:
        batch_norm: BatchNorm in evaluation → the linear or convolution before it, else the linears after it.
        rep_norm: BatchNorm plus a multiple of its input (PRepBN) → the linears after it.
        norm: scale and shift of LayerNorm and RMSNorm → the linears after it; the bare norm stays.
        linear: two linears in a row → one, where that has fewer weights.
        smooth_k: subtract the mean key from all keys; prepares quantised attention and saves nothing by itself.
    """

    name: ClassVar[str] = "fold"
    contract: ClassVar[Contract] = EXACT
    batch_norm: bool = True
    rep_norm: bool = True
    norm: bool = True
    linear: bool = True
    smooth_k: bool = False

    def rules(self) -> tuple[Rule, ...]:
        chosen: tuple[tuple[bool, tuple[Rule, ...]], ...] = (
            (self.batch_norm, (FoldBatchNormBack(), FoldBatchNorm())),
            (self.rep_norm, (FoldRepNorm(),)),
            (self.norm, (FoldLayerNorm(), FoldRMSNorm())),
            (self.linear, (FoldLinears(),)),
            (self.smooth_k, (SmoothKeys(),)),
        )
        return tuple(rule for wanted, rules in chosen if wanted for rule in rules)
