# SPDX-License-Identifier: Apache-2.0
"""Patterns traced from Python functions: they find what the same pattern written by hand finds, or name the line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rewriter
from rewriter.errors import PatternError
from rewriter.matcher import explain, find
from rewriter.operators import (
    cast,
    gelu,
    layer_norm,
    linear,
    mean,
    reshape,
    rsqrt,
    sdpa,
    sigmoid,
    silu,
    softmax,
    swap_last,
    tanh,
)
from rewriter.pattern import Anything, Const, Pattern, Var, pattern
from rewriter.predicates import number, parameter

from .helpers import trace

x, y, w, b = Var("x"), Var("y"), Var("w"), Var("b")
c = Const("c", where=number)


def found(program: Any, of: Pattern) -> list[tuple[str, dict[str, str]]]:
    """Roots and captures, as text."""
    return [(m.root.name, {name: str(m[name]) for name in sorted(m.captures)}) for m in find(program, of)]


# ---------------------------------------------------------------------------------------------- the law, on random trees

# One grammar, two algebras: what torch computes (on tensors and on symbols), and the pattern language.
TORCH: dict[str, Callable[..., Any]] = {
    "add": lambda p, q: p + q,
    "mul": torch.mul,
    "sub": lambda p, q: p.sub(q),
    "matmul": lambda p, q: p @ q,
    "sigmoid": torch.sigmoid,
    "tanh": lambda p: p.tanh(),
    "neg": lambda p: -p,
    "softmax": lambda p: F.softmax(p, dim=-1),
    "transpose": lambda p: p.transpose(-2, -1),
    "scaled": lambda p, s: s * p,
    "half": lambda p: p * 0.5,
    "from one": lambda p: 1 - p,
}
LANGUAGE: dict[str, Callable[..., Any]] = {
    "add": lambda p, q: p + q,
    "mul": lambda p, q: p * q,
    "sub": lambda p, q: p - q,
    "matmul": lambda p, q: p @ q,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "neg": lambda p: -p,
    "softmax": lambda p: softmax(p, -1),
    "transpose": swap_last,
    "scaled": lambda p, s: s * p,
    "half": lambda p: p * 0.5,
    "from one": lambda p: 1 - p,
}
UNARY, BINARY = ("sigmoid", "tanh", "neg", "softmax", "transpose", "half", "from one"), ("add", "mul", "sub", "matmul")
Tree = Any  # "x", "y", or (operator, *trees)

trees: st.SearchStrategy[Tree] = st.recursive(
    st.sampled_from(("x", "y")),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(UNARY), inner),
        st.tuples(st.sampled_from(BINARY), inner, inner),
        st.tuples(st.just("scaled"), inner, st.just("c")),
    ),
    max_leaves=5,
).filter(lambda tree: isinstance(tree, tuple))


def build(tree: Tree, algebra: dict[str, Callable[..., Any]], **leaves: Any) -> Any:
    if isinstance(tree, str):
        return leaves[tree]
    return algebra[tree[0]](*(build(part, algebra, **leaves) for part in tree[1:]))


def leaves_of(tree: Tree) -> set[str]:
    return {tree} if isinstance(tree, str) else {leaf for part in tree[1:] for leaf in leaves_of(part)}


def function_of(tree: Tree) -> Callable[..., Any]:
    """A function whose parameters are the tree's leaves: x and y positional, c keyword-only."""
    used = leaves_of(tree)
    tensors, numbers = [n for n in ("x", "y") if n in used], [n for n in ("c",) if n in used]
    head = ", ".join([*tensors, *(["*", *numbers] if numbers else [])])
    body = ", ".join(f"{name}={name}" for name in (*tensors, *numbers))
    scope: dict[str, Any] = {"build": build, "tree": tree, "TORCH": TORCH}
    exec(f"def function({head}): return build(tree, TORCH, {body})", scope)
    made: Callable[..., Any] = scope["function"]
    return made


