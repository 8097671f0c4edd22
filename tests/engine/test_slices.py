# SPDX-License-Identifier: Apache-2.0
"""Slices and single-entry single-exit regions, against networkx and against counting paths."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from rewriter.facts import Facts
from rewriter.slices import Dominance, Region, slice_of

from .helpers import by_target, capture_graph, trace
from .small_models import small_model

aten = torch.ops.aten
X, Y = torch.rand(3, 4), torch.rand(3, 4)  # two tensors: the same one twice would be one input
SMOOTH = ("sin", "cos", "add", "mul", "exp")


def named(module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in module.graph.nodes if node.name == name)


def test_a_slice_ends_at_inputs_parameters_and_sizes() -> None:
    module = trace(lambda x, y, w: (x.sin() * w + x.cos()).relu() + y, X, Y, w=torch.rand(4))
    facts = Facts(module)
    (relu,) = by_target(module, aten.relu)
    region = slice_of(facts, relu.all_input_nodes[0], SMOOTH)
    assert isinstance(region, Region) and region.exit is relu.all_input_nodes[0]
    assert [n.name for n in region.nodes] == ["sin", "mul", "cos", "add"]
    assert [(n.op, str(n.target)) for n in region.entries] == [("get_attr", "w"), ("placeholder", "tensors_0")]
    assert list(region.nodes) == sorted(region.nodes)
    reason = slice_of(facts, max(by_target(module, aten.add)), SMOOTH)
    assert reason == "relu (relu) is not among the operators allowed here"


def test_random_operators_and_later_writes_are_obstacles() -> None:
    facts = Facts(module := trace(lambda x: torch.rand_like(x) + x, X))
    assert slice_of(facts, named(module, "add"), ("rand_like", "add")) == "rand_like (rand_like) draws random numbers"

    def written(x: Tensor) -> Tensor:
        y = x.sin()
        z = y.cos()
        y.mul_(2)
        return z + y

    facts = Facts(module := trace(written, X))
    assert isinstance(slice_of(facts, named(module, "cos"), SMOOTH), str)
    region = slice_of(facts, named(module, "cos"), (*SMOOTH, "mul_"), at=named(module, "mul_"))
    assert isinstance(region, Region) and [n.name for n in region.nodes] == ["sin", "cos"]
    region = slice_of(facts, named(module, "sin"), (*SMOOTH, "mul_"), at=named(module, "add"))
    assert isinstance(region, Region) and [n.name for n in region.nodes] == ["sin", "mul_"]


def test_a_shape_is_not_a_value() -> None:
    facts = Facts(module := trace(lambda x: torch.zeros_like(x.relu()) + 1, X))
    assert isinstance(slice_of(facts, named(module, "add"), ("add", "zeros_like")), str)

    def values(facts: Facts, node: fx.Node) -> tuple[fx.Node, ...]:
        return () if node.name == "zeros_like" else tuple(node.all_input_nodes)

    region = slice_of(facts, named(module, "add"), ("add", "zeros_like"), values)
    assert isinstance(region, Region) and region.entries == ()


def test_owned_nodes_serve_the_exit_alone() -> None:
    module = trace(lambda x: ((x.sin().cos() + x.sin().exp()).mul(2).relu(), x.sin()), X)
    facts = Facts(module)
    region = slice_of(facts, named(module, "mul"), SMOOTH)
    assert isinstance(region, Region)
    assert [n.name for n in region.owned(facts)] == [n.name for n in region.nodes]
    module = trace(lambda x: ((y := x.sin()).cos() + 1, y), X)
    region = slice_of(Facts(module), named(module, "add"), SMOOTH)
    assert isinstance(region, Region) and [n.name for n in region.owned(Facts(module))] == ["cos", "add"]


def test_single_entry_single_exit() -> None:
    def diamond(x: Tensor, w: Tensor) -> Tensor:
        y = x.sin()
        return (y.cos() * w + y.exp()).relu()

    module = trace(diamond, X, w=torch.rand(4))
    dominance = Dominance(Facts(module))
    sin, add, relu = (named(module, n) for n in ("sin", "add", "relu"))
    region = dominance.between(sin, add)
    assert isinstance(region, Region) and [n.name for n in region.nodes] == ["cos", "mul", "exp", "add"]
    assert region.entries == (sin,)
    assert dominance.smallest(add) == region
    assert [n.name for n in dominance.dominators(relu)] == ["add", "sin", "tensors_0"]
    assert [n.name for n in dominance.post_dominators(named(module, "cos"))] == ["mul", "add", "relu", "output"]
    assert dominance.between(named(module, "cos"), add) == "add.Tensor (add) can be reached without cos (cos)"


def test_a_second_way_out_or_in_is_named() -> None:
    module = trace(lambda x: ((y := x.sin()).cos().relu(), y), X)
    reason = Dominance(Facts(module)).between(named(module, "sin"), named(module, "relu"))
    assert reason == "sin (sin) is used without relu (relu)"
    module = trace(lambda x, y: (x.sin() + y).relu(), X, Y)
    dominance = Dominance(Facts(module))
    assert dominance.between(named(module, "sin"), named(module, "relu")) == "relu (relu) can be reached without sin (sin)"
    region = dominance.smallest(named(module, "relu"))
    assert region is not None and [n.name for n in region.nodes] == ["relu"]
    assert dominance.smallest(named(module, "add")) is None


@st.composite
def graphs(draw: st.DrawFn) -> fx.GraphModule:
    """A random program: sums and sines of earlier values, one or two inputs, one to three outputs."""
    graph = fx.Graph()
    values = [graph.placeholder(f"x{i}") for i in range(draw(st.integers(1, 2)))]
    for value in values:
        value.meta["val"] = X
    for _ in range(draw(st.integers(1, 12))):
        a, b = (values[-1 - draw(st.integers(0, min(len(values), 5) - 1))] for _ in range(2))
        unary = draw(st.booleans())
        node = graph.call_function(aten.sin.default, (a,)) if unary else graph.call_function(aten.add.Tensor, (a, b))
        node.meta["val"] = X
        values.append(node)
    graph.output(tuple(values[-1 - i] for i in range(min(len(values), draw(st.integers(1, 3))))))
    return fx.GraphModule(torch.nn.Module(), graph)


@settings(max_examples=150, deadline=None)
@given(graphs(), st.data())
def test_regions_are_what_cutting_says(module: fx.GraphModule, data: st.DataObject) -> None:
    """Removing a dominator cuts the node off from the inputs; removing a post-dominator from the outputs."""
    facts = Facts(module)
    dominance = Dominance(facts)
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    entry, exit = (data.draw(st.sampled_from(nodes)) for _ in range(2))
    flow = nx.DiGraph()
    flow.add_nodes_from(module.graph.nodes)
    flow.add_edges_from((operand, node) for node in module.graph.nodes for operand in node.all_input_nodes)
    flow.add_edges_from(("in", node) for node in module.graph.nodes if node.op == "placeholder")
    flow.add_edges_from((node, "out") for node in module.graph.nodes if not node.users)

    def cuts(removed: fx.Node, a: object, b: object) -> bool:
        rest = flow.subgraph(n for n in flow if n is not removed)
        return not nx.has_path(rest, a, b)

    dominates = entry is not exit and cuts(entry, "in", exit)
    follows = entry is not exit and cuts(exit, entry, "out")
    region = dominance.between(entry, exit)
    assert isinstance(region, Region) is (dominates and follows)
    assert (entry in dominance.dominators(exit)) is dominates
    assert (exit in dominance.post_dominators(entry)) is follows
    whole = slice_of(facts, exit, SMOOTH)
    assert isinstance(whole, Region)
    owned = {n for n in whole.nodes if n is exit or cuts(exit, n, "out")}
    assert set(whole.owned(facts)) == owned
    if isinstance(region, Region):
        assert set(region.nodes) == {n for n in flow if n in nx.descendants(flow, entry)} & ({*nx.ancestors(flow, exit)} | {exit})


def test_dominance_of_a_graph_without_inputs_is_empty() -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.rand.default, ([2],))
    node.meta["val"] = X
    graph.output((node,))
    dominance = Dominance(Facts(fx.GraphModule(torch.nn.Module(), graph)))
    assert dominance.dominators(node) == [] and dominance.smallest(node) is None


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_every_layer_of_a_model_is_a_region(kind: str) -> None:
    """The residual stream is what dominates: one region of each layer enters and leaves through it."""
    model, inputs = small_model(kind, "sdpa")
    facts = Facts(capture_graph(model, (), inputs))
    dominance = Dominance(facts)
    attentions = by_target(facts.graph_module, aten.scaled_dot_product_attention)
    for attention in attentions:
        region = dominance.smallest(dominance.post_dominators(attention)[0])
        assert region is not None and len(region.entries) == 1
