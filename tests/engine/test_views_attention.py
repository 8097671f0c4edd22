# SPDX-License-Identifier: Apache-2.0
"""Attention under every spelling: biases, masks, soft-caps, merged heads, shared heads; and what each one captures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.configs import ZOO

import rewriter
from rewriter.facts import Facts
from rewriter.legality import refusal
from rewriter.matcher import Match
from rewriter.views import ATTENTION

from .helpers import capture_graph, trace

B, H, S, D = 2, 3, 5, 4
Q, K, V = (torch.rand(B, H, S, D) for _ in range(3))
BIAS, MASK = torch.rand(1, H, S, S), torch.rand(B, 1, S, S)
SEEN = torch.eye(S, dtype=torch.bool).flip(-1)  # kept or dropped, every row sees a key
LOWEST = torch.finfo(torch.float32).min


def soft(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def scores_of(match: Match, tensors: dict[str, Tensor]) -> Tensor:
    """softmax's argument, as the captures define it: the oracle of every spelling below."""

    def value(name: str) -> Tensor:
        node = match[name]
        assert node.op == "placeholder", "the tests below capture inputs"
        return tensors[str(node.target)]

    scores = match["scale"] * value("q") @ value("k").mT
    if match["softcap"] is not None:
        scores = match["softcap"] * torch.tanh(scores / match["softcap"])
    if match["bias"] is not None:
        scores = scores + match["bias_scale"] * value("bias")
    if match["mask_form"] == "added":
        scores = scores + value("mask")
    elif match["mask_form"] is not None:
        dropped = value("mask") if match["mask_form"] == "drop" else ~value("mask")
        scores = scores.masked_fill(dropped, match["fill"])
    return scores


