# SPDX-License-Identifier: Apache-2.0
"""Straight code computes what its graph does, bit for bit, on tensors it was not written with; and nothing besides."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.errors import LegalityError
from rewriter.straightline import straight

aten = torch.ops.aten
SHAPE = (2, 3, 4)
Step = Callable[[Graph, Node, Node], Node]


def call(target: Any, *rest: Any, **named: Any) -> Step:
    """A step that passes the newest value first."""
    return lambda graph, newest, earlier: graph.call_function(target, (newest, *rest), named)


def with_earlier(target: Any) -> Step:
    return lambda graph, newest, earlier: graph.call_function(target, (newest, earlier))


def split(graph: Graph, newest: Node, earlier: Node) -> Node:
    parts = graph.call_function(aten.split_with_sizes.default, (newest, [1, 3], -1))
    last, first = (graph.call_function(operator.getitem, (parts, n)) for n in (1, 0))
    return graph.call_function(aten.cat.default, ([last, first], -1))


def turned(graph: Graph, newest: Node, earlier: Node) -> Node:
    """Views of views, and back by a copy where there must be one."""
    moved = graph.call_function(aten.transpose.int, (newest, 0, 2))
    part = graph.call_function(aten.slice.Tensor, (moved, 1, 0, 2))
    rest = graph.call_function(aten.slice.Tensor, (moved, 1, 2, 2**63 - 1))
    joined = graph.call_function(aten.cat.default, ([rest, part], 1))
    return graph.call_function(aten.reshape.default, (joined, list(SHAPE)))


def sized(graph: Graph, newest: Node, earlier: Node) -> Node:
    """A table made of a size, which a graph for any length computes at every call."""
    length = graph.call_function(aten.sym_size.int, (newest, 1))
    positions = graph.call_function(aten.arange.default, (length,))
    table = graph.call_function(aten.unsqueeze.default, (positions, 1))
    return graph.call_function(aten.mul.Tensor, (newest, table))


STEPS: dict[str, Step] = {
    "same dtype": call(aten.to.dtype, torch.float32),
    "double": call(aten.to.dtype, torch.float64),
    "all of it": call(aten.slice.Tensor, 0, 0, 2**63 - 1),
    "detached": call(aten.detach.default),
    "no dropout": call(aten.dropout.default, 0.5, False),
    "own shape": call(aten.expand.default, list(SHAPE)),
    "view": call(aten.view.default, list(SHAPE)),
    "contiguous": call(aten.contiguous.default),
    "halved": call(aten.mul.Tensor, 0.5),
    "silu": call(aten.silu.default),
    "power": call(aten.pow.Tensor_Scalar, 2),
    "less its mean": lambda g, n, e: g.call_function(
        aten.sub.Tensor, (n, g.call_function(aten.mean.dim, (n, [-1], True)))
    ),
    "sum": with_earlier(aten.add.Tensor),
    "product": with_earlier(aten.mul.Tensor),
    "split": split,
    "turned": turned,
    "sized": sized,
}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=8), st.integers(0, 2**31 - 1))
def test_it_computes_what_the_graph_does(names: list[str], seed: int) -> None:
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    values = [x, graph.call_function(aten.mul.Tensor, (weight, weight))]
    for name in names:
        values.append(STEPS[name](graph, values[-1], values[-2]))
    graph.output((values[-1], values[-2]))
    generator = torch.Generator().manual_seed(seed)
    first, second, weights = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    module = GraphModule({"weight": weights}, graph)
    function = straight(graph, {"x": first}, {"weight": weights})
    for given_ in (first, second):
        for got, want in zip(function(given_), module(given_), strict=True):
            assert got.dtype is want.dtype and got.stride() == want.stride() and torch.equal(got, want)


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def test_what_comes_out_the_same_each_time_is_not_computed_again() -> None:
    graph = Graph()
    x, weight, mask = graph.placeholder("x"), graph.get_attr("weight"), graph.placeholder("mask")
    value = graph.call_function(aten.to.dtype, (x, torch.float32))
    value = sized(graph, value, x)
    value = graph.call_function(aten.mul.Tensor, (value, graph.call_function(aten.cos.default, (weight,))))
    view = graph.call_function(aten.transpose.int, (graph.call_function(aten.transpose.int, (value, 0, 2)), 1, 2))
    graph.call_function(aten.exp.default, (view,))  # used by nobody
    graph.call_function(aten.mul.Tensor, (mask, 2))
    graph.output((view, graph.call_function(aten.slice.Tensor, (x, 0, 0, 5))))
    given_ = torch.randn(SHAPE)
    function = straight(graph, {"x": given_}, {"weight": torch.randn(4), "mask": torch.ones(SHAPE)})
    with Counted() as counted:
        view_, same = function(given_)
    assert counted.names == ["mul", "mul", "as_strided"] and same is given_
    assert view_.shape == (4, 2, 3)


def test_a_view_of_an_argument_is_no_offset_into_its_storage() -> None:
    """The next argument may lie elsewhere in a larger tensor."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.slice.Tensor, (x, 1, 1, 2)),))
    whole = torch.arange(24.0).view(4, 2, 3)
    function = straight(graph, {"x": whole[0]}, {})
    assert torch.equal(function(whole[2])[0], whole[2][:, 1:2])


def refused(target: Any, *args: Any) -> Graph:
    graph = Graph()
    graph.output((graph.call_function(target, (graph.placeholder("x"), *args)),))
    return graph


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (refused(aten.add_.Tensor, 1), "writes to memory"),
        (refused(aten.rand_like.default), "draws random numbers"),
        (refused(aten.dropout.default, 0.5, True), "draws random numbers"),
        (refused(lambda x: x), "is no operator"),
    ],
    ids=("a write", "random numbers", "dropout", "a function"),
)
def test_what_is_not_a_function_of_its_arguments_is_refused(graph: Graph, message: str) -> None:
    x: Tensor = torch.zeros(SHAPE)
    with pytest.raises(LegalityError, match=message):
        straight(graph, {"x": x}, {})
    assert not x.any()
