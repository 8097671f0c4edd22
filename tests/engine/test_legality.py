# SPDX-License-Identifier: Apache-2.0
"""Small adversarial graphs: each is either replaceable, refused for the expected reason, or no match at all."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.facts import Facts
from rewriter.legality import as_miss, refusal
from rewriter.matcher import Match, find
from rewriter.operators import VALUE_PRESERVING, exp, relu, reshape, softmax, swap_last, tanh
from rewriter.pattern import Anything, Const, Pattern, Var, optionally, pattern
from rewriter.views import ATTENTION, LINEAR, QKV, View

from .helpers import by_target, capture_graph, trace

aten = torch.ops.aten
x, y = Var("x"), Var("y")
Q, K, V = (torch.rand(1, 2, 3, 4) for _ in range(3))
A, W, U = torch.rand(2, 4), torch.rand(5, 4), torch.rand(5, 4)

TANH_RELU = pattern("tanh relu", tanh(relu(x)))
SCORES = pattern("masked scores", softmax(x @ y + Var("mask"), -1))


def attend(q: Tensor, k: Tensor, v: Tensor, between: Callable[[Tensor, Tensor, Tensor], Any] | None = None) -> Tensor:
    p = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
    if between is not None:
        between(q, k, v)
    return p @ v


def fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the function on copies, so that it may write to them without writing to the program's inputs."""
    return lambda *inputs: function(*(i.clone() for i in inputs))


Case = tuple[Pattern | View, Callable[..., Any], tuple[Tensor, ...], str | None, str]
NO_MATCH = "no match"

LEGAL: dict[str, Case] = {
    "plain": (ATTENTION, attend, (Q, K, V), None, ""),
    "commuted operands": (
        ATTENTION, lambda q, k, v, m: (m + 0.5 * (q @ k.mT)).softmax(-1) @ v, (Q, K, V, Q @ K.mT), None, ""
    ),
    "write before the first read": (ATTENTION, fresh(lambda q, k, v: attend(q.mul_(2), k, v)), (Q, K, V), None, ""),
    "write after the root": (
        ATTENTION, fresh(lambda q, k, v: (attend(q, k, v), q.mul_(2))), (Q, K, V), None, ""
    ),
    "write to something else": (
        ATTENTION, fresh(lambda q, k, v: (attend(q, k, v, lambda *_: q.sin().mul_(2)))), (Q, K, V), None, ""
    ),
    "result written in place": (LINEAR, lambda a, w: F.linear(a, w).mul_(2), (A,), None, ""),
    "half precision around a float softmax": (
        ATTENTION,
        lambda q, k, v: F.softmax(q @ k.mT * 0.5, dim=-1, dtype=torch.float32).half() @ v,
        (Q.half(), K.half(), V.half()), None, "",
    ),
    "negative dimension spelled positively": (
        ATTENTION, lambda q, k, v: (q @ k.transpose(2, 3)).softmax(3) @ v, (Q, K, V), None, ""
    ),
    "dropout in evaluation": (
        ATTENTION, lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5, False) @ v, (Q, K, V), None, ""
    ),
    "left padding mask": (
        ATTENTION,
        lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v,
        (Q, K, V, torch.tensor([float("-inf"), 0.0, 0.0])), None, "",
    ),
    "no rows": (LINEAR, lambda a, w: F.linear(a, w), (A[:0],), None, ""),
    "tied weight": (LINEAR, lambda i, w: F.linear(F.embedding(i, w), w), (torch.tensor([1, 2]),), None, ""),
}  # fmt: skip