@given(searched=trees, planted=st.lists(trees, max_size=3))
def test_a_traced_pattern_finds_what_the_written_one_finds(searched: Tree, planted: list[Tree]) -> None:
    traced = rewriter.traced(function_of(searched), name="p")
    written = pattern("p", build(searched, LANGUAGE, x=x, y=y, c=c))

    def model(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        same = build(searched, TORCH, x=p, y=q, c=3.0)
        return (same, *(build(tree, TORCH, x=same, y=q, c=0.5) for tree in planted))

    program = trace(model, torch.rand(3, 3), torch.rand(3, 3))
    assert found(program, traced) == found(program, written)
    assert set(traced.names) == set(written.names)
    assert traced.root_targets == written.root_targets


# ------------------------------------------------------------------------------------------------- spellings, one by one

TOP = torch.ops.aten
SPELLINGS: dict[str, tuple[Callable[..., Any], Any]] = {
    "torch function": (lambda x, y: torch.add(x, torch.sigmoid(y)), x + sigmoid(y)),
    "method": (lambda x, y: x.add(y.sigmoid()), x + sigmoid(y)),
    "overload": (lambda x, y: TOP.add.Tensor(x, TOP.sigmoid.default(y)), x + sigmoid(y)),
    "packet": (lambda x, y: TOP.add(x, TOP.sigmoid(y)), x + sigmoid(y)),
    "reflected": (lambda x, y: y.sigmoid() + (2 - x), sigmoid(y) + (2 - x)),
    "linear": (lambda x, w, b: F.linear(x, w, b), linear(x, w, b)),
    "no bias": (lambda x, w: F.linear(x, w), linear(x, w)),
    "rms": (
        lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6),
        x * rsqrt(mean(cast(x, torch.float32) ** 2, -1, True) + 1e-6),
    ),
    "tanh gelu": (lambda x: F.gelu(x, approximate="tanh"), gelu(x, "tanh")),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b, 1e-5), layer_norm(x, [4], w, b, 1e-5, Anything())),
    "attention": (
        lambda x, y, w: F.scaled_dot_product_attention(x, y, w, is_causal=True),
        sdpa(x, y, w, is_causal=True),
    ),
    "view": (lambda x: x.view(2, -1), reshape(x, [2, -1])),
    "mT": (lambda x, y: x @ y.mT, x @ swap_last(y)),
    "silu": (lambda x: F.silu(x), silu(x)),
    "any size": (lambda x: x.reshape(Anything()), reshape(x, Anything())),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    function, written = SPELLINGS[name]
    by_hand = pattern("p", written)

    def model(p: Tensor, q: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """Every right-hand side of the table once."""
        wide = q[:, None]
        return (
            p + torch.sigmoid(q),
            q.sigmoid() + (2 - p),
            F.linear(p, q, r[0]),
            F.linear(q, p),
            p * torch.rsqrt(p.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6),
            F.gelu(p, approximate="tanh"),
            F.gelu(q),
            F.layer_norm(p, (4,), r[0], r[1]),
            F.scaled_dot_product_attention(wide, wide, r[:, None], is_causal=True),
            p.view(2, -1),
            p @ q.transpose(0, 1),
            F.silu(p),
        )

    double = torch.float64
    program = trace(model, *(torch.rand(4, 4, dtype=double) for _ in range(3)))
    traced = rewriter.traced(function, name="p")
    assert found(program, traced) == found(program, by_hand)
    assert len(found(program, traced)) >= 1


def test_numbers_are_captured_and_outputs_may_be_several() -> None:
    @rewriter.traced
    def both(x, y, *, factor):  # type: ignore[no-untyped-def]
        common = torch.exp(x) * factor
        return common + y, common - y

    program = trace(lambda p, q: (2.5 * p.exp() + q, p.exp() * 0.5 - q), torch.rand(3), torch.rand(3))
    assert find(program, both) == []  # not one common value

    def model(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        common = p.exp() * 2.5
        return q + common, common - q

    (match,) = find(trace(model, torch.rand(3), torch.rand(3)), both)
    assert match["factor"] == 2.5 and len(match.outputs) == 2
    assert both.name == "both" and both.names == ("x", "factor", "y")


def test_annotations_are_conditions_and_options_reach_the_pattern() -> None:
    @rewriter.traced(name="projection", where=lambda captures: captures["x"].name.endswith("_0"))
    def project(x: Tensor, w: parameter):  # type: ignore[no-untyped-def, valid-type]
        return x @ w

    program = trace(lambda p, q, w: (p @ w, q @ w, p @ q), torch.rand(3, 3), torch.rand(3, 3), w=torch.rand(3, 3))
    (match,) = find(program, project)
    assert project.name == "projection" and str(match["w"].target).endswith("w")


def test_arguments_outside_the_operators_own_operands_are_compared() -> None:
    doubled = rewriter.traced(lambda x, y: torch.add(x, y, alpha=2), name="x + 2y")
    program = trace(lambda p, q: (torch.add(p, q, alpha=2), p + q), torch.rand(3), torch.rand(3))
    assert [str(m.root.kwargs) for m in find(program, doubled)] == ["{'alpha': 2}"]


def test_an_operator_the_language_does_not_name_comes_from_its_schema() -> None:
    clipped = rewriter.traced(lambda x, y: torch.amax(torch.maximum(x, y).clamp(min=0.0), dim=(-1, -2)), name="clipped")

    def model(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return torch.maximum(p, q).clamp(0.0).amax((2, 1)), torch.maximum(p, q).clamp(0.0).amax((0, 1))

    (match,) = find(trace(model, torch.rand(2, 3, 4), torch.rand(2, 3, 4)), clipped)
    assert match["x"].name.endswith("_0") and match.root.args[1] == [2, 1]


@pytest.mark.parametrize(("dim", "hits"), [(-1, 1), (2, 1), (1, 0)])
def test_dimensions_of_a_stack_are_those_of_its_result(dim: int, hits: int) -> None:
    stacked = rewriter.traced(lambda x, y: torch.stack([x, y], dim=-1), name="stacked")
    program = trace(lambda p, q: torch.stack([p, q], dim=dim), torch.rand(3, 3), torch.rand(3, 3))
    assert len(find(program, stacked)) == hits


def test_a_miss_names_the_functions_own_operators() -> None:
    swish = rewriter.traced(lambda x: x * torch.sigmoid(x), name="swish")
    (miss,) = explain(trace(lambda p: p * p.tanh(), torch.rand(3)), swish)
    assert (miss.expected, miss.found) == ("sigmoid", "tanh (tanh)")


# ------------------------------------------------------------------------------------------------------- what is refused


def branches(x: Any) -> Any:
    if x.sum() > 0:
        return x.exp()
    return -x


def unknown_method(x: Any) -> Any:
    y = x.exp()
    return y.frobnicate(3)


def in_place(x: Any) -> Any:
    x += 1
    return x


def unused(x: Any, y: Any) -> Any:
    return x + 1


def with_default(x: Any, y: Any = 1) -> Any:
    return x + y


def asks_for_sizes(x: Any) -> Any:
    return x.exp().reshape(x.shape[0], -1)


def own_tensor(x: Any) -> Any:
    return torch.ones(3) + x


def own_module(x: Any) -> Any:
    return torch.nn.Linear(3, 3)(x)


def a_mapping(x: Any) -> Any:
    return {"a": x.exp()}


def forgotten(x: Any) -> Any:
    x.exp()
    return x.log()


def to_device(x: Any) -> Any:
    return x.exp().to("cpu")


def taken_apart(x: Any) -> Any:
    first, second = x.exp().chunk(2)
    return first + second


def no_operator(x: Any) -> Any:
    return x


def several(x: Any) -> Any:
    return torch.topk(x, 2)


def variadic(*x: Any) -> Any:
    return x[0] + x[1]


def written_into(x: Any) -> Any:
    return x.exp().add_(1)


def constants_only(x: Any, *, c: Any) -> Any:
    return x * torch.exp(c)


REFUSED: dict[Callable[..., Any], tuple[int, str]] = {  # function -> line below its def, message
    branches: (1, "control flow"),
    unknown_method: (2, "frobnicate: there is no torch operator of this name"),
    in_place: (1, "no in-place operators"),
    unused: (0, "y of unused is not used"),
    with_default: (0, "y of with_default has a default"),
    asks_for_sizes: (1, "cannot ask for .shape"),
    own_tensor: (1, "pass it as a parameter"),
    own_module: (1, "module is not installed"),
    a_mapping: (0, "returns a tensor or a tuple of tensors"),
    forgotten: (1, "the value of exp is not used"),
    to_device: (1, "only casts to a dtype are known"),
    taken_apart: (1, "cannot take a value apart"),
    no_operator: (0, "an output of 'no_operator' must be an operator"),
    several: (1, "returns several values"),
    variadic: (0, "takes *x"),
    written_into: (1, "no in-place operators"),
    constants_only: (1, "of constants only"),
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_be_translated_names_its_line(function: Callable[..., Any]) -> None:
    below, message = REFUSED[function]
    line = function.__code__.co_firstlineno + below
    with pytest.raises(PatternError, match=re.escape(message)) as caught:
        rewriter.traced(function)
    assert f"{__file__}:{line}: " in str(caught.value)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(PatternError, match="takes a Python function"):
        rewriter.traced(torch.sigmoid)
