# SPDX-License-Identifier: Apache-2.0
"""f(x) = x:  x.to(x.dtype),  x[:],  x.reshape(x.shape),  x.expand(x.shape),  dropout(x, p=0 or in evaluation),  1 · x,  x / 1"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import Facts, same_shape
from rewriter.matcher import Match, Miss
from rewriter.operators import ALIAS, EVAL_DROPOUT, NOOP_CAST, NOOP_SHAPE, div, mul
from rewriter.passes.simplify.scalars import scaled
from rewriter.passes.simplify.sites import calls, sharing_shows, site
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule

aten = torch.ops.aten

# Calls that hand on their argument itself; `contiguous` and `clone` do not: what reads them may need the layout.
_NOTHING = (NOOP_CAST, NOOP_SHAPE, EVAL_DROPOUT, ALIAS)
_TARGETS = frozenset[Any]().union(*(kind.targets for kind in _NOTHING), mul.targets, div.targets)


class RemoveIdentity(Rule):
    """A call that changes nothing goes away; shapes are compared for every input, not for the example."""

    name: ClassVar[str] = "simplify.identity"
    role: ClassVar[str] = "identity"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        found = ((node, _unchanged(facts, node)) for node in calls(facts, _TARGETS))
        return [site(self.role, (node,), {"x": x}) for node, x in found if x is not None], ()

    def refusal(self, program: Program, match: Match) -> str | None:
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        if program.facts.aliased(match.root) and match.root.target is not aten._to_copy.default:
            return None  # it shares storage already, and legality has looked at that
        return sharing_shows(program.facts, match.root, match["x"])

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return {match.root: match["x"]}


def _unchanged(facts: Facts, node: Node) -> Node | None:
    """The argument whose values and strides the node hands on, if it is such a node."""
    if node.target in mul.targets or node.target in div.targets:
        scale = scaled(facts, node)
        return scale.x if scale is not None and scale.factor == 1 and same_shape(*map(facts.shape, (scale.x, node))) else None
    if any(node.target in kind.targets and kind.test(facts, node) for kind in _NOTHING):
        return node.all_input_nodes[0]
    return None
