# SPDX-License-Identifier: Apache-2.0
"""The expressions patterns are made of: variables, constants, operator calls, alternatives, optional parts.

Objects of this module are immutable and know the line that wrote them. An expression object that occurs twice stands
for one node; a name that occurs twice for one value.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from rewriter.errors import PatternError
from rewriter.facts import Facts
from rewriter.predicates import Predicate, Where, predicates
from rewriter.schemas import defaults, describe

aten = torch.ops.aten


# Files whose frames are never the author's.
_LANGUAGE = {
    __file__,
    "<string>",
    str(Path(__file__).with_name("pattern.py")),
    dataclasses.__file__,
    functools.__file__,
}


_written_at: ContextVar[str | None] = ContextVar("_written_at", default=None)


@contextmanager
def written_at(location: str) -> Iterator[None]:
    """Expressions made in this block were written at ``location``, whoever calls: for patterns made by a program."""
    token = _written_at.set(location)
    try:
        yield
    finally:
        _written_at.reset(token)


def defined() -> str:
    """``file:line`` of the innermost caller outside the pattern language: where the author wrote the expression."""
    if (location := _written_at.get()) is not None:
        return location
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _LANGUAGE:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@dataclass(frozen=True, eq=False)
class Expression:
    """Base of everything a pattern is made of. `location` is the line that wrote it."""

    location: str = field(default_factory=defined, kw_only=True, repr=False)

    @property
    def children(self) -> tuple[Expression, ...]:
        return ()

    def __add__(self, other: Any) -> Call:
        return add(self, other)

    def __radd__(self, other: Any) -> Call:
        return add(other, self)

    def __sub__(self, other: Any) -> Call:
        return sub(self, other)

    def __rsub__(self, other: Any) -> Call:
        return rsub(self, other)

    def __mul__(self, other: Any) -> Call:
        return mul(self, other)

    def __rmul__(self, other: Any) -> Call:
        return mul(other, self)

    def __truediv__(self, other: Any) -> Call:
        return div(self, other)

    def __matmul__(self, other: Any) -> Call:
        return matmul(self, other)

    def __pow__(self, other: Any) -> Call:
        return power(self, other)

    def __neg__(self) -> Call:
        return neg(self)

    def __or__(self, other: Expression) -> Alternatives:
        """``a | b``: a where it matches, else b."""
        return Alternatives((*_options(self), *_options(other)))


@dataclass(frozen=True, eq=False)
class Var(Expression):
    """Any node, captured under `name`; the same node wherever the name occurs."""

    name: str
    where: Where = None

    @cached_property
    def predicates(self) -> tuple[Predicate, ...]:
        return predicates(self.where, self.location)


@dataclass(frozen=True, eq=False)
class Const(Expression):
    """Any constant (number, dtype, list of numbers, ...), captured under `name`; equal wherever the name occurs."""

    name: str
    where: Where = None

    @cached_property
    def predicates(self) -> tuple[Predicate, ...]:
        return predicates(self.where, self.location)


@dataclass(frozen=True, eq=False)
class Literal(Expression):
    """Exactly this constant. ``2`` equals ``2.0``; ``True`` is not ``1``."""

    value: Any


@dataclass(frozen=True, eq=False)
class Dim(Expression):
    """A dimension index modulo the operand's rank (plus `new_dims`): ``Dim(-1)`` is also dimension 3 of four."""

    index: int
    new_dims: int = 0


@dataclass(frozen=True, eq=False)
class Anything(Expression):
    """Any node or constant, not captured."""


@dataclass(frozen=True, eq=False)
class Optional(Expression):
    """An argument that may be None (a bias, a mask); names inside are then captured as None."""

    inner: Expression

    @property
    def children(self) -> tuple[Expression, ...]:
        return (self.inner,)


@dataclass(frozen=True, eq=False)
class Variadic(Expression):
    """Zero or more nodes of an argument list, captured under `name` as a tuple."""

    name: str
    where: Where = None

    @cached_property
    def predicates(self) -> tuple[Predicate, ...]:
        return predicates(self.where, self.location)


@dataclass(frozen=True, eq=False)
class Sequence(Expression):
    """A list argument, item by item; at most one item is `Variadic`. Write a Python list."""

    items: tuple[Expression, ...]

    @property
    def children(self) -> tuple[Expression, ...]:
        return self.items


