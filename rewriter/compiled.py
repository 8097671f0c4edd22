# SPDX-License-Identifier: Apache-2.0
"""Patterns as straight-line Python: the fast half of the matcher.

A pattern is compiled once into a function that reads one candidate root and answers

    Match     what the solver would find here
    None      the solver would find nothing here
    UNSURE    ask the solver

The function takes, at every choice (operand order, alternatives, nodes to look through), the first option whose
operators are present; the solver tries options in the same order, so success is the solver's answer too. A failure is
final as long as every choice so far had one option left, which in real graphs is nearly always: operators tell the
options apart. Otherwise `no`, the value a failure returns, has become UNSURE. There is no backtracking here.

`source_of` shows the text of a pattern's function.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from rewriter.emitting import Text
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
    walk,
)
from rewriter.facts import Facts
from rewriter.looking import behind, chain, leads_to, nearest, same_value
from rewriter.matches import Match
from rewriter.schemas import nodes_in

if TYPE_CHECKING:
    from rewriter.pattern import Pattern

UNSURE = "unsure"
_FEW = 4  # so many operators are compared one by one
_MISSING = object()  # a capture nothing was found for, where None may have been found
# Arguments of these types contain no node.
_PLAIN = frozenset({int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.SymInt})

Compiled = Callable[[Facts, Node], "Match | str | None"]


def compile_pattern(pattern: Pattern) -> Compiled:
    """The function of a pattern."""
    writer = _Writer(pattern)
    name = f"<pattern {pattern.name} at {pattern.location}>"
    source = writer.source()
    # Tracebacks and profilers show the generated lines.
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), writer.constants)
    function: Compiled = writer.constants["match"]
    return function


def source_of(pattern: Pattern) -> str:
    """The Python text a pattern compiles to."""
    return _Writer(pattern).source()


class _Writer(Text):
    """Writes the function of one pattern, goal by goal in the solver's order.

    Variables: n0, n1, ... are the nodes of calls, c_NAME the captures, passed and looked the nodes looked through.
    """

    def __init__(self, pattern: Pattern) -> None:
        super().__init__({
            "Match": Match, "MappingProxyType": MappingProxyType, "Node": Node, "PLAIN": _PLAIN, "MISSING": _MISSING,
            "UNSURE": UNSURE, "EMPTY": frozenset(), "KINDS": pattern.transparent, "behind": behind, "leads_to": leads_to,
            "nearest": nearest, "same_value": same_value, "same_dim": same_dim, "equal": equal, "has_nodes": _has_nodes,
            "fits": _fits,
        })  # fmt: skip
        self.pattern = pattern
        self.kinds = pattern.transparent
        self.calls: dict[int, str] = {}  # id of a Call -> the variable with its node
        self.named: set[str] = set()  # captures written so far
        self.repeated = _repeated(pattern)
        self.parts: dict[int, str] = {}  # id of a repeated expression -> its function

    def source(self) -> str:
        pattern = self.pattern
        self._expression(pattern.outputs[0], "root", None, look_through=False)
        if len(pattern.outputs) > 1:
            self.line("return UNSURE")  # further outputs are searched for, not read off
        else:
            self._finish()
        start = ["def match(facts, root):", "    no = None"]
        start += [f"    {name} = {'MISSING' if name.startswith('c_') else 'None'}" for name in self.open]
        if self.kinds:
            start += ["    passed, looked = [], []"]
        return "\n".join((*start, *self.functions, *self.lines)) + "\n"

    # -- one expression against the value in a variable

    def _expression(self, expression: Expression, value: str, consumer: str | None, look_through: bool = True) -> None:
        if look_through and id(expression) in self.repeated:
            self.fail_if(f"not {self._part(expression)}({value}, {consumer})")
            return
        self._write(expression, value, consumer, look_through)

    def _part(self, expression: Expression) -> str:
        """The function of an expression that occurs several times: written once, so that text grows with the pattern."""
        if id(expression) in self.parts:
            return self.parts[id(expression)]
        name = self.parts[id(expression)] = f"part{len(self.parts)}"
        with self.function(f"{name}(value, consumer)"):
            if isinstance(expression, Call):
                known = self.calls.setdefault(id(expression), f"n{len(self.calls)}")
                same = f"leads_to(facts, KINDS, value, {known}, passed)" if self.kinds else f"value is {known}"
                self.line(f"if {known} is not None: return {same}")
            self._write(expression, "value", "consumer", look_through=True)
        return name

    def _write(self, expression: Expression, value: str, consumer: str | None, look_through: bool) -> None:
        match expression:
            case Call():
                self._call(expression, value, look_through)
            case Var():
                self._var(expression, value)
            case Alternatives():
                self._alternatives(expression, value, consumer, look_through)
            case Optional():
                with self.branch(f"if {value} is not None"):
                    self._expression(expression.inner, value, consumer)
            case Sequence():
                self._sequence(expression, value, consumer)
            case Variadic():
                self._variadic(expression, value)
            case Const():
                self.fail_if(f"{value}.__class__ not in PLAIN and has_nodes({value})")
                self._predicates(expression.predicates, value)
                self._capture(expression.name, value, f"equal({value}, c_{expression.name})")
            case Dim():
                self.fail_if(f"not same_dim(facts, {self.constant(expression)}, {value}, {consumer})")
            case Literal():
                self.fail_if(f"not equal({value}, {self.constant(expression.value)})")
            case Anything():
                pass
            case RegionOf():  # which region it is takes a search
                self.line("no = UNSURE")
                self.line(self.fail)
            case _:
                raise TypeError(f"{type(expression).__name__} is not part of the pattern language")

    def _call(self, call: Call, value: str, look_through: bool) -> None:
        node = self.calls.setdefault(id(call), f"n{len(self.calls)}")
        targets = frozenset(call.operator.targets)
        if look_through and self.kinds:
            self.line(f"{node} = behind(facts, KINDS, {value}, {self.constant(targets)}, passed)")
            self.fail_if(f"{node} is None")
            if both := targets & _transparent_targets(self.pattern):
                self.line(f"if {node}.target in {self.constant(both)}: no = UNSURE")  # behind it may be another
        else:
            self.fail_if(f"not {self._calls(value, targets)}")
            self.line(f"{node} = {value}")
        self.bound(node)
        operands = self._operands(call, node)
        self._predicates(call.conditions, node)
        if call.name is not None:
            self.line(f"c_{call.name} = {node}")
            self._captured(call.name)
        expressions = list(call.arguments.values())
        if call.operator.commutative and len(operands) == 2:
            self._order(expressions, operands)
        for expression, operand in zip(expressions, operands, strict=True):
            self._expression(expression, operand, node)

    def _operands(self, call: Call, node: str) -> list[str]:
        """Variables with the operands. The usual way to write a call is read off; any other by the operator."""
        wanted = list(call.arguments)
        variables = [self.fresh() for _ in wanted]
        names = ", ".join(variables) + ("," if len(variables) == 1 else "")
        operator = self.constant(call.operator)
        shortest = min(len(target._schema.arguments) for target in call.operator.targets)
        leading = wanted == list(call.operator.operands[: len(wanted)]) and 0 < len(wanted) <= shortest
        usual = f"len({node}.args) == {len(wanted)} and not {node}.kwargs"
        if call.operator.read is not None or not leading:
            usual = "False"
        self.line(f"if {usual}: {names} = {node}.args")
        with self.branch("else"):
            self.line(f"operands = {operator}.operands_of(facts, {node}, {self.constant(call.arguments)})")
            self.fail_if("operands.__class__ is str")
            for variable, name in zip(variables, wanted, strict=True):
                self.line(f"{variable} = operands[{name!r}]")
        return variables

    def _order(self, expressions: list[Expression], operands: list[str]) -> None:
        """Exchange the operands of a commutative operator where only that order can fit."""
        (first, second), (a, b) = expressions, operands
        straight = self._both(self._feasible(first, a), self._feasible(second, b))
        exchanged = self._both(self._feasible(first, b), self._feasible(second, a))
        one, other = self.constant(first), self.constant(second)
        deep_straight = f"fits(facts, KINDS, {one}, {a}) and fits(facts, KINDS, {other}, {b})"
        deep_exchanged = f"fits(facts, KINDS, {one}, {b}) and fits(facts, KINDS, {other}, {a})"
        with self.branch(f"if {straight}"), self.branch(f"if {a} is not {b} and {exchanged} and {deep_exchanged}"):
            self.line(f"if {deep_straight}: no = UNSURE")
            self.line(f"else: {a}, {b} = {b}, {a}")
        if straight != "True":
            self.line(f"elif {exchanged}: {a}, {b} = {b}, {a}")
            self.line(f"else: {self.fail}")

    def _alternatives(self, group: Alternatives, value: str, consumer: str | None, look_through: bool) -> None:
        options = list(_flat(group))
        word = "if"
        for index, option in enumerate(options):
            feasible = self._feasible(option, value, look_through)
            rivals = [later for later in options[index + 1 :] if not self._disjoint(option, later)]
            others = [self._feasible(later, value, look_through) for later in rivals]
            # Worth a closer look, where another option would do for the operator alone.
            closer = f" and fits(facts, KINDS, {self.constant(option)}, {value})" if others and option.children else ""
            with self.branch(f"{word} {feasible}{closer}"):
                if others:
                    self.line(f"if {' or '.join(others)}: no = UNSURE")
                self._expression(option, value, consumer, look_through)
            if feasible == "True" and not closer:
                return  # what follows is only reached from here, and then by the solver
            word = "elif"
        self.line(f"else: {self.fail}")

    def _var(self, var: Var, value: str) -> None:
        self.fail_if(f"{value}.__class__ is not Node")
        again = f"same_value(facts, KINDS, c_{var.name}, {value}, looked)" if self.kinds else f"c_{var.name} is {value}"
        for predicate in var.predicates:  # every occurrence's conditions hold of what is captured
            again += f" and {self.constant(predicate.test)}(facts, c_{var.name})"
        if var.predicates and self.kinds:
            found = self.fresh()
            self.line(f"{found} = nearest(facts, KINDS, {value}, {self.constant(var.predicates)}, looked)")
            first = [f"if {found} is None: {self.fail}"]
        else:
            found, first = value, []
            for predicate in var.predicates:
                first.append(f"if not {self.constant(predicate.test)}(facts, {value}): {self.fail}")
        self._capture(var.name, found, again, first)

    def _sequence(self, sequence: Sequence, value: str, consumer: str | None) -> None:
        spread = next((i for i, item in enumerate(sequence.items) if isinstance(item, Variadic)), None)
        length = len(sequence.items)
        self.fail_if(f"not isinstance({value}, (list, tuple))")
        self.fail_if(f"len({value}) {'!=' if spread is None else '<'} {length if spread is None else length - 1}")
        for index, item in enumerate(sequence.items):
            variable = self.fresh()
            after = length - index - 1
            if spread is None or index < spread:
                self.line(f"{variable} = {value}[{index}]")
            elif index == spread:
                self.line(f"{variable} = tuple({value}[{index}:len({value}) - {after}])")
            else:
                self.line(f"{variable} = {value}[-{after + 1}]")
            self._expression(item, variable, consumer)

    def _variadic(self, variadic: Variadic, value: str) -> None:
        with self.branch(f"for item in {value}"):
            self.fail_if("item.__class__ is not Node")
            self._predicates(variadic.predicates, "item")
        self._capture(variadic.name, value, f"c_{variadic.name} == {value}")

    # -- the end: use limits, relations, the match

    def _finish(self) -> None:
        bound = list(self.calls.values())
        certain = [node for node in bound if node in self.certain]
        rest = [node for node in bound if node not in self.certain]
        members = [*certain, *([f"*(n for n in ({', '.join(rest)},) if n is not None)"] if rest else [])]
        if self.kinds:
            members += ["*passed", "*looked"]
        self.line(f"nodes = tuple(sorted({{{', '.join(members)}}}))")
        self._group("shared", [c for c in self._distinct() if c.may_escape], ["looked"] if self.kinds else [])
        self._group("casts", [c for c in self._distinct() if c.operator.casts], [])
        # A value with one user is used where it was found; only others can escape.
        inner = [
            self.calls[id(c)] for c in self._distinct() if not c.may_escape and self.calls[id(c)] not in self._roots()
        ]
        counts = [
            f"len({n}.users) > 1" if n in self.certain else f"({n} is not None and len({n}.users) > 1)" for n in inner
        ]
        if self.kinds:
            counts.append("passed")
        if counts:
            self.fail_if(f"({' or '.join(counts)}) and facts.escape(nodes, (root,), shared) is not None")
        captures = ", ".join(f"{name!r}: {self._captured_value(name)}" for name in self.pattern.names)
        self.line(f"captures = {{{captures}}}")
        for condition in self.pattern.conditions:
            self.fail_if(f"not {self.constant(condition.test)}(facts, captures)")
        name, location = self.constant(self.pattern.name), self.constant(self.pattern.location)
        self.line(f"return Match({name}, root, MappingProxyType(captures), nodes, (root,), casts, shared, {location})")

    def _distinct(self) -> list[Call]:
        found = {id(e): e for e in walk(self.pattern.outputs[0]) if isinstance(e, Call) and id(e) in self.calls}
        return list(found.values())

    def _roots(self) -> set[str]:
        """Calls that occur as the root and nowhere else."""
        options = list(_flat(self.pattern.outputs[0]))
        inside = {id(below) for option in options for below in walk(*option.children)}
        return {self.calls[id(option)] for option in options if id(option) in self.calls and id(option) not in inside}

    def _group(self, variable: str, calls: list[Call], lists: list[str]) -> None:
        parts = [self.calls[id(call)] for call in calls] + [f"*{name}" for name in lists]
        if not parts:
            self.line(f"{variable} = EMPTY")
            return
        self.line(f"{variable} = frozenset({{{', '.join(parts)}}})")
        if any(part not in self.certain and not part.startswith("*") for part in parts):
            self.line(f"{variable} -= {{None}}")

    def _captured_value(self, name: str) -> str:
        if name not in self.named:
            return "None"  # inside a region
        if f"c_{name}" in self.certain:
            return f"c_{name}"
        return f"None if c_{name} is MISSING else c_{name}"

    # -- small parts

    def _feasible(self, expression: Expression, value: str, look_through: bool = True) -> str:
        """A cheap condition without which the expression cannot match the value."""
        match expression:
            case Call():
                targets = frozenset(expression.operator.targets)
                if look_through and self.kinds:
                    return f"behind(facts, KINDS, {value}, {self.constant(targets)}, None) is not None"
                return self._calls(value, targets)
            case Var():
                return f"{value}.__class__ is Node"
            case Const() | Literal() | Dim() | Sequence():
                return f"{value}.__class__ is not Node"
        return "True"

    def _calls(self, value: str, targets: frozenset[Any]) -> str:
        """The value is a node that calls one of the operators. Identity is cheaper than an operator's hash."""
        if len(targets) > _FEW:
            return f"({value}.__class__ is Node and {value}.target in {self.constant(targets)})"
        same = " or ".join(f"{value}.target is {self.constant(target)}" for target in sorted(targets, key=str))
        return f"({value}.__class__ is Node and ({same}))"

    def _disjoint(self, one: Expression, other: Expression) -> bool:
        """Whether no value is feasible for both."""
        if isinstance(one, Call) and isinstance(other, Call):
            return not self.kinds and not (set(one.operator.targets) & set(other.operator.targets))
        nodes, constants = (Call, Var), (Const, Literal, Dim, Sequence)
        return (isinstance(one, nodes) and isinstance(other, constants)) or (
            isinstance(one, constants) and isinstance(other, nodes)
        )

    @staticmethod
    def _both(one: str, other: str) -> str:
        return " and ".join(part for part in (one, other) if part != "True") or "True"

    def _predicates(self, predicates: Any, value: str) -> None:
        for predicate in predicates:
            self.fail_if(f"not {self.constant(predicate.test)}(facts, {value})")

    def _capture(self, name: str, value: str, again: str, first: list[str] | None = None) -> None:
        """Bind a name, or check that it stands for the same as before."""
        variable = f"c_{name}"
        if variable in self.certain:
            self.fail_if(f"not ({again})")
            return
        if name not in self.named and not self.local:  # a local function runs again, when the name may be bound
            for text in first or []:
                self.line(text)
            self.line(f"{variable} = {value}")
            self._captured(name)
            return
        with self.branch(f"if {variable} is not MISSING"):
            self.fail_if(f"not ({again})")
        with self.branch("else"):
            for text in first or []:
                self.line(text)
            self.line(f"{variable} = {value}")
        self._captured(name)

    def _captured(self, name: str) -> None:
        self.named.add(name)
        self.bound(f"c_{name}")


