# SPDX-License-Identifier: Apache-2.0
"""The pattern language: expressions that look like the mathematics they match.

    q, k, v, mask = Var("q"), Var("k"), Var("v"), Var("mask")
    scores = q @ swap_last(k) * Const("scale", where=number)
    probabilities = softmax(optionally(lambda s: s + mask, scores), -1)
    attention = pattern("attention", probabilities @ v)

With ``x = Var("x")``, ``x * sigmoid(x)`` needs both operands to be the same node. Values inside a match may not be
used outside it, unless the pattern says `shared`; assertion nodes do not count. Patterns are checked when they are
defined: what is impossible or ambiguous is a `PatternError` that names the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch._ops import OpOverload

from rewriter.compiled import Compiled, compile_pattern
from rewriter.errors import PatternError
from rewriter.expressions import (
    Alternatives,
    Anything,
    Call,
    Const,
    Dim,
    Expression,
    Literal,
    Operator,
    Optional,
    RegionOf,
    Sequence,
    Var,
    Variadic,
    defined,
    optionally,
    walk,
)
from rewriter.looking import Transparent
from rewriter.predicates import Predicate, Where, predicates

__all__ = [
    "Alternatives", "Anything", "Call", "Const", "Dim", "Expression", "Literal", "Operator", "Optional", "Pattern",
    "RegionOf", "Sequence", "Transparent", "Var", "Variadic", "optionally", "pattern",
]  # fmt: skip


# From a leaf of a pattern up to one of its outputs: the operators passed, as sets of targets.
Route = tuple[Expression, tuple[frozenset[OpOverload], ...]]


@dataclass(frozen=True, eq=False)
class Pattern:
    """A checked pattern; make one with `pattern`.

    Attributes:
        name: what matches and misses are called by.
        outputs: the values the match defines; the first is where matching starts (the root).
        conditions: relations between captures, tested last.
        transparent: kinds of nodes to look through.
        anchor: the call that makes a site worth explaining; the root unless given.
        location: ``file:line`` of the definition.
    """

    name: str
    outputs: tuple[Expression, ...]
    conditions: tuple[Predicate, ...]
    transparent: tuple[Transparent, ...]
    anchor: Expression
    location: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every capture name, in the order of the pattern."""
        return tuple(dict.fromkeys(n for n in map(_name, walk(*self.outputs)) if n is not None))

    @cached_property
    def root_targets(self) -> tuple[OpOverload, ...]:
        """Operators a root may call, in the order of the pattern."""
        return tuple(dict.fromkeys(t for call in _calls_at(self.outputs[0]) for t in call.operator.targets))

    @cached_property
    def required(self) -> tuple[Call, ...]:
        """Calls below the root that occur in every match; those of alternatives and optional parts need not."""
        return tuple(_required(self.outputs[0]))

    @cached_property
    def compiled(self) -> Compiled:
        """The pattern as a function; see :mod:`rewriter.compiled`."""
        return compile_pattern(self)

    @cached_property
    def anchor_targets(self) -> tuple[OpOverload, ...]:
        return tuple(dict.fromkeys(t for call in _calls_at(self.anchor) for t in call.operator.targets))

    @cached_property
    def anchor_routes(self) -> tuple[Route, ...]:
        """The ways from the anchor up to the root."""
        return self.routes_from(self.anchor)

    def routes_from(self, part: Expression) -> tuple[Route, ...]:
        """The ways from a part of the pattern up to the root."""
        return tuple(dict.fromkeys(_routes(self.outputs[0], lambda e: e is part)))

    @cached_property
    def links(self) -> tuple[tuple[Route, ...], ...]:
        """For each further output, the ways to reach it from what earlier outputs bind."""
        return tuple(_links(self.outputs, i) for i in range(1, len(self.outputs)))


def pattern(
    name: str,
    *outputs: Expression,
    where: Where = None,
    transparent: tuple[Transparent, ...] = (),
    anchor: Expression | None = None,
) -> Pattern:
    """Define and check a pattern.

    Args:
        name: what matches and misses are called by.
        outputs: one expression per value the match defines; the first is the root.
        where: conditions on all captures together, functions of ``(captures)`` or ``(facts, captures)``.
        transparent: kinds of nodes to look through, e.g. `rewriter.operators.VALUE_PRESERVING`.
        anchor: the call whose occurrences `explain` reports on when they do not match (default: the root).

    Raises:
        PatternError: the pattern can never match, or could match in two ways by accident; the message names the line.
    """
    location = defined()
    if not outputs:
        raise PatternError(f"{location}: pattern {name!r} has no output")
    made = Pattern(name, outputs, predicates(where, location), transparent, anchor or outputs[0], location)
    _check(made)
    return made


