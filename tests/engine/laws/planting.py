# SPDX-License-Identifier: Apache-2.0
"""Planting: an occurrence of a pattern in a graph, commuted and decorated, or made a near miss by one edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from rewriter import operators as ops
from rewriter.pattern import (
    Alternatives,
    Anything,
    Call,
    Const,
    Dim,
    Expression,
    Literal,
    Optional,
    Pattern,
    Sequence,
    Var,
    Variadic,
)
from rewriter.predicates import parameter

from .graphs import (
    BINARY,
    COMMUTATIVE,
    DTYPES,
    NUMBERS,
    PASSING,
    UNARY,
    Builder,
    Chance,
    IllTypedError,
    aten,
    some_value,
    write,
)

_CONSTANTS: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "dim": (-1, 1, 0),
    "keepdim": (True, False),
    "shape": ([3],),
    "eps": (1e-5, 1e-6),
    "approximate": ("tanh", "none"),
    "p": (0.5, 0.0),
    "train": (False, True),
}
EDITS = ("operator", "operand", "argument", "escape", "exchange", "constant", "between", "twice", "write", "draw")


@dataclass
class Planter:
    """Plants one pattern. `edit` is what to do wrong, at the call number `at`; None plants it faithfully."""

    made: Builder
    chance: Chance
    edit: str | None = None
    at: int = -1
    count: int = 0
    captures: dict[str, Any] = field(default_factory=dict)
    bound: dict[int, Node] = field(default_factory=dict)

    def plant(self, planted: Pattern) -> None:
        """As much of the pattern as torch accepts. Occurrences it gives up half-way are near misses too."""
        try:
            for output in planted.outputs:
                self.value(output, "", bool(planted.transparent))
        except IllTypedError:
            return

    def value(self, e: Expression, operand: str, decorate: bool) -> Any:
        if isinstance(e, Alternatives):
            return self.value(self.chance.among(e.options), operand, decorate)
        if isinstance(e, Optional):
            return None if self.chance.one_in(3) else self.value(e.inner, operand, decorate)
        if isinstance(e, Sequence):
            parts = [self.value(item, operand, decorate) for item in e.items]
            return [n for part in parts for n in (part if isinstance(part, list) else [part])]
        if isinstance(e, Variadic):
            wanted = [some_value(self.made, self.chance) for _ in range(self.chance.upto(2))]
            return list(self.captures.setdefault(e.name, wanted))
        if isinstance(e, Const):
            options = (True,) if self.edit == "draw" and operand == "train" else _CONSTANTS.get(operand, NUMBERS)
            return self.captures.setdefault(e.name, self.chance.among(options))
        if isinstance(e, Literal):
            return self.chance.among(NUMBERS) if self.now("constant") and e.value in NUMBERS else e.value
        if isinstance(e, Dim):
            return e.index
        node = self.node(e, decorate)
        return self.decorated(node) if decorate else node

    def node(self, e: Expression, decorate: bool) -> Node:
        if isinstance(e, Anything):
            return some_value(self.made, self.chance)
        if isinstance(e, Var):
            return self.variable(e)
        assert isinstance(e, Call)
        if id(e) in self.bound and not self.now("twice"):
            return self.bound[id(e)]
        node = self.bound[id(e)] = self.call(e, decorate)
        return node

    def variable(self, e: Var) -> Node:
        """What the name stands for already, else a value that e may accept."""
        if self.now("operand"):
            return some_value(self.made, self.chance)
        if e.name not in self.captures:
            of_parameter = any(predicate is parameter for predicate in e.predicates)
            parameters = self.made.values[:2]
            self.captures[e.name] = (
                self.chance.among(parameters) if of_parameter else some_value(self.made, self.chance)
            )
        return self.captures[e.name]

    def call(self, e: Call, decorate: bool) -> Node:
        arguments = {name: self.value(child, name, decorate) for name, child in e.arguments.items()}
        self.count += 1
        target, args, kwargs = self.spelled(e, arguments)
        node = self.made.call(target, *args, **kwargs)
        if self.now("escape"):
            self.made.call(aten.relu.default, node)
        if self.now("write"):  # to what was just read, or to what it computed
            write(self.made, self.chance.among([*node.all_input_nodes, node]))
        if self.now("draw") and target is not aten.dropout.default:
            self.made.call(aten.dropout.default, node, 0.5, True)
        if self.now("between"):
            node = self.made.call(aten.neg.default, node)
        if self.chance.one_in(8):
            self.made.check(node)
        return node

    def spelled(self, e: Call, arguments: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
        """The target, and its arguments in the schema's order, under one of the operator's spellings."""
        values = list(arguments.values())
        if e.operator is ops.cast:
            return aten.to.dtype, values, {}
        if e.operator is ops.swap_last:
            return aten.transpose.int, [values[0], *self.chance.among(((-1, -2), (0, 1)))], {}
        target: Any = next(iter(e.operator.targets))
        if self.now("operator") and len(values) == (2 if target in BINARY else 1):
            target = self.chance.among(BINARY if target in BINARY else UNARY if target in UNARY else (target,))
        swap = (target in COMMUTATIVE and bool(self.chance.upto(1))) or self.now("exchange")
        if swap and len(values) == 2 and all(isinstance(v, Node) for v in values):
            values.reverse()
        schema = target._schema.arguments
        spelled = dict(zip(e.operator.operands, (a.name for a in schema), strict=False))
        given = {spelled[operand]: value for operand, value in zip(arguments, values, strict=True)}
        if self.now("argument") and any(a.name == "alpha" for a in schema):
            given["alpha"] = 2
        placed = [a for a in schema if not a.kwarg_only]
        last = max(i for i, a in enumerate(placed) if a.name in given)
        args = [given.get(a.name, a.default_value) for a in placed[: last + 1]]
        return target, args, {a.name: given[a.name] for a in schema if a.kwarg_only and a.name in given}

    def decorated(self, node: Node) -> Node:
        """The node, or what hands it on."""
        if not self.chance.one_in(4):
            return node
        target, *rest = self.chance.among(PASSING)(node.meta["val"])
        return self.made.call(target, node, *rest)

    def now(self, edit: str) -> bool:
        return self.edit == edit and self.count == self.at
