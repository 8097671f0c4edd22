# SPDX-License-Identifier: Apache-2.0
"""A pure computation that nothing reads goes away. Assertions read; random numbers that nobody reads move the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch.fx import Node

from rewriter.editing import Editor
from rewriter.matcher import Match, Miss
from rewriter.passes.simplify.pure import is_pure
from rewriter.passes.simplify.sites import near, site
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule


class RemoveDead(Rule):
    """One site per value that nobody reads, with everything that was computed only for it."""

    name: ClassVar[str] = "simplify.dead"
    role: ClassVar[str] = "dead"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        dead: set[Node] = set()
        misses: list[Miss] = []
        for node in reversed(facts.graph.nodes):
            if any(user not in dead for user in node.users) or not is_pure(facts, node):
                continue
            if facts.is_random(node):
                reason = "it draws random numbers: without it all later draws would be others"
                misses.append(near(facts, self.name, node, "value without users", reason))
                continue
            dead.add(node)
        ends = sorted(node for node in dead if not node.users)
        claimed: set[Node] = set()
        return [site(self.role, _only_for(end, dead, claimed), {}) for end in ends], misses[::-1]

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return {}  # nothing takes its place; the editor erases the nodes of a match that nobody reads


def _only_for(end: Node, dead: set[Node], claimed: set[Node]) -> list[Node]:
    """A dead value and the dead nodes behind it that no earlier site claimed, in graph order.

    What several dead values share is claimed by the first and erased with the last.
    """
    found: set[Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in dead and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    claimed |= found
    return sorted(found)
