# SPDX-License-Identifier: Apache-2.0
"""`fuse` promises the same function: the golden run with gradients, and refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import kinds
import pytest
import torch
from kinds import KINDS, LANGUAGE, padded, tokens
from torch import Tensor, nn

import rewriter
from rewriter.optimized import Optimized

aten = torch.ops.aten
WIDTH = 12


def inputs(kind: str) -> list[tuple[Tensor, ...]]:
    """Flat inputs of the captured call: plain, left padding, right padding, and a row that sees no key at all."""
    if kind not in (*LANGUAGE, "exported"):
        return [call.args for name, call in kinds.calls(kind).items() if name in ("positional", "other sizes")]
    nothing = torch.ones(3, 9, dtype=torch.long)
    nothing[1] = 0
    masks = [torch.ones(3, 9, dtype=torch.long), padded(3, 9, "left"), padded(3, 9, "right"), nothing]
    if kind == "exported":
        return [(tokens(3, 9), (mask - 1.0) * 1e4) for mask in masks]
    names = kinds.optimized(kind, "fuse").program.input_names()
    assert set(names) == {"input_ids", "attention_mask"}
    return [
        tuple({"input_ids": tokens(3, 9, i), "attention_mask": mask}[n] for n in names)
        for i, mask in enumerate(masks)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_run_with_gradients(kind: str) -> None:
    opt = kinds.optimized(kind, "fuse")
    result = rewriter.verify(opt.original_program(), opt.program, inputs(kind))
    result.raise_if_failed()
    assert result.samples == len(inputs(kind))
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10
    assert len(result.gradients) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_as_many_as_the_model_has(kind: str) -> None:
    opt = kinds.optimized(kind, "fuse")
    layers = {"sequential": 0, "exported": 1}.get(kind, 2)
    merged = 0 if kind == "gpt2" else layers  # GPT-2 stores q, k and v as one weight
    rules = [site.rule for site in opt.plan.sites]
    assert rules.count("fuse.attention") == layers and rules.count("fuse.qkv") == merged
    targets = [node.target for node in opt.program.graph.nodes]
    assert targets.count(aten.scaled_dot_product_attention.default) == layers
    assert aten.softmax.int not in targets


def test_a_merged_weight_is_the_three_it_came_from() -> None:
    opt = kinds.optimized("llama", "fuse")
    model = kinds.build("llama")
    layer = model.model.layers[0].self_attn
    expected = torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
    assert torch.equal(opt.get_parameter("model.layers.0.self_attn.qkv_proj.weight"), expected)
    assert "model.layers.0.self_attn.q_proj.weight" not in dict(opt.named_parameters())
    assert sum(p.numel() for p in opt.parameters()) == sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------- spellings and refusals


class Attention(nn.Module):
    """One attention, written out, with the variations a rule must tell apart."""

    def __init__(
        self,
        *,
        bias: bool = True,
        scale: str = "mul",
        mask: str | None = None,
        dropout: float = 0.0,
        k_from: str = "x",
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.scale, self.mask, self.dropout, self.k_from = scale, mask, dropout, k_from

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x if self.k_from == "x" else x * 2), self.v(x)
        scores = q @ k.transpose(-1, -2)
        if self.scale == "mul":
            scores = scores * 0.3
        elif self.scale == "div":
            scores = scores / math.sqrt(WIDTH)
        if self.mask is not None:
            filled = -math.inf if self.mask == "infinite" else -1e9
            n = x.shape[1]
            causal = torch.full((n, n), filled).triu(1)
            scores = scores + causal
        weights = nn.functional.dropout(torch.softmax(scores, -1), self.dropout, self.training)
        return weights @ v


def fused(model: nn.Module, **options: object) -> Optimized:
    return rewriter.optimize(model, ["fuse"], example_inputs=sample(), **options)  # type: ignore[arg-type]


def sample(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(0))


def rules(opt: Optimized) -> list[str]:
    return [site.rule for site in opt.plan.sites]


def reasons(opt: Optimized, rule: str) -> str:
    return "\n".join(str(miss) for miss in opt.plan.misses if miss.rule.startswith(rule))


@pytest.mark.parametrize("mask", [None, "finite"])
@pytest.mark.parametrize("scale", ["none", "mul", "div"])
@pytest.mark.parametrize("bias", [True, False])
def test_spellings(bias: bool, scale: str, mask: str | None) -> None:
    model = Attention(bias=bias, scale=scale, mask=mask).eval()
    opt = fused(model)
    assert rules(opt) == ["fuse.attention", "fuse.qkv"]
    samples: Sequence[tuple[Tensor, ...]] = [(sample(),), (sample(3, 7),)]
    rewriter.verify(opt.original_program(), opt.program, samples).raise_if_failed()


def test_only_the_linears_of_one_input_are_merged() -> None:
    opt = fused(Attention(k_from="twice x").eval())
    assert rules(opt) == ["fuse.attention", "fuse.qkv"]
    assert opt.plan.sites[1].address.path == "qv_proj" and opt.plan.sites[1].paths == ("q", "v")
    rewriter.verify(opt.original_program(), opt.program, [(sample(),)]).raise_if_failed()


@pytest.mark.parametrize("kind", LANGUAGE)
def test_what_a_rule_merged_is_not_what_it_left_alone(kind: str) -> None:
    """GPT-2's layers come merged; those of the others are, and are no misses of the rule that did it."""
    reasons = [miss.reason for miss in kinds.optimized(kind, "fuse").plan.misses if miss.rule == "fuse.qkv"]
    assert set(reasons) == ({"q, k and v already come from one linear"} if kind == "gpt2" else set())