SPELLINGS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    # name: (function of q, k, v, bias, mask, seen), what is captured besides
    "bias and mask": (lambda q, k, v, b, m, s: soft(q @ k.mT + b + m) @ v, {"mask_form": "added"}),
    "mask, then scores, then bias": (lambda q, k, v, b, m, s: soft(m + (b + q @ k.mT * 2)) @ v, {"scale": 2.0}),
    "masked_fill": (lambda q, k, v, b, m, s: soft((q @ k.mT).masked_fill(s, -1e9)) @ v, {"mask_form": "drop", "fill": -1e9}),
    "masked_fill of -inf": (lambda q, k, v, b, m, s: soft((q @ k.mT).masked_fill(s, -math.inf)) @ v, {"fill": -math.inf}),
    "masked_fill after a bias": (lambda q, k, v, b, m, s: soft((q @ k.mT + b).masked_fill(s, LOWEST)) @ v, {"fill": LOWEST}),
    "where, keeping": (lambda q, k, v, b, m, s: soft(torch.where(s, q @ k.mT, LOWEST)) @ v, {"mask_form": "keep"}),
    "where, dropping": (lambda q, k, v, b, m, s: soft(torch.where(s, -1e9, q @ k.mT)) @ v, {"mask_form": "drop"}),
    "where, a tensor": (
        lambda q, k, v, b, m, s: soft(torch.where(s, q @ k.mT / 2, torch.full([], LOWEST))) @ v,
        {"mask_form": "keep", "fill": LOWEST, "scale": 0.5},
    ),
    "soft-cap": (lambda q, k, v, b, m, s: soft(torch.tanh(q @ k.mT * 0.5 / 30) * 30) @ v, {"softcap": 30.0, "scale": 0.5}),
    "soft-cap and mask": (lambda q, k, v, b, m, s: soft(20 * torch.tanh(q @ k.mT / 20) + m) @ v, {"softcap": 20.0}),
    "soft-cap by a product": (lambda q, k, v, b, m, s: soft(torch.tanh(q @ k.mT * 0.125) * 8.0) @ v, {"softcap": 8.0}),
    "scale on all three": (lambda q, k, v, b, m, s: soft((q * 0.5) @ (k * 0.5).mT * 2) @ v, {"scale": 0.5}),
    "the root of the scale on q and k": (
        lambda q, k, v, b, m, s: soft((q / D**0.25) @ (k / D**0.25).mT) @ v, {"scale": pytest.approx(0.5)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, expected = SPELLINGS[name]
    tensors = {f"tensors_{i}": tensor for i, tensor in enumerate((Q, K, V, BIAS, MASK, SEEN))}
    module = trace(function, *tensors.values())
    (match,) = ATTENTION.find(module)
    assert {key: match[key] for key in expected} == expected
    assert match["spelling"] == "eager" and match["split"] is None and refusal(Facts(module), match) is None
    given = {str(node.target): tensors[str(node.target)] for node in module.graph.find_nodes(op="placeholder")}
    torch.testing.assert_close(soft(scores_of(match, tensors)) @ V, module(*given.values())[0])


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_baddbmm(alpha: float, beta: float) -> None:
    q, k, v, alibi = Q.flatten(0, 1), K.flatten(0, 1), V.flatten(0, 1), torch.rand(B * H, 1, S)

    def plain(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return torch.bmm(soft(torch.baddbmm(a, q, k.mT, beta=beta, alpha=alpha)), v)

    module = trace(plain, q, k, v, alibi)
    (match,) = ATTENTION.find(module)
    assert match["scale"] == alpha and match["mask"] is None and match["split"] is None
    assert (match["bias"] is None) is (beta == 0) and match["blended"] is (beta != 0)
    assert match["bias_scale"] == (beta or 1.0)
    tensors = {f"tensors_{i}": t for i, t in enumerate((q, k, v, alibi))}
    torch.testing.assert_close(soft(scores_of(match, tensors)) @ v, module(q, k, v, alibi)[0])


@pytest.mark.parametrize("join", ["after softmax", "before softmax"])
def test_heads_merged_with_the_batch(join: str) -> None:
    """Bloom's and the older Bart's layout: products over [batch · heads], masks over [batch, heads]."""

    def merged(q: Tensor, k: Tensor, v: Tensor, a: Tensor, m: Tensor) -> Tensor:
        scores = a.baddbmm(q, k.mT, beta=1.0, alpha=0.5).view(B, H, S, S) + m
        if join == "before softmax":
            return torch.bmm(soft(scores.view(B * H, S, S)), v)
        return torch.bmm(soft(scores).view(B * H, S, S), v)

    inputs = (*(t.flatten(0, 1) for t in (Q, K, V)), torch.rand(B * H, 1, S), MASK)
    module = trace(merged, *inputs)
    (match,) = ATTENTION.find(module)
    assert match["split"].target is torch.ops.aten.view.default and match["blended"] and match["scale"] == 0.5
    assert match["mask"].target == "tensors_4" and match["bias"].target == "tensors_3"


def test_a_reshape_that_is_not_undone_is_a_miss() -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return soft((q @ k.mT).view(B, H, S * S)).view(B, H, S, S) @ v

    module = trace(mixed, Q, K, V)
    assert ATTENTION.find(module) == []
    assert "heads that are split off the batch" in ATTENTION.explain(module)[0].expected


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda q, k, v, b, m: soft(torch.tanh(q @ k.mT / 30) * 20) @ v, "30"),
        (lambda q, k, v, b, m: soft(q @ k.mT + b + m + b.sin()) @ v, "add"),
        (lambda q, k, v, b, m: soft(q @ k.mT + (m > 0)) @ v, "floating"),
        (lambda q, k, v, b, m: soft((q @ k.mT)[:, :1] + m + b) @ v, "slice"),
        (lambda q, k, v, b, m: soft((q @ k.mT).sum(1, True) + b) @ v, "sum"),
        (lambda q, k, v, b, m: soft(q[:, :1] @ k[:, :1].mT + b) @ v, "broadcasts to the scores"),
        (lambda q, k, v, b, m: (q @ k.mT).softmax(-2) @ v, "dim -1"),
        (lambda q, k, v, b, m: soft(q @ k.mT * m.sum()) @ v, "mul"),
        (lambda q, k, v, b, m: soft(torch.where(m > 0, q @ k.mT, b)) @ v, "a constant number"),
        (lambda q, k, v, b, m: soft(q @ k) @ v.mT, "transpose"),
    ],
)
def test_near_misses_say_what_is_wrong(function: Callable[..., Tensor], words: str) -> None:
    square = [t[..., :D, :] for t in (Q, K, V)]
    module = trace(function, *square, BIAS[..., :D, :D], MASK[..., :D, :D])
    assert ATTENTION.find(module) == []
    miss = ATTENTION.explain(module)[0]
    assert words in f"{miss.reason} {miss.expected} {miss.found} {miss.step}"
    assert miss.node is not None and ".py:" in miss.source


