# SPDX-License-Identifier: Apache-2.0
"""Norms, GELU, gated units, softmax and cross entropy as views: every spelling, near misses, real architectures."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.facts import Facts
from rewriter.legality import refusal
from rewriter.matcher import Match
from rewriter.views import CROSS_ENTROPY, GELU, GLU, LAYER_NORM, LOG_SOFTMAX, RMS_NORM, SOFTMAX, View

from .helpers import trace

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
W, B = torch.rand(6) + 0.5, torch.rand(6)
EPS = 1e-5
Function = Callable[..., Any]


def only(view: View, function: Function, *inputs: Tensor, **parameters: Tensor) -> tuple[Facts, Match]:
    """The one match of a view in a traced function, legal to replace."""
    module = trace(function, *inputs, **parameters)
    facts = Facts(module)
    (match,) = view.find(facts)
    assert refusal(facts, match) is None
    return facts, match


# ------------------------------------------------------------------------------------------------------ norms


def ms(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


RMS: dict[str, tuple[Function, bool, bool]] = {
    # name: (function, has weight, 1 + weight)
    "operator": (lambda x, w, b: F.rms_norm(x, (6,), w, EPS), True, False),
    "rsqrt": (lambda x, w, b: w * (x * torch.rsqrt(ms(x) + EPS)), True, False),
    "weight last": (lambda x, w, b: x * torch.rsqrt(EPS + (x * x).mean(2, True)) * w, True, False),
    "over a root": (lambda x, w, b: x / torch.sqrt(torch.square(x).mean(-1, True) + EPS) * w, True, False),
    "power": (lambda x, w, b: w * (x * torch.pow(ms(x) + EPS, -0.5)), True, False),
    "no weight": (lambda x, w, b: x * torch.rsqrt(ms(x) + EPS), False, False),
    "unit offset": (lambda x, w, b: (x * torch.rsqrt(ms(x) + EPS)) * (1.0 + w.float()), True, True),
    "through float32": (lambda x, w, b: w * ((h := x.float()) * torch.rsqrt(ms(h) + EPS)).to(x.dtype), True, False),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm_under_every_spelling(name: str, dtype: torch.dtype) -> None:
    function, weighted, offset = RMS[name]
    facts, match = only(RMS_NORM, function, X.to(dtype), w=W.to(dtype), b=B)
    assert match["x"].op == "placeholder" and match["eps"] == EPS and match["unit_offset"] is offset
    assert (match["weight"] is not None) is weighted and (not weighted or match["weight"].target == "w")
    assert match["spelling"] == ("rms_norm" if name == "operator" else "written")
    assert LAYER_NORM.find(facts) == []


def test_rms_norm_keeps_the_cast_back_and_says_the_dtypes() -> None:
    def gemma(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        return ((wide * torch.rsqrt(ms(wide) + EPS)) * (1.0 + w.float())).type_as(x)

    facts, match = only(RMS_NORM, gemma, X.half(), w=W.half())
    assert facts.dtype(match.root) == torch.float16 and match["work"] == match["dtype"] == torch.float32

    def t5(x: Tensor, w: Tensor) -> Tensor:  # the product of fp16 and fp32 is fp32, without a cast
        return w * (x * torch.rsqrt(ms(x.float()) + EPS)).to(w.dtype)

    facts, match = only(RMS_NORM, t5, X.half(), w=W.half())
    assert match["dtype"] == torch.float32 and match["work"] == torch.float16


def test_the_operator_without_an_eps_has_that_of_the_dtype_it_computes_in() -> None:
    for dtype, eps in ((torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        _, match = only(RMS_NORM, lambda x: F.rms_norm(x, (6,)), X.to(dtype))
        assert match["eps"] == torch.finfo(eps).eps
        tiny = torch.full((1, 6), 1e-3, dtype=dtype)
        with_eps = F.rms_norm(tiny, (6,), None, match["eps"])
        assert torch.equal(with_eps, F.rms_norm(tiny, (6,)))


def var(x: Tensor) -> Tensor:
    return x.var(-1, unbiased=False, keepdim=True)


LAYER: dict[str, tuple[Function, bool, bool]] = {
    # name: (function, has weight, has bias)
    "operator": (lambda x, w, b: F.layer_norm(x, (6,), w, b, EPS), True, True),
    "variance": (lambda x, w, b: (x - x.mean(-1, True)) / torch.sqrt(var(x) + EPS) * w + b, True, True),
    "correction": (
        lambda x, w, b: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS) * w, True, False,
    ),
    "squares": (lambda x, w, b: b + w * ((d := x - x.mean(2, True)) * torch.rsqrt((d * d).mean(2, True) + EPS)), True, True),
    "power": (lambda x, w, b: (d := x - x.mean(-1, True)) * (d.pow(2).mean(-1, True) + EPS) ** -0.5, False, False),
    "centred twice": (
        lambda x, w, b: (x - x.mean(-1, True)) / torch.sqrt(((x - x.mean(-1, True)) ** 2).mean(-1, True) + EPS), False, False,
    ),
    "bias only": (lambda x, w, b: (x - x.mean(-1, True)) / (var(x) + EPS).sqrt() + b, False, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYER)
def test_layer_norm_under_every_spelling(name: str) -> None:
    function, weighted, biased = LAYER[name]
    facts, match = only(LAYER_NORM, function, X, w=W, b=B)
    assert match["x"].op == "placeholder" and match["eps"] == EPS
    assert (match["weight"] is not None) is weighted and (match["bias"] is not None) is biased
    assert match["spelling"] == ("layer_norm" if name == "operator" else "written")
    assert RMS_NORM.find(facts) == []  # the RMSNorm of x − μ, but that is what a LayerNorm is
    expected = F.layer_norm(X, (6,), W if weighted else None, B if biased else None, EPS)
    torch.testing.assert_close(facts.graph_module(X)[0], expected)


NO_NORM: dict[str, tuple[View, Function]] = {
    "eps outside the root": (RMS_NORM, lambda x, w: x / (ms(x).sqrt() + EPS) * w),
    "another dimension": (RMS_NORM, lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, True) + EPS) * w),
    "a sum": (RMS_NORM, lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, True) + EPS) * w),
    "cubes": (RMS_NORM, lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, True) + EPS) * w),
    "another x": (RMS_NORM, lambda x, w: x.sin() * torch.rsqrt(x.pow(2).mean(-1, True) + EPS)),
    "a normalised vector": (RMS_NORM, lambda x, w: F.normalize(x, dim=-1) * math.sqrt(6) * w),
    "annotated": (LAYER_NORM, lambda x, w: w * (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + EPS)),
    "unbiased": (LAYER_NORM, lambda x, w: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True) + EPS)),
    "two means": (LAYER_NORM, lambda x, w: (x - x.mean(1, True)) / torch.sqrt(var(x) + EPS)),
    "another centre": (LAYER_NORM, lambda x, w: (x - x.sin().mean(-1, True)) / torch.sqrt(var(x) + EPS)),
}


@pytest.mark.parametrize("name", NO_NORM)
def test_what_is_no_norm(name: str) -> None:
    view, function = NO_NORM[name]
    assert view.find(trace(function, X, w=W)) == []


def test_norm_misses_say_why() -> None:
    miss = RMS_NORM.explain(trace(NO_NORM["another dimension"][1], X, w=W))[0]
    assert miss.reason == "another dimension" and miss.expected == "dim -1" and "mean (mean)" not in miss.found
    miss = LAYER_NORM.explain(trace(lambda x: (d := x - x.mean(-1, True)) * torch.rsqrt(d.pow(3).mean(-1, True) + EPS), X))[0]
    assert miss.reason == "another constant" and miss.found == "3"


@settings(max_examples=30)
@given(st.data())
def test_norms_do_not_depend_on_spelling(data: st.DataObject) -> None:
    def either(a: Any, b: Any) -> tuple[Any, Any]:
        return (a, b) if data.draw(st.booleans()) else (b, a)

    def times(a: Any, b: Any) -> Any:
        return torch.mul(*either(a, b))

    layer = data.draw(st.booleans())

    def function(x: Tensor, w: Tensor) -> Tensor:
        value = x - x.mean(-1, True) if layer else x
        square = data.draw(st.sampled_from([lambda v: v * v, lambda v: v**2, torch.square]))(value)
        moment = square.mean(data.draw(st.sampled_from([-1, 2])), keepdim=True)
        moment = operator.add(*either(moment, EPS))
        normed = data.draw(
            st.sampled_from([lambda: value / moment.sqrt(), lambda: times(value, moment.rsqrt()), lambda: value * moment**-0.5])
        )()
        return times(normed, w if data.draw(st.booleans()) else w.to(torch.float32))

    module = trace(function, X, w=W)
    found, other = (LAYER_NORM, RMS_NORM) if layer else (RMS_NORM, LAYER_NORM)
    (match,) = found.find(module)
    assert match["x"].op == "placeholder" and match["weight"].target == "w" and match["eps"] == EPS
    assert other.find(module) == []


def test_a_weight_per_row_is_not_part_of_a_norm() -> None:
    _, match = only(RMS_NORM, lambda x, w: (x * torch.rsqrt(ms(x) + EPS)) * w, X, w=torch.rand(2, 3, 1))
    assert match["weight"] is None


def test_a_norm_whose_inside_is_needed_outside_is_refused_or_smaller() -> None:
    module = trace(lambda x, w: ((n := x * torch.rsqrt(ms(x) + EPS)) * w, n), X, w=W)
    (match,) = RMS_NORM.find(module)
    assert match["weight"] is None
    assert RMS_NORM.find(trace(lambda x: (x * (r := torch.rsqrt(ms(x) + EPS)), r), X)) == []


# ------------------------------------------------------------------------------------------------------- GELU

C = math.sqrt(2 / math.pi)
GELUS: dict[str, tuple[Function, str]] = {
    "operator": (lambda x: F.gelu(x), "none"),
    "operator tanh": (lambda x: F.gelu(x, approximate="tanh"), "tanh"),
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "none"),
    "erf, cdf": (lambda x: x * (0.5 * (1 + torch.erf(x * 0.7071067811865476))), "none"),
    "erf, half last": (lambda x: (x * (torch.erf(x / 1.4142135623730951) + 1)) / 2, "none"),
    "erf, distributed": (lambda x: x * (torch.erf(x / math.sqrt(2)) * 0.5 + 0.5), "none"),
    "distribution function": (lambda x: x * torch.special.ndtr(x), "none"),
    "new": (lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))), "tanh"),
    "products": (lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * x * x * x))), "tanh"),
    "square": (lambda x: 0.5 * x * (torch.tanh(C * (x + 0.044715 * (x * x) * x)) + 1), "tanh"),
    "bloom": (lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))), "tanh"),
    "float literals": (lambda x: x / 2 * (1 + torch.tanh(0.7978846 * x * (1 + 0.044715 * torch.square(x)))), "tanh"),
    "sigmoid": (lambda x: x * torch.sigmoid(2 * C * (x + 0.044715 * x**3)), "tanh"),
    "distributed": (lambda x: 0.5 * x * (1 + torch.tanh(C * x + 0.044715 * C * x**3)), "tanh"),
}


@pytest.mark.parametrize("name", GELUS)
def test_gelu_under_every_spelling(name: str) -> None:
    function, approximate = GELUS[name]
    _, match = only(GELU, function, X)
    assert match["x"].op == "placeholder" and match["approximate"] == approximate
    assert match["spelling"] == ("gelu" if name.startswith("operator") else "written")
    torch.testing.assert_close(function(X), F.gelu(X, approximate=approximate))
    literal = {"bloom": 1.0e-9, "float literals": 4.9e-8}.get(name)
    assert match["deviation"] < 1e-15 if literal is None else match["deviation"] == pytest.approx(literal, rel=0.05)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**2))),
        lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.05 * x**3))),
        lambda x: 0.5 * x * (1 + torch.erf(x)),
        lambda x: 0.5 * x.sin() * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: torch.tanh(x / 30) * 30,
        lambda x: x * 0.5 * torch.add(torch.erf(x / math.sqrt(2)), torch.ones(()), alpha=2),
    ],
)
def test_what_is_no_gelu(function: Function) -> None:
    assert GELU.find(trace(function, X)) == []


def test_gelu_misses_say_why() -> None:
    miss = GELU.explain(trace(lambda x: 0.5 * x * (1 + torch.erf(x / 1.5)), X))[0]
    assert miss.reason == "s is not 1.414213562" and miss.step.endswith("erf.x > div.y") and miss.found == "1.5"


@settings(max_examples=30)
@given(st.data())
def test_gelu_does_not_depend_on_operand_order(data: st.DataObject) -> None:
    def mul(a: Any, b: Any) -> Any:
        return a * b if data.draw(st.booleans()) else b * a

    def add(a: Any, b: Any) -> Any:
        return a + b if data.draw(st.booleans()) else b + a

    def function(x: Tensor) -> Tensor:
        cube = mul(mul(x, x), x)
        curve = torch.tanh(mul(C, add(x, mul(0.044715, cube))))
        return mul(mul(x, 0.5), add(curve, 1)) if data.draw(st.booleans()) else mul(mul(0.5, add(1, curve)), x)

    (match,) = GELU.find(trace(function, X))
    assert match["approximate"] == "tanh"


# ------------------------------------------------------------------------------------- softmax, cross entropy


def shifted(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.amax(dim, keepdim=True)


SOFTMAXES: dict[str, tuple[Function, int, bool]] = {
    # name: (function, dim, whether it overflows no sooner than the operator)
    "operator": (lambda x: x.softmax(1), 1, True),
    "amax": (lambda x: (e := torch.exp(shifted(x))) / e.sum(-1, keepdim=True), -1, True),
    "max": (lambda x: (e := torch.exp(x - x.max(1, keepdim=True).values)) / e.sum(1, True), 1, True),
    "max over another name of the dimension": (lambda x: (e := torch.exp(shifted(x, 2))) / e.sum(-1, True), -1, True),
    "detached": (lambda x: (e := (x - x.max(-1, True)[0].detach()).exp()) / e.sum(-1, True), -1, True),
    "unsqueezed": (lambda x: (e := (x - x.amax(-1)[..., None]).exp()) / e.sum(-1).unsqueeze(-1), -1, True),
    "no maximum": (lambda x: x.exp() / x.exp().sum(-1, keepdim=True), -1, False),
    "maximum of everything": (lambda x: (e := torch.exp(x - x.amax((0, 1, 2), True))) / e.sum(-1, True), -1, False),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_under_every_spelling(name: str) -> None:
    function, dim, stable = SOFTMAXES[name]
    if name == "no maximum":
        assert SOFTMAX.find(trace(function, X)) == []  # two exponentials: common subexpressions come first
        function = lambda x: (e := x.exp()) / e.sum(-1, keepdim=True)  # noqa: E731
    _, match = only(SOFTMAX, function, X)
    assert match["dim"] == dim and match["stable"] is stable
    assert (match["x"].op == "placeholder") is (name != "maximum of everything")
    assert match["spelling"] == ("softmax" if name == "operator" else "written")
    torch.testing.assert_close(function(X), X.softmax(dim))  # whatever is subtracted


def test_a_shifted_input_that_is_needed_elsewhere_stays() -> None:
    module = trace(lambda x: ((e := (z := shifted(x)).exp()) / e.sum(-1, True), z), X)
    facts = Facts(module)
    (match,) = SOFTMAX.find(facts)
    assert match["stable"] and match["x"].target is torch.ops.aten.sub.Tensor and refusal(facts, match) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (e := x[0].exp()) / e.sum(-1),  # not kept: divides columns
        lambda x: (e := torch.exp(shifted(x, 1))) / e.sum((-1, 1), keepdim=True),
        lambda x: (e := x.exp()) / e.sum((1, 2), keepdim=True),
        lambda x: (e := x.exp()) / (e.sum(-1, keepdim=True) + 1e-9),
        lambda x: (e := x.exp()) / torch.ops.aten.sum.dim_IntList(e, None, True),
        lambda x: (e := x.exp()) / e.sum(-1).unsqueeze(1),
        lambda x: x.exp() / x.sin().exp().sum(-1, keepdim=True),
    ],
)
def test_what_is_no_softmax(function: Function) -> None:
    assert SOFTMAX.find(trace(function, torch.rand(2, 6, 6))) == []


def test_softmax_misses_say_why() -> None:
    miss = SOFTMAX.explain(trace(lambda x: (e := x.exp()) / (e.sum(-1, keepdim=True) + 1e-9), X))[0]
    assert miss.reason == "a different operator" and "sum" in miss.expected and "add.Tensor" in miss.found
    miss = LOG_SOFTMAX.explain(trace(lambda x: x.sin() - x.logsumexp(-1, keepdim=True), X))[0]
    assert miss.reason == "'x' stands for two different values"


LOG_SOFTMAXES: dict[str, tuple[Function, bool]] = {
    "operator": (lambda x: x.log_softmax(-1), True),
    "logsumexp": (lambda x: x - x.logsumexp(-1, keepdim=True), True),
    "logsumexp, unsqueezed": (lambda x: x - torch.logsumexp(x, -1)[..., None], True),
    "shifted": (lambda x: (z := shifted(x)) - z.exp().sum(-1, keepdim=True).log(), True),
    "log, then unsqueezed": (lambda x: (z := shifted(x)) - z.exp().sum(-1).log().unsqueeze(-1), True),
    "not shifted": (lambda x: x - x.exp().sum(-1, keepdim=True).log(), False),
    "log of a softmax": (lambda x: x.softmax(-1).log(), False),
}


@pytest.mark.parametrize("name", LOG_SOFTMAXES)
def test_log_softmax_under_every_spelling(name: str) -> None:
    function, stable = LOG_SOFTMAXES[name]
    _, match = only(LOG_SOFTMAX, function, X)
    assert match["x"].op == "placeholder" and match["dim"] == -1 and match["stable"] is stable
    torch.testing.assert_close(function(X), X.log_softmax(-1))


T2 = torch.tensor([[0, 5, 3], [1, 1, 2]])


def picked(x: Tensor, t: Tensor) -> Tensor:
    return x.log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1)


LOSSES: dict[str, tuple[Function, str, str]] = {
    # name: (function of logits [2, 3, 6] and targets [2, 3], reduction, spelling)
    "operator": (lambda x, t: F.cross_entropy(x.view(-1, 6), t.view(-1)), "mean", "cross_entropy"),
    "sum": (lambda x, t: F.cross_entropy(x.view(-1, 6), t.view(-1), reduction="sum"), "sum", "cross_entropy"),
    "nll": (lambda x, t: F.nll_loss(x.view(-1, 6).log_softmax(-1), t.view(-1)), "mean", "nll"),
    "nll of an image": (lambda x, t: F.nll_loss(x.transpose(1, 2).log_softmax(1), t, reduction="none"), "none", "nll"),
    "gather": (lambda x, t: -picked(x, t), "none", "gather"),
    "gather, mean": (lambda x, t: -picked(x, t).mean(), "mean", "gather"),
    "gather, mean of the negative": (lambda x, t: (-picked(x, t)).mean(), "mean", "gather"),
    "gather, sum": (lambda x, t: picked(x, t).sum() * -1, "sum", "gather"),
    "gather, not squeezed": (lambda x, t: -x.log_softmax(-1).gather(2, t[..., None]).mean(), "mean", "gather"),
    "gather, indexed": (lambda x, t: -x.log_softmax(-1).gather(-1, t[..., None])[..., 0], "none", "gather"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_under_every_spelling(name: str) -> None:
    function, reduction, spelling = LOSSES[name]
    _, match = only(CROSS_ENTROPY, function, X, T2)
    assert match["reduction"] == reduction and match["spelling"] == spelling and match["weight"] is None
    assert match["ignore_index"] == (None if spelling == "gather" else -100) and match["label_smoothing"] == 0.0
    assert match["class_dim"] == (2 if spelling == "gather" else 1)
    expected = F.cross_entropy(X.transpose(1, 2), T2, reduction=reduction)
    torch.testing.assert_close(function(X, T2).view_as(expected), expected)


def test_what_is_no_cross_entropy() -> None:
    t = T2.view(-1)
    wrong_dim = trace(lambda x, t: F.nll_loss(x.view(6, 6).log_softmax(0), t), torch.rand(6, 6), t)
    assert CROSS_ENTROPY.find(wrong_dim) == []
    assert CROSS_ENTROPY.find(trace(lambda x, t: picked(x, t), X, T2)) == []  # the sign is missing
    assert CROSS_ENTROPY.find(trace(lambda x, t: -x.softmax(-1).gather(-1, t[..., None]).mean(), X, T2)) == []


# -------------------------------------------------------------------------------------------------------- GLU

G, U = torch.rand(4, 6), torch.rand(4, 6)
P = torch.rand(8, 6)
ACTIVATIONS: dict[str, Function] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": GELUS["new"][0],
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_of_two_linears(activation: str) -> None:
    act = ACTIVATIONS[activation]
    for function in (lambda x, g, u: act(F.linear(x, g)) * F.linear(x, u), lambda x, g, u: F.linear(x, u) * act(F.linear(x, g))):
        _, match = only(GLU, function, X, g=G, u=U)
        assert match["activation"] == activation and match["x"].op == "placeholder"
        assert match["gate"]["weight"].target == "g" and match["up"]["weight"].target == "u"
        assert match["packed"] is None and match["gate_first"] is None


PACKED: dict[str, tuple[Function, bool]] = {
    "chunk": (lambda x, p: (h := F.linear(x, p).chunk(2, -1))[1] * F.silu(h[0]), True),
    "split, gate last": (lambda x, p: (h := F.linear(x, p).split(4, dim=2))[0] * F.silu(h[1]), False),
    "sizes": (lambda x, p: F.silu((h := F.linear(x, p).split([4, 4], -1))[0]) * h[1], True),
}


@pytest.mark.parametrize("name", PACKED)
def test_glu_of_one_linear(name: str) -> None:
    function, first = PACKED[name]
    _, match = only(GLU, function, X, p=P)
    assert match["packed"]["weight"].target == "p" and match["gate_first"] is first and match["gate"] is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x.sin(), u), "different inputs"),
        (lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u).sin(), "multiplied by is not a linear"),
        (lambda x, g, u: F.silu(F.linear(x, g).sin()) * F.linear(x, u), "taken of is not a linear"),
        (lambda x, g, u: (h := F.linear(x, g)) * torch.sigmoid(h), "are one value"),
        (lambda x, g, u: F.silu((h := F.linear(x, g).chunk(2, -1))[0]) * h[0], "both factors are one half"),
        (lambda x, g, u: F.silu((h := F.linear(x, g).chunk(2, 0))[0]) * h[1], "is not a linear"),
        (lambda x, g, u: F.silu(F.linear(x, g).chunk(2, -1)[0]) * F.linear(x, u).chunk(2, -1)[1], "halves of two"),
    ],
)
def test_glu_misses_say_why(function: Function, reason: str) -> None:
    module = trace(function, X, g=G, u=U)
    assert GLU.find(module) == []
    assert reason in GLU.explain(module)[0].reason
