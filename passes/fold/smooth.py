# SPDX-License-Identifier: Apache-2.0
"""softmax(q (k − k̄)ᵀ + mask) = softmax(q kᵀ + mask)     k̄ = mean of k over the keys

q · k̄ is one number per row, and a softmax ignores what all of its row gets. Nothing is saved: without their common part
keys have a smaller range, which is what quantised attention wants (SageAttention, arXiv 2410.02367).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.views import ATTENTION

aten = torch.ops.aten


class SmoothKeys(Rule):
    """Attention as one operator only; written out, it becomes one by `fuse`."""

    name: ClassVar[str] = "fold.smooth_k"
    role: ClassVar[str] = "smooth_k"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        single = [m for m in ATTENTION.find(facts) if m["spelling"] == "sdpa" and not _centred(facts, m["k"])]
        return single, [m for m in ATTENTION.explain(facts) if m.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        if match.captures.get("softcap") is not None:
            return "the scores are capped, which a shift of the row changes"
        if (dtype := program.facts.dtype(match["k"])) is None or not dtype.is_floating_point:
            return "the keys are not floating"
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        k = edit.resolve(match["k"])
        smooth = edit.call(aten.sub.Tensor, k, edit.call(aten.mean.dim, k, [-2], True))
        q, _, *rest = match.root.args
        target: Any = match.root.target
        return {match.root: edit.call(target, q, smooth, *rest, **match.root.kwargs)}


def _centred(facts: Facts, k: Node) -> bool:
    """Whether the keys have lost their mean already."""
    if k.op != "call_function" or k.target is not aten.sub.Tensor:
        return False
    arguments = facts.arguments(k)
    mean = arguments["other"]
    if not isinstance(mean, Node) or mean.target is not aten.mean.dim:
        return False
    given = facts.arguments(mean)
    rank = len(facts.shape(k) or ())
    return given["self"] is arguments["self"] and [d % rank for d in given["dim"]] == [rank - 2]
