# SPDX-License-Identifier: Apache-2.0
"""Random patterns: every form of the pattern language, in any nesting the definition check accepts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rewriter import operators as ops
from rewriter.pattern import (
    Alternatives,
    Anything,
    Call,
    Const,
    Dim,
    Expression,
    Literal,
    Operator,
    Optional,
    Pattern,
    Sequence,
    Var,
    Variadic,
    optionally,
    pattern,
    walk,
)
from rewriter.predicates import floating, has_dtype, has_rank, number, parameter

from .graphs import DTYPES, NUMBERS, Chance

UNARY: tuple[Operator, ...] = (ops.relu, ops.sigmoid, ops.tanh, ops.exp, ops.neg, ops.silu)
BINARY: tuple[Operator, ...] = (ops.add, ops.mul, ops.sub, ops.div)
TRANSPARENT = ((), ops.VALUE_PRESERVING, (*ops.VALUE_PRESERVING, ops.DETACH), (ops.CONTIGUOUS,))
CONDITIONS = (None, None, floating, has_rank(2), has_dtype(DTYPES[0]), lambda facts, node: facts.shape(node) != ())


@dataclass
class Writer:
    """Writes one pattern. `calls` are the calls written so far, which may stand for further operands as well.

    `plain` keeps to what VF2 can express: operators of variables and numbers. `exact` never looks through what stops
    gradients, as a rule must not that promises EXACT.
    """

    chance: Chance
    plain: bool = False
    exact: bool = False
    calls: list[Call] = field(default_factory=list)
    named: int = 0

    def expression(self, depth: int) -> Expression:
        if depth == 0 or self.chance.one_in(5):
            return self.leaf()
        kind = 0 if self.plain else self.chance.upto(5)
        if kind == 4:
            return self.call(depth) | (self.call(depth - 1) if self.chance.upto(1) else self.variable(True))
        if kind == 5:
            return self.optional_part(depth)
        return self.call(depth)

    def leaf(self) -> Expression:
        if self.calls and self.chance.one_in(4):
            return self.chance.among(self.calls)
        if not self.plain and self.chance.one_in(8):
            return Anything()
        return self.variable()

    def variable(self, bare: bool = False) -> Var:
        name = self.chance.among(("x", "y", "z"))
        if self.plain or bare or not self.chance.one_in(4):
            return Var(name)
        return Var(name, where=self.chance.among((parameter, floating, has_dtype(DTYPES[0]))))

    def optional_part(self, depth: int) -> Expression:
        """One object inside two options, as the language's own `optionally` makes it."""
        inner = self.call(depth - 1) if depth > 1 else self.variable(True)
        wrap = self.chance.among(
            (
                lambda e: ops.cast(e, Const("t")),
                lambda e: e + Var("m"),
                lambda e: e * Const("c", where=number),
                lambda e: ops.dropout(e, Const("rate"), Const("train")),
                ops.neg,
            )
        )
        return optionally(wrap, inner)

    def call(self, depth: int) -> Call:
        depth = max(depth, 1)
        written = self.binary(depth) if self.chance.upto(1) else self.other(depth)
        if not self.plain and self.chance.one_in(5):
            self.named += 1
            written = written.named(f"n{self.named}")
        if self.chance.one_in(5):
            written = written.shared()
        if not self.plain and (condition := self.chance.among(CONDITIONS)) is not None and self.chance.one_in(2):
            written = written.where(condition)
        self.calls.append(written)
        return written

    def binary(self, depth: int) -> Call:
        operator = self.chance.among(BINARY)
        first = self.expression(depth - 1)
        if self.chance.one_in(5):
            second: Any = self.chance.among(NUMBERS) if self.plain or self.chance.upto(1) else Const("c")
            if any(isinstance(e, (Var, Anything, Variadic)) for e in walk(first)):
                return operator(first, second)
        return operator(first, self.expression(depth - 1))

    def other(self, depth: int) -> Call:
        x = self.expression(depth - 1)
        kind = self.chance.upto(3 if self.plain else 13)
        if kind <= 2:
            return self.chance.among(UNARY)(x)
        if kind == 3:
            return x @ self.expression(depth - 1)
        if kind == 4:
            return ops.softmax(x, self.chance.among((-1, Const("dim"), 1)))
        if kind == 5:
            return ops.linear(
                x, Var("w", where=parameter), self.chance.among((None, Optional(Var("bias")), Var("bias")))
            )
        if kind == 6:
            return ops.cast(x, self.chance.among((Const("t"), DTYPES[1])))
        if kind == 7:
            return ops.swap_last(x)
        if kind == 8:
            return ops.mean(x, self.chance.among((-1, Const("dim"))), self.chance.among((True, Const("keep"))))
        if kind == 9:
            return ops.cat(self.items(x, depth), self.chance.among((0, Const("dim"))))
        if kind == 10:
            weight, bias = Optional(Var("w")), Optional(Var("bias"))
            return ops.layer_norm(x, Const("shape"), weight, bias, Const("eps", where=number))
        if kind == 11:
            return ops.gelu(x, self.chance.among(("none", "tanh", Const("approximate"))))
        if kind == 12:
            return ops.unsqueeze(x, self.chance.among((0, -1, Const("dim"))))
        return ops.dropout(x, Const("rate"), self.chance.among((False, Const("train"))))

    def items(self, x: Expression, depth: int) -> list[Expression]:
        """A list argument with any number of further nodes before, between or after, or none."""
        items = [x, self.expression(depth - 1)] if self.chance.upto(1) else [x]
        if self.chance.upto(2):
            items.insert(
                self.chance.upto(len(items)), Variadic("rest", where=floating if self.chance.upto(1) else None)
            )
        return items

    def pattern(self) -> Pattern:
        depth = 1 + self.chance.upto(2)
        root: Expression = self.call(depth)
        if not self.plain and self.chance.one_in(6):
            root = root | self.call(depth)
        outputs = [root]
        if not self.plain and _certain(root) and self.chance.one_in(4):
            outputs.append(self.further(root))
        where = _unequal if not self.plain and self.chance.one_in(4) else None
        kinds = [k for k in TRANSPARENT if not (self.exact and ops.DETACH in k) and not (self.plain and k)]
        transparent = self.chance.among(kinds)
        return pattern("random", *outputs, where=where, transparent=transparent)

    def further(self, root: Expression) -> Expression:
        """A second output, of something that every match of the first one has bound."""
        link = self.chance.among([*_certain(root), root])
        link = Var(link.name) if isinstance(link, Var) else link
        written = self.chance.among(UNARY)(link)
        return written if self.chance.upto(1) else self.chance.among(BINARY)(written, self.variable(True))


