# SPDX-License-Identifier: Apache-2.0
"""What a view is: a name, a way to find its matches, and a way to explain its misses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch.fx import Node

from rewriter.facts import Facts, facts_of
from rewriter.matcher import Match, Miss, Target, within


@dataclass(frozen=True)
class View:
    """A model part that `find` recognises under several spellings.

    Attributes:
        name: what matches and misses are called by.
        find_in: matches in graph order of their roots.
        explain_in: misses of the places that look like the part, nearest first; each names its node.
    """

    name: str
    find_in: Callable[[Facts], list[Match]]
    explain_in: Callable[[Facts], list[Miss]]

    def find(self, program: Target) -> list[Match]:
        """Every match, in graph order."""
        return self.find_in(facts_of(program))

    def explain(self, program: Target, site: str | None = None) -> list[Miss]:
        """Why places that look like this part are none; only those at or below the module path `site`."""
        facts = facts_of(program)
        misses = [miss for miss in self.explain_in(facts) if miss.node is None or within(facts, miss.node, site)]
        if misses or any(within(facts, match.root, site) for match in self.find_in(facts)):
            return misses
        where = "in the program" if site is None else "at this site"
        return [Miss(self.name, site or "", "", f"nothing {where} looks like {self.name}")]


def with_captures(match: Match, captures: Mapping[str, Any], name: str | None = None) -> Match:
    """The match under other captures: what a spelling captured, in the view's own terms."""
    return replace(match, name=name or match.name, captures=MappingProxyType(dict(captures)))


def miss_at(facts: Facts, rule: str, node: Node, reason: str, depth: int = 1) -> Miss:
    """A miss that a view's own reasoning found, at one node."""
    return Miss(rule, facts.path(node), "", reason, source=facts.source(node), depth=depth, node=node)