@dataclass(frozen=True, eq=False)
class RegionOf(Expression):
    """A value computed by allowed operators alone, however they are arranged; captured as a `rewriter.slices.Region`.

    Without an entry: computed from inputs, parameters, constants and sizes. Its nodes are the match's input, as a
    variable's are. With one: the single-entry single-exit region between the nearest dominator that matches `entry`
    and the value; its nodes are part of the match.

    Attributes:
        name: of the capture.
        operators: names without overload: ``{"le", "logical_and", "expand"}``.
        entry: what the region begins behind, or None.
        where: conditions on the value's node.
    """

    name: str
    operators: frozenset[str]
    entry: Expression | None = None
    where: Where = None

    @property
    def children(self) -> tuple[Expression, ...]:
        return () if self.entry is None else (self.entry,)

    @cached_property
    def predicates(self) -> tuple[Predicate, ...]:
        return predicates(self.where, self.location)


@dataclass(frozen=True, eq=False)
class Alternatives(Expression):
    """The first option that matches. Write ``a | b``."""

    options: tuple[Expression, ...]

    @property
    def children(self) -> tuple[Expression, ...]:
        return self.options


@dataclass(frozen=True, eq=False)
class Call(Expression):
    """A node that calls `operator`. Made by calling the operator; refined by `where`, `named` and `shared`."""

    operator: Operator
    arguments: Mapping[str, Expression]
    conditions: tuple[Predicate, ...] = ()
    name: str | None = None
    may_escape: bool = False

    @property
    def children(self) -> tuple[Expression, ...]:
        return tuple(self.arguments.values())

    def where(self, *conditions: Predicate | Callable[..., bool]) -> Call:
        """The same call under further conditions on its node."""
        return replace(self, conditions=self.conditions + predicates(conditions, defined()))

    def named(self, name: str) -> Call:
        """The same call, its node captured under `name`."""
        return replace(self, name=name)

    def shared(self) -> Call:
        """The same call, allowed to have users outside the match (it then stays in the graph)."""
        return replace(self, may_escape=True)


Reader = Callable[[Facts, Node], "Mapping[str, Any] | str"]