REFUSED: dict[str, Case] = {
    "captured input written between read and root": (
        ATTENTION, fresh(lambda *t: attend(*t, between=lambda q, k, v: q.mul_(2))), (Q, K, V), "mutation", "mul_",
    ),
    "written through a view": (
        ATTENTION, fresh(lambda *t: attend(*t, between=lambda q, k, v: k.view(-1)[:3].zero_())), (Q, K, V),
        "mutation", "zero_",
    ),
    "view of an input, input written": (
        pattern("p", tanh(swap_last(x)) * y),
        fresh(lambda a, b: (b.t().tanh(), b.add_(1))[0] * a.t()), (A, A), "mutation", "add_",
    ),
    "interior value written": (
        pattern("p", tanh(reshape(relu(x).shared(), Anything()))),
        lambda a: (h := a.relu(), v := h.view(-1), h.mul_(2), v.tanh())[-1], (A,), "mutation", "mul_",
    ),
    "dropout in training": (
        ATTENTION, lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v, (Q, K, V), "random", "dropout",
    ),
    "sdpa with dropout": (
        ATTENTION, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), (Q, K, V), "random", "draws",
    ),
    "undeclared promotion by the mask": (
        SCORES, lambda q, k, m: (q @ k.mT + m).softmax(-1), (Q.half(), K.half(), Q @ K.mT), "dtype",
        "from float16 to float32",
    ),
    "output is a view of an input and returned": (
        pattern("p", swap_last(swap_last(x))), lambda a: a.t().t(), (A,), "alias", "shares storage",
    ),
    "output is a view of an input that is written": (
        pattern("p", reshape(swap_last(x), Anything())),
        fresh(lambda a: (r := a.t().reshape(2, 4), a.mul_(2), r.sin())[-1]), (A.reshape(4, 2).t(),),
        "alias", "shares storage",
    ),
    "x written between the projections": (
        QKV,
        lambda a, w, u: F.scaled_dot_product_attention(
            F.linear(h := a.sin(), w), F.linear(h.mul_(2), u), V[0, 0, :2, :1].expand(2, 5)
        ),
        (A,), NO_MATCH, "",  # the second linear reads the written value, another node
    ),
    "x written through an alias between the projections": (
        QKV,
        lambda a, w, u: (h := a.sin(), s := F.linear(h, w), h.view(-1).mul_(2), t := F.linear(h, u),
                         F.scaled_dot_product_attention(s, t, a @ a.t() @ s))[-1],
        (A,), "mutation", "mul_",
    ),
    "projection written in place": (
        QKV,
        lambda a, w, u: (s := F.linear(a, w), t := F.linear(a, u), r := s.view(2, 5),
                         o := F.scaled_dot_product_attention(r, t, a @ a.t() @ s), s.mul_(2), o)[-1],
        (A,), "alias", "later written in place",
    ),
}  # fmt: skip

UNMATCHED: dict[str, Case] = {
    "alpha": (SCORES, lambda q, k, m: torch.add(q @ k.mT, m, alpha=2).softmax(-1), (Q, K, Q @ K.mT), NO_MATCH, ""),
    "escaping interior value": (
        ATTENTION, lambda q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p), (Q, K, V), NO_MATCH, ""
    ),
    "softmax over another dimension": (
        ATTENTION, lambda q, k, v: (q @ k.mT).softmax(-2) @ v, (Q, K, V), NO_MATCH, ""
    ),
    "mask that makes the scores larger": (
        ATTENTION, lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v, (Q, K, V, torch.rand(5, 2, 3, 3)), NO_MATCH, ""
    ),
    "scores narrowed before the softmax": (
        ATTENTION, lambda q, k, v: (q @ k.mT).half().softmax(-1).float() @ v, (Q, K, V), NO_MATCH, ""
    ),
    "boolean mask that is added": (
        ATTENTION, lambda q, k, v: (q @ k.mT + (q @ k.mT > 0)).softmax(-1) @ v, (Q, K, V), NO_MATCH, ""
    ),
    "detached probabilities": (
        ATTENTION, lambda q, k, v: (q @ k.mT).softmax(-1).detach() @ v, (Q, K, V), NO_MATCH, ""
    ),
    "computed weight": (LINEAR, lambda a, w: F.linear(a, w.sin()), (A,), NO_MATCH, ""),
    "weight on the left": (LINEAR, lambda a, w: w @ a.t(), (A,), NO_MATCH, ""),
    "scale that is a tensor": (
        ATTENTION, lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v, (Q, K, V, torch.tensor(0.5)), NO_MATCH, ""
    ),
}  # fmt: skip

CASES = LEGAL | REFUSED | UNMATCHED


