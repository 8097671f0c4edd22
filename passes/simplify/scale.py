# SPDX-License-Identifier: Apache-2.0
"""Numbers multiply once:

    (x · c) · d  =  x · (c d)
    (c x) @ (d y) · e  =  ((c d e) x) @ y             also through reshapes and transposes of x and y
    sdpa(c q, d k, v, scale=s)  =  sdpa(q, k, v, scale=c d s)

Only where at least one product fewer is computed, and where exponents cannot run out between the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.operators import ALIAS, CONTIGUOUS, div, matmul, mul, sdpa
from rewriter.passes.simplify.chains import CollapseReshapes, CollapseTransposes
from rewriter.passes.simplify.scalars import WIDE, keeps_shape, scaled
from rewriter.passes.simplify.sites import calls, sharing_shows, site, sole_user
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule

aten = torch.ops.aten

# Rearrangements of elements: c · f(x) = f(c · x).
_MOVES = CollapseTransposes.targets | CollapseReshapes.targets | ALIAS.targets | CONTIGUOUS.targets
_LIMIT = 2.0**20  # factors beyond it, or below its inverse, are no scales but tricks with the exponent


@dataclass(frozen=True)
class _Operand:
    """An operand ``moves(c · x)``: where the numbers are, and what to repeat without them."""

    value: Node
    x: Node
    factors: tuple[float, ...] = ()
    moves: tuple[Node, ...] = ()  # from x upwards
    nodes: tuple[Node, ...] = ()


class MergeScales(Rule):
    """The merged number stands where the first one stood, so no larger tensor is multiplied than before."""

    name: ClassVar[str] = "simplify.scale"
    role: ClassVar[str] = "scale"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        inside: set[Node] = set()
        matches: list[Match] = []
        candidates = (*_attentions(facts), *_products(facts), *_repeated(facts))
        for match in candidates:
            if not inside & set(match.nodes):
                inside |= set(match.nodes)
                matches.append(match)
        return sorted(matches, key=lambda m: facts.position(m.root)), ()

    def refusal(self, program: Program, match: Match) -> str | None:
        facts = program.facts
        if (reason := legality.refusal(facts, match)) is not None:
            return str(reason)
        if (dtype := facts.dtype(match.root)) not in WIDE:
            return f"in {str(dtype).removeprefix('torch.')} the product may overflow or vanish where each factor does not"
        factors = (*match["factors"], match["factor"])
        if odd := [c for c in factors if not 1 / _LIMIT <= abs(c) <= _LIMIT]:
            return f"the factor {odd[0]:g} is not of the size of a scale, and the order of products may matter"
        if match["operator"] is None and match["factor"] == 1:  # nothing is left of the products
            return sharing_shows(facts, match.root, match["x"].value)
        return None

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        factor, place = match["factor"], match["place"]
        operands = {name: match[name] for name in ("x", "y") if match[name] is not None}
        built = {name: _rebuilt(edit, operand, factor if place == name else 1.0) for name, operand in operands.items()}
        call: Node | None = match["operator"]
        if call is None:
            return {match.root: built["x"]}
        swap = {operand.value: built[name] for name, operand in operands.items()}
        arguments = [swap.get(a, a) if isinstance(a, Node) else a for a in call.args]
        keywords = {k: swap.get(a, a) if isinstance(a, Node) else a for k, a in call.kwargs.items()}
        if place == "scale":
            keywords = {k: v for k, v in keywords.items() if k != "scale"} | {"scale": factor}
        target: Any = call.target  # an operator
        new = edit.call(target, *arguments, **keywords)
        return {match.root: _times(edit, new, factor if place == "root" else 1.0)}


def _attentions(facts: Facts) -> Iterator[Match]:
    """Attentions of which q or k was multiplied by a number."""
    for node in calls(facts, sdpa.targets):
        arguments = facts.arguments(node)
        q, k = (_operand(facts, arguments[name], node) for name in ("query", "key"))
        scale = arguments["scale"]
        width = (facts.shape(q.value) or (None,))[-1]
        own = width**-0.5 if scale is None and isinstance(width, int) else scale
        if (q.factors or k.factors) and q.value is not k.value and isinstance(own, (int, float)):
            yield _match(node, (*k.nodes, *q.nodes, node), q, k, node, (float(own),), place="scale")


def _products(facts: Facts) -> Iterator[Match]:
    """Matrix products with numbers on two or more of: left, right, result."""
    for node in calls(facts, matmul.targets):
        arguments = list(facts.arguments(node).values())
        if not all(isinstance(a, Node) for a in arguments[:2]) or arguments[0] is arguments[1]:
            continue
        x, y = _operand(facts, arguments[0], node), _operand(facts, arguments[1], node)
        after: list[Node] = []
        factors: list[float] = []
        top = node
        while (user := sole_user(facts, top)) is not None and (found := scaled(facts, user)) is not None:
            if not keeps_shape(facts, found):
                break
            after.append(user)
            factors.append(found.factor)
            top = user
        if len((*x.factors, *y.factors, *factors)) >= 2:
            place = "x" if x.factors else "y" if y.factors else "root"
            yield _match(top, (*x.nodes, *y.nodes, node, *after), x, y, node, tuple(factors), place)


def _repeated(facts: Facts) -> Iterator[Match]:
    """A value multiplied by a number more than once."""
    for node in reversed(calls(facts, (*mul.targets, *div.targets))):
        nodes: list[Node] = []
        factors: list[float] = []
        value = node
        while (found := scaled(facts, value)) is not None and keeps_shape(facts, found):
            if nodes and (sole_user(facts, value) is not nodes[-1] or len(value.users) > 1):
                break
            nodes.append(value)
            factors.append(found.factor)
            value = found.x
        if len(nodes) > 1:
            x = _Operand(node, value, tuple(factors), (), tuple(nodes))
            yield _match(node, tuple(nodes), x, None, None, (), "x")


def _operand(facts: Facts, value: Node, reader: Node) -> _Operand:
    """An operand down to the last number it is multiplied by, along values that nothing else reads."""
    nodes: list[Node] = []
    moves: list[Node] = []
    factors: list[float] = []
    best = _Operand(value, value)
    at, above = value, reader
    while sole_user(facts, at) is above and len(at.users) == 1:
        found = scaled(facts, at)
        if found is not None and keeps_shape(facts, found):
            nodes.append(at)
            factors.append(found.factor)
            at, above = found.x, at
            best = _Operand(value, at, tuple(factors), tuple(reversed(moves)), tuple(nodes))
        elif at.op == "call_function" and at.target in _MOVES:
            nodes.append(at)
            moves.append(at)
            at, above = at.all_input_nodes[0], at
        else:
            break
    return best


def _match(
    root: Node,
    nodes: Sequence[Node],
    x: _Operand,
    y: _Operand | None,
    operator: Node | None,
    others: tuple[float, ...],
    place: str,
) -> Match:
    factors = (*x.factors, *(y.factors if y is not None else ()), *others)
    captures = {
        "x": x, "y": y, "operator": operator, "factors": factors, "factor": math.prod(factors), "place": place,
    }  # fmt: skip
    ordered = sorted(n for n in nodes if n is not root)
    return site("scale", (*ordered, root), captures)


def _rebuilt(edit: Editor, operand: _Operand, factor: float) -> Node:
    """The operand with one number in place of its own ones."""
    value = _times(edit, edit.resolve(operand.x), factor)
    for move in operand.moves:
        target: Any = move.target  # an operator
        value = edit.call(target, value, *move.args[1:], **move.kwargs)
    return value


def _times(edit: Editor, value: Node, factor: float) -> Node:
    return value if factor == 1 else edit.call(aten.mul.Tensor, value, factor)


