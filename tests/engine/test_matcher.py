# SPDX-License-Identifier: Apache-2.0
"""What matches, what does not, and what the miss says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rewriter.facts import Facts
from rewriter.matcher import Match, explain, find, match_at
from rewriter.operators import (
    CONTIGUOUS,
    DETACH,
    EVAL_DROPOUT,
    NOOP_CAST,
    VALUE_PRESERVING,
    cat,
    exp,
    linear,
    neg,
    relu,
    sigmoid,
    silu,
    softmax,
    swap_last,
    tanh,
)
from rewriter.pattern import Anything, Const, Expression, Optional, Pattern, Var, Variadic, optionally, pattern
from rewriter.predicates import floating, has_dtype, has_shape, number, parameter, shape_like

from .helpers import by_target, capture_graph, trace

aten = torch.ops.aten
x, y, z = Var("x"), Var("y"), Var("z")
T = torch.rand(2, 3)


def count(expression: Expression | Pattern, function: Callable[..., Any], *inputs: Tensor, **options: Any) -> int:
    made = expression if isinstance(expression, Pattern) else pattern("p", expression, **options)
    return len(find(trace(function, *(inputs or (T,))), made))


def first(expression: Expression, function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Match:
    (match,) = find(trace(function, *(inputs or (T,))), pattern("p", expression, **options))
    return match


SWISH = x * sigmoid(x)

CASES: list[tuple[str, Expression, Callable[..., Any], int]] = [
    ("one operator", relu(x), lambda a: a.relu(), 1),
    ("another operator", relu(x), lambda a: a.tanh(), 0),
    ("every root", relu(x), lambda a: (a.relu(), a.sin().relu()), 2),
    ("nested", tanh(relu(x)), lambda a: a.relu().tanh(), 1),
    ("repeated capture", SWISH, lambda a: a * torch.sigmoid(a), 1),
    ("repeated capture, commuted", SWISH, lambda a: torch.sigmoid(a) * a, 1),
    ("repeated capture of two values", SWISH, lambda a: a * torch.sigmoid(a.sin()), 0),
    ("square", x * x, lambda a: a * a, 1),
    ("square of two values", x * x, lambda a: a * a.sin(), 0),
    ("equal but distinct constants", x * Const("c") + y * Const("c"), lambda a: a * 2 + a.sin() * 2.0, 1),
    ("different constants of one name", x * Const("c") + y * Const("c"), lambda a: a * 2 + a.sin() * 3, 0),
    ("literal", x + 1, lambda a: a + 1, 1),
    ("literal by value", x + 1, lambda a: a + 1.0, 1),
    ("other literal", x + 1, lambda a: a + 2, 0),
    ("literal on either side", 2 * x, lambda a: a * 2, 1),
    ("a bool is not a number", x + 1, lambda a: a + True, 0),
    ("a constant is not a value", x + y, lambda a: a + 1, 0),
    ("a value is not a constant", x * Const("c"), lambda a: a * a.sin(), 0),
    ("alpha", x + y, lambda a: torch.add(a, a.sin(), alpha=2), 0),
    ("alpha one", x + y, lambda a: torch.add(a, a.sin(), alpha=1), 1),
    ("subtraction does not commute", x - relu(y), lambda a: a.relu() - a, 0),
    ("rsub", 1 - x, lambda a: 1 - a, 1),
    ("rounding division", x / y, lambda a: torch.div(a, a.sin(), rounding_mode="floor"), 0),
    ("negative dimension", softmax(x, -1), lambda a: a.softmax(1), 1),
    ("other dimension", softmax(x, -1), lambda a: a.softmax(0), 0),
    ("default operand", softmax(x, -1), lambda a: a.softmax(-1, dtype=torch.float64), 0),
    ("dtype operand", softmax(x, -1, torch.float64), lambda a: a.softmax(-1, dtype=torch.float64), 1),
    ("alternatives", silu(x) | SWISH, lambda a: (F.silu(a), a * torch.sigmoid(a)), 2),
    ("anything", x + Anything(), lambda a: (a + 3, a + a.sin()), 2),
    ("transpose", swap_last(x), lambda a: (a.t(), a.mT, a.transpose(-1, -2), a.permute(1, 0)), 4),
    ("no transpose", swap_last(x), lambda a: a.unsqueeze(0).transpose(0, 1), 0),
]


@pytest.mark.parametrize(("expression", "function", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_matches(expression: Expression, function: Callable[..., Any], expected: int) -> None:
    assert count(expression, function) == expected


def test_captures_are_complete_and_read_only() -> None:
    gate = optionally(lambda value: value * Const("scale", number), relu(x))
    match = first(sigmoid(gate), lambda a: a.relu().sigmoid())
    assert dict(match.captures) == {"scale": None, "x": match["x"]} and match["x"].op == "placeholder"
    with pytest.raises(TypeError):
        match.captures["x"] = None  # type: ignore[index]
    assert first(sigmoid(gate), lambda a: (a.relu() * 3).sigmoid())["scale"] == 3


def test_nodes_are_the_interior_in_graph_order() -> None:
    match = first(exp(x) * relu(y), lambda a: a.sin().exp() * a.relu())
    assert [n.target for n in match.nodes] == [aten.exp.default, aten.relu.default, aten.mul.Tensor]
    assert match.root is match.nodes[-1] and match.outputs == (match.root,)
    assert match.location.startswith(__file__)


def test_predicates_restrict_captures() -> None:
    wide = torch.rand(2, 3, dtype=torch.float64)
    assert count(relu(Var("x", has_dtype(torch.float64))), torch.relu, wide) == 1
    assert count(relu(Var("x", has_dtype(torch.float64))), torch.relu, T) == 0
    assert count(relu(Var("x", has_shape(None, 3))), torch.relu, T) == 1
    assert count(relu(Var("x", has_shape(3, None))), torch.relu, T) == 0
    assert count(x + Var("y", floating), lambda a, b: a + b, T, torch.ones(3, dtype=torch.long)) == 1  # commuted
    assert count(x * Const("c", lambda c: c > 0), lambda a: (a * 2, a * -2)) == 1
    assert count(relu(x).where(has_dtype(torch.float64)), torch.relu, T) == 0
    together = pattern("p", x * y, where=shape_like("x", "y"))
    assert count(together, lambda a: a * a.sin()) == 1 and count(together, lambda a: a * a.sum(0)) == 0


def test_optional_arguments() -> None:
    affine = linear(x, Var("w", parameter), Optional(Var("b", parameter)))
    for bias in (True, False):
        tensors = {"w": torch.rand(4, 3)} | ({"b": torch.rand(4)} if bias else {})
        module = trace(lambda a, w, b=None: F.linear(a, w, b), T, **tensors)
        (match,) = find(module, pattern("p", affine))
        assert (match["b"] is not None) is bias


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_variadic_lists(parts: int) -> None:
    match = first(cat([relu(x), Variadic("rest")], 0), lambda a: torch.cat([a.relu(), *[a.sin()] * (parts - 1)]))
    assert len(match["rest"]) == parts - 1
    assert count(cat([x, y], 0), lambda a: torch.cat([a] * parts)) == (parts == 2)


def test_interior_values_may_not_escape() -> None:
    chain = tanh(relu(x))
    assert count(chain, lambda a: ((h := a.relu()).tanh(), h)) == 0
    assert count(chain, lambda a: (h := a.relu()).tanh() + h) == 0
    assert count(tanh(relu(x).shared()), lambda a: ((h := a.relu()).tanh(), h)) == 1
    # a value that escapes is an input where the pattern allows it to be one
    match = first(tanh(optionally(relu, x)), lambda a: ((h := a.relu()).tanh(), h))
    assert match["x"].target is aten.relu.default and len(match.nodes) == 1


def test_assertions_are_no_users() -> None:
    module = trace(lambda a: a.relu().tanh(), T)
    (node,) = by_target(module, aten.relu)
    with module.graph.inserting_after(node):
        module.graph.call_function(aten._assert_tensor_metadata.default, (node,))
    assert len(find(module, pattern("p", tanh(relu(x))))) == 1


def test_an_expression_used_twice_is_one_node() -> None:
    shifted = exp(x)
    assert count(shifted + shifted * 2, lambda a: (e := a.exp()) + e * 2) == 1
    assert count(shifted + shifted * 2, lambda a: a.exp() + a.exp() * 2) == 0


def test_several_outputs() -> None:
    half = exp(x)
    pair = pattern("p", tanh(half), sigmoid(half))
    module = trace(lambda a: ((e := a.exp()).tanh(), e.sigmoid()), T)
    (match,) = find(module, pair)
    assert [node.target for node in match.outputs] == [aten.tanh.default, aten.sigmoid.default]
    assert count(pair, lambda a: (a.exp().tanh(), a.exp().sigmoid())) == 0
    assert count(pair, lambda a: ((e := a.exp()).tanh(), e.sigmoid(), e)) == 0  # the shared value escapes
    inputs = pattern("p", linear(x, y), linear(x, z))
    both = trace(lambda a, w, v: (F.linear(a, w), F.linear(a, v)), T, w=torch.rand(4, 3), v=torch.rand(5, 3))
    assert [len(find(both, inputs)), len(find(both, pattern("p", relu(x), linear(x, y))))] == [2, 0]


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        (NOOP_CAST, lambda a: a.relu().to(torch.float32).tanh()),
        (EVAL_DROPOUT, lambda a: F.dropout(a.relu(), 0.3, False).tanh()),
        (CONTIGUOUS, lambda a: a.relu().clone().tanh()),
        (DETACH, lambda a: a.relu().detach().tanh()),
    ],
)
def test_transparent_nodes_are_looked_through_by_choice(kind: Any, function: Callable[..., Any]) -> None:
    assert count(tanh(relu(x)), function) == 0
    match = first(tanh(relu(x)), function, transparent=(kind,))
    assert len(match.nodes) == 3  # what was looked through belongs to the match


def test_what_changes_values_is_not_transparent() -> None:
    for function in (
        lambda a: a.relu().to(torch.float64).tanh(),
        lambda a: F.dropout(a.relu(), 0.3, True).tanh(),
        lambda a: a.relu()[:1].tanh(),
        lambda a: a.relu().detach().tanh(),
    ):
        assert count(tanh(relu(x)), function, transparent=VALUE_PRESERVING) == 0


def test_repeated_captures_agree_behind_transparent_nodes() -> None:
    def function(a: Tensor) -> Tensor:
        return a.sin().to(torch.float32) * torch.sigmoid(a.sin().clone())

    def same(a: Tensor) -> Tensor:
        return (s := a.sin()).to(torch.float32) * torch.sigmoid(s.clone())

    assert count(SWISH, same, transparent=VALUE_PRESERVING) == 1
    assert count(SWISH, function, transparent=VALUE_PRESERVING) == 0


def test_at_most_one_match_per_root_and_roots_may_overlap() -> None:
    matches = find(trace(lambda a: a.neg().neg().neg(), T), pattern("p", neg(neg(x))))
    assert len(matches) == 2 and matches[0].root in matches[1].nodes
    assert [m.root for m in matches] == sorted(m.root for m in matches)


def test_matches_are_values() -> None:
    module = trace(lambda a: a.relu(), T)
    made = pattern("p", relu(x))
    (one,), (two,) = find(module, made), find(Facts(module), made)
    assert one == two and hash(one) == hash(two) and str(one) == "p at <root> (relu)"
    assert match_at(module, made, one.root) == one


# -- explain


def only_miss(expression: Expression, function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Any:
    (miss,) = explain(trace(function, *(inputs or (T,))), pattern("rule", expression, **options))
    return miss


MISSES: list[tuple[str, Expression, Callable[..., Any], str, str, str]] = [
    ("operator", tanh(relu(x)), lambda a: a.sin().tanh(), "tanh.x", "a different operator", "relu"),
    ("literal", x + 1, lambda a: a + 2, "add.y", "another constant", "1"),
    ("dimension", softmax(x, -1), lambda a: a.softmax(0), "softmax.dim", "another dimension", "dim -1"),
    ("alpha", x + y, lambda a: torch.add(a, a.sin(), alpha=2), "add", "add.Tensor with alpha = 2", "add"),
    (
        "repeat",
        x * sigmoid(x),
        lambda a: a * a.sin().sigmoid(),
        "mul.y > sigmoid.x",
        "'x' stands for two",
        "placeholder",
    ),
    ("escape", tanh(relu(x)), lambda a: ((h := a.relu()).tanh(), h), "use limit", "needed outside", "no other user"),
    ("constant", x * Const("c", number), lambda a: a * a.sin(), "mul.y", "a computed value where a constant", "'c'"),
    ("value", tanh(x + y), lambda a: (a + 1).tanh(), "tanh.x > add.y", "a constant where a tensor", "'y'"),
    ("dtype", relu(Var("x", has_dtype(torch.half))), torch.relu, "relu.x", "x is not dtype float16", "float16"),
]


@pytest.mark.parametrize("case", MISSES, ids=[case[0] for case in MISSES])
def test_explain_names_step_reason_and_line(case: tuple[str, Expression, Callable[..., Any], str, str, str]) -> None:
    _, expression, function, step, reason, expected = case
    miss = only_miss(expression, function)
    assert miss.step == step and reason in miss.reason and expected in miss.expected
    assert "in forward" in miss.source
    text = str(miss)
    assert text.startswith("rule does not apply at <root>: ") and miss.reason in text


class Wave(torch.nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        wave = a.sin()  # the line to show
        return wave.tanh()


def test_explain_shows_the_users_line() -> None:
    (miss,) = explain(capture_graph(Wave(), (T,)), pattern("rule", tanh(relu(x))))
    assert miss.source.startswith(__file__) and miss.source.endswith("wave = a.sin()  # the line to show")


def test_explain_collects_what_alternatives_expected() -> None:
    miss = only_miss(tanh(relu(x) | sigmoid(x)), lambda a: a.sin().tanh())
    assert miss.expected == "relu or sigmoid" and miss.found == "sin (sin)"


def test_explain_reports_the_furthest_step_first() -> None:
    deep = pattern("rule", tanh(exp(relu(x))))
    misses = explain(trace(lambda a: (a.tanh(), a.sin().exp().tanh()), T), deep)
    assert [miss.step for miss in misses] == ["tanh.x > exp.x", "tanh.x"]
    assert [miss.depth for miss in misses] == [2, 1]


def test_explain_starts_at_the_anchor() -> None:
    scores = softmax(x, -1)
    attention = pattern("rule", scores @ y, anchor=scores)
    (miss,) = explain(trace(lambda a: a.softmax(-1).relu(), T), attention)
    assert miss.reason == "nothing consumes softmax.int (softmax) as the pattern needs"
    assert miss.expected == "matmul or mm or bmm"
    assert "relu" in miss.found
    assert explain(trace(lambda a: a.softmax(-1) @ a.t(), T), attention) == []


def test_explain_says_when_there_is_nothing_alike() -> None:
    (miss,) = explain(trace(torch.tanh, T), pattern("rule", relu(x)))
    assert miss.reason == "there is no relu in the program" and miss.node is None
    (miss,) = explain(trace(torch.relu, T), pattern("rule", relu(x) + y), site="layers.3")
    assert miss.reason == "there is no add at this site" and miss.site == "layers.3"


def test_rules_whose_root_is_absent_look_at_no_node() -> None:
    class Untouchable(fx.Graph):
        @property
        def nodes(self) -> Any:
            raise AssertionError("the graph was searched node by node")

    module = trace(torch.tanh, T)
    module.graph.__class__ = Untouchable
    assert find(Facts(module), pattern("p", relu(x))) == []
