# SPDX-License-Identifier: Apache-2.0
"""A rule for any pattern that is right wherever rewriting is: f(x) = f(x), computed anew where the match stood.

Its replacement computes what the match computed, from the captured inputs, at the root and without the nodes that the
pattern looks through. That changes an output exactly where the match should have been refused (a value written in
between, an interior value needed outside, numbers drawn at random) or where looking through was wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from rewriter import legality, matcher, registry
from rewriter.editing import Editor
from rewriter.matcher import Match, Miss
from rewriter.pattern import Pattern
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Pass, Rule, provenance

PATTERNS: dict[int, Pattern] = {}  # by key, so that a stored plan finds its pattern again


class Recompute(Rule):
    name: ClassVar[str] = "recompute"
    role: ClassVar[str] = "random"
    contract: ClassVar[Contract] = EXACT

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return [m for m in matcher.find(program, self.pattern) if not any(map(provenance, m.outputs))], ()

    def refusal(self, program: Program, match: Match) -> str | None:
        if len(set(match.outputs)) < len(match.outputs):
            return "two outputs are one node"
        reason = legality.refusal(program.facts, match)
        return None if reason is None else f"{reason.kind}: {reason}"

    def replaced_nodes(self, match: Match) -> tuple[Node, ...]:
        return match.outputs

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        new: dict[Node, Node] = {}
        kinds = self.pattern.transparent
        for node in match.nodes:
            if node._erased:  # looked past, and an earlier site of this stage put something in its place
                new[node] = edit.resolve(node)
                continue
            through = any(node.target in kind.targets and kind.test(edit.program.facts, node) for kind in kinds)
            if through and node not in match.outputs:
                behind = node.all_input_nodes[0]
                new[node] = new.get(behind, behind)
                continue
            args, kwargs = map_arg((node.args, node.kwargs), lambda operand: new.get(operand, operand))
            new[node] = edit.call(node.target, *args, **kwargs)
        # Under an alias, for a rule that builds what was there is told that it changes nothing.
        return {output: edit.call(torch.ops.aten.alias.default, new[output]) for output in match.outputs}


@registry.register
@dataclass(frozen=True)
class RecomputePass(Pass):
    """Recompute under one pattern, by its key."""

    key: int = 0
    name: ClassVar[str] = "recompute"
    contract: ClassVar[Contract] = EXACT

    def rules(self) -> tuple[Rule, ...]:
        made = PATTERNS.get(self.key)  # none under the default key, with which others list the passes there are
        return () if made is None else (Recompute(made),)


def recompute(pattern: Pattern) -> RecomputePass:
    """The pass for a pattern. The last few hundred patterns are kept."""
    key = max(PATTERNS, default=0) + 1
    PATTERNS[key] = pattern
    PATTERNS.pop(key - 300, None)
    return RecomputePass(key)
