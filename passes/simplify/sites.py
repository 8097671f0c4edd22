# SPDX-License-Identifier: Apache-2.0
"""What the simplifications share: matches made of a few nodes, and when a value may become another's alias."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch.fx import Node

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.schemas import describe


def site(
    name: str,
    nodes: Sequence[Node],
    captures: Mapping[str, Any],
    *,
    casts: Collection[Node] = (),
) -> Match:
    """A match of the given nodes, in graph order; the last one is its root and only output."""
    return Match(
        name=name,
        root=nodes[-1],
        captures=MappingProxyType(dict(captures)),
        nodes=tuple(nodes),
        outputs=(nodes[-1],),
        casts=frozenset(casts),
    )


def near(facts: Facts, name: str, node: Node, step: str, reason: str, expected: str = "") -> Miss:
    """A place that nearly simplifies."""
    return Miss(
        rule=name,
        site=facts.path(node),
        step=step,
        reason=reason,
        expected=expected,
        found=describe(node),
        source=facts.source(node),
        depth=1,
        node=node,
    )


def calls(facts: Facts, targets: Collection[Any]) -> list[Node]:
    """Nodes that call one of the operators, in graph order; from the graph's index."""
    graph = facts.graph
    return sorted(n for t in targets for n in graph.find_nodes(op="call_function", target=t, sort=False))


def sole_user(facts: Facts, node: Node) -> Node | None:
    """The only node that uses the value; None if there are several or none."""
    users = facts.users(node)
    return users[0] if len(users) == 1 else None


def leaves_program(facts: Facts, node: Node) -> bool:
    """Whether the value, or a value that may share its storage, is an output of the program."""
    roots = facts.alias_roots(node)
    return any(roots & facts.alias_roots(value) for value in facts.graph.output_node().all_input_nodes)


def sharing_shows(facts: Facts, fresh: Node, other: Node) -> str | None:
    """Why a value with storage of its own may not be replaced by another value of equal contents; None if it may.

    Once they share storage, a write to one is a write to both, and as outputs they are one tensor.
    """
    for value in (fresh, other):
        if writers := facts.writers(value):
            return f"{describe(value)} is written in place by {describe(writers[0])}: sharing its storage would show"
    if leaves_program(facts, fresh) and _known_outside(facts, other):
        return f"{describe(fresh)} is returned and would share storage with {describe(other)}"
    return None


def _known_outside(facts: Facts, node: Node) -> bool:
    """Whether somebody outside the program holds the storage: its caller, or its owner."""
    return leaves_program(facts, node) or any(root.op != "call_function" for root in facts.alias_roots(node))


def chain_above(facts: Facts, node: Node, targets: Collection[Any]) -> Iterator[Node]:
    """The node and what it reads first, for as long as these call one of the operators."""
    while node.op == "call_function" and node.target in targets:
        yield node
        node = node.all_input_nodes[0]
