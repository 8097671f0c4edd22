# SPDX-License-Identifier: Apache-2.0
"""Model code with one thing off: `explain` names the step that failed, what it expected and found, and the line.

Each case is a `forward` whose line at fault ends in ``# <-``.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import rewriter
from rewriter.cli.app import app
from rewriter.errors import PlanError
from rewriter.operators import sigmoid
from rewriter.pattern import Const, Pattern, Var, pattern
from rewriter.predicates import number
from rewriter.rules import Rule
from rewriter.views import ATTENTION, GELU, GLU, LAYER_NORM, LINEAR, RMS_NORM, View

x, y = Var("x"), Var("y")
SWISH = pattern("x·σ(x) + y", x * sigmoid(x) + y)
SCALED = pattern("scaled", x * Const("factor", where=(number, lambda value: value > 0)))
FUSE_ATTENTION = next(r for r in rewriter.passes.Fuse().rules() if r.name == "fuse.attention")  # type: ignore[attr-defined]


def heads(*shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.rand(shape) for _ in range(3))


class Case:
    """A forward that nearly is what `of` looks for, and what `explain` has to say about it."""

    def __init__(
        self,
        forward: Callable[..., Any],
        of: Pattern | View | Rule,
        inputs: tuple[Tensor, ...],
        step: str,
        reason: str,
        expected: str = "",
        found: str = "",
        **parameters: Tensor,
    ) -> None:
        self.of, self.step, self.reason, self.expected, self.found = of, step, reason, expected, found
        self.forward, self.inputs, self.parameters = forward, inputs, parameters

    def __repr__(self) -> str:
        return self.forward.__name__

    def program(self) -> rewriter.Program:
        code = self.forward.__code__.replace(co_name="forward")  # export keeps the lines of frames of this name only
        model = type("Case", (nn.Module,), {"forward": FunctionType(code, globals())})()
        for name, value in self.parameters.items():
            model.register_parameter(name, nn.Parameter(value))
        return rewriter.capture(model.eval(), self.inputs, dynamic_shapes="static")

    def line(self) -> str:
        """``file:line`` of the marked line, with its code."""
        lines, start = inspect.getsourcelines(self.forward)
        (marked,) = [i for i, text in enumerate(lines) if text.rstrip().endswith("# <-")]
        return f"{__file__}:{start + marked} in forward: {lines[marked].strip()}"


# ------------------------------------------------------------------------------------------------------ x·σ(x) + y


def alpha(self: Any, p: Tensor, r: Tensor) -> Tensor:
    product = p * torch.sigmoid(p)
    return torch.add(product, r, alpha=2)  # <-


def read_twice(self: Any, p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(p)  # <-
    return p * gate + r, gate.exp()


def another_value(self: Any, p: Tensor, r: Tensor) -> Tensor:
    gate = torch.sigmoid(r)  # <-
    return p * gate + r


def another_operator(self: Any, p: Tensor, r: Tensor) -> Tensor:
    gate = torch.tanh(p)  # <-
    return p * gate + r


def negative_factor(self: Any, p: Tensor) -> Tensor:
    return p * -2.0  # <-


# ------------------------------------------------------------------------------------------------------- attention


def softmax_over_heads(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    weights = torch.softmax(scores, 1)  # <-
    return weights @ v


def keys_not_transposed(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k  # <-
    return torch.softmax(scores, -1) @ v


def wrong_axes_transposed(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = k.transpose(1, 2)  # <-
    return torch.softmax(q @ keys, -1) @ v


def scale_is_a_tensor(self: Any, q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores = scores * t  # <-
    return torch.softmax(scores, -1) @ v


def weights_returned(self: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    weights = torch.softmax(scores, -1)  # <-
    return weights @ v, weights


def weights_renormalised(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-2, -1), -1)  # <-
    weights = weights / 2
    return weights @ v


def values_on_the_left(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-2, -1), -1)
    return v @ weights  # <-


def integer_mask(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores = scores + mask  # <-
    return torch.softmax(scores, -1) @ v


def scores_through_relu(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores = torch.relu(scores)  # <-
    return torch.softmax(scores, -1) @ v


# ------------------------------------------------------------------------- attention, found and then refused by the rule


def dropout_active(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-2, -1), -1)
    weights = F.dropout(weights, 0.1, training=True)
    return weights @ v  # <-


def soft_cap(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores = 30.0 * torch.tanh(scores / 30.0)
    return torch.softmax(scores, -1) @ v  # <-


# ---------------------------------------------------------------------------------------------------- linear and others


def weight_is_computed(self: Any, p: Tensor) -> Tensor:
    return p @ self.w.exp()  # <-


def weight_of_rank_three(self: Any, p: Tensor) -> Tensor:
    return p @ self.w  # <-


def beta(self: Any, p: Tensor) -> Tensor:
    return torch.addmm(self.b, p, self.w, beta=2)  # <-


def norm_over_rows(self: Any, p: Tensor) -> Tensor:
    mean = p.pow(2).mean(0, keepdim=True)  # <-
    return p * torch.rsqrt(mean + 1e-6) * self.w


def norm_of_cubes(self: Any, p: Tensor) -> Tensor:
    power = p.pow(3)  # <-
    return p * torch.rsqrt(power.mean(-1, keepdim=True) + 1e-6) * self.w


def norm_times_root(self: Any, p: Tensor) -> Tensor:
    root = torch.sqrt(p.pow(2).mean(-1, keepdim=True) + 1e-6)  # <-
    return p * root * self.w


def unbiased_variance(self: Any, p: Tensor) -> Tensor:
    variance = p.var(-1, keepdim=True)  # <-
    return (p - p.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) * self.w + self.b


def gelu_without_root(self: Any, p: Tensor) -> Tensor:
    inner = p / 2  # <-
    return 0.5 * p * (1 + torch.erf(inner))


def gate_of_another_input(self: Any, p: Tensor, r: Tensor) -> Tensor:
    return F.silu(F.linear(p, self.w)) * F.linear(r, self.u)  # <-


VECTORS = (torch.rand(3), torch.rand(3))
QKV = heads(2, 3, 4, 4)
MATRIX = (torch.rand(3, 4),)
CASES = [
    Case(alpha, SWISH, VECTORS, "add", "add.Tensor with alpha = 2", "add", "add.Tensor (add)"),
    Case(read_twice, SWISH, VECTORS, "use limit", "sigmoid (sigmoid) is needed outside", "no other user", "exp (exp)"),
    Case(
        another_value,
        SWISH,
        VECTORS,
        "add.x > mul.y > sigmoid.x",
        "'x' stands for two",
        "placeholder tensors_0",
        "placeholder tensors_1",
    ),
    Case(another_operator, SWISH, VECTORS, "add.x > mul.y", "a different operator", "sigmoid", "tanh (tanh)"),
    Case(negative_factor, SCALED, VECTORS[:1], "mul.y", "factor is not", "the condition at", "-2.0"),
    Case(softmax_over_heads, ATTENTION, QKV, "matmul.x > softmax.dim", "another dimension", "dim -1", "1"),
    Case(
        keys_not_transposed,
        ATTENTION,
        QKV,
        "softmax.x > matmul.y",
        "a different operator",
        "transpose of the last two",
        "placeholder tensors_1",
    ),
    Case(
        wrong_axes_transposed,
        ATTENTION,
        heads(2, 4, 4, 4),
        "matmul.y > transpose of the last two dimensions",
        "orders the dimensions [0, 2, 1, 3]",
        "transpose of the last two",
        "transpose.int",
    ),
    Case(
        scale_is_a_tensor,
        ATTENTION,
        (*QKV, torch.rand(2, 1, 1, 4)),
        "softmax.x > mul.y",
        "a computed value where a constant is needed",
        "a constant",
        "placeholder tensors_3",
    ),
    Case(
        weights_returned,
        ATTENTION,
        QKV,
        "use limit",
        "softmax.int (softmax) is needed outside",
        "no other user",
        "is a program output",
    ),
    Case(
        weights_renormalised,
        ATTENTION,
        QKV,
        "above the anchor",
        "nothing consumes softmax.int (softmax)",
        "matmul",
        "div.Tensor (div)",
    ),
    Case(values_on_the_left, ATTENTION, QKV, "matmul.x", "a different operator", "softmax", "placeholder tensors_2"),
    Case(
        integer_mask,
        ATTENTION,
        (*QKV, torch.ones(4, 4, dtype=torch.int64)),
        "softmax.x > add.y",
        "mask is not a floating-point tensor",
        "a floating-point tensor",
        "placeholder tensors_3",
    ),
    Case(
        scores_through_relu, ATTENTION, QKV, "matmul.x > softmax.x", "a different operator", "mul or div", "relu (relu)"
    ),
    Case(dropout_active, FUSE_ATTENTION, QKV, "guard", "drops out with p=0.1"),
    Case(soft_cap, FUSE_ATTENTION, QKV, "guard", "caps the scores with 30"),
    Case(
        weight_is_computed,
        LINEAR,
        MATRIX,
        "matmul.y",
        "weight is computed",
        "a parameter or buffer",
        "exp (exp)",
        w=torch.rand(4, 5),
    ),
    Case(
        weight_of_rank_three,
        LINEAR,
        (torch.rand(2, 3, 4),),
        "matmul.y",
        "weight is not 2 dimensions",
        "2 dimensions",
        "parameter w",
        w=torch.rand(2, 4, 5),
    ),
    Case(
        beta,
        LINEAR,
        MATRIX,
        "addmm",
        "addmm with beta = 2",
        "addmm",
        "addmm (addmm)",
        w=torch.rand(4, 5),
        b=torch.rand(5),
    ),
    Case(norm_over_rows, RMS_NORM, MATRIX, "add.x > mean.dim", "another dimension", "dim -1", "[0]", w=torch.rand(4)),
    Case(norm_of_cubes, RMS_NORM, MATRIX, "mean.x > pow.y", "another constant", "2", "3", w=torch.rand(4)),
    Case(
        norm_times_root,
        RMS_NORM,
        MATRIX,
        "above the anchor",
        "nothing consumes sqrt (sqrt)",
        "div",
        "mul.Tensor (mul)",
        w=torch.rand(4),
    ),
    Case(
        unbiased_variance,
        LAYER_NORM,
        MATRIX,
        "variance.unbiased",
        "another constant",
        "False",
        "True",
        w=torch.rand(4),
        b=torch.rand(4),
    ),
    Case(gelu_without_root, GELU, MATRIX, "erf.x > div.y", "is not 1.414213562", "1.414213562", "2"),
    Case(
        gate_of_another_input,
        GLU,
        MATRIX * 2,
        "",
        "gate and up have different inputs",
        w=torch.rand(5, 4),
        u=torch.rand(5, 4),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_nearest_miss_names_step_reason_and_line(case: Case) -> None:
    program = case.program()
    assert rewriter.find(program, case.of) == []
    miss = rewriter.explain(program, case.of)[0]
    assert miss.step.endswith(case.step) and bool(miss.step) == bool(case.step), miss
    assert case.reason in miss.reason, miss
    assert case.expected in miss.expected, miss
    assert case.found in miss.found, miss
    assert miss.source == case.line(), miss


# ---------------------------------------------------------------------------------------------- expect= and the command


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.dim = dim

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(hidden).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(4)
        weights = torch.softmax(scores, self.dim)
        return hidden + (weights @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Four layers; the softmax of the last runs over the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(dim) for dim in (-1, -1, -1, -2))
        self.example_input_array = torch.rand(2, 5, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def build() -> nn.Module:
    return Model().eval()


def line_of(code: str) -> str:
    lines, start = inspect.getsourcelines(Attention.forward)
    (index,) = [i for i, line in enumerate(lines) if line.strip() == code]
    return f"{__file__}:{start + index} in forward: {code}"


def test_expect_fails_with_exactly_the_miss_that_explain_returns() -> None:
    model = build()
    program = rewriter.capture(model, (model.example_input_array,))
    (miss,) = rewriter.explain(program, FUSE_ATTENTION)
    assert (miss.site, miss.step) == ("layers.3", "matmul.x > softmax.dim")
    assert miss.source == line_of("weights = torch.softmax(scores, self.dim)")
    with pytest.raises(PlanError) as caught:
        rewriter.plan(program, ["fuse"], expect={"fuse.attention": 4})
    assert str(caught.value) == f"expected 4 sites of fuse.attention, found 3; nearest misses:\n  {miss}"


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.stderr or repr(done.exception)
    return done.stdout


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return f"{Path(__file__).stem}:build"


@pytest.mark.parametrize("rule", ["attention", "fuse.attention"])
def test_the_command_says_the_same(importable: str, rule: str) -> None:
    found = json.loads(run(importable, "--rule", rule, "--site", "layers.3", "--json"))
    assert found["matches"] == []
    (miss,) = found["misses"]
    assert (miss["site"], miss["step"], miss["reason"]) == ("layers.3", "matmul.x > softmax.dim", "another dimension")
    assert (miss["expected"], miss["found"]) == ("dim -1", "-2")
    assert miss["source"] == line_of("weights = torch.softmax(scores, self.dim)")
    text = run(importable, "--rule", rule, "--site", "layers.3")
    for part in ("0 matches", "1 near miss", miss["step"], miss["reason"], miss["expected"], miss["source"]):
        assert part in text, text


def test_the_command_lists_where_the_rule_applies_and_names_what_it_does_not_know(importable: str) -> None:
    assert "3 matches" in (text := run(importable, "--rule", "attention"))
    assert "layers.{0…2}" in text and "layers.3" in text
    unknown = CliRunner().invoke(app, ["explain", importable, "--rule", "atention"])
    assert unknown.exit_code == 1 and "nearest: attention" in unknown.stderr
    nowhere = CliRunner().invoke(app, ["explain", importable, "--rule", "attention", "--site", "layers.7"])
    assert nowhere.exit_code == 1 and "no node belongs to 'layers.7'" in nowhere.stderr
