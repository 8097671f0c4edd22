# SPDX-License-Identifier: Apache-2.0
"""Patterns are checked where they are defined; an error names the line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewriter.errors import PatternError
from rewriter.operators import cast, cat, layer_norm, linear, relu, sigmoid, softmax, swap_last, unsqueeze
from rewriter.pattern import (
    Anything,
    Call,
    Const,
    Dim,
    Literal,
    Operator,
    Optional,
    Pattern,
    Sequence,
    Var,
    Variadic,
    optionally,
    pattern,
)
from rewriter.predicates import has_dtype, has_rank, number

aten = torch.ops.aten
x, y = Var("x"), Var("y")

IMPOSSIBLE: dict[str, tuple[Callable[[], object], str]] = {
    "no output": (lambda: pattern("p"), "has no output"),
    "bare variable": (lambda: pattern("p", x), "must be an operator, not Var('x')"),
    "variable as an option": (lambda: pattern("p", relu(x) | x), "must be an operator"),
    "missing operand": (lambda: linear(x), "linear needs the operand 'weight'"),
    "too many operands": (lambda: relu(x, y), "relu takes x; 2 given"),
    "operand twice": (lambda: softmax(x, dim=-1, x=y), "got x twice"),
    "unknown operand": (lambda: softmax(x, axis=-1), "no operand axis; it has x, dim, dtype"),
    "not an operator": (lambda: Operator("f", (torch.relu,), ("x",)), "not a torch operator"),
    "no spelling": (lambda: Operator("f", (), ("x",)), "the operator 'f' has no spelling"),
    "unreachable option": (lambda: pattern("p", relu(x | sigmoid(x))), "what follows Var('x') in 'p' can never"),
    "unreachable after anything": (lambda: pattern("p", relu(Anything() | x)), "can never be reached"),
    "only constants": (lambda: pattern("p", x + relu(Const("c"))), "relu of constants only in 'p' never occurs"),
    "two kinds of one name": (lambda: pattern("p", x * Const("x")), "'x' is Const('x') here and Var('x') at"),
    "two nodes of one name": (lambda: pattern("p", relu(x).named("n") + sigmoid(x).named("n")), "'n' is the operator"),
    "no name": (lambda: pattern("p", relu(Var("not a name"))), "'not a name' is not a name"),
    "two dtypes": (
        lambda: pattern("p", Var("x", has_dtype(torch.half)) + sigmoid(Var("x", has_dtype(torch.float)))),
        "no dtype is left for 'x'",
    ),
    "two ranks": (lambda: pattern("p", Var("x", has_rank(2)) @ Var("x", has_rank(3))), "cannot have two ranks"),
    "two variadic parts": (lambda: pattern("p", cat([Variadic("a"), Variadic("b")], 0)), "is ambiguous"),
    "variadic outside a list": (lambda: pattern("p", cat(Variadic("a"), 0) + x), "outside a list"),
    "optional literal": (lambda: pattern("p", linear(x, y, Optional(Literal(None)))), "Optional of the literal None"),
    "unconnected output": (lambda: pattern("p", relu(x), sigmoid(y)), "output 2 of 'p' shares nothing"),
    "foreign anchor": (lambda: pattern("p", relu(x), anchor=sigmoid(x)), "the anchor of 'p' is not part"),
    "condition of three arguments": (
        lambda: pattern("p", relu(Var("x", lambda a, b, c: True))),
        "a condition takes (value) or (facts, value)",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_match_is_refused_at_its_definition(name: str) -> None:
    define, words = IMPOSSIBLE[name]
    with pytest.raises(PatternError) as error:
        define()
    message = str(error.value)
    assert words in message
    first = inspect.getsourcelines(define)[1]
    lines = range(first, first + len(inspect.getsourcelines(define)[0]) + 1)
    assert any(message.startswith(f"{__file__}:{line}: ") for line in lines), message


def test_a_pattern_remembers_its_line() -> None:
    here = inspect.currentframe()
    assert here is not None
    made, line = pattern("p", relu(x)), here.f_lineno
    assert made.location == f"{__file__}:{line}"


def test_expressions_read_like_the_mathematics() -> None:
    made = pattern("p", -(x + 1) * y / 2.0 - x**2)
    root = made.outputs[0]
    assert isinstance(root, Call) and root.operator.name == "sub"
    quotient, square = root.children
    assert isinstance(quotient, Call) and quotient.operator.name == "div"
    assert isinstance(square, Call) and square.operator.name == "pow"
    assert made.names == ("x", "y")


def test_numbers_on_the_left_keep_their_side() -> None:
    for call, name in ((2 * x, "mul"), (1 + x, "add"), (1 - x, "rsub")):
        assert call.operator.name == name
    left, right = (2 * x).children
    assert isinstance(left, Literal) and right is x


def test_dimensions_are_compared_modulo_the_rank_and_other_numbers_are_not() -> None:
    assert isinstance(softmax(x, -1).arguments["dim"], Dim)
    made = unsqueeze(x, 2).arguments["dim"]
    assert isinstance(made, Dim) and made.new_dims == 1
    assert isinstance((x + 1).arguments["y"], Literal)


def test_lists_are_sequences_only_where_they_hold_expressions() -> None:
    tensors = cat([x, Variadic("rest")], 1).arguments["tensors"]
    assert isinstance(tensors, Sequence) and len(tensors.items) == 2
    assert isinstance(layer_norm(x, [64], y).arguments["shape"], Literal)


def test_names_are_listed_in_the_order_of_the_pattern() -> None:
    scores = optionally(lambda s: s + Var("mask"), Var("q") @ swap_last(Var("k")) * Const("scale", number))
    made = pattern("attention", (softmax(scores, -1) @ Var("v")).named("out"))
    assert made.names == ("out", "q", "k", "scale", "mask", "v")


def test_operands_left_out_must_have_a_default() -> None:
    assert isinstance(pattern("p", softmax(x, 0)), Pattern)
    assert isinstance(pattern("p", cast(x)), Pattern)  # recognised operators leave the rest free


def test_packets_stand_for_their_functional_overloads() -> None:
    targets = Operator("relu", (aten.relu,), ("x",)).targets
    assert aten.relu.default in targets and aten.relu.out not in targets


def test_the_examples_of_the_documentation_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "patterns.md").read_text(encoding="utf-8")
    example = tmp_path / "example.py"  # a real file: misses quote the user's line
    example.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), encoding="utf-8")
    exec(compile(example.read_text(encoding="utf-8"), str(example), "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out.splitlines()
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    for line, promised in zip(printed, shown.splitlines(), strict=False):
        if "source" not in promised:
            assert line == promised
    assert printed[4].endswith("in forward: return a * torch.sigmoid(a) + b * torch.tanh(b)")
    assert printed[5].endswith("softmax has no operand axis; it has x, dim, dtype")
