# SPDX-License-Identifier: Apache-2.0
"""softmax(scale · q kᵀ + mask) v  =  sdpa(q, k, v, attn_mask=mask, scale=scale)"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.views import ATTENTION

aten = torch.ops.aten
_MASK_DEPTH = 200  # nodes of a mask's computation that are searched for -inf


class FuseAttention(Rule):
    """The mask keeps its value: an additive one stays additive, so rows that see no key come out as before."""

    name: ClassVar[str] = "fuse.attention"
    role: ClassVar[str] = "attention"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        matches = [m for m in ATTENTION.find(program) if m["spelling"] == "eager"]
        return matches, [m for m in ATTENTION.explain(program) if m.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        if match["dropout_p"] > 0:
            return f"drops out with p={match['dropout_p']}: the operator would draw other random numbers"
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        mask = match["mask"]
        if mask is None:
            return None
        if len(program.facts.shape(mask) or ()) < 2:
            return "the mask has fewer than two dimensions, which the operator does not take"
        if program.facts.dtype(mask) != program.facts.dtype(match["q"]):
            return f"the mask is {program.facts.dtype(mask)}, q is {program.facts.dtype(match['q'])}: adding them widens the scores"
        if _holds_minus_infinity(mask):
            return "the mask holds -inf: a row that sees no key is NaN as written and zero in the operator"
        return None

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        new = edit.call(
            aten.scaled_dot_product_attention.default,
            match["q"],
            match["k"],
            match["v"],
            match["mask"],
            scale=match["scale"],
        )
        return {match.root: new}


def _holds_minus_infinity(mask: Node) -> bool:
    """Whether -inf is written anywhere in the computation of the mask, as a literal."""
    pending, seen = [mask], {mask}
    while pending and len(seen) < _MASK_DEPTH:
        node = pending.pop()
        if any(isinstance(a, float) and math.isinf(a) and a < 0 for a in (*node.args, *node.kwargs.values())):
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending += new
    return False
