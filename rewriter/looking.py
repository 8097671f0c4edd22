# SPDX-License-Identifier: Apache-2.0
"""Looking through nodes that hand on their first argument's values: casts to the same dtype, copies, dropout in eval.

A pattern names the kinds it looks through. The *chain* of a value is the value itself, then what is behind it for as
long as it is of such a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.predicates import Predicate


@dataclass(frozen=True)
class Transparent:
    """A kind of node a pattern may look through: it hands on its first argument's values unchanged.

    Attributes:
        name: how messages call it.
        targets: the operators it may be spelled with.
        test: whether this call really changes nothing.
    """

    name: str
    targets: frozenset[OpOverload]
    test: Callable[[Facts, Node], bool]


Kinds = tuple[Transparent, ...]


def looks_through(facts: Facts, kinds: Kinds, node: Node) -> bool:
    """Whether the node is of one of the kinds."""
    target: Any = node.target
    return any(target in kind.targets and kind.test(facts, node) for kind in kinds)


def chain(facts: Facts, kinds: Kinds, value: Node) -> Iterator[Node]:
    """The value, then what is behind it as long as the kinds look through."""
    yield value
    while looks_through(facts, kinds, value):
        value = value.all_input_nodes[0]
        yield value


def readers(facts: Facts, kinds: Kinds, value: Node) -> Iterator[Node]:
    """Users of a value, also through nodes of the kinds."""
    for user in facts.users(value):
        yield user
        if looks_through(facts, kinds, user):
            yield from readers(facts, kinds, user)


def behind(facts: Facts, kinds: Kinds, value: Any, targets: Collection[Any], passed: list[Node] | None) -> Node | None:
    """The first node of the value's chain that calls one of `targets`; those before it go to `passed`."""
    return _first(facts, kinds, value, lambda node: node.target in targets, passed)


def leads_to(facts: Facts, kinds: Kinds, value: Any, wanted: Node, passed: list[Node]) -> bool:
    """Whether `wanted` is in the value's chain; the nodes before it go to `passed`."""
    return _first(facts, kinds, value, lambda node: node is wanted, passed) is not None


def nearest(
    facts: Facts, kinds: Kinds, value: Node, predicates: tuple[Predicate, ...], passed: list[Node]
) -> Node | None:
    """The first node of the value's chain that satisfies the predicates; those before it go to `passed`."""
    return _first(facts, kinds, value, lambda node: all(p.test(facts, node) for p in predicates), passed)


def same_value(facts: Facts, kinds: Kinds, one: Node, other: Node, passed: list[Node]) -> bool:
    """Whether two nodes have one value behind the nodes looked through, all of which go to `passed`."""
    if one is other:
        return True
    first, second = list(chain(facts, kinds, one)), list(chain(facts, kinds, other))
    if first[-1] is not second[-1]:
        return False
    passed += [*first[:-1], *second[:-1]]
    return True


def _first(
    facts: Facts, kinds: Kinds, value: Any, fits: Callable[[Node], bool], passed: list[Node] | None
) -> Node | None:
    if not isinstance(value, Node):
        return None
    if fits(value):  # the usual case, without a generator
        return value
    before: list[Node] = []
    for node in chain(facts, kinds, value):
        if fits(node):
            if passed is not None:
                passed += before
            return node
        before.append(node)
    return None
