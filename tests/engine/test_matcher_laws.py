# SPDX-License-Identifier: Apache-2.0
"""Laws of matching on random graphs: the result depends neither on node order nor on operand order, and equals what
an enumeration of the pattern's written meaning finds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from rewriter.matcher import find
from rewriter.operators import relu, sigmoid
from rewriter.pattern import Var, pattern

aten = torch.ops.aten

UNARY = (aten.sigmoid.default, aten.relu.default)
BINARY = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)
COMMUTATIVE = (aten.mul.Tensor, aten.add.Tensor)

x, y = Var("x"), Var("y")
SWISH_PLUS = pattern("swish plus", x * sigmoid(x) + y)
NESTED = pattern("nested", relu(x) * (y + relu(x)) - y)


@dataclass(frozen=True)
class Step:
    """One call: its operator and the earlier values it reads; a negative index is an input of the graph."""

    operator: object
    operands: tuple[int, ...]


Recipe = list[Step]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Random graphs in which the patterns' shapes, and near misses of them, are likely."""
    steps: Recipe = []

    def add(operator: object, *operands: int) -> int:
        steps.append(Step(operator, operands))
        return len(steps) - 1

    value = st.deferred(lambda: st.integers(-2, len(steps) - 1))
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["noise", "swish", "nested"]))
        a, b = draw(value), draw(value)
        if kind == "noise":
            operator = draw(st.sampled_from(UNARY + BINARY))
            add(operator, *((a,) if operator in UNARY else (a, b)))
        elif kind == "swish":
            product = add(aten.mul.Tensor, a, add(aten.sigmoid.default, draw(st.sampled_from([a, a, b]))))
            add(aten.add.Tensor, product, b)
        else:
            left, right = add(aten.relu.default, a), add(aten.relu.default, draw(st.sampled_from([a, a, b])))
            product = add(aten.mul.Tensor, left, add(aten.add.Tensor, b, right))
            add(aten.sub.Tensor, product, draw(st.sampled_from([b, b, a])))
    return steps


def build(steps: Recipe, order: list[int] | None = None, swapped: frozenset[int] = frozenset()) -> fx.GraphModule:
    """The graph of a recipe, its calls in the given topological order, some operands exchanged."""
    graph = fx.Graph()
    values: dict[int, fx.Node] = {-1: graph.placeholder("a"), -2: graph.placeholder("b")}
    for index in order if order is not None else range(len(steps)):
        step = steps[index]
        operands = [values[i] for i in step.operands]
        if index in swapped and step.operator in COMMUTATIVE:
            operands.reverse()
        values[index] = graph.create_node("call_function", step.operator, tuple(operands), {}, f"step{index}")
    last = max(i for i in values)
    graph.output([values[last]])
    return fx.GraphModule(nn.Module(), graph)


def topological(steps: Recipe, draw: st.DataObject) -> list[int]:
    """A random order in which every call follows what it reads."""
    left, order = set(range(len(steps))), list[int]()
    while left:
        ready = sorted(i for i in left if not left.intersection(steps[i].operands))
        order.append(draw.draw(st.sampled_from(ready)))
        left.remove(order[-1])
    return order


def found(module: fx.GraphModule) -> set[tuple[str, str, frozenset[str]]]:
    matches = [match for made in (SWISH_PLUS, NESTED) for match in find(module, made)]
    return {(match.name, match.root.name, frozenset(node.name for node in match.nodes)) for match in matches}


@settings(deadline=None, max_examples=50)
@given(recipes(), st.data())
def test_matches_do_not_depend_on_node_order(steps: Recipe, data: st.DataObject) -> None:
    assert found(build(steps)) == found(build(steps, topological(steps, data)))


@settings(deadline=None, max_examples=50)
@given(recipes(), st.data())
def test_roots_do_not_depend_on_operand_order(steps: Recipe, data: st.DataObject) -> None:
    swapped = frozenset(data.draw(st.sets(st.integers(0, len(steps) - 1))))
    roots = [{entry[:2] for entry in found(build(steps, swapped=s))} for s in (frozenset(), swapped)]
    assert roots[0] == roots[1]


@settings(deadline=None, max_examples=100)
@given(recipes())
def test_matches_are_those_of_an_enumeration(steps: Recipe) -> None:
    module = build(steps)
    expected = {("swish plus", f"step{i}") for i in range(len(steps)) if swish_plus(steps, i)}
    expected |= {("nested", f"step{i}") for i in range(len(steps)) if nested(steps, i)}
    assert {entry[:2] for entry in found(module)} == expected


# -- the patterns' meaning, written out without the matcher


def swish_plus(steps: Recipe, root: int) -> bool:
    """x · sigmoid(x) + y with nothing inside used elsewhere."""
    for product, _ in both_orders(steps, root, aten.add.Tensor):
        for value, gate in both_orders(steps, product, aten.mul.Tensor):
            inner = call(steps, gate, aten.sigmoid.default)
            if inner == (value,) and closed(steps, root, {product, gate}):
                return True
    return False


def nested(steps: Recipe, root: int) -> bool:
    """relu(x) · (y + relu(x)) - y, where both relus may not be used elsewhere."""
    operands = call(steps, root, aten.sub.Tensor)
    if operands is None:
        return False
    product, y_again = operands
    for left, total in both_orders(steps, product, aten.mul.Tensor):
        for value, right in both_orders(steps, total, aten.add.Tensor):
            one, two = call(steps, left, aten.relu.default), call(steps, right, aten.relu.default)
            same = one is not None and one == two and value == y_again
            if same and closed(steps, root, {product, left, total, right}):
                return True
    return False


def call(steps: Recipe, index: int, operator: object) -> tuple[int, ...] | None:
    return steps[index].operands if index >= 0 and steps[index].operator is operator else None


def both_orders(steps: Recipe, index: int, operator: object) -> list[tuple[int, ...]]:
    operands = call(steps, index, operator)
    return [] if operands is None else list(permutations(operands))


def closed(steps: Recipe, root: int, inside: set[int]) -> bool:
    """Whether only the match reads what is inside it; the last step is the graph's output."""
    if len(steps) - 1 in inside:
        return False
    readers = {i for i, step in enumerate(steps) if inside.intersection(step.operands)}
    return readers <= inside | {root}