def test_cross_attention() -> None:
    memory = torch.rand(B, H, S + 2, D)
    module = trace(lambda q, k, v, m: soft(q @ k.mT * 0.5 + m) @ v, Q, memory, memory.sin(), torch.rand(B, 1, S, S + 2))
    (match,) = ATTENTION.find(module)
    assert match["k"] is not match["q"] and match["groups"] == 1 and match["mask_form"] == "added"


SHARED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "broadcast": lambda q, k, v: soft(q @ k.mT) @ v,
    "expanded": lambda q, k, v: soft(q @ k.expand(B, H, S, D).mT) @ v.expand(B, H, S, D),
    "sdpa, expanded": lambda q, k, v: F.scaled_dot_product_attention(q, k.expand(B, H, S, D), v.expand(B, H, S, D)),
    "repeat_interleave": lambda q, k, v: soft(q @ k.repeat_interleave(H, 1).mT) @ v.repeat_interleave(H, 1),
}


@pytest.mark.parametrize("name", SHARED)
def test_multi_query_attention(name: str) -> None:
    """One head of keys and values, however it reaches all heads of queries."""
    (match,) = ATTENTION.find(trace(SHARED[name], Q, K[:, :1], V[:, :1]))
    assert match["groups"] == H and match["k_base"].op == match["v_base"].op == "placeholder"


def test_half_precision_with_a_wider_softmax_and_a_capped_score() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.mT / 50) * 50 + m
        return scores.softmax(-1, torch.float32).to(q.dtype) @ v

    module = trace(attention, *(t.half() for t in (Q, K, V, MASK)))
    (match,) = ATTENTION.find(module)
    assert match["softcap"] == 50.0 and match["softmax_dtype"] is torch.float32 and len(match.casts) == 2
    assert refusal(Facts(module), match) is None


def test_position_bias_may_be_trained() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.rand(H, S, S))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return soft(q @ k.mT + self.table[None] + mask) @ v

    (match,) = ATTENTION.find(capture_graph(Biased(), (Q, K, V, MASK)))
    assert match["bias"].target is torch.ops.aten.unsqueeze.default and match["mask"].target == "mask"


# What attention looks like in the zoo beyond scale and mask: name -> captures of every site.
DETAILS: dict[str, dict[str, Any]] = {
    "llama": {"groups": 2, "bias": False, "softcap": None},
    "gemma2": {"groups": 2, "bias": False, "softcap": 50.0},
    "bloom": {"groups": 1, "bias": True, "softcap": None, "blended": True, "split": True},
    "whisper": {"groups": 1, "bias": False, "scale": 1.0},
    "distilbert": {"groups": 1, "bias": False, "softcap": None},
}


@pytest.mark.parametrize("name", DETAILS)
def test_architectures(name: str) -> None:
    architecture = ZOO[name]
    program = rewriter.capture(architecture.build("eager"), None, architecture.call())
    matches = ATTENTION.find(program)
    assert len(matches) == architecture.implied(architecture.configuration()).attention
    for match in matches:
        found = match.captures | {"bias": match["bias"] is not None, "split": match["split"] is not None}
        assert {key: found[key] for key in DETAILS[name]} == DETAILS[name]
        assert refusal(program.facts, match) is None


def test_t5_adds_a_position_bias_and_a_mask_and_does_not_scale() -> None:
    architecture = ZOO["t5"]
    program = rewriter.capture(architecture.build("eager"), None, architecture.call())
    for match in ATTENTION.find(program):
        assert match["bias"] is not None and match["mask"] is not None and match["scale"] == 1.0
