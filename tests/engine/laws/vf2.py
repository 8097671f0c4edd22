# SPDX-License-Identifier: Apache-2.0
"""Matches of plain patterns (operators of variables and numbers) by networkx's VF2, the second oracle.

A graph and a pattern become multigraphs: a node per value, an edge per operand, labelled by its position, and by no
position where the operator is commutative. A match is then a subgraph monomorphism, except that VF2 maps different
pattern nodes to different values and the pattern language need not: so every way to identify pattern nodes is tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import networkx as nx
from networkx.algorithms.isomorphism import MultiDiGraphMatcher
from torch import fx
from torch.fx import Node

from rewriter.pattern import Call, Literal, Pattern, Var, walk
from rewriter.schemas import ASSERTIONS

from .graphs import COMMUTATIVE

Found = tuple[Node, frozenset[Node]]  # the root, and the nodes of the match


def vf2_matches(graph: fx.Graph, pattern: Pattern) -> set[Found]:
    """Root and nodes of every solution that keeps the use limits."""
    data, (root,) = data_graph(graph), pattern.outputs
    calls = [e for e in walk(root) if isinstance(e, Call)]
    found: set[Found] = set()
    for shape in quotients(pattern):
        matcher = MultiDiGraphMatcher(data, shape, node_match=_same_node, edge_match=_same_edges)
        for mapping in matcher.subgraph_monomorphisms_iter():
            image = {part: node for node, merged in mapping.items() for part in merged}
            shared = {image[e] for e in calls if e.may_escape}
            nodes = frozenset(image[e] for e in calls)
            if _closed(nodes, shared | {image[root]}):
                found.add((image[root], nodes))
    return found


def data_graph(graph: fx.Graph) -> nx.MultiDiGraph:
    made = nx.MultiDiGraph()
    for node in graph.nodes:
        if node.op == "output":
            continue
        usual = not node.kwargs and node.op == "call_function"
        constants = [arg for arg in node.args if not isinstance(arg, Node)]
        made.add_node(node, target=node.target if usual else None, constants=constants)
        for position, arg in enumerate(node.args):
            if isinstance(arg, Node):
                made.add_edge(arg, node, position=None if node.target in COMMUTATIVE else position)
    return made


def quotients(pattern: Pattern) -> Iterator[nx.MultiDiGraph]:
    """The pattern's graph under every identification of its nodes that one value could meet."""
    objects = list(walk(pattern.outputs[0]))
    parts: list[Any] = [e for e in objects if isinstance(e, Call)]
    parts += dict.fromkeys(e.name for e in objects if isinstance(e, Var))
    for groups in _partitions(parts):
        group_of = {part: frozenset(group) for group in groups for part in group}
        made = nx.MultiDiGraph()
        for group in group_of.values():
            calls = [part for part in group if isinstance(part, Call)]
            made.add_node(group, calls=[(c.operator.targets.keys(), _constants(c)) for c in calls])
        for group in set(group_of.values()):
            edges: Counter[Any] = Counter()
            for call in (part for part in group if isinstance(part, Call)):
                edges |= Counter(_edges(call, group_of))  # one value has its operands once
            for (source, position), count in edges.items():
                made.add_edges_from([(source, group, {"position": position})] * count)
        yield made


def _edges(call: Call, group_of: dict[Any, Any]) -> Iterator[tuple[Any, int | None]]:
    for position, child in enumerate(call.arguments.values()):
        if not isinstance(child, Literal):
            part = child.name if isinstance(child, Var) else child
            yield group_of[part], None if call.operator.commutative else position


def _constants(call: Call) -> list[Any]:
    return [child.value for child in call.arguments.values() if isinstance(child, Literal)]


def _same_node(data: dict[str, Any], shape: dict[str, Any]) -> bool:
    return all(data["target"] in targets and data["constants"] == constants for targets, constants in shape["calls"])


def _same_edges(data: dict[Any, Any], shape: dict[Any, Any]) -> bool:
    one, other = (Counter(edge["position"] for edge in edges.values()) for edges in (data, shape))
    return one == other


def _closed(nodes: frozenset[Node], free: set[Node]) -> bool:
    return all(user in nodes or user.target in ASSERTIONS for node in nodes - free for user in node.users)


def _partitions(parts: list[Any]) -> Iterator[list[list[Any]]]:
    if not parts:
        yield []
        return
    first, *rest = parts
    for groups in _partitions(rest):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]
