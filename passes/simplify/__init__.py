# SPDX-License-Identifier: Apache-2.0
"""Exact simplifications without parameters: the same values from fewer nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.passes.simplify.chains import CollapseCasts, CollapseReshapes, CollapseTransposes
from rewriter.passes.simplify.common import ShareCommon
from rewriter.passes.simplify.dead import RemoveDead
from rewriter.passes.simplify.identity import RemoveIdentity
from rewriter.passes.simplify.scale import MergeScales
from rewriter.passes.simplify.shift import DropShift
from rewriter.registry import register
from rewriter.rules import EXACT, Contract, Pass, Rule


@register
@dataclass(frozen=True)
class Simplify(Pass):
    """Remove what computes nothing new.

    Attributes:
        identity: calls that hand on their argument: casts to the same dtype, full slices, dropout in evaluation, 1 · x.
        chains: transposes, reshapes and casts in a row → one, or none where they cancel.
        scales: numbers multiplied onto one value, one matrix product or one attention → one number.
        shift: what is added to a whole row before a softmax.
        common: equal calls on equal operands → the first of them.
        dead: values that nobody reads.
    """

    name: ClassVar[str] = "simplify"
    contract: ClassVar[Contract] = EXACT
    identity: bool = True
    chains: bool = True
    scales: bool = True
    shift: bool = True
    common: bool = True
    dead: bool = True

    def rules(self) -> tuple[Rule, ...]:
        chosen: tuple[tuple[bool, tuple[Rule, ...]], ...] = (
            (self.identity, (RemoveIdentity(),)),
            (self.chains, (CollapseTransposes(), CollapseReshapes(), CollapseCasts())),
            (self.scales, (MergeScales(),)),
            (self.shift, (DropShift(),)),
            (self.common, (ShareCommon(),)),
            (self.dead, (RemoveDead(),)),
        )
        return tuple(rule for wanted, rules in chosen if wanted for rule in rules)
