# SPDX-License-Identifier: Apache-2.0
"""Parts of a graph with one way out, found without knowing how they are spelled.

Two questions are answered. `slice_of`: is a value computed from its sources by allowed operators alone (a mask from
positions and the padding input, say)? `Dominance`: which part of the graph lies between two nodes, so that nothing
enters but through the one and nothing leaves but through the other?
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.schemas import base_name, describe

Reads = Callable[[Facts, Node], "tuple[Node, ...]"]


@dataclass(frozen=True)
class Region:
    """Nodes that compute one value.

    Attributes:
        exit: the node whose value the region computes.
        nodes: everything it computes on the way, in graph order, `exit` included and `entries` not.
        entries: what it starts from, in graph order: inputs, parameters, sizes; or the one entry asked for.
    """

    exit: Node
    nodes: tuple[Node, ...]
    entries: tuple[Node, ...]

    def owned(self, facts: Facts) -> tuple[Node, ...]:
        """The nodes nobody outside needs but through `exit` (it post-dominates them), in graph order."""
        own = {self.exit}
        for node in reversed(self.nodes):
            if node is not self.exit and all(user in own for user in facts.users(node)):
                own.add(node)
        return tuple(node for node in self.nodes if node in own)


def slice_of(
    facts: Facts, node: Node, allowed: Collection[str], reads: Reads | None = None, at: Node | None = None
) -> Region | str:
    """The backward slice of a value, if all of it is computed by allowed operators; else what is not.

    The slice ends at placeholders, parameters, constants and sizes (symbolic integers). Operators that write in place
    to a value of the slice belong to it.

    Args:
        facts: of the graph.
        node: the value.
        allowed: operator names without overload (``"le"``, ``"index"``, ``"masked_fill_"``).
        reads: the operands of a node whose *values* count, where that is fewer than all (``zeros_like`` reads none).
        at: the node that reads the value: writes before it belong to the slice. Without it, a write after `node` is
            an obstacle.

    Returns:
        The region, or one sentence that names the first obstacle. Cost: linear in the slice.
    """
    inside: dict[Node, None] = {}
    entries: dict[Node, None] = {}
    pending = [node]
    while pending:
        value = pending.pop()
        if value in inside or value in entries:
            continue
        if is_entry(value):
            entries[value] = None
        elif facts.is_random(value):
            return f"{describe(value)} draws random numbers"
        elif value.op != "call_function" or base_name(value.target) not in allowed:
            return f"{describe(value)} is not among the operators allowed here"
        else:
            inside[value] = None
            pending.extend(value.all_input_nodes if reads is None else reads(facts, value))
        for writer in () if is_size(value) else facts.writers(value):
            if at is None and writer > node:
                return f"{describe(value)} is written by {describe(writer)} after {describe(node)} was computed"
            if at is None or writer < at:
                pending.append(writer)
    return Region(node, tuple(sorted(inside)), tuple(sorted(entries)))


def is_entry(node: Node) -> bool:
    """Whether a slice starts here: an input, a parameter or constant, or a size."""
    return node.op in ("placeholder", "get_attr") or is_size(node)


def is_size(node: Node) -> bool:
    """Whether the node's value is a (symbolic) integer."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


class Dominance:
    """Dominators and post-dominators of a whole graph, from networkx; sweeps once, answers in O(depth).

    What counts is the flow from the inputs: values computed from parameters, constants and sizes alone may enter a
    region anywhere, and assertions may read anywhere. A virtual source stands before all inputs and a virtual sink
    after all values without users, so that a graph with many of them has dominators, too.
    """

    _SOURCE, _SINK = "source", "sink"

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.flow: Any = nx.DiGraph()
        self.flow.add_nodes_from((self._SOURCE, self._SINK))
        for node in facts.graph.nodes:
            if facts.is_assertion(node) or is_size(node):
                continue
            if node.op == "placeholder":
                self.flow.add_edge(self._SOURCE, node)
            self.flow.add_edges_from((operand, node) for operand in node.all_input_nodes if operand in self.flow)
            if node in self.flow and not facts.users(node):
                self.flow.add_edge(node, self._SINK)
        self._before = nx.immediate_dominators(self.flow, self._SOURCE)
        self._after = nx.immediate_dominators(self.flow.reverse(copy=False), self._SINK)

    def dominators(self, node: Node) -> list[Node]:
        """What every way from the inputs to the node passes, nearest first."""
        return list(self._chain(self._before, node))

    def post_dominators(self, node: Node) -> list[Node]:
        """What every way from the node to an output passes, nearest first."""
        return list(self._chain(self._after, node))

    def between(self, entry: Node, exit: Node) -> Region | str:
        """The single-entry single-exit region from `entry` (not in it) to `exit` (in it), or why there is none."""
        if entry not in self.dominators(exit):
            return f"{describe(exit)} can be reached without {describe(entry)}"
        if exit not in self.post_dominators(entry):
            return f"{describe(entry)} is used without {describe(exit)}"
        inside = (nx.descendants(self.flow, entry) & nx.ancestors(self.flow, exit)) | {exit}
        return Region(exit, tuple(sorted(inside)), (entry,))

    def ending_at(self, exit: Node) -> Iterator[Region]:
        """The single-entry single-exit regions that end at a node, smallest first."""
        for entry in self.dominators(exit):
            region = self.between(entry, exit)
            if isinstance(region, Region):
                yield region

    def smallest(self, exit: Node) -> Region | None:
        """The smallest single-entry region that ends at `exit`; None where only the inputs dominate it."""
        return next(self.ending_at(exit), None)

    @staticmethod
    def _chain(above: dict[Any, Any], node: Node) -> Iterator[Node]:
        found = above.get(node)
        while isinstance(found, Node):
            yield found
            found = above.get(found)