@pytest.mark.parametrize("split", [4, [4, 4, 4]], ids=["equal", "sizes"])
def test_a_packed_linear_is_known_however_it_is_split(split: int | list[int]) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(*self.qkv(x).split(split, -1))

    plan = rewriter.plan(rewriter.capture(Packed().eval(), (torch.rand(2, 3, 4),)), ["fuse"])
    (miss,) = [miss for miss in plan.misses if miss.rule == "fuse.qkv"]
    assert not plan.sites and miss.reason == "q, k and v already come from one linear"


def test_a_mask_with_minus_infinity_is_handed_on_where_every_row_sees_a_key() -> None:
    opt = fused(Attention(mask="infinite").eval())
    assert "fuse.attention" in rules(opt)  # where a row may see none: test_fuse_masks.py
    rewriter.verify(opt.original_program(), opt.program, [(sample(),), (sample(3, 7),)]).raise_if_failed()


def test_a_trained_and_a_frozen_weight_are_not_merged() -> None:
    model = Attention().eval()
    model.k.requires_grad_(False)
    opt = fused(model)
    assert rules(opt) == ["fuse.attention"]
    assert "frozen" in reasons(opt, "fuse.qkv")


def test_weights_of_two_dtypes_are_not_merged() -> None:
    model = Attention(bias=False).eval()
    model.k.weight.data = model.k.weight.data.double()
    plan = rewriter.plan(
        rewriter.capture(model, sample()), ["fuse"]
    )  # fake tensors do not mind; the model does not run
    assert "fuse.qkv" not in [site.rule for site in plan.sites]


def test_a_weight_read_elsewhere_is_not_merged() -> None:
    class Tied(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.q.weight.sum()

    opt = fused(Tied().eval())
    assert rules(opt) == ["fuse.attention"]
    assert "q.weight is also read outside" in reasons(opt, "fuse.qkv")


def test_one_linear_as_q_and_k_is_not_merged() -> None:
    model = Attention().eval()
    model.k = model.q
    opt = fused(model)
    assert rules(opt) == ["fuse.attention"]
    torch.testing.assert_close(opt(sample()), model(sample()))


def test_probabilities_that_are_returned_keep_the_attention_as_written() -> None:
    class Showing(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
            return weights @ self.v(x), weights

    model = Showing().eval()
    opt = fused(model)
    assert rules(opt) == []
    for a, b in zip(opt(sample()), model(sample()), strict=True):
        torch.testing.assert_close(a, b)


def test_training_with_dropout_keeps_the_written_attention_and_the_merged_weight() -> None:
    model = Attention(dropout=0.5).eval()
    opt = fused(model)
    assert rules(opt) == ["fuse.attention", "fuse.qkv"]
    opt.train()
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actual = opt(sample())
        torch.manual_seed(0)
        torch.testing.assert_close(actual, model(sample()))


def test_options_choose_the_rules() -> None:
    model = Attention().eval()
    only = rewriter.optimize(model, [rewriter.passes.Fuse(attention=False)], example_inputs=sample())
    assert rules(only) == ["fuse.qkv"]
    only = rewriter.optimize(model, [rewriter.passes.Fuse(qkv=False)], example_inputs=sample())
    assert rules(only) == ["fuse.attention"]