def _check(made: Pattern) -> None:
    for output in made.outputs:
        if not _calls_at(output) or not all(isinstance(option, Call) for option in _flat(output)):
            raise PatternError(f"{made.location}: an output of {made.name!r} must be an operator, not {_say(output)}")
    kinds: dict[str, Expression] = {}
    for expression in walk(*made.outputs):
        _check_expression(made.name, expression)
        name = _name(expression)
        if name is None:
            continue
        if not name.isidentifier():
            raise PatternError(f"{expression.location}: {name!r} is not a name for a capture")
        first = kinds.setdefault(name, expression)
        if type(first) is not type(expression) or (isinstance(expression, (Call, RegionOf)) and first is not expression):
            raise PatternError(
                f"{expression.location}: {name!r} is {_say(expression)} here and {_say(first)} at {first.location}"
            )
    _check_contradictions(made)
    if not any(expression is made.anchor for expression in walk(made.outputs[0])):
        raise PatternError(f"{made.location}: the anchor of {made.name!r} is not part of its first output")
    for index, routes in enumerate(made.links, start=2):
        if not routes:
            raise PatternError(f"{made.location}: output {index} of {made.name!r} shares nothing with those before it")


def _check_expression(name: str, expression: Expression) -> None:
    where = expression.location
    if isinstance(expression, Alternatives):
        for option in expression.options[:-1]:
            if isinstance(option, Anything) or (isinstance(option, Var) and not option.predicates):
                raise PatternError(f"{where}: what follows {_say(option)} in {name!r} can never be reached")
    if isinstance(expression, Optional) and isinstance(expression.inner, (Optional, Literal)):
        raise PatternError(f"{where}: Optional of {_say(expression.inner)} in {name!r}")
    if isinstance(expression, Call):
        if not any(isinstance(e, (Var, Variadic, Anything, RegionOf)) for e in walk(expression)):
            raise PatternError(f"{where}: {expression.operator.name} of constants only in {name!r} never occurs")
        if any(isinstance(child, Variadic) for child in expression.children):
            raise PatternError(f"{where}: Variadic in {name!r} outside a list; write [Variadic(...)]")
    if isinstance(expression, RegionOf) and not expression.operators:
        raise PatternError(f"{where}: the region {expression.name!r} in {name!r} allows no operator")
    if isinstance(expression, Sequence) and sum(isinstance(i, Variadic) for i in expression.items) > 1:
        raise PatternError(f"{where}: a list with two Variadic parts in {name!r} is ambiguous")


def _check_contradictions(made: Pattern) -> None:
    """A variable cannot have two dtypes or two ranks."""
    implied: dict[str, tuple[frozenset[Any] | None, int | None]] = {}
    for expression in walk(*made.outputs):
        if not isinstance(expression, (Var, Const, Variadic)):
            continue
        for condition in expression.predicates:
            dtypes, rank = implied.get(expression.name, (None, None))
            if condition.dtypes is not None:
                dtypes = condition.dtypes if dtypes is None else dtypes & condition.dtypes
            if dtypes is not None and not dtypes:
                raise PatternError(f"{expression.location}: no dtype is left for {expression.name!r} in {made.name!r}")
            if None not in (rank, condition.rank) and rank != condition.rank:
                raise PatternError(f"{expression.location}: {expression.name!r} cannot have two ranks in {made.name!r}")
            implied[expression.name] = (dtypes, condition.rank if condition.rank is not None else rank)


def _name(expression: Expression) -> str | None:
    return expression.name if isinstance(expression, (Var, Const, Variadic, Call, RegionOf)) else None


def _say(expression: Expression) -> str:
    if isinstance(expression, Call):
        return f"the operator {expression.operator.name}"
    if isinstance(expression, Literal):
        return f"the literal {expression.value!r}"
    name = _name(expression)
    return f"{type(expression).__name__}({name!r})" if name else type(expression).__name__


def _flat(expression: Expression) -> Iterator[Expression]:
    """The options at one place, alternatives opened."""
    if isinstance(expression, Alternatives):
        for option in expression.options:
            yield from _flat(option)
    else:
        yield expression


def _calls_at(expression: Expression) -> list[Call]:
    return [option for option in _flat(expression) if isinstance(option, Call)]


def _required(*expressions: Expression) -> Iterator[Call]:
    for expression in expressions:
        if isinstance(expression, Call):
            yield expression
        if isinstance(expression, (Call, Sequence)):
            yield from _required(*expression.children)


def _routes(expression: Expression, is_leaf: Callable[[Expression], bool]) -> Iterator[Route]:
    if is_leaf(expression):
        yield expression, ()  # and deeper: of alternatives, the one that was bound may be another
    if isinstance(expression, RegionOf):
        return  # what lies between its entry and its value cannot be climbed operator by operator
    step = (frozenset(expression.operator.targets),) if isinstance(expression, Call) else ()
    for child in expression.children:
        for leaf, passed in _routes(child, is_leaf):
            yield leaf, passed + step


def _links(outputs: tuple[Expression, ...], index: int) -> tuple[Route, ...]:
    earlier = list(walk(*outputs[:index]))
    objects = {id(e) for e in earlier if isinstance(e, Call)}
    names = {e.name for e in earlier if isinstance(e, Var)}

    def is_leaf(expression: Expression) -> bool:
        return id(expression) in objects or (isinstance(expression, Var) and expression.name in names)

    return tuple(dict.fromkeys(_routes(outputs[index], is_leaf)))
