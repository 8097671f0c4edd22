# SPDX-License-Identifier: Apache-2.0
"""The meaning of patterns (docs/patterns.md, "What a match is"), enumerated by brute force.

A solution is a value, and `Meaning.solutions` yields all of them in the order the meaning gives; the first one at a
root is the match. There is no trail, no index and no pruning, and nothing is shared with the matcher. Regions are not
part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile
from typing import Any, NamedTuple

from torch.fx import Node

from rewriter.expressions import Call, Expression, Variadic
from rewriter.facts import Facts
from rewriter.pattern import Pattern


class Solution(NamedTuple):
    captures: dict[str, Any]
    bound: dict[Call, Node]
    nodes: frozenset[Node]
    past: frozenset[Node]  # looked past: others may use them too
    outputs: tuple[Node, ...] = ()


class Meaning(NamedTuple):
    facts: Facts
    pattern: Pattern

    def matches(self) -> list[Solution]:
        """The first solution at each root that has one, in graph order."""
        start = Solution({}, {}, frozenset(), frozenset())
        return [first for node in self.facts.graph.nodes for first in islice(self.at([node], start), 1)]

    def at(self, candidates: Any, s: Solution) -> Iterator[Solution]:
        """Solutions with the next output at one of the candidates, and the further ones anywhere."""
        if len(s.outputs) < len(self.pattern.outputs):
            for node in candidates:
                for found in self.solutions(self.pattern.outputs[len(s.outputs)], node, None, s, through=False):
                    yield from self.at(self.facts.graph.nodes, found._replace(outputs=(*s.outputs, node)))
            return
        inside = s.nodes - s.past - set(s.outputs) - {node for e, node in s.bound.items() if e.may_escape}
        kept = all(user in s.nodes or self.facts.is_assertion(user) for node in inside for user in node.users)
        captures = {name: s.captures.get(name) for name in self.pattern.names}
        if kept and self.holds(self.pattern.conditions, captures):
            yield s._replace(captures=captures)

    def solutions(self, e: Expression, value: Any, user: Any, s: Solution, through: bool = True) -> Iterator[Solution]:
        """Every way in which `value`, an argument of `user`, is the expression `e`, given what is bound already."""
        return getattr(self, type(e).__name__.lower())(e, value, user, s, through)

    def alternatives(self, e: Any, value: Any, user: Any, s: Solution, through: bool) -> Iterator[Solution]:
        for option in e.options:
            yield from self.solutions(option, value, user, s, through)

    def optional(self, e: Any, value: Any, user: Any, s: Solution, _: bool) -> Iterator[Solution]:
        yield from [s] if value is None else self.solutions(e.inner, value, user, s)

    def literal(self, e: Any, value: Any, user: Any, s: Solution, _: bool) -> Iterator[Solution]:
        yield from [s] if not _holds_node(value) and _equal(value, e.value) else []

    def anything(self, e: Any, value: Any, user: Any, s: Solution, _: bool) -> Iterator[Solution]:
        yield s

    def const(self, e: Any, value: Any, user: Any, s: Solution, _: bool) -> Iterator[Solution]:
        if not _holds_node(value) and self.holds(e.predicates, value) and _equal(s.captures.get(e.name, value), value):
            yield s._replace(captures={e.name: value, **s.captures})

    def dim(self, e: Any, value: Any, user: Any, s: Solution, _: bool) -> Iterator[Solution]:
        value = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        rank = len(self.facts.shape(user.all_input_nodes[0]) or ()) + e.new_dims
        if type(value) is int and ((value - e.index) % rank == 0 if rank else value == e.index):
            yield s

    def variadic(self, e: Any, value: Any, user: Any, s: Solution, _: bool) -> Iterator[Solution]:
        if all(isinstance(n, Node) and self.holds(e.predicates, n) for n in value):
            yield from [s._replace(captures={e.name: value, **s.captures})] * (s.captures.get(e.name, value) == value)

    def sequence(self, e: Any, value: Any, user: Any, s: Solution, _: bool) -> Iterator[Solution]:
        given = list(value) if isinstance(value, (list, tuple)) else [None] * (len(e.items) + 1)
        for at in [i for i, item in enumerate(e.items) if isinstance(item, Variadic)]:
            end = len(given) - (len(e.items) - at - 1)
            given = [*given[:at], tuple(given[at:end]), *given[end:]] if end >= at else []
        yield from self.each(list(zip(e.items, given, strict=True)), user, s) if len(given) == len(e.items) else []

    def var(self, e: Any, value: Any, user: Any, s: Solution, _: bool) -> Iterator[Solution]:
        chain = self.chain(value) if isinstance(value, Node) else []
        if e.name in s.captures:
            node, before = s.captures[e.name], self.chain(s.captures[e.name])
            past = [] if value is node else [*before[:-1], *chain[:-1]]
            fits = bool(chain) and before[-1] is chain[-1] and self.holds(e.predicates, node)
        else:
            past = list(takewhile(lambda n: not self.holds(e.predicates, n), chain))
            fits, node = len(past) < len(chain), [*chain, None][len(past)]
        if fits:
            yield Solution({**s.captures, e.name: node}, s.bound, s.nodes.union(past), s.past.union(past), s.outputs)

    def call(self, e: Call, value: Any, user: Any, s: Solution, through: bool) -> Iterator[Solution]:
        chain = ([value] if not through else self.chain(value)) if isinstance(value, Node) else []
        for count, node in enumerate(chain):
            at = s._replace(nodes=s.nodes.union(chain[:count]))
            operands = self.operands(e, node) if e not in s.bound else None
            if s.bound.get(e) is node:
                yield at
            elif operands is not None and self.holds(e.conditions, node):
                captures = {**s.captures, e.name: node} if e.name else s.captures
                at = Solution(captures, {**s.bound, e: node}, at.nodes | {node}, s.past, s.outputs)
                exchanged = [operands[::-1]] if e.operator.commutative and len(operands) == 2 else []
                for order in [operands, *exchanged]:
                    yield from self.each(list(zip(e.arguments.values(), order, strict=True)), node, at)

    def each(self, goals: list[tuple[Any, Any]], user: Node | None, s: Solution) -> Iterator[Solution]:
        for after in self.solutions(*goals[0], user, s) if goals else ():
            yield from self.each(goals[1:], user, after)
        yield from [] if goals else [s]

    def operands(self, e: Call, node: Node) -> list[Any] | None:
        """What the call's operands stand for at the node; every argument it does not name must have its default."""
        if node.target not in e.operator.targets:
            return None
        if e.operator.read is not None:
            read = e.operator.read(self.facts, node)
            return None if isinstance(read, str) else [read[name] for name in e.arguments]
        schema: Any = node.target._schema.arguments  # type: ignore[union-attr]
        usual = {a.name: a.default_value for a in schema if a.has_default_value()}
        given = usual | dict(zip([a.name for a in schema], node.args, strict=False)) | node.kwargs
        spelled = dict(zip(e.operator.operands, [a.name for a in schema], strict=False))
        wanted = [spelled.get(name) for name in e.arguments]
        rest = all(name in usual and _equal(given[name], usual[name]) for name in given.keys() - set(wanted))
        return [given[name] for name in wanted] if rest and given.keys() >= set(wanted) else None

    def chain(self, node: Node) -> list[Node]:
        """The node and what is behind it, as far as the pattern looks through."""
        through = any(node.target in kind.targets and kind.test(self.facts, node) for kind in self.pattern.transparent)
        return [node, *self.chain(node.all_input_nodes[0])] if through else [node]

    def holds(self, conditions: Any, value: Any) -> bool:
        return all(condition.test(self.facts, value) for condition in conditions)


def _holds_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, (list, tuple)) and any(map(_holds_node, value)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