@dataclass(frozen=True, eq=False)
class Operator:
    """One mathematical operator under all its spellings.

    Attributes:
        name: how messages call it.
        overloads: the torch operators that spell it; packets stand for their functional overloads.
        operands: names for the leading schema arguments, in order. Every other argument must have its default value,
            so ``add(x, y, alpha=2)`` never matches ``x + y``; so must an operand a pattern leaves out.
        commutative: the first two operands may be swapped.
        casts: the operator may change the dtype, and a pattern that names it declares so.
        new_dims: dimensions the result has more than its first operand (`unsqueeze`: 1), for negative indices.
        read: for operators that schemas do not tell apart (a swap of the last two dimensions): returns the operands,
            or why the node is not this operator. Operands a pattern leaves out are then free.
    """

    name: str
    overloads: tuple[Any, ...]
    operands: tuple[str, ...]
    commutative: bool = False
    casts: bool = False
    new_dims: int = 0
    read: Reader | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise PatternError(f"{defined()}: the operator {self.name!r} has no spelling")

    def __call__(self, *args: Any, **kwargs: Any) -> Call:
        if len(args) > len(self.operands):
            raise PatternError(f"{defined()}: {self.name} takes {', '.join(self.operands)}; {len(args)} given")
        given = dict(zip(self.operands, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            raise PatternError(f"{defined()}: {self.name} got {', '.join(sorted(twice))} twice")
        if unknown := kwargs.keys() - set(self.operands):
            known = ", ".join(self.operands)
            what = f"{self.name} has no operand {', '.join(sorted(unknown))}"
            raise PatternError(f"{defined()}: {what}; it has {known}")
        given |= kwargs
        for operand in self.operands:
            if operand not in given and operand not in self.optional:
                raise PatternError(f"{defined()}: {self.name} needs the operand {operand!r}")
        return Call(self, MappingProxyType({n: _coerce(value, n, self.new_dims) for n, value in given.items()}))

    @cached_property
    def targets(self) -> Mapping[OpOverload, Mapping[str, str]]:
        """Overload -> operand name -> schema name."""
        found: dict[OpOverload, Mapping[str, str]] = {}
        for overload in (o for given in self.overloads for o in _functional(given)):
            schema = [argument.name for argument in overload._schema.arguments]
            found[overload] = MappingProxyType(dict(zip(self.operands, schema, strict=False)))
        return MappingProxyType(found)

    @cached_property
    def optional(self) -> frozenset[str]:
        """Operands a pattern may leave out: those some overload has a default for."""
        if self.read is not None:
            return frozenset(self.operands)
        return frozenset(
            operand
            for target, names in self.targets.items()
            for operand in self.operands
            if names.get(operand) is None or names[operand] in defaults(target)
        )

    def operands_of(self, facts: Facts, node: Node, wanted: Mapping[str, Any]) -> Mapping[str, Any] | str:
        """The values of the `wanted` operands, or what about the node's other arguments does not fit."""
        if self.read is not None:
            return self.read(facts, node)
        arguments = facts.arguments(node)
        target: Any = node.target  # one of `targets`
        names = self.targets[target]
        found = {operand: arguments[name] for operand, name in names.items() if operand in wanted and name in arguments}
        if missing := wanted.keys() - found.keys():
            return f"no argument {', '.join(sorted(missing))}"
        bound = {names[operand] for operand in found}
        usual = defaults(target)
        for name, value in arguments.items():
            if name not in bound and not (name in usual and equal(value, usual[name])):
                return f"{name} = {describe(value)}"
        return found


def equal(value: Any, expected: Any) -> bool:
    """Equality of constants: numbers by value, but a bool is not a number; a node equals no constant."""
    if isinstance(value, Node) or isinstance(value, bool) != isinstance(expected, bool):
        return False
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(equal(a, b) for a, b in zip(value, expected, strict=True))
    return bool(value == expected)


def same_dim(facts: Facts, dim: Dim, value: Any, consumer: Node | None) -> bool:
    """Whether an argument of `consumer` is the dimension; a list of one dimension counts as that dimension."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    operand = next(iter(consumer.all_input_nodes), None) if consumer is not None else None
    shape = facts.shape(operand) if operand is not None else None
    if shape is None or not len(shape) + dim.new_dims:
        return value == dim.index
    return (value - dim.index) % (len(shape) + dim.new_dims) == 0


def optionally(wrap: Callable[[Expression], Expression], inner: Expression) -> Alternatives:
    """``wrap(inner)`` where it occurs, else ``inner``: an optional scale, mask, cast or dropout."""
    return wrap(inner) | inner


def walk(*roots: Expression) -> Iterator[Expression]:
    """Every expression below the roots, parents first, each object once."""
    seen: set[int] = set()
    pending = list(reversed(roots))
    while pending:
        expression = pending.pop()
        if id(expression) in seen:
            continue
        seen.add(id(expression))
        yield expression
        pending.extend(reversed(expression.children))


def _options(expression: Expression) -> tuple[Expression, ...]:
    return expression.options if isinstance(expression, Alternatives) else (expression,)


def _functional(given: Any) -> Iterator[OpOverload]:
    if isinstance(given, OpOverload):
        yield given
    elif isinstance(given, OpOverloadPacket):
        packet: Any = given  # torch does not annotate it
        overloads = (getattr(packet, name) for name in packet.overloads())
        yield from (
            o for o in overloads if isinstance(o, OpOverload) and not any(a.is_out for a in o._schema.arguments)
        )
    else:
        raise PatternError(f"{defined()}: {given!r} is not a torch operator; give an overload or a packet")


def _coerce(value: Any, operand: str = "", new_dims: int = 0) -> Expression:
    if isinstance(value, Expression):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(item, Expression) for item in value):
        return Sequence(tuple(_coerce(item) for item in value))
    if operand.startswith("dim") and isinstance(value, int) and not isinstance(value, bool):
        return Dim(value, new_dims)
    return Literal(value)


# x + y, x - y, x * y, x / y, x ** y, -x, y - x and x @ y
add = Operator("add", (aten.add.Tensor, aten.add.Scalar), ("x", "y"), commutative=True)
sub = Operator("sub", (aten.sub.Tensor, aten.sub.Scalar), ("x", "y"))
rsub = Operator("rsub", (aten.rsub.Tensor, aten.rsub.Scalar), ("x", "y"))
mul = Operator("mul", (aten.mul.Tensor, aten.mul.Scalar), ("x", "y"), commutative=True)
div = Operator("div", (aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor), ("x", "y"))
power = Operator("pow", (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor), ("x", "y"))
neg = Operator("neg", (aten.neg.default, aten.negative.default), ("x",))
matmul = Operator("matmul", (aten.matmul.default, aten.mm.default, aten.bmm.default), ("x", "y"))
