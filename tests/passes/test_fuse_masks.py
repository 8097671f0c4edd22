# SPDX-License-Identifier: Apache-2.0
"""Fusing attention with biases, fills and merged heads, and masks that the operator has a flag for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.configs import ZOO

import rewriter
from rewriter.optimized import Optimized
from rewriter.passes import Fuse

aten = torch.ops.aten
WIDTH, HEADS = 8, 2
LOWEST = torch.finfo(torch.float32).min
ONLY_ATTENTION = Fuse(qkv=False, gate_up=False)
ONLY_MASKS = Fuse(attention=False, qkv=False, gate_up=False, masks=True)

Scores = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Attention of two heads whose scores pass through a function of (scores, padding)."""

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(1, HEADS, 1, 1))
        self.scores = scores

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        scores = self.scores(q @ k.mT * 0.5 + self.bias.expand(-1, -1, *x.shape[1:2], 1), padding)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    @staticmethod
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def call(batch: int = 3, length: int = 6, hidden: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * length)
    padding = torch.ones(batch, length, dtype=torch.long)
    padding[0, :hidden] = 0
    return torch.randn(batch, length, WIDTH, generator=generator), padding


def seen(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


def optimized(model: nn.Module, *passes: object) -> Optimized:
    return rewriter.optimize(model.eval(), list(passes), example_inputs=call())


def sites(opt: Optimized, rule: str) -> int:
    return sum(site.rule == rule for site in opt.plan.sites)


def reasons(opt: Optimized, rule: str) -> str:
    return "\n".join(miss.reason for miss in opt.plan.misses if miss.rule == rule)


def verified(opt: Optimized) -> None:
    """The golden run with gradients, at other sizes and with rows that see no key."""
    result = rewriter.verify(opt.original_program(), opt.program, [call(), call(4, 9), call(2, 5, hidden=3)])
    result.raise_if_failed()
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10 and len(result.gradients) >= 6


FUSED: dict[str, Scores] = {
    "bias alone": lambda s, p: s,
    "bias and mask": lambda s, p: s + torch.full(s.shape[-2:], LOWEST).triu(1),
    "bias and padding": lambda s, p: s + (1.0 - p[:, None, None, :].float()) * LOWEST,
    "infinite, causal": lambda s, p: s + torch.full(s.shape[-2:], -math.inf).triu(1),
    "filled, causal": lambda s, p: s.masked_fill(~seen(s), LOWEST),
    "filled with -inf, causal": lambda s, p: s.masked_fill(~seen(s), -math.inf),
    "where, causal": lambda s, p: torch.where(seen(s), s, -1e9),
    "where, causal, a tensor": lambda s, p: torch.where(~seen(s), torch.full([], LOWEST), s),
}


@pytest.mark.parametrize("name", FUSED)
def test_biases_and_fills_become_the_operators_mask(name: str) -> None:
    opt = optimized(Attention(FUSED[name]), ONLY_ATTENTION)
    assert sites(opt, "fuse.attention") == 1
    assert aten.softmax.int not in {node.target for node in opt.program.graph.nodes}
    verified(opt)


KEPT: dict[str, tuple[Scores, str]] = {
    "a soft-cap around the bias": (lambda s, p: torch.tanh(s / 30) * 30, "a different operator"),
    "filled, padded": (lambda s, p: s.masked_fill(p[:, None, None, :] == 0, LOWEST), "a row that sees no key"),
    "filled with -inf, padded": (lambda s, p: s.masked_fill(p[:, None, None, :] == 0, -math.inf), "a row that sees no key"),
    "infinite, padded": (
        lambda s, p: s + torch.zeros(()).masked_fill(p[:, None, None, :] == 0, -math.inf), "the mask is padding",
    ),
    "infinite, rows that see nothing": (lambda s, p: s + torch.full(s.shape[-2:], -math.inf).triu(0), "holds -inf"),
    "filled a little": (lambda s, p: s.masked_fill(~seen(s), -5.0), "hidden scores become -5"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_the_operator_would_do_differently_is_refused(name: str) -> None:
    scores, reason = KEPT[name]
    opt = optimized(Attention(scores), ONLY_ATTENTION)
    assert sites(opt, "fuse.attention") == 0 and reason in reasons(opt, "fuse.attention")


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("masked", [True, False])
def test_merged_heads_are_split_for_the_operator(masked: bool, beta: float) -> None:
    class Merged(Attention):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = (self.heads(layer(x)).reshape(b * HEADS, n, -1) for layer in (self.q, self.k, self.v))
            alibi = (self.bias * torch.arange(n)).expand(b, -1, -1, -1).reshape(b * HEADS, 1, n)
            scores = alibi.baddbmm(q, k.mT, beta=beta, alpha=0.5)
            if masked:
                mask = torch.full((n, n), LOWEST).triu(1) + (1.0 - padding[:, None, None, :].float()) * LOWEST
                scores = (scores.view(b, HEADS, n, n) + mask).softmax(-1).view(b * HEADS, n, n)
            else:
                scores = scores.softmax(-1)
            return torch.bmm(scores, v).view(b, HEADS, n, -1).transpose(1, 2).flatten(2)

    opt = optimized(Merged(lambda s, p: s), ONLY_ATTENTION)
    assert sites(opt, "fuse.attention") == 1
    verified(opt)
    (attention,) = opt.program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert len(attention.meta["val"].shape) == (4 if masked else 3)


def test_one_head_of_keys_for_all_queries() -> None:
    class MultiQuery(Attention):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            q, k, v = self.heads(self.q(x)), self.k(x)[:, None, :, :4], self.v(x)[:, None, :, :4]
            return (torch.softmax(q @ k.mT * 0.5, -1) @ v).transpose(1, 2).flatten(2)

    model = MultiQuery(lambda s, p: s)
    model.bias.requires_grad_(False)
    opt = optimized(model, ONLY_ATTENTION)
    assert sites(opt, "fuse.attention") == 1
    verified(opt)


@pytest.mark.parametrize(("name", "fused"), [("t5", 8), ("bloom", 2), ("gemma2", 0), ("distilbert", 2)])
def test_transformers_with_biases(name: str, fused: int) -> None:
    architecture = ZOO[name]
    opt = rewriter.optimize(architecture.build("eager"), [ONLY_ATTENTION], example_kwargs=architecture.call())
    assert sites(opt, "fuse.attention") == fused
    if not fused:
        assert "caps the scores with 50" in reasons(opt, "fuse.attention")
        return
    names = opt.original_program().input_names()
    calls = [architecture.call(padding, seed=i) for i, padding in enumerate(architecture.paddings)]
    result = rewriter.verify(opt.original_program(), opt.program, [tuple(c[n] for n in names) for c in calls])
    result.raise_if_failed()
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10


# ------------------------------------------------------------------------------------------- masks as flags


class Flagged(Attention):
    """The operator, with a mask made from (scores, padding)."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        q = q + self.bias
        mask = self.scores(torch.zeros_like(q @ k.mT), padding)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3).transpose(1, 2).flatten(2)


FLAGS: dict[str, tuple[Scores, bool]] = {
    "boolean": (lambda s, p: seen(s), True),
    "added": (lambda s, p: torch.full(s.shape[-2:], LOWEST).triu(1), True),
    "infinite": (lambda s, p: torch.full(s.shape[-2:], -math.inf).triu(1)[None, None], True),
    "everything": (lambda s, p: torch.ones(s.shape[-2:], dtype=torch.bool), False),
    "zeros": (lambda s, p: torch.zeros_like(s), False),
}


@pytest.mark.parametrize("name", FLAGS)
def test_causal_and_full_masks_become_flags(name: str) -> None:
    scores, causal = FLAGS[name]
    opt = optimized(Flagged(scores), ONLY_MASKS)
    assert sites(opt, "fuse.mask") == 1
    (attention,) = opt.program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    arguments = opt.program.facts.arguments(attention)
    assert arguments["is_causal"] is causal and arguments["attn_mask"] is None and arguments["scale"] == 0.3
    verified(opt)
    again = rewriter.plan(opt.program, [ONLY_MASKS])
    assert again.sites == ()  # it does not match what it made


UNFLAGGED: dict[str, tuple[Scores, str]] = {
    "padding": (lambda s, p: p.bool()[:, None, None, :], "the mask is padding"),
    "causal and padded": (lambda s, p: seen(s) & p.bool()[:, None, None, :], "the mask is causal+padding"),
    "a window": (lambda s, p: seen(s).triu(-2), "the mask is window(3)"),
    "off by one": (lambda s, p: torch.ones(s.shape[-2:], dtype=torch.bool).tril(-1) | seen(s)[:1], "unknown"),
    "a bias": (lambda s, p: s + 0.5, "it is a bias, too"),
}


@pytest.mark.parametrize("name", UNFLAGGED)
def test_other_masks_stay(name: str) -> None:
    scores, reason = UNFLAGGED[name]
    opt = optimized(Flagged(scores), ONLY_MASKS)
    assert sites(opt, "fuse.mask") == 0 and reason in reasons(opt, "fuse.mask")


def test_masks_are_left_alone_unless_asked_for() -> None:
    opt = optimized(Flagged(FLAGS["boolean"][0]), Fuse())
    assert sites(opt, "fuse.mask") == 0
    (attention,) = opt.program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert opt.program.facts.arguments(attention)["attn_mask"] is not None


def test_undo_and_saving_bring_the_mask_back(tmp_path: object) -> None:
    opt = optimized(Flagged(FLAGS["added"][0]), ONLY_MASKS)
    x, padding = call(2, 7)
    torch.testing.assert_close(opt.undo("fuse.mask")(x, padding), opt(x, padding))
    opt.save(f"{tmp_path}/model")
    torch.testing.assert_close(rewriter.load(f"{tmp_path}/model")(x, padding), opt(x, padding))


def test_merged_heads_survive_saving(tmp_path: object) -> None:
    architecture = ZOO["bloom"]
    opt = rewriter.optimize(architecture.build("eager"), [ONLY_ATTENTION], example_kwargs=architecture.call())
    opt.save(f"{tmp_path}/model")
    loaded, inputs = rewriter.load(f"{tmp_path}/model"), architecture.call(batch=2, length=5)
    torch.testing.assert_close(loaded(**inputs)["logits"], opt(**inputs)["logits"])


def test_whisper_decodes_causally() -> None:
    """Its mask is that of packed sequences, made from positions that are not packed."""
    architecture = ZOO["whisper"]
    opt = rewriter.optimize(architecture.build("sdpa"), [ONLY_MASKS], example_kwargs=architecture.call())
    config = architecture.configuration()
    assert sites(opt, "fuse.mask") == config.decoder_layers
    names = opt.original_program().input_names()
    calls = [architecture.call(), architecture.call(batch=2, length=5)]
    rewriter.verify(opt.original_program(), opt.program, [tuple(c[n] for n in names) for c in calls]).raise_if_failed()
