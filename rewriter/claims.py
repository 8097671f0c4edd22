# SPDX-License-Identifier: Apache-2.0
"""Whether a rule did what it says: a fingerprint of each site before and after.

A rule returns which nodes it replaced by which. It must not claim a change and have made none (then a fixpoint would
never come), nor change the graph and not say so (then neither journal nor undo would know). Costs what the site is
large; :class:`Tally` does the same for a whole stage, in one sweep over the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.fx import Graph, Node

from rewriter.schemas import describe, operator_name


class Witness:
    """One match before a rule rewrites it."""

    def __init__(self, graph: Graph, nodes: Sequence[Node], roots: Sequence[Node]) -> None:
        self.graph, self.nodes, self.roots = graph, nodes, roots
        self.length = len(graph.nodes)
        # A node looked past may be gone already: an earlier site of this stage put something in its place.
        self.calls = [(node, node.target, node.args, node.kwargs) for node in nodes if not node._erased]
        self.readers = [len(root.users) for root in roots]

    def complaint(self, replacement: Mapping[Node, Node], added: Sequence[Node], tensors: Collection[str]) -> str | None:
        """What is wrong with the rule's claim; None if it is true.

        Args:
            replacement: what the rule returned.
            added: the nodes it made through the editor.
            tensors: names of the site's new tensors: new values make a change even where the nodes look alike.
        """
        for node, *call in self.calls:
            if node._erased or not _same_call(node, *call):
                return f"it changed {describe(node)} itself; a rule builds new nodes and returns what they replace"
        if len(self.graph.nodes) != self.length + len(added):
            return "it made or erased nodes of the graph itself; build them with edit.call, and leave erasing to the editor"
        missing = [root for root in self.roots if root not in replacement and root.users]
        if missing and added:
            return f"it made {len(added)} nodes and does not say what stands for {describe(missing[0])}"
        if missing:
            return f"it matched, and returned nothing that stands for {describe(missing[0])}"
        for node in added:
            if any(root in node.all_input_nodes for root in self.roots):
                return f"{describe(node)}, which it built, reads the value it is to replace"
        if [len(root.users) for root in self.roots] != self.readers:
            return "it redirected the readers of what it replaces itself; return old -> new instead"
        if not replacement:
            return None  # nobody reads the roots: nothing need stand for them, and the editor erases them
        if tensors or any(self._differ(old, new, added) for old, new in replacement.items()):
            return None
        return f"it claims a change, and what it built for {describe(self.roots[0])} is what was there"

    def _differ(self, old: Node, new: Node, added: Sequence[Node]) -> bool:
        if old is new:
            return False
        if new not in added or old.target is not new.target:
            return True
        return not _alike(old, new, (set(self.nodes), set(added)))


class Tally:
    """All calls of a graph before a stage, to find edits behind the editor's back anywhere in it."""

    def __init__(self, graph: Graph) -> None:
        self.calls = {node: (node.target, node.args, node.kwargs) for node in graph.nodes}

    def changed(self, graph: Graph, expected: Collection[Node]) -> Node | None:
        """A node whose call is another now although nothing it reads was replaced."""
        for node in graph.nodes:
            call = self.calls.get(node)
            if call is not None and node not in expected and not _same_call(node, *call):
                return node
        return None


def formula(node: Node, inside: Collection[Node]) -> str:
    """A value computed from nodes outside a group, for reading: ``add(mul(x, sigmoid(x)), y)``."""
    if node not in inside or node.op != "call_function":
        return str(node.target) if node.op == "get_attr" else node.name
    given = (*(_written(a, inside) for a in node.args), *(f"{k}={_written(v, inside)}" for k, v in node.kwargs.items()))
    return f"{operator_name(node.target).partition('.')[0]}({', '.join(given)})"


def _alike(old: Any, new: Any, inside: tuple[Collection[Node], Collection[Node]]) -> bool:
    """Whether two values are the same computation of nodes outside both groups."""
    if isinstance(old, Node) and isinstance(new, Node):
        if old is new:
            return True
        same = old in inside[0] and new in inside[1] and old.target is new.target
        return same and _alike(old.args, new.args, inside) and _alike(old.kwargs, new.kwargs, inside)
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(_alike(a, b, inside) for a, b in zip(old, new, strict=True))
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_alike(value, new[key], inside) for key, value in old.items())
    return type(old) is type(new) and bool(old == new)


def _written(value: Any, inside: Collection[Node]) -> str:
    if isinstance(value, Node):
        return formula(value, inside)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_written(item, inside) for item in value) + "]"
    return str(value)


def _same_call(node: Node, target: Any, args: Any, kwargs: Any) -> bool:
    """Arguments are compared by identity: a node keeps its tuple until somebody assigns another."""
    return node.target is target and (node.args is args or node.args == args) and node.kwargs == kwargs