def judge(what: Pattern | View, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[str | None, str]:
    """The kind and words of the refusal of the only match; None if it is legal."""
    code = function.__code__.co_varnames[: function.__code__.co_argcount]
    tensors = {name: value for name, value in (("w", W), ("u", U)) if name in code}
    module = trace(function, *inputs, **tensors)
    facts = Facts(module)
    matches = what.find(facts) if isinstance(what, View) else find(facts, what)
    if not matches:
        return NO_MATCH, ""
    (match,) = matches
    reason = refusal(facts, match)
    return (None, "") if reason is None else (reason.kind, str(reason))


@pytest.mark.parametrize("name", CASES)
def test_adversarial_graphs(name: str) -> None:
    what, function, inputs, kind, words = CASES[name]
    found, message = judge(what, function, inputs)
    assert found == kind, message
    assert words in message


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 30


def test_a_refusal_names_node_and_line_and_becomes_a_miss() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            p = (q @ k.mT).softmax(-1)
            p = F.dropout(p, 0.25, True)  # draws
            return p @ v

    facts = Facts(capture_graph(Model(), (Q, K, V)))
    (match,) = ATTENTION.find(facts)
    reason = refusal(facts, match)
    assert reason is not None and reason.node.target is aten.dropout.default
    assert reason.source.startswith(__file__) and reason.source.endswith("p = F.dropout(p, 0.25, True)  # draws")
    miss = as_miss(match, reason)
    assert (miss.rule, miss.step, miss.node) == ("attention", "legality: random", reason.node)
    assert miss.reason == "dropout (dropout) draws random numbers" and miss.source == reason.source


def hand_made(build: Callable[[fx.Graph], Any], **attributes: Any) -> Facts:
    root = nn.Module()
    for name, value in attributes.items():
        setattr(root, name, value)
    graph = fx.Graph()
    graph.output([build(graph)])
    return Facts(fx.GraphModule(root, graph))


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = torch.ones(2)
    return node


def test_a_parameter_that_the_program_writes_is_no_constant() -> None:
    def build(graph: fx.Graph) -> fx.Node:
        weight, value = graph.get_attr("weight"), graph.placeholder("value")
        call(graph, aten.mul_.Tensor, weight, 2.0)
        for node in (weight, value):
            node.meta["val"] = torch.ones(2, 2)
        return call(graph, aten.linear.default, value, weight)

    facts = hand_made(build, weight=nn.Parameter(torch.ones(2, 2)))
    (match,) = LINEAR.find(facts)
    reason = refusal(facts, match)
    assert reason is not None and reason.kind == "mutation"
    assert reason.message.startswith("parameter weight is written by mul_.Tensor")


@pytest.mark.parametrize("between", [True, False])
def test_nothing_moves_across_a_mode_switch(between: bool) -> None:
    def build(graph: fx.Graph) -> fx.Node:
        value = graph.placeholder("value")
        if not between:
            graph.call_function(torch._C._set_grad_enabled, (False,))
        value = call(graph, aten.relu.default, value)
        if between:
            graph.call_function(torch._C._set_grad_enabled, (False,))
        return call(graph, aten.tanh.default, value)

    facts = hand_made(build)
    (match,) = find(facts, TANH_RELU)
    reason = refusal(facts, match)
    assert (reason is not None and reason.kind == "region") is between


def test_control_flow_bodies_are_not_part_of_the_main_graph() -> None:
    def forward(a: Tensor) -> Tensor:
        return torch.cond(a.sum() > 0, lambda b: b.relu().tanh(), lambda b: b.sin(), (a,))

    facts = Facts(trace(forward, A))
    assert find(facts, TANH_RELU) == []
    region = next(node for node in facts.graph.nodes if str(node.target) == "cond")
    (match,) = [match for body in facts.bodies(region) for match in find(body, TANH_RELU)]
    reason = refusal(facts, match)
    assert reason is not None and reason.kind == "region" and "control-flow body" in reason.message


def test_autocast_regions_are_not_searched() -> None:
    def forward(a: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = F.linear(a, w)
        return F.linear(a, w).sum() + h.sum()

    facts = Facts(trace(forward, A, w=W))
    assert len(LINEAR.find(facts)) == 1


def test_a_match_made_by_hand_must_close_over_its_values() -> None:
    facts = Facts(trace(lambda a: ((h := a.relu()).tanh(), h), A))
    (inner,), (root,) = by_target(facts.graph_module, aten.relu), by_target(facts.graph_module, aten.tanh)
    open_match = Match("p", root, {}, (inner, root), (root,))
    reason = refusal(facts, open_match)
    assert reason is not None and reason.kind == "escape"
    assert reason.message == "relu (relu) is returned as a program output"
    assert refusal(facts, Match("p", root, {}, (inner, root), (inner, root))) is None


def test_a_region_inside_a_match_is_refused() -> None:
    facts = Facts(trace(lambda a: torch.cond(a.sum() > 0, torch.sin, torch.cos, (a,)).tanh(), A))
    region = next(node for node in facts.graph.nodes if str(node.target) == "cond")
    (item,) = [node for node in facts.graph.nodes if node.target is operator.getitem]
    reason = refusal(facts, Match("p", item, {}, (region, item), (item,)))
    assert reason is not None and reason.kind == "region" and "graph of its own" in reason.message


def test_values_behind_a_copy_are_read_where_the_copy_was_made() -> None:
    """x · exp(copy of x), x written after the copy: the two reads differ although the copy is looked through."""
    square = pattern("p", x * exp(x), transparent=VALUE_PRESERVING)

    def forward(a: Tensor) -> Tensor:
        h = a.sin()
        same, before = h.view(2, 4), h.clone().exp()
        h.mul_(2)
        return same * before

    facts = Facts(trace(forward, A))
    (match,) = find(facts, square)
    reason = refusal(facts, match)
    assert reason is not None and reason.kind == "mutation" and "mul_" in reason.message


def test_scales_and_optional_parts_do_not_hide_a_write() -> None:
    made = pattern("p", tanh(optionally(lambda s: s * Const("c"), relu(x))))

    def forward(a: Tensor) -> Tensor:
        h = a.sin()
        scaled = h.relu() * 2
        h.add_(1)
        return scaled.tanh()

    facts = Facts(trace(forward, A))
    (match,) = find(facts, made)
    reason = refusal(facts, match)
    assert reason is not None and reason.kind == "mutation" and "add_" in reason.message