def _flat(expression: Expression) -> Iterator[Expression]:
    if isinstance(expression, Alternatives):
        for option in expression.options:
            yield from _flat(option)
    else:
        yield expression


def _transparent_targets(pattern: Pattern) -> frozenset[Any]:
    return frozenset().union(*(kind.targets for kind in pattern.transparent))


def _has_nodes(value: Any) -> bool:
    return next(nodes_in(value), None) is not None


def _fits(facts: Facts, kinds: Any, expression: Expression, value: Any) -> bool:
    """Whether the operators below the value are those of the expression, whatever the captures say: necessary for a
    match, and enough to tell two operand orders apart in nearly every graph."""
    match expression:
        case Call():
            if not isinstance(value, Node):
                return False
            calling = (n for n in chain(facts, kinds, value) if n.target in expression.operator.targets)
            return any(_operands_fit(facts, kinds, expression, node) for node in calling)
        case Alternatives():
            return any(_fits(facts, kinds, option, value) for option in expression.options)
        case Optional():
            return value is None or _fits(facts, kinds, expression.inner, value)
        case Var():
            return isinstance(value, Node)
        case Const() | Literal() | Dim():
            return not isinstance(value, Node)
    return True


def _operands_fit(facts: Facts, kinds: Any, call: Call, node: Node) -> bool:
    operands = call.operator.operands_of(facts, node, call.arguments)
    if isinstance(operands, str):
        return False
    expressions = list(call.arguments.values())
    values = [operands[name] for name in call.arguments]
    orders = [values, values[::-1]] if call.operator.commutative and len(values) == 2 else [values]
    return any(all(_fits(facts, kinds, e, v) for e, v in zip(expressions, order, strict=True)) for order in orders)


def _repeated(pattern: Pattern) -> frozenset[int]:
    """Ids of the compound expressions that are part of several others."""
    seen: set[int] = set()
    several: set[int] = set()
    for parent in walk(pattern.outputs[0]):
        for child in parent.children:
            if child.children:
                (several if id(child) in seen else seen).add(id(child))
    return frozenset(several)
