# SPDX-License-Identifier: Apache-2.0
"""The code of a flat graph computes what torch's own does, and holds no value longer."""

from __future__ import annotations

import gc
import math
import operator
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from rewriter.capturing import capture
from rewriter.flatcode import FlatCode, FlatModule

from .small_models import KINDS, small_model

aten = torch.ops.aten
X, Y = torch.rand(3, 4), torch.rand(3, 4)


def by_torch(graph: fx.Graph, root: nn.Module | None = None) -> fx.GraphModule:
    """A copy of the graph under torch's own generator."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    copied.set_codegen(CodeGen())
    return fx.GraphModule(root or nn.Module(), copied)


def compiled(graph: fx.Graph) -> tuple[FlatModule, fx.GraphModule]:
    """The graph under this generator and under torch's."""
    stock = by_torch(graph)
    flat = FlatModule(nn.Module(), fx.Graph())
    graph.set_codegen(FlatCode())
    flat.graph = graph
    return flat, stock


@pytest.mark.parametrize("kind", KINDS)
def test_models_compute_the_same_bits(kind: str) -> None:
    model, inputs = small_model(kind, "eager")
    program = capture(model, (), inputs)
    assert isinstance(program.graph_module, FlatModule)
    stock = by_torch(program.graph, program.graph_module)
    with torch.no_grad():
        for one, other in zip(program.run(*program.example), stock(*program.example), strict=True):
            assert torch.equal(one, other)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=40), st.data())
def test_random_graphs_compute_the_same(steps: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Shared, repeated and dead values in any order: the variable of one value goes to another only when it is free."""
    graph = fx.Graph()
    values = [graph.placeholder("v0"), graph.placeholder("y")]  # a placeholder named as a variable would be
    for kind, a, b in steps:
        one, other = values[a % len(values)], values[b % len(values)]
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (aten.add.Tensor, (one, other)),
            (aten.mul.Tensor, (one, one)),
            (aten.stack.default, ([one, other, one], 0)),
            (aten.tanh.default, (one,)),
        ]
        target, args = calls[kind]
        made = graph.call_function(target, args)
        if target is aten.stack.default:
            made = graph.call_function(aten.sum.dim_IntList, (made, [0]))
        values.append(made)
    chosen = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4))
    graph.output([values[i] for i in chosen])
    flat, stock = compiled(graph)
    assert all(torch.equal(a, b) for a, b in zip(flat(X, Y), stock(X, Y), strict=True))


def test_constants_of_every_kind() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    picked = graph.call_function(operator.getitem, (x, (slice(0, 2, None), Ellipsis)))
    filled = graph.call_function(aten.masked_fill.Scalar, (picked, graph.call_function(aten.gt.Scalar, (picked, 0.5)), -math.inf))
    cast = graph.call_function(aten.to.dtype, (filled, torch.float64), {"copy": True})
    moved = graph.call_function(aten._to_copy.default, (cast,), {"device": torch.device("cpu"), "memory_format": torch.preserve_format})
    graph.output([graph.call_function(aten.softmax.int, (moved, -1, None))])
    flat, stock = compiled(graph)
    (one,), (other,) = flat(X), stock(X)
    assert one.dtype is torch.float64
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # a row may be masked as a whole


def test_values_are_released_after_their_last_use() -> None:
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def step(value: Tensor, *_: Tensor) -> Tensor:
        counts.append(sum(ref() is not None for ref in alive))
        result = value + 1
        alive.append(weakref.ref(result))
        return result

    graph = fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_function(step, (x,))
    two = graph.call_function(step, (one,))
    three = graph.call_function(step, (one, two))  # both die here
    graph.call_function(step, (three,))  # nobody reads it
    graph.output([graph.call_function(step, (three,))])
    flat, _ = compiled(graph)
    gc.collect()
    flat(X)
    assert counts == [0, 1, 2, 1, 1]


def test_code_for_reading_keeps_the_names_of_nodes() -> None:
    graph = fx.Graph()
    total = graph.call_function(aten.add.Tensor, (graph.placeholder("left"), graph.placeholder("right")), name="total")
    graph.output([total])
    flat, _ = compiled(graph)
    assert "v0 = aten_add_Tensor(left, right)" in flat.code or "left = aten_add_Tensor(left, right)" in flat.code
    assert "total" in flat.print_readable(print_output=False)
