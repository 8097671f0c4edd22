# SPDX-License-Identifier: Apache-2.0
"""What matching yields: a `Match` where a pattern holds, a `Miss` with its reason where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.fx import Node

from rewriter.facts import paths_of


@dataclass(frozen=True)
class Match:
    """One place where a pattern or view holds.

    Attributes:
        name: of the pattern or view.
        root: the node whose value the match defines (the last one, of several).
        captures: name -> node, constant, tuple of nodes (variadic) or `Match` (groups); None for parts left out.
        nodes: every node the match consists of, in graph order, `root` included, captured inputs not.
        outputs: the nodes whose values the match defines; users outside may read these and no other.
        casts: nodes at which the pattern itself names a change of dtype.
        shared: nodes that may have users outside and then stay in the graph.
        location: ``file:line`` of the pattern.
    """

    name: str
    root: Node
    captures: Mapping[str, Any]
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    casts: frozenset[Node] = frozenset()
    shared: frozenset[Node] = frozenset()
    location: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.root, self.nodes))

    def __getitem__(self, name: str) -> Any:
        """The capture of that name."""
        return self.captures[name]

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The original module paths the nodes come from, in graph order."""
        return tuple(dict.fromkeys(path for node in self.nodes for path in paths_of(node)))

    @property
    def path(self) -> str:
        """Module path of the root."""
        return paths_of(self.root)[0]

    def __str__(self) -> str:
        return f"{self.name} at {self.path or '<root>'} ({self.root.name})"


@dataclass(frozen=True)
class Miss:
    """One place where a rule does not apply, and why.

    Attributes:
        rule: the pattern, view or rule.
        site: module path of the place.
        step: how far matching came, e.g. ``"matmul.x > softmax.x"``.
        reason: what is wrong, in one sentence.
        expected, found: what the step asked for and what is there instead.
        source: the user's line behind it.
        depth: number of nodes that did fit; larger is nearer to a match.
        node: the node at which it failed; None where the rule's operators do not occur at all.
    """

    rule: str
    site: str
    step: str
    reason: str
    expected: str = ""
    found: str = ""
    source: str = ""
    depth: int = 0
    node: Node | None = field(default=None, compare=False)

    def __str__(self) -> str:
        lines = [f"{self.rule} does not apply at {self.site or '<root>'}: {self.reason}"]
        if self.step:
            lines.append(f"  step      {self.step}")
        if self.expected:
            lines.append(f"  expected  {self.expected}")
        if self.found:
            lines.append(f"  found     {self.found}")
        if self.source:
            lines.append(f"  source    {self.source}")
        return "\n".join(lines)