def _certain(expression: Expression) -> list[Expression]:
    """What every match of the expression binds: not what only one option has, nor a part that may be left out."""
    if isinstance(expression, (Call, Sequence)):
        own = [expression] if isinstance(expression, Call) else []
        return own + [found for child in expression.children for found in _certain(child)]
    if isinstance(expression, Alternatives):
        names = [{e.name for e in _certain(option) if isinstance(e, Var)} for option in expression.options]
        return [Var(name) for name in sorted(set.intersection(*names))]
    return [expression] if isinstance(expression, Var) else []


def _unequal(facts: Any, captures: Any) -> bool:
    """x and y, where both are captured, are two nodes."""
    return captures.get("x") is None or captures.get("x") is not captures.get("y")


def say(e: Any) -> str:
    """The expression as one writes it; an object that stands in two places shows its address in both."""
    if isinstance(e, Call):
        written = ", ".join(f"{name}={say(child)}" for name, child in e.arguments.items())
        marks = (f":{e.name}" if e.name else "") + (" shared" if e.may_escape else "")
        conditions = "".join(f" where {c.description}" for c in e.conditions)
        return f"{e.operator.name}@{id(e) % 9973}{marks}({written}){conditions}"
    if isinstance(e, (Var, Const, Variadic)):
        conditions = "".join(f" where {c.description}" for c in e.predicates)
        return f"{type(e).__name__}({e.name}{conditions})"
    if isinstance(e, Sequence):
        return f"[{', '.join(map(say, e.items))}]"
    if isinstance(e, Alternatives):
        return f"({' | '.join(map(say, e.options))})"
    if isinstance(e, Optional):
        return f"{say(e.inner)}?"
    if isinstance(e, (Literal, Dim)):
        return repr(e.value if isinstance(e, Literal) else e.index)
    return type(e).__name__
