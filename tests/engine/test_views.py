# SPDX-License-Identifier: Apache-2.0
"""Views on small hand-written models: every spelling, and the words for what is not one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.facts import Facts
from rewriter.views import ATTENTION, EMBEDDING, HEAD, LINEAR, QKV, VIEWS
from rewriter.views.linear import features

from .helpers import capture_graph, trace

X = torch.rand(2, 3, 4)
W, B = torch.rand(5, 4), torch.rand(5)
Q, K, V = (torch.rand(1, 2, 3, 4) for _ in range(3))
M = torch.rand(1, 1, 3, 3)

LINEARS: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    # name: (function of x, w or its transpose, b), transposed, has bias
    "linear": (lambda x, w, b: F.linear(x, w, b), False, True),
    "linear without bias": (lambda x, w, b: F.linear(x, w), False, False),
    "Conv1D": (lambda x, w, b: torch.addmm(b, x.view(-1, 4), w), True, True),
    "addmm of a transposed view": (lambda x, w, b: torch.addmm(b, x.view(-1, 4), w.t()), False, True),
    "matmul": (lambda x, w, b: x @ w, True, False),
    "mm": (lambda x, w, b: torch.mm(x.view(-1, 4), w), True, False),
    "matmul of a transposed view": (lambda x, w, b: x @ w.t(), False, False),
    "matmul and add": (lambda x, w, b: x @ w + b, True, True),
    "add and matmul": (lambda x, w, b: b + x @ w.mT, False, True),
    "weight cast to its own dtype": (lambda x, w, b: F.linear(x, w.to(torch.float32), b), False, True),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linear_under_every_spelling(name: str) -> None:
    function, transposed, biased = LINEARS[name]
    module = trace(function, X, w=W.t().contiguous() if transposed else W, b=B)
    (match,) = LINEAR.find(module)
    facts = Facts(module)
    assert match["transposed"] is transposed and (match["bias"] is not None) is biased
    assert match["weight"].target == "w" and (not biased or match["bias"].target == "b")
    assert features(facts, match) == (4, 5)
    # what the captures say is what the graph computes
    weight, bias = (facts.tensor(match[n]) if match[n] is not None else None for n in ("weight", "bias"))
    assert weight is not None
    expected = F.linear(X, weight.t() if transposed else weight, bias)
    torch.testing.assert_close(module(X)[0].view_as(expected), expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, b: F.linear(x, w * 2, b), "weight is computed"),
        (lambda x, w, b: F.linear(x, w.double().float(), b), "weight is computed"),
        (lambda x, w, b: F.linear(x, w, b * 2), "bias is computed"),
        (lambda x, w, b: x @ x.mT, "weight is computed"),
        (lambda x, w, b: torch.addmm(b, x[0], w.t(), alpha=2), "addmm with alpha = 2"),
        (lambda x, w, b: x @ x.new_ones(2, 4, 5), "weight is computed"),
    ],
)
def test_linear_misses_say_why(function: Callable[..., Tensor], reason: str) -> None:
    module = trace(function, X, w=W, b=B)
    assert LINEAR.find(module) == []
    miss = LINEAR.explain(module)[0]
    assert miss.rule == "linear" and miss.reason == reason


def test_a_product_used_twice_is_a_linear_without_the_bias() -> None:
    module = trace(lambda x, w, b: ((p := x @ w) + b, p.sin()), X, w=W.t().contiguous(), b=B)
    (match,) = LINEAR.find(module)
    assert match["bias"] is None and match.root.target is torch.ops.aten.matmul.default


def test_weights_of_more_dimensions_are_no_linear() -> None:
    module = trace(lambda x, w: x @ w, X, w=torch.rand(2, 4, 5))
    assert LINEAR.find(module) == [] and "2 dimensions" in LINEAR.explain(module)[0].expected


def test_embedding() -> None:
    ids = torch.tensor([[1, 0]])
    (plain,) = EMBEDDING.find(trace(lambda i, w: F.embedding(i, w), ids, w=W))
    assert plain["weight"].target == "w" and plain["padding_idx"] is None and plain["ids"].op == "placeholder"
    (padded,) = EMBEDDING.find(trace(lambda i, w: F.embedding(i, w, padding_idx=0), ids, w=W))
    assert padded["padding_idx"] == 0
    scaled = trace(lambda i, w: F.embedding(i, w, scale_grad_by_freq=True), ids, w=W)
    assert EMBEDDING.find(scaled) == []
    assert EMBEDDING.explain(scaled)[0].reason == "embedding with scale_grad_by_freq = True"
    assert EMBEDDING.explain(trace(lambda i, w: F.embedding(i, w.sin()), ids, w=W))[0].reason == "weight is computed"


def soft(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


EAGER: dict[str, tuple[Callable[..., Tensor], float, bool]] = {
    # name: (function, scale, has mask)
    "no scale": (lambda q, k, v, m: soft(q @ k.mT) @ v, 1.0, False),
    "scores times": (lambda q, k, v, m: soft(q @ k.mT * 0.5) @ v, 0.5, False),
    "times scores": (lambda q, k, v, m: soft(0.5 * (q @ k.transpose(2, 3))) @ v, 0.5, False),
    "scores over": (lambda q, k, v, m: soft(q @ k.transpose(-2, -1) / math.sqrt(4)) @ v, 0.5, False),
    "query times": (lambda q, k, v, m: soft((q * 0.5) @ k.mT) @ v, 0.5, False),
    "query over": (lambda q, k, v, m: soft((q / 2) @ k.mT) @ v, 0.5, False),
    "key times": (lambda q, k, v, m: soft(q @ (k * 0.5).mT) @ v, 0.5, False),
    "transposed key times": (lambda q, k, v, m: soft(q @ (k.mT * 0.5)) @ v, 0.5, False),
    "both by the root": (lambda q, k, v, m: soft((q * 0.5) @ (k / 2).mT) @ v, 0.25, False),
    "mask": (lambda q, k, v, m: soft(q @ k.mT + m) @ v, 1.0, True),
    "mask first": (lambda q, k, v, m: soft(m + q @ k.mT * 2) @ v, 2.0, True),
    "permuted key": (lambda q, k, v, m: soft(q @ k.permute(0, 1, 3, 2) + m) @ v, 1.0, True),
    "evaluated dropout": (lambda q, k, v, m: F.dropout(soft(q @ k.mT), 0.1, False) @ v, 1.0, False),
    "three dimensions": (lambda q, k, v, m: torch.bmm(soft(torch.bmm(q[0], k[0].mT)), v[0]), 1.0, False),
    "double softmax": (lambda q, k, v, m: soft((q @ k.mT + m).double()).float() @ v, 1.0, True),
}


@pytest.mark.parametrize("name", EAGER)
def test_attention_written_out(name: str) -> None:
    function, scale, masked = EAGER[name]
    module = trace(function, Q, K, V, M)
    (match,) = ATTENTION.find(module)
    assert match["scale"] == pytest.approx(scale) and (match["mask"] is not None) is masked
    assert match["spelling"] == "eager" and match["dropout_p"] == 0.0 and match["is_causal"] is False
    assert match["groups"] == 1 and match["k_base"] is match["k"] and match["v_base"] is match["v"]
    expected = F.scaled_dot_product_attention(Q, K, V, M if masked else None, scale=match["scale"])
    torch.testing.assert_close(module(*inputs_of(module))[0].view_as(expected), expected)


def inputs_of(module: torch.fx.GraphModule) -> list[Tensor]:
    """The tensors for the inputs the captured graph kept."""
    given = {f"tensors_{i}": tensor for i, tensor in enumerate((Q, K, V, M))}
    return [given[str(node.target)] for node in module.graph.find_nodes(op="placeholder")]


def test_attention_as_one_operator() -> None:
    module = trace(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), Q, K, V, M)
    (match,) = ATTENTION.find(module)
    assert (match["spelling"], match["scale"], match["is_causal"]) == ("sdpa", 0.5, False)
    assert match["mask"].op == "placeholder"
    (causal,) = ATTENTION.find(
        trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), Q, K, V)
    )
    assert causal["is_causal"] is True and causal["scale"] == 0.3 and causal["mask"] is None


def test_grouped_queries_capture_repeated_and_base() -> None:
    def unrolled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, :, None].expand(1, 2, 3, 3, 4).reshape(1, 6, 3, 4) for t in (k, v))
        return soft(q @ k.mT) @ v

    def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, dim=-3))

    for function in (unrolled, interleaved):
        (match,) = ATTENTION.find(trace(function, torch.rand(1, 6, 3, 4), K, V))
        assert match["groups"] == 3, function
        assert match["k_base"].op == match["v_base"].op == "placeholder" and match["k"].op == "call_function"
    flag = trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), torch.rand(1, 6, 3, 4), K, V)
    (match,) = ATTENTION.find(flag)
    assert match["groups"] == 3 and match["k_base"] is match["k"]


def test_a_tiled_head_is_no_repeated_head() -> None:
    """[k0, k1, k0, k1] is not [k0, k0, k1, k1]."""

    def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, None].expand(1, 3, 2, 3, 4).reshape(1, 6, 3, 4) for t in (k, v))
        return soft(q @ k.mT) @ v

    (match,) = ATTENTION.find(trace(tiled, torch.rand(1, 6, 3, 4), K, V))
    assert match["groups"] == 1 and match["k_base"] is match["k"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda q, k, v, m: soft((q @ k.mT) ** 2) @ v, "pow"),
        (lambda q, k, v, m: soft(torch.tanh(q @ k.mT)) @ v, "tanh"),
        (lambda q, k, v, m: soft(q @ k.mT + m + m.sin() + m.cos()) @ v, "add"),
        (lambda q, k, v, m: soft(q @ k.mT).sum(-1), "sum"),
    ],
)
def test_attention_misses_name_what_is_there_instead(function: Callable[..., Tensor], words: str) -> None:
    module = trace(function, Q, K, V, M)
    assert ATTENTION.find(module) == []
    miss = ATTENTION.explain(module)[0]
    assert words in miss.found and miss.expected and miss.depth >= 1


class Language(nn.Module):
    """Embedding, one attention, head."""

    def __init__(self, vocabulary: int = 600, tied: bool = False, cap: str = "", bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for _ in range(3))
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, vocabulary, bias=False)
        self.cap = cap
        self.register_buffer("shift", torch.zeros(1, vocabulary))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        h = self.embed(ids)
        h = h + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        logits = self.head(self.down(self.up(h).relu())[:, -2:])
        if self.cap == "soft":
            logits = 30.0 * torch.tanh(logits / 30.0) + self.shift.to(logits.device)
        elif self.cap:
            logits = torch.sin(logits)
        if labels is None:
            return logits
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.reshape(-1)), logits


IDS = torch.randint(0, 500, (2, 4))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_head_tied_or_not_with_or_without_loss(tied: bool, labels: bool) -> None:
    inputs = (IDS, IDS[:, :2]) if labels else (IDS,)
    (match,) = HEAD.find(capture_graph(Language(tied=tied).eval(), inputs))
    assert match.name == "head" and match.path == "head" and match["tied"] is tied
    assert len(match["weight"].users) == 1 + tied


def test_head_with_a_soft_cap_and_a_stored_shift() -> None:
    (match,) = HEAD.find(capture_graph(Language(cap="soft").eval(), (IDS,)))
    assert match.path == "head"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Language(vocabulary=500), "its 500 outputs are fewer than 512, too few for a vocabulary"),
        (Language(cap="sine"), "its result goes through sin (sin)"),
        (nn.Sequential(nn.Linear(4, 700), nn.Linear(700, 600)), "another linear has more outputs (700) than its 600"),
        (nn.Sequential(nn.Linear(200, 600)), "no embedding has 600 rows, and that is not more than four times"),
    ],
)
def test_head_misses_say_why(model: nn.Module, reason: str) -> None:
    inputs = IDS if isinstance(model, Language) else torch.rand(2, model[0].in_features)  # type: ignore[index]
    module = capture_graph(model.eval(), (inputs,))
    assert HEAD.find(module) == []
    assert reason in HEAD.explain(module)[0].reason


def test_head_without_embedding_is_wide() -> None:
    (match,) = HEAD.find(capture_graph(nn.Sequential(nn.Linear(8, 600)), (torch.rand(2, 8),)))
    assert match["tied"] is False


def test_qkv_groups_linears_of_one_input() -> None:
    module = capture_graph(Language().eval(), (IDS,))
    (match,) = QKV.find(module)
    assert match.paths == ("q", "k", "v") and [m.path for m in map(match.__getitem__, ROLES)] == ["q", "k", "v"]
    assert match.outputs == tuple(match[role].root for role in ROLES)
    assert {match[role]["x"] for role in ROLES} == {match["x"]} and match["attention"].name == "attention"


ROLES = ("q_linear", "k_linear", "v_linear")


class Cross(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.v = nn.Linear(8, 8, bias=kind != "mixed bias")

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        k = self.k(x if self.kind == "all different" else memory)
        v = self.v(memory.sin() if self.kind == "all different" else memory)
        return F.scaled_dot_product_attention(self.q(x.cos() if self.kind == "all different" else x), k, v)


def test_qkv_of_cross_attention_groups_keys_and_values() -> None:
    inputs = (torch.rand(1, 3, 8), torch.rand(1, 3, 8))
    (match,) = QKV.find(capture_graph(Cross("plain").eval(), inputs))
    assert match["q_linear"] is None and match.paths == ("k", "v") and len(match.outputs) == 2
    for kind, reason in (("mixed bias", "some of the linears"), ("all different", "have different inputs")):
        module = capture_graph(Cross(kind).eval(), inputs)
        assert QKV.find(module) == [] and reason in QKV.explain(module)[0].reason


def test_explain_can_be_limited_to_a_site() -> None:
    module = capture_graph(Language(cap="sine").eval(), (IDS,))
    (miss,) = HEAD.explain(module, site="head")
    assert miss.site == "head"
    (miss,) = HEAD.explain(module, site="nowhere")
    assert miss.reason == "nothing at this site looks like head" and miss.node is None


def test_every_view_is_silent_on_a_graph_without_any() -> None:
    module = trace(torch.sin, X)
    for name, view in VIEWS.items():
        assert view.find(module) == []
        (miss,) = view.explain(module)
        assert miss.rule == name and miss.node is None
