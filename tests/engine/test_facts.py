# SPDX-License-Identifier: Apache-2.0
"""Facts: normalised arguments, places, aliases, mutations, users, randomness."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.facts import Facts, same_shape

from .helpers import by_target, capture_graph, trace

aten = torch.ops.aten


def only(module: fx.GraphModule, packet: Any) -> fx.Node:
    (node,) = by_target(module, packet)
    return node


def graph_of(build: Any) -> fx.GraphModule:
    """A hand-made graph, for what export would not write; `build(graph)` returns the output."""
    graph = fx.Graph()
    graph.output([build(graph)])
    return fx.GraphModule(nn.Module(), graph)


def test_arguments_have_every_default_under_its_schema_name() -> None:
    module = trace(lambda x, y: torch.add(x, y).t().contiguous(), torch.ones(2, 3), torch.ones(2, 3))
    facts = Facts(module)
    x, y = module.graph.find_nodes(op="placeholder")
    assert dict(facts.arguments(only(module, aten.add))) == {"self": x, "other": y, "alpha": 1}
    assert facts.arguments(only(module, aten.contiguous))["memory_format"] is torch.contiguous_format


def test_arguments_do_not_depend_on_how_the_call_was_spelled() -> None:
    def build(graph: fx.Graph) -> fx.Node:
        x = graph.placeholder("x")
        first = graph.call_function(aten.softmax.int, (x, -1))
        return graph.call_function(aten.softmax.int, (), {"dim": -1, "self": first, "dtype": None})

    facts = Facts(graph_of(build))
    one, two = by_target(facts.graph_module, aten.softmax)
    assert set(facts.arguments(one)) == set(facts.arguments(two)) == {"self", "dim", "dtype"}
    assert facts.arguments(one)["dtype"] is None


def test_arguments_never_drop_what_no_schema_names() -> None:
    def build(graph: fx.Graph) -> fx.Node:
        x = graph.placeholder("x")
        return graph.call_function(aten.relu.default, (x, 7), {"odd": 3})

    facts = Facts(graph_of(build))
    arguments = facts.arguments(only(facts.graph_module, aten.relu))
    assert arguments["*1"] == 7 and arguments["odd"] == 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()  # the line a user wrote


def test_path_and_source_are_the_users() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    module = capture_graph(Model(), (torch.ones(2, 4),))
    facts = Facts(module)
    linear, relu = only(module, aten.linear), only(module, aten.relu)
    assert (facts.path(linear), facts.path(relu)) == ("block.inner", "block")
    assert {facts.path(node) for node in module.graph.find_nodes(op="get_attr")} == {"block.inner"}
    for node in (linear, relu):  # the linear's own frame is torch's; the innermost line outside torch is the user's
        assert "test_facts.py" in facts.source(node)
        assert facts.source(node).endswith("in forward: return self.inner(x).relu()  # the line a user wrote")
    relu.meta.pop("stack_trace")
    assert facts.source(relu) == ""


def test_paths_of_a_rewritten_node_are_those_it_came_from() -> None:
    module = trace(torch.relu, torch.ones(2))
    node = only(module, aten.relu)
    node.meta["custom"] = {"rewriter": {"paths": ["a.q", "a.k"]}}
    assert Facts(module).paths(node) == ("a.q", "a.k")


def test_views_resolve_to_their_base() -> None:
    def forward(x: Tensor) -> Tensor:
        a, b = torch.split(x.view(4, 4).transpose(0, 1), 2)
        return a.reshape(8) + b.contiguous().detach().flatten()

    module = trace(forward, torch.ones(16))
    facts = Facts(module)
    (x,) = module.graph.find_nodes(op="placeholder")
    views = [n for n in module.graph.nodes if n.op == "call_function" and n.target is not aten.add.Tensor]
    assert len(views) >= 7
    assert {facts.alias_root(node) for node in views} == {x}
    total = only(module, aten.add)
    assert facts.alias_root(total) is total


def test_undeclared_aliases_are_known() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=False).type_as(y)

    module = trace(forward, torch.ones(3), torch.ones(3))
    facts = Facts(module)
    x, _ = module.graph.find_nodes(op="placeholder")
    assert facts.alias_root(only(module, aten.type_as)) is x


def test_two_reads_of_one_storage_alias() -> None:
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(4))
    root.register_buffer("view", root.weight.detach()[:2])
    graph = fx.Graph()
    weight, view = graph.get_attr("weight"), graph.get_attr("view")
    graph.output([graph.call_function(aten.add.Tensor, (weight, view))])
    facts = Facts(fx.GraphModule(root, graph))
    assert facts.alias_root(view) is weight and facts.is_parameter(view)


def test_writes_between_sees_writes_through_views() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x.sin()
        before = y.cos()
        y.view(4)[:2].mul_(3.0)
        middle = y.exp()
        y.add_(1.0)
        return before + middle + y.tan()

    module = trace(forward, torch.ones(2, 2))
    facts = Facts(module)
    y, cos, exp, tan = (only(module, p) for p in (aten.sin, aten.cos, aten.exp, aten.tan))
    mul_, add_ = only(module, aten.mul_), only(module, aten.add_)
    assert facts.writes_between(y, cos, exp) == [mul_]
    assert facts.writes_between(y, cos, tan) == [mul_, add_]
    assert facts.writes_between(y, exp, add_) == []  # the ends do not count
    assert [facts.epoch(y, node) for node in (cos, exp, tan)] == [0, 1, 2]
    assert facts.writes_between(cos, y, tan) == []


def test_batch_norm_in_training_writes_its_statistics() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    for train, expected in ((True, {"norm.running_mean", "norm.running_var"}), (False, set())):
        module = capture_graph(Model().train(train), (torch.randn(4, 3),))
        facts = Facts(module)
        norm = only(module, aten.batch_norm)
        assert {str(node.target) for node in facts.written(norm)} == expected


def region_writing_its_input(write: bool) -> Facts:
    """A set-grad region whose body does or does not write to the value it is given."""
    body = fx.Graph()
    inner = body.placeholder("inner")
    result = body.call_function(aten.add_.Tensor if write else aten.add.Tensor, (inner, 1))
    body.output((result,))
    root = nn.Module()
    root.body = fx.GraphModule(nn.Module(), body)
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2)
    region = graph.call_function(torch.ops.higher_order.wrap_with_set_grad_enabled, (False, graph.get_attr("body"), x))
    graph.output([graph.call_function(operator.getitem, (region, 0))])
    return Facts(fx.GraphModule(root, graph))


@pytest.mark.parametrize("write", [True, False])
def test_writes_inside_a_region_are_writes_of_the_region(write: bool) -> None:
    facts = region_writing_its_input(write)
    (x,) = facts.graph.find_nodes(op="placeholder")
    assert [str(node.target) for node in facts.writers(x)] == ["wrap_with_set_grad_enabled"] * write


def test_users_leave_assertions_out() -> None:
    def build(graph: fx.Graph) -> fx.Node:
        x = graph.placeholder("x")
        graph.call_function(aten._assert_tensor_metadata.default, (x,))
        return graph.call_function(aten.relu.default, (x,))

    facts = Facts(graph_of(build))
    (x,) = facts.graph.find_nodes(op="placeholder")
    assert [node.target for node in facts.users(x)] == [aten.relu.default]
    assert [facts.is_assertion(node) for node in x.users] == [True, False]


@pytest.mark.parametrize(
    ("call", "random"),
    [
        (lambda x: F.dropout(x, 0.5, True), True),
        (lambda x: F.dropout(x, 0.0, True), False),
        (lambda x: F.dropout(x, 0.5, False), False),
        (lambda x: torch.bernoulli(x, 0.0), True),  # draws, though the result is known
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
        (lambda x: F.scaled_dot_product_attention(x, x, x), False),
        (lambda x: F.rrelu(x, training=False), False),
        (torch.rand_like, True),
        (torch.relu, False),
    ],
)
def test_is_random_asks_how_the_call_is_made(call: Any, random: bool) -> None:
    module = trace(call, torch.rand(2, 3, 4))
    facts = Facts(module)
    assert any(facts.is_random(node) for node in module.graph.nodes) is random


def test_a_region_is_as_random_as_its_body() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda a: F.dropout(a, 0.5, True), lambda a: a.sin(), (x,))

    module = trace(forward, torch.rand(3))
    facts = Facts(module)
    assert facts.is_random(next(n for n in module.graph.nodes if str(n.target) == "cond"))


def test_types_come_from_the_fake_values() -> None:
    module = trace(lambda x: x.half(), torch.ones(2, 3))
    facts = Facts(module)
    node = only(module, aten.to)
    assert (facts.dtype(node), facts.shape(node), facts.device(node)) == (torch.float16, (2, 3), torch.device("cpu"))
    assert facts.dtype(module.graph.output_node()) is None


def test_symbolic_sizes_are_equal_only_where_they_always_are() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sin() @ y.cos()

    auto = torch.export.Dim.AUTO
    module = capture_graph(
        Model(), (torch.ones(3, 4), torch.ones(4, 5)), None, ({0: auto, 1: auto}, {0: auto, 1: auto})
    )
    facts = Facts(module)
    x, y = (facts.shape(only(module, packet)) for packet in (aten.sin, aten.cos))
    assert x is not None and y is not None
    assert same_shape((x[1],), (y[0],))  # the contraction makes them one symbol
    assert not same_shape((x[0],), (y[1],)) and not same_shape(x, (3, 4)) and not same_shape(x, None)


def test_forget_keeps_facts_right_across_an_edit() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x.sin()
        view = y.view(4)
        y.mul_(2.0)
        return view.cos()

    module = trace(forward, torch.ones(2, 2))
    facts = Facts(module)
    sin, view, cos = only(module, aten.sin), only(module, aten.view), only(module, aten.cos)
    assert facts.alias_root(view) is sin and facts.writers(view) == [only(module, aten.mul_)]
    assert facts.arguments(cos)["self"] is view
    with module.graph.inserting_after(sin):
        fresh = module.graph.call_function(aten.tan.default, (sin,))
    view.update_arg(0, fresh)
    with module.graph.inserting_before(cos):
        relu = module.graph.call_function(aten.relu.default, (view,))
    cos.update_arg(0, relu)
    for node in (fresh, view, relu, cos):
        facts.forget(node)
    again = Facts(module)
    for node in module.graph.nodes:
        assert facts.alias_roots(node) == again.alias_roots(node), node
        assert facts.writers(node) == again.writers(node), node
        assert facts.position(node) == again.position(node)
        assert dict(facts.arguments(node)) == dict(again.arguments(node))
    assert facts.writers(view) == []
