# SPDX-License-Identifier: Apache-2.0
"""The linear-attention pass: where it applies, what it puts there, and every way of calling and running the result."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import rewriter
from rewriter import UntrainedWarning
from rewriter.errors import PlanError
from rewriter.passes import LinearAttention
from rewriter.passes.linear_attention.form import Form
from rewriter.passes.linear_attention.gate import has_kernel, pays_from

VOCABULARY, LENGTH = 50, 24
UNTRAINED = {
    "gated delta": {"rule": "delta", "gate": "fixed", "calibrate": False},
    "key gates": {"gate": "key", "calibrate": False},
}
FORMS: dict[str, dict[str, Any]] = {"landmark": {}, **UNTRAINED}
MODULES = ["landmark", "gated delta"]  # forms that go back into the model's class
SITE = "model.layers.0.self_attn"
SMALL_FORMS: dict[str, dict[str, Any]] = {
    "terrace": {"block": "terrace", "sinks": 2},
    "hedgehog": {"feature_map": "hedgehog", "gate": "fixed", "anchor": "max"},
    "no window": {"window": None, "feature_map": "elu"},
    "decayed": {"window": None, "feature_map": "identity", "gate": "fixed"},
}


def tokens(rows: int = 4, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def llama(layers: int = 1) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


@cache
def optimized(form: str) -> rewriter.Optimized:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        return rewriter.optimize(
            llama(), [LinearAttention(min_length=None, **({"window": 4} | FORMS[form]))], calibration=[tokens()]
        )


def logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids, **more).logits
    return out


class Small(nn.Module):
    """Self-attention alone, which is captured in a tenth of the time of a model: 4 heads of 8 on 2 key heads."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.project = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (8, 8)).transpose(1, 2)
        p = self.dropout if self.training else 0.0
        q, k, v = heads[:, :4], heads[:, 4:6], heads[:, 6:]
        out = nn.functional.scaled_dot_product_attention(q, k, v, None, p, True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def inputs(rows: int = 4, length: int = LENGTH, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def small(*, layers: int = 1, dropout: float = 0.0, data: bool = True, **options: Any) -> rewriter.Optimized:
    """`Small`, or several in a row, rewritten with a window of 4."""
    torch.manual_seed(1)
    rewrite = LinearAttention(**({"window": 4, "min_length": None} | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        model = nn.Sequential(*(Small(dropout) for _ in range(layers))).eval()
        return rewriter.optimize(model, [rewrite], (inputs(),), calibration=[(inputs(),)] if data else None)


# ----------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize(
    "options", [{"window": LENGTH}, {"window": 12, "block": "terrace"}, {"window": 2, "sinks": LENGTH}]
)
def test_a_window_over_everything_is_exactly_softmax(options: dict[str, Any]) -> None:
    """No key outside the window: the linear branch has nothing to add, whatever its map (here the untrained elu)."""
    opt, x = small(feature_map="elu", calibrate=False, data=False, **options), inputs()
    torch.manual_seed(1)
    assert len(opt.plan.sites) == 1
    torch.testing.assert_close(opt(x), Small()(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", SMALL_FORMS)
def test_it_is_causal_and_serves_other_shapes(form: str) -> None:
    opt, x, other = small(**SMALL_FORMS[form]), inputs(), inputs()
    other[:, 15:] = inputs(seed=1)[:, 15:]
    whole = opt(x)
    torch.testing.assert_close(whole[:, :15], opt(other)[:, :15], rtol=0, atol=5e-6)
    torch.testing.assert_close(opt(x[:1, :1]), whole[:1, :1], rtol=0, atol=5e-6)


def test_gates_of_keys_before_rotary_are_causal() -> None:
    """The other forms of a model are decoded, token by token."""
    ids, other = tokens(), tokens()
    other[:, 15:] = tokens(seed=1)[:, 15:]
    opt = optimized("key gates")
    torch.testing.assert_close(logits(opt, ids)[:, :15], logits(opt, other)[:, :15], rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_padding_on_the_left_is_as_if_it_were_not_there(form: str) -> None:
    opt, ids = optimized(form), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    changed = torch.where(mask.bool(), ids, 3)
    assert torch.equal(logits(opt, ids, attention_mask=mask)[:, 5:], logits(opt, changed, attention_mask=mask)[:, 5:])
    if form != "key gates":  # these see keys before rotary, all others see only differences of positions
        short = logits(opt, ids[:, 5:])
        torch.testing.assert_close(logits(opt, ids, attention_mask=mask)[:, 5:], short, rtol=0, atol=5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_batch_one_length_one_and_right_padding(form: str) -> None:
    opt, ids = optimized(form), tokens()
    whole = logits(opt, ids)
    torch.testing.assert_close(logits(opt, ids[:1]), whole[:1], rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(opt, ids[:, :1]), whole[:, :1], rtol=0, atol=2e-6)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    torch.testing.assert_close(logits(opt, ids, attention_mask=mask)[:, :20], whole[:, :20], rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("form", MODULES)
def test_decoding_equals_the_parallel_form_with_constant_memory(form: str) -> None:
    opt, ids = optimized(form), tokens(2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    state = rewriter.DecodeState(opt)
    for padding in (None, mask):
        expected = logits(opt, ids, **({} if padding is None else {"attention_mask": padding}))
        state.reset()
        parts = [state.prefill(ids[:, :9], None if padding is None else padding[:, :9], chunk=4)]
        held = state.nbytes
        parts += [state.step(ids[:, t])[:, None] for t in range(9, LENGTH)]
        torch.testing.assert_close(torch.cat(parts, 1)[:, 3:], expected[:, 3:], rtol=0, atol=2e-6)
        assert state.constant and state.nbytes == held > 0 and state.length == LENGTH
    assert state.by_class == {"landmark": "", "gated delta": f"{SITE}: more than one operator of it has a state"}[form]
    state.reset()
    state.prefill(ids[:1, :9])  # another number of sequences, and steps in between that need the class
    with torch.autocast("cpu"):
        state.step(ids[:1, 9])
    state.step(ids[:1, 10])
    assert state.length == 11 and state.step(ids[:1, 11]).shape == (1, VOCABULARY)


def test_features_of_positions_are_decoded_by_the_class() -> None:
    """A graph of one token would number each of them 0."""
    opt = rewriter.optimize(
        llama(),
        [LinearAttention(min_length=None, window=4, feature_map="cosformer", horizon=LENGTH)],
        calibration=[tokens()],
    )
    ids, state = tokens(2), rewriter.DecodeState(opt)
    parts = [state.prefill(ids[:, :9])] + [state.step(ids[:, t])[:, None] for t in range(9, LENGTH)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(opt, ids), rtol=0, atol=2e-6)
    assert "cumsum" in state.by_class


def test_a_softmax_layer_that_was_kept_keeps_its_keys() -> None:
    opt = rewriter.optimize(
        llama(2), [LinearAttention(min_length=None, window=4, keep_softmax_every=2)], calibration=[tokens()]
    )
    assert [s.paths for s in opt.report.sites] == [("model.layers.0.self_attn",)]
    ids, state = tokens(2), rewriter.DecodeState(opt)
    parts = [state.prefill(ids[:, :9])]
    held = state.nbytes
    parts += [state.step(ids[:, t])[:, None] for t in range(9, LENGTH)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(opt, ids), rtol=0, atol=2e-6)
    keys_and_values = 2 * ids.shape[0] * 2 * (LENGTH - 9) * 8 * 4  # two key heads of width 8, float32
    assert not state.constant and state.nbytes == held + keys_and_values


def test_decoding_refuses_what_it_cannot_do() -> None:
    state = rewriter.DecodeState(optimized("landmark"))
    right = torch.ones(2, 6, dtype=torch.long)
    right[:, 4:] = 0
    with pytest.raises(PlanError, match="on the left"):
        state.prefill(tokens(2, 6), right)
    state.prefill(tokens(2, 6))
    with pytest.raises(PlanError, match="already holds 6 tokens"):
        state.prefill(tokens(2, 6))
    with pytest.raises(PlanError, match="causal language model of transformers"):
        rewriter.DecodeState(nn.Linear(2, 2))


@pytest.mark.parametrize("form", MODULES)
def test_to_module_generates_what_the_greedy_loop_does(form: str) -> None:
    opt, ids = optimized(form), tokens(2, 8)
    module = opt.to_module()
    assert type(module) is hf.LlamaForCausalLM
    torch.testing.assert_close(logits(module, ids), logits(opt, ids), rtol=0, atol=2e-6)
    module.generation_config.eos_token_id = None
    generated = module.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    for _ in range(8):
        ids = torch.cat([ids, logits(opt, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, ids)


def test_gates_of_keys_before_rotary_have_no_module_form() -> None:
    with pytest.raises(PlanError, match="no module form"):
        optimized("key gates").to_module()


# --------------------------------------------------------------------------------------------- life of a model


@pytest.mark.parametrize("form", UNTRAINED)
def test_untrained_forms_train(form: str) -> None:
    opt = small(**UNTRAINED[form])
    opt.train()
    opt(inputs(2, 12)).square().mean().backward()
    still = [n for n, p in opt.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    assert len(opt.plan.sites) == 1 and not still


def test_it_trains_and_casts() -> None:
    opt, ids = copy.deepcopy(optimized("landmark")), tokens(2, 12)
    own = {n: p for n, p in opt.named_parameters() if n.rpartition(".")[0].endswith("self_attn")}
    opt.train()
    opt(ids, labels=ids).loss.backward()
    still = [n for n, p in own.items() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    assert own and not still
    expected = logits(opt.eval(), ids)
    result = logits(opt.to(torch.bfloat16), ids)
    assert result.dtype == torch.bfloat16
    lost = (logits(copy.deepcopy(llama()).to(torch.bfloat16), ids).float() - logits(llama(), ids)).abs().max()
    assert (result.float() - expected).abs().max() <= 2 * lost


def test_it_saves_and_loads(tmp_path: Path) -> None:
    opt, ids = optimized("landmark"), tokens(2, 12)
    opt.save(tmp_path / "m")
    torch.testing.assert_close(logits(rewriter.load(tmp_path / "m"), ids), logits(opt, ids), rtol=0, atol=2e-6)
    assert (tmp_path / "m").exists() and opt.undo("linear_attention").plan.sites == ()


def test_parameters_are_named_after_the_attention_and_the_report_has_the_errors() -> None:
    opt = optimized("landmark")
    names = {n.rpartition(".")[2] for n, _ in opt.named_parameters() if n.startswith("model.layers.0.self_attn.")}
    own = {
        "choice_weight",
        "choice_bias",
        "gain_weight",
        "gain_bias",
        "key_weight",
        "key_bias",
        "window_gate",
        "map_scale",
    }
    assert own <= names
    for site in opt.report.sites:
        assert site.contract == "CALIBRATED"
        assert site.figures["output_error"] <= site.figures["window_error"]


# ------------------------------------------------------------------------------------------ other architectures


def test_bidirectional_attention_of_an_encoder() -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=32,
    )  # fmt: skip
    model = hf.BertModel(config).eval()
    opt = rewriter.optimize(
        model, [LinearAttention(min_length=None)], calibration=[tokens()], expect={"linear_attention": 1}
    )
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:] = 0
    with torch.no_grad():
        padded = opt(ids, attention_mask=mask).last_hidden_state[0, :6]
        alone = opt(ids[:1, :6], attention_mask=mask[:1, :6]).last_hidden_state[0]
        back = opt.to_module()(ids, attention_mask=mask).last_hidden_state[0, :6]
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(padded, back, rtol=0, atol=2e-6)


def test_in_training_it_drops_out() -> None:
    opt, x = small(dropout=0.5), inputs(2, 12)
    assert len(opt.plan.sites) == 1 and torch.equal(opt(x), opt(x))
    opt.train()
    assert not torch.equal(opt(x), opt(x))


class Cross(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k = x.unflatten(-1, (2, 4)).transpose(1, 2), y.unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


def test_cross_attention_forgets_the_order_of_its_keys() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 7, 8, generator=g), torch.randn(4, 11, 8, generator=g)
    opt = rewriter.optimize(
        Cross(), [LinearAttention(min_length=None)], (x, y), calibration=[(x, y)], expect={"linear_attention": 1}
    )
    expected = opt(x, y)
    torch.testing.assert_close(opt(x, y.flip(1)), expected, rtol=0, atol=2e-6)
    exact = Cross()(x, y)
    assert (expected - exact).norm() < (y.mean(1, keepdim=True) - exact).norm()  # what a constant map would give


class Attention(nn.Module):
    """softmax(f(q kᵀ)) v with what is to be refused."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.mT * 0.5
        if self.kind == "cap":
            scores = torch.tanh(scores / 30.0) * 30.0
        if self.kind == "bias":
            at = torch.arange(x.shape[1])
            scores = scores + 0.1 * (at[None] - at[:, None]).abs()
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("kind", "reason"), [("cap", "caps the scores with 30"), ("bias", "bias")])
def test_scores_that_are_no_product_of_features_are_refused(kind: str, reason: str) -> None:
    x = torch.randn(2, 6, 8)
    plan = rewriter.plan(rewriter.capture(Attention(kind), (x,)), [LinearAttention(min_length=None)])
    assert not plan.sites and any(reason in miss.reason for miss in plan.misses)


def test_gates_need_an_order() -> None:
    plan = rewriter.plan(
        rewriter.capture(Attention("plain"), (torch.randn(2, 6, 8),)),
        [LinearAttention(min_length=None, gate="key", calibrate=False)],
    )
    assert not plan.sites and any("no order to follow" in miss.reason for miss in plan.misses)


# ------------------------------------------------------------------------------------------- what stays softmax


def test_without_data_sites_are_kept_and_the_report_says_why() -> None:
    opt = small(data=False)
    assert not opt.plan.sites and all("give calibration=" in miss.reason for miss in opt.report.misses)


def test_short_sequences_are_kept_and_the_report_says_so() -> None:
    opt = small(min_length="auto")
    assert not opt.plan.sites
    assert all("the rewrite pays from" in miss.reason and "have 24" in miss.reason for miss in opt.report.misses)
    assert len(small(min_length=LENGTH).plan.sites) == 1


def test_the_most_sensitive_attention_is_kept() -> None:
    every = small(layers=2, feature_map="elu").report.sites
    (site,) = small(layers=2, feature_map="elu", keep_softmax_every=2, keep="sensitivity").report.sites
    errors = sorted(s.figures["output_error"] for s in every)
    assert site.figures["output_error"] == errors[0] < errors[1]


def test_the_gate_opens_later_for_more_work_and_never_below_the_window() -> None:
    def form(window: int, causal: bool = True) -> Form:
        return Form("landmark", 0.125, window, "sliding", 0, "none", causal, 8)

    small, large = (pays_from(form(64), 8, 64, features, "cuda") for features in (32, 256))
    assert 64 < small <= large
    assert pays_from(form(64), 8, 64, 128, "cuda") <= pays_from(form(1024), 8, 64, 128, "cuda")
    assert pays_from(form(0, causal=False), 8, 64, 128, "cpu") <= pays_from(form(64), 8, 64, 128, "cpu")
    blocks = dataclasses.replace(form(64), block="terrace")
    assert 4 * pays_from(form(64), 8, 64, 128, "cpu") < pays_from(blocks, 8, 64, 128, "cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 0},
        {"gate": "fixed"},
        {"block": "terrace"},
        {"sinks": 1},
        {"causal": False, "window": 0},
        {"gate": "key"},
    ],
    ids=str,
)
def test_the_gate_knows_where_the_reference_runs(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    form = Form(**({"feature_map": "elu", "scale": 0.5, "window": 4, "block": "sliding", "sinks": 0} | {
        "anchor": "max", "causal": True, "heads": 2} | options))  # fmt: skip
    tensors = {role: torch.zeros(2) for role in form.roles}
    with caplog.at_level(logging.DEBUG, "rewriter"), torch.no_grad():
        form.call(*(torch.randn(1, 2, 9, 8) for _ in range(3)), None, tensors)
    assert has_kernel(form, "cpu") == ("runs its reference" not in caplog.text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"feature_map": "landmarks"}, "nearest: landmark"),
        ({"window": 0}, "at least 1 key"),
        ({"window": None, "sinks": 1}, "options of the window"),
        ({"gate": "key"}, "calibrate=False"),
        ({"gate": "key", "rule": "delta", "calibrate": False}, "additive rule"),
        ({"calibrate": False}, "placed from data"),
        ({"features": 8, "feature_map": "elu"}, "counts landmarks"),
        ({"keep_softmax_every": 1}, "at least 2"),
        ({"min_length": "long"}, "a length, 'auto' or None"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        LinearAttention(**options)
