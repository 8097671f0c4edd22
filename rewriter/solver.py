# SPDX-License-Identifier: Apache-2.0
"""Backtracking search for one match of a pattern at one root: the inner loop of the matcher.

State is a handful of tables and a trail; a choice point remembers the length of the trail and undoes down to it.
Nothing is copied. Goals form a linked list, so that what remains to be shown is known at every choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from rewriter.expressions import (
    Alternatives,
    Anything,
    Call,
    Const,
    Dim,
    Expression,
    Literal,
    Optional,
    RegionOf,
    Sequence,
    Var,
    Variadic,
    equal,
    same_dim,
)
from rewriter.facts import Facts
from rewriter.looking import chain, readers
from rewriter.pattern import Pattern, Route
from rewriter.predicates import Predicate
from rewriter.schemas import base_name, describe, nodes_in, operator_name
from rewriter.slices import Dominance, Region, slice_of


@dataclass(frozen=True)
class Failure:
    """Where a search could not go on.

    Attributes:
        depth: number of nodes that fitted until then.
        precise: the operator fitted too, and something about the call did not.
        node, step: the place in the graph and in the pattern.
        reason, expected, found: what is wrong; what would have done, and what is there.
        reader: the node that reads the value at fault; has a source line where inputs and parameters have none.
        captured: number of captures until then: of two places equally deep, the search got past the one with fewer.
    """

    depth: int
    precise: bool
    node: Node | None
    step: str
    reason: str
    expected: tuple[str, ...]
    found: str
    reader: Node | None = None
    captured: int = 0

    @property
    def progress(self) -> tuple[int, bool, int]:
        return self.depth, self.precise, self.captured

    @property
    def place(self) -> tuple[Any, ...]:
        return *self.progress, self.node, self.step


class Trace:
    """Keeps the furthest failure of a search."""

    def __init__(self) -> None:
        self.furthest: Failure | None = None

    def record(self, failure: Failure) -> None:
        known = self.furthest
        if known is None or failure.progress > known.progress:
            self.furthest = failure
        elif failure.place == known.place:  # another alternative there: either would have done
            self.furthest = replace(known, expected=known.expected + failure.expected)


@dataclass(frozen=True, slots=True)
class Goal:
    """`value`, an argument of `consumer`, must match `expression`; then everything in `rest`."""

    expression: Expression
    value: Any
    consumer: Node | None
    step: str
    rest: Goal | None


class Solver:
    """One search. After `solve` returned True its tables hold the match."""

    def __init__(self, facts: Facts, pattern: Pattern, trace: Trace | None = None) -> None:
        self.facts = facts
        self.pattern = pattern
        self.trace = trace
        self.captures: dict[str, Any] = {}
        self.bound: dict[int, Node] = {}  # id of a Call expression -> its node
        self.nodes: dict[Node, None] = {}
        self.casts: dict[Node, None] = {}
        self.shared: dict[Node, None] = {}
        self.outputs: list[Node] = []
        self._trail: list[Callable[[], object]] = []
        self._partial = False

    def solve(self, root: Node) -> bool:
        """Whether the whole pattern matches with its first output at `root`."""
        self.outputs = [root]
        return self._match_call_options(self.pattern.outputs[0], root)

    def solve_part(self, expression: Expression, node: Node) -> bool:
        """Whether one expression of the pattern matches at `node`, whatever surrounds it."""
        self._partial = True
        return self._match_call_options(expression, node)

    def _match_call_options(self, expression: Expression, node: Node) -> bool:
        return self._next(Goal(expression, node, None, "", None), look_through=False)

    # -- goals

    def _next(self, goal: Goal | None, look_through: bool = True) -> bool:
        if goal is None:
            return self._complete()
        expression = goal.expression
        if isinstance(expression, Call):
            return self._call(expression, goal, look_through)
        if isinstance(expression, Var):
            return self._var(expression, goal)
        if isinstance(expression, Alternatives):
            return self._any_of(
                (Goal(option, goal.value, goal.consumer, goal.step, goal.rest) for option in expression.options),
                look_through,
            )
        if isinstance(expression, Optional):
            return self._optional(expression, goal)
        if isinstance(expression, Sequence):
            return self._sequence(expression, goal)
        if isinstance(expression, RegionOf):
            return self._region(expression, goal)
        return self._constant(expression, goal)

    def _any_of(self, goals: Iterator[Goal | None], look_through: bool = True) -> bool:
        for goal in goals:
            mark = len(self._trail)
            if self._next(goal, look_through):
                return True
            self._undo(mark)
        return False

    def _call(self, call: Call, goal: Goal, look_through: bool) -> bool:
        wanted = call.operator
        if not isinstance(goal.value, Node):
            return self._fail(goal, "a constant where a computed value is needed", wanted.name)
        occurs = False
        passed: list[Node] = []
        for node in self._chain(goal.value) if look_through else (goal.value,):
            if node.target in wanted.targets:
                occurs = True
                mark = len(self._trail)
                if self._call_at(call, node, goal, passed):
                    return True
                self._undo(mark)
            passed.append(node)
        return False if occurs else self._fail(goal, "a different operator", wanted.name)

    def _call_at(self, call: Call, node: Node, goal: Goal, passed: list[Node]) -> bool:
        known = self.bound.get(id(call))
        if known is not None:
            if known is not node:
                return self._fail(goal, "not the same value as before", describe(known))
            self._take(passed)
            return self._next(goal.rest)
        step = f"{goal.step} > {call.operator.name}" if goal.step else call.operator.name
        operands = call.operator.operands_of(self.facts, node, call.arguments)
        if isinstance(operands, str):
            what = f"{operator_name(node.target)}{': ' if call.operator.read else ' with '}{operands}"
            return self._fail(replace(goal, step=step), what, call.operator.name, node)
        if not self._satisfied(call.conditions, node, goal, call.name):
            return False
        if call.name is not None and not self._capture(call.name, node, goal):
            return False
        self._bind(call, node, passed)
        return self._any_of(self._orders(call, node, operands, step, goal.rest))

    def _orders(self, call: Call, node: Node, operands: Any, step: str, rest: Goal | None) -> Iterator[Goal | None]:
        """The goals of a call's operands; for a commutative one, in both orders."""
        names = list(call.arguments)
        values = [operands[name] for name in names]
        orders = [values]
        if call.operator.commutative and len(values) == 2 and values[0] is not values[1]:
            orders.append([values[1], values[0]])
        for order in orders:
            goals = rest
            for name, value in reversed(list(zip(names, order, strict=True))):
                goals = Goal(call.arguments[name], value, node, f"{step}.{name}", goals)
            yield goals

    def _var(self, var: Var, goal: Goal) -> bool:
        if not isinstance(goal.value, Node):
            return self._fail(goal, "a constant where a tensor is needed", f"any value for {var.name!r}")
        known = self.captures.get(var.name)
        if known is not None and known is not goal.value:
            return self._same_value(var, known, goal)
        passed: list[Node] = []
        for node in self._chain(goal.value):  # the nearest value that will do
            if self._satisfied(var.predicates, node, goal, var.name):
                self._look_past(passed)
                return self._capture(var.name, node, goal) and self._next(goal.rest)
            passed.append(node)
        return False

    def _same_value(self, var: Var, known: Node, goal: Goal) -> bool:
        """Two nodes are one value if they are so behind the nodes the pattern looks through."""
        one, other = list(self._chain(known)), list(self._chain(goal.value))
        if one[-1] is not other[-1]:
            return self._fail(goal, f"{var.name!r} stands for two different values", describe(known))
        self._look_past([*one[:-1], *other[:-1]])
        return self._satisfied(var.predicates, known, goal, var.name) and self._next(goal.rest)

    def _optional(self, optional: Optional, goal: Goal) -> bool:
        if goal.value is None:
            return self._next(goal.rest)
        return self._next(Goal(optional.inner, goal.value, goal.consumer, goal.step, goal.rest))

    def _sequence(self, sequence: Sequence, goal: Goal) -> bool:
        if not isinstance(goal.value, (list, tuple)):
            return self._fail(goal, "not a list", f"a list of {len(sequence.items)}")
        values = list(goal.value)
        spread = next((i for i, item in enumerate(sequence.items) if isinstance(item, Variadic)), None)
        extra = len(values) - len(sequence.items)
        if spread is not None:
            stop = spread + extra + 1
            values = [*values[:spread], tuple(values[spread:stop]), *values[max(stop, spread) :]]
        if len(values) != len(sequence.items):
            return self._fail(goal, f"a list of {len(goal.value)}", f"a list of {len(sequence.items)}")
        goals = goal.rest
        for index, item, value in reversed(list(zip(range(len(values)), sequence.items, values, strict=True))):
            goals = Goal(item, value, goal.consumer, f"{goal.step}[{index}]", goals)
        return self._next(goals)

    def _region(self, wanted: RegionOf, goal: Goal) -> bool:
        if not isinstance(goal.value, Node):
            return self._fail(goal, "a constant where a computed value is needed", f"a region for {wanted.name!r}")
        if not self._satisfied(wanted.predicates, goal.value, goal, wanted.name):
            return False
        if wanted.entry is None:
            region = slice_of(self.facts, goal.value, wanted.operators)
            if isinstance(region, str):
                return self._fail(goal, region, f"a region of {', '.join(sorted(wanted.operators))}")
            return self._capture(wanted.name, region, goal) and self._next(goal.rest)
        for region in self.facts.derived(Dominance).ending_at(goal.value):
            mark = len(self._trail)
            if self._region_from(wanted, wanted.entry, region, goal):
                return True
            self._undo(mark)
        return self._fail(goal, "no region of these operators ends here", f"a region for {wanted.name!r}")

    def _region_from(self, wanted: RegionOf, entry: Expression, region: Region, goal: Goal) -> bool:
        """One region with one entry: its operators, then what the entry is."""
        for node in region.nodes:
            if node.op != "call_function" or base_name(node.target) not in wanted.operators:
                return self._fail(goal, f"{describe(node)} is not among the operators of {wanted.name!r}", "", node)
        if not self._capture(wanted.name, region, goal):
            return False
        self._take(list(region.nodes))
        (start,) = region.entries
        return self._next(Goal(entry, start, region.nodes[0], f"{goal.step} > {wanted.name}", goal.rest))

    def _constant(self, expression: Expression, goal: Goal) -> bool:
        value = goal.value
        if isinstance(expression, Anything):
            return self._next(goal.rest)
        if isinstance(expression, Variadic):
            return self._variadic(expression, goal)
        if next(nodes_in(value), None) is not None:
            return self._fail(goal, "a computed value where a constant is needed", _constant_name(expression))
        if isinstance(expression, Const):
            if not self._satisfied(expression.predicates, value, goal, expression.name):
                return False
            return self._capture(expression.name, value, goal) and self._next(goal.rest)
        if isinstance(expression, Dim):
            fits = same_dim(self.facts, expression, value, goal.consumer)
            return self._next(goal.rest) if fits else self._fail(goal, "another dimension", f"dim {expression.index}")
        if isinstance(expression, Literal):
            fits = equal(value, expression.value)
            return self._next(goal.rest) if fits else self._fail(goal, "another constant", repr(expression.value))
        raise TypeError(f"{type(expression).__name__} is not part of the pattern language")

    def _variadic(self, variadic: Variadic, goal: Goal) -> bool:
        for item in goal.value:
            if not isinstance(item, Node):
                return self._fail(goal, "a list with constants", "a list of tensors")
            if not self._satisfied(variadic.predicates, item, goal, variadic.name):
                return False
        return self._capture(variadic.name, goal.value, goal) and self._next(goal.rest)

    # -- the end of the search

    def _complete(self) -> bool:
        """All operands fit: now the further outputs, then use limits, then the relations between captures."""
        if self._partial:
            return True
        if len(self.outputs) < len(self.pattern.outputs):
            return self._further_output(len(self.outputs))
        escaped = self.facts.escape(self.nodes, self.outputs, self.shared)
        if escaped is not None:
            node, user = escaped
            how = "is a program output" if user.op == "output" else f"is used by {describe(user)}"
            self._report(node, "use limit", f"{describe(node)} is needed outside the match", "no other user", how)
            return False
        everything = self.captures | {n: None for n in self.pattern.names if n not in self.captures}
        for condition in self.pattern.conditions:
            if not condition.test(self.facts, everything):
                self._report(
                    self.outputs[0], "conditions", "the captures do not fit together", condition.description, ""
                )
                return False
        return True

    def _further_output(self, index: int) -> bool:
        for node in self._reachable(self.pattern.links[index - 1]):
            mark = len(self._trail)
            self.outputs.append(node)
            self._trail.append(self.outputs.pop)
            if self._next(Goal(self.pattern.outputs[index], node, None, f"output {index + 1}", None), False):
                return True
            self._undo(mark)
        self._report(self.outputs[0], f"output {index + 1}", "no node computes this output", "", "")
        return False

    def _reachable(self, routes: tuple[Route, ...]) -> list[Node]:
        """Candidates for a further output: up the routes from what is already bound."""
        found: dict[Node, None] = {}
        for leaf, steps in routes:
            start = self.captures.get(leaf.name) if isinstance(leaf, Var) else self.bound.get(id(leaf))
            same = () if start is None else self._chain(start) if isinstance(leaf, Var) else (start,)
            level = dict.fromkeys(same)  # any of them may be what the output reads
            for targets in steps:
                users = (user for node in level for user in readers(self.facts, self.pattern.transparent, node))
                level = dict.fromkeys(user for user in users if user.target in targets)
            found.update(level)
        return sorted(found)

    # -- tables and trail

    def _chain(self, value: Node) -> Iterator[Node]:
        """The value, then what is behind it as long as the pattern looks through."""
        return chain(self.facts, self.pattern.transparent, value)

    def _bind(self, call: Call, node: Node, passed: list[Node]) -> None:
        self.bound[id(call)] = node
        self._trail.append(lambda: self.bound.pop(id(call)))
        self._take([*passed, node])
        if call.operator.casts:
            self._add(self.casts, node)
        if call.may_escape:
            self._add(self.shared, node)

    def _take(self, nodes: list[Node]) -> None:
        for node in nodes:
            self._add(self.nodes, node)

    def _look_past(self, nodes: list[Node]) -> None:
        """Nodes between the match and an input of it: others may use them too."""
        for node in nodes:
            self._add(self.nodes, node)
            self._add(self.shared, node)

    def _add(self, table: dict[Node, None], node: Node) -> None:
        if node not in table:
            table[node] = None
            self._trail.append(lambda: table.pop(node))

    def _capture(self, name: str, value: Any, goal: Goal) -> bool:
        if name not in self.captures:
            self.captures[name] = value
            self._trail.append(lambda: self.captures.pop(name))
            return True
        known = self.captures[name]
        same = known == value if next(nodes_in(value), None) is not None else equal(value, known)
        return same or self._fail(goal, f"{name!r} stands for two different values", describe(known))

    def _satisfied(self, conditions: tuple[Predicate, ...], value: Any, goal: Goal, name: str | None) -> bool:
        for condition in conditions:
            if not condition.test(self.facts, value):
                what = name or describe(value)
                reason = (
                    f"{what} {condition.complaint}" if condition.complaint else f"{what} is not {condition.description}"
                )
                return self._fail(goal, reason, condition.description)
        return True

    def _undo(self, mark: int) -> None:
        while len(self._trail) > mark:
            self._trail.pop()()

    # -- reporting

    def _fail(self, goal: Goal, reason: str, expected: str, call: Node | None = None) -> bool:
        """Record why a goal failed; `call` is the node whose operator fitted though its arguments do not."""
        if self.trace is not None:
            node = call or (goal.value if isinstance(goal.value, Node) else goal.consumer)
            found = describe(goal.value)
            self._report(node, goal.step, reason, expected, found, precise=call is not None, reader=goal.consumer)
        return False

    def _report(
        self,
        node: Node | None,
        step: str,
        reason: str,
        expected: str,
        found: str,
        precise: bool = False,
        reader: Node | None = None,
    ) -> None:
        if self.trace is not None:
            depth, captured = len(self.nodes), len(self.captures)
            self.trace.record(Failure(depth, precise, node, step, reason, (expected,), found, reader, captured))


def _constant_name(expression: Expression) -> str:
    if isinstance(expression, Literal):
        return repr(expression.value)
    return f"a constant for {expression.name!r}" if isinstance(expression, Const) else "a dimension"
