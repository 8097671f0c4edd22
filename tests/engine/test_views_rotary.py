# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings in both layouts and every spelling; routers, which approximating rules leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo.configs import ZOO

import rewriter
from rewriter.facts import Facts
from rewriter.legality import refusal
from rewriter.matcher import Match
from rewriter.views import LINEAR, ROTARY, ROUTER
from rewriter.views.router import is_router

from .helpers import capture_graph, trace

D = 8
X = torch.rand(2, 3, 5, D)
COS, SIN = torch.rand(5, D), torch.rand(5, D)
HALF_COS, HALF_SIN = torch.rand(5, D // 2), torch.rand(5, D // 2)


def pairs(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], -1).flatten(-2)


def chunked(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def split(x: Tensor) -> Tensor:
    a, b = torch.split(x, D // 2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def unbound(x: Tensor) -> Tensor:
    a, b = x.view(*x.shape[:-1], D // 2, 2).unbind(-1)
    return torch.stack([-b, a], -1).view(x.shape)


def selected(x: Tensor) -> Tensor:
    y = x.unflatten(-1, (-1, 2))
    return pairs(-y[..., 1], y[..., 0])


def half_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def pair_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return pairs(a * cos - b * sin, a * sin + b * cos)


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str, str]] = {
    "slices": (lambda x, c, s: x * c + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * s, "half", "rotated"),
    "chunks": (lambda x, c, s: x * c + chunked(x) * s, "half", "rotated"),
    "splits": (lambda x, c, s: s * split(x) + c * x, "half", "rotated"),
    "every second": (lambda x, c, s: x * c + pairs(-x[..., 1::2], x[..., ::2]) * s, "interleaved", "rotated"),
    "unbound": (lambda x, c, s: x * c + unbound(x) * s, "interleaved", "rotated"),
    "selected": (lambda x, c, s: x * c + selected(x) * s, "interleaved", "rotated"),
    "half, in parts": (half_parts, "half", "parts"),
    "pairs, in parts": (pair_parts, "interleaved", "parts"),
}


def rotated(match: Match, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, from the captures."""
    half = match["layout"] == "half"
    a, b = x.chunk(2, -1) if half else (x[..., ::2], x[..., 1::2])
    turned = torch.cat([-b, a], -1) if half else pairs(-b, a)
    if match["spelling"] == "parts":
        cos, sin = (torch.cat([t, t], -1) if half else pairs(t, t) for t in (cos, sin))
    return x * cos + turned * sin


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, layout, spelling = SPELLINGS[name]
    angles = (HALF_COS, HALF_SIN) if spelling == "parts" else (COS, SIN)
    module = trace(function, X, *angles)
    (match,) = ROTARY.find(module)
    assert (match["layout"], match["spelling"], match["features"], match["partial"]) == (layout, spelling, D, False)
    assert [match[n].target for n in ("x", "cos", "sin")] == ["tensors_0", "tensors_1", "tensors_2"]
    assert refusal(Facts(module), match) is None
    computed = {n for n in module.graph.nodes if n.op == "call_function"}
    assert computed == set(match.nodes)  # nothing of it is left outside
    torch.testing.assert_close(rotated(match, X, *angles), module(X, *angles)[0])


def test_partial_rotation() -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        some, rest = x[..., :4], x[..., 4:]
        turned = torch.cat([-some[..., 2:], some[..., :2]], -1)
        return torch.cat([some * cos + turned * sin, rest], -1)

    (match,) = ROTARY.find(trace(partial, X, COS[:, :4], SIN[:, :4]))
    assert match["partial"] is True and match["features"] == 4 and match["x"].target is torch.ops.aten.slice.Tensor


WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "the halves not exchanged": lambda x, c, s: x * c + torch.cat([-x[..., : D // 2], x[..., D // 2 :]], -1) * s,
    "the other half negated": lambda x, c, s: x * c + torch.cat([x[..., D // 2 :], -x[..., : D // 2]], -1) * s,
    "odd and even exchanged": lambda x, c, s: x * c + pairs(-x[..., ::2], x[..., 1::2]) * s,
    "uneven parts": lambda x, c, s: x * c + torch.cat([-x[..., 2:], x[..., :2]], -1) * s,
    "parts of another value": lambda x, c, s: x * c + chunked(x.sin()) * s,
    "pairs joined as halves": lambda x, c, s: x * c + torch.cat([-x[..., 1::2], x[..., ::2]], -1) * s,
    "halves along another dimension": lambda x, c, s: x * c + torch.cat([-x[..., 1:, :], x[..., :1, :]], -2) * s,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_looks_like_a_rotation_and_is_none(name: str) -> None:
    x = X[..., :2, :] if "dimension" in name else X
    module = trace(WRONG[name], x, COS[: x.shape[-2]], SIN[: x.shape[-2]])
    assert ROTARY.find(module) == []
    assert ROTARY.explain(module)[0].rule == "rotary"


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(4)), st.lists(st.sampled_from([1.0, -1.0]), min_size=4, max_size=4))
def test_only_rotations_are_found(order: list[int], signs: list[float]) -> None:
    """Of all signed arrangements of four quarters, those the view takes are rotations of halves."""
    quarters = D // 4

    def arranged(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        parts = [a[..., :quarters], a[..., quarters:], b[..., :quarters], b[..., quarters:]]
        return x * cos + torch.cat([sign * parts[i] for i, sign in zip(order, signs, strict=True)], -1) * sin

    assert ROTARY.find(trace(arranged, X, COS, SIN)) == []  # quarters are not how anyone writes it: never by accident


def test_parts_read_elsewhere_stay() -> None:
    def shared(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return x * cos + torch.cat([-b, a], -1) * sin, a

    module = trace(shared, X, COS, SIN)
    (match,) = ROTARY.find(module)
    assert refusal(Facts(module), match) is None


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox", "gptj", "bert", "gpt2"])
def test_rotary_in_transformers(name: str) -> None:
    architecture = ZOO[name]
    config = architecture.configuration()
    program = rewriter.capture(architecture.build("eager"), None, architecture.call())
    matches = ROTARY.find(program)
    assert len(matches) == architecture.implied(config).rotary
    assert {m["layout"] for m in matches} <= {"interleaved" if name == "gptj" else "half"}
    assert {m["partial"] for m in matches} <= {name in ("gptj", "gpt_neox")}
    assert [refusal(program.facts, m) for m in matches] == [None] * len(matches)


# ------------------------------------------------------------------------------------------------- routers

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]


class Mixture(nn.Module):
    """Four experts and a router."""

    def __init__(self, choose: Choose, used: bool = True) -> None:
        super().__init__()
        self.gate, self.other = nn.Linear(8, 4, bias=False), nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.rand(4, 8, 8))
        self.choose, self.used = choose, used

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weights, chosen = self.choose(self.gate(x))
        if not self.used:
            return self.other(x), weights, chosen
        experts = self.experts[chosen.reshape(len(x), -1)]
        outputs = torch.einsum("nd,nkde->nke", self.other(x), experts)
        return ((outputs * weights.reshape(len(x), -1, 1)).sum(1),)


def best(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = scores.topk(2, dim=-1)
    return weights, chosen


ROUTERS: dict[str, tuple[Choose, int, str | None]] = {
    "softmax, top-k": (lambda s: best(s.softmax(-1)), 2, "softmax"),
    "wide softmax, top-k": (lambda s: best(F.softmax(s, dim=1, dtype=torch.float64).float()), 2, "softmax"),
    "sigmoid, bias, top-k": (lambda s: best(s.sigmoid() + torch.ones(4)), 2, "sigmoid"),
    "top-k, softmax": (lambda s: (best(s)[0].softmax(-1), best(s)[1]), 2, None),
    "argmax": (lambda s: (s.softmax(-1).amax(-1), s.softmax(-1).argmax(-1)), 1, "softmax"),
    "max": (lambda s: tuple(s.softmax(-1).max(-1)), 1, "softmax"),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str) -> None:
    choose, count, activation = ROUTERS[name]
    module = capture_graph(Mixture(choose).eval(), (torch.rand(5, 8),))
    (router,) = ROUTER.find(module)
    assert router.path == "gate" and router["linear"]["weight"].target == "gate.weight"
    assert (router["count"], router["experts"], router["activation"]) == (count, 4, activation)
    decided = {match.path: is_router(Facts(module), match) for match in LINEAR.find(module)}
    assert decided == {"gate": True, "other": False}


def test_a_choice_that_is_only_returned_routes_nothing() -> None:
    module = capture_graph(Mixture(lambda s: best(s.softmax(-1)), used=False).eval(), (torch.rand(5, 8),))
    assert ROUTER.find(module) == []


def test_attention_is_no_router() -> None:
    for name in ("llama", "gpt2", "bert"):
        program = rewriter.capture(ZOO[name].build("eager"), None, ZOO[name].call())
        assert ROUTER.find(program) == []


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_approximations_leave_routers_alone(name: str) -> None:
    config = ZOO[name].configuration()
    program = rewriter.capture(ZOO[name].build("eager"), None, ZOO[name].call())
    routers = ROUTER.find(program)
    assert len(routers) == config.num_hidden_layers
    assert {r["count"] for r in routers} == {config.num_experts_per_tok} and {r["experts"] for r in routers} == {4}
    plan = rewriter.plan(program, ["shift_add"])
    misses = [m for m in plan.misses if "mixture-of-experts router" in m.reason]
    assert sorted(m.site for m in misses) == sorted(r.path for r in routers)
    assert not {r.path for r in routers} & {path for site in plan.sites for path in site.paths}
