# SPDX-License-Identifier: Apache-2.0
"""ShiftAddViT's attention as a pass: where it goes, where it does not and why, what it starts from."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViTConfig, ViTModel

import rewriter
from rewriter.errors import PlanError, UntrainedWarning
from rewriter.passes.shift_add.additive import ShiftAttention

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=100, **SMALL)).eval()


def rewritten(model: torch.nn.Module, *options: object, **given: object) -> rewriter.Optimized:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        return rewriter.optimize(model, ["fuse", *options], **given)


def test_bidirectional_models_are_rewritten_and_say_they_are_untrained() -> None:
    with pytest.warns(UntrainedWarning, match="shift_attention"):
        opt = rewriter.optimize(bert(), ["fuse", ShiftAttention()])
    sites = [s for s in opt.report.sites if s.rule == "shift_attention.attention"]
    assert [s.contract for s in sites] == ["LEARNED"] * 2
    image = ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL)).eval()
    opt = rewritten(image, "shift_attention", example_inputs=(torch.randn(2, 3, 32, 32),))
    assert sum(s.rule == "shift_attention.attention" for s in opt.report.sites) == 2


def test_causal_attention_is_left_alone_with_a_reason() -> None:
    config = LlamaConfig(vocab_size=100, num_key_value_heads=2, **SMALL)
    opt = rewritten(LlamaModel(config).eval(), "shift_attention")
    assert not [s for s in opt.report.sites if s.rule.startswith("shift_attention")]
    assert {m.reason for m in opt.report.misses if m.rule.startswith("shift_attention")} == {
        "the mask is causal+padding"
    }


def test_padding_is_not_seen() -> None:
    opt = rewritten(bert(), ShiftAttention(taps=3))
    torch.nn.init.normal_(dict(opt.named_parameters())["encoder.layer.0.attention.self.conv"])
    mask = torch.ones_like(IDS)
    mask[0, 5:] = 0
    other = IDS.clone()
    other[0, 5:] = 7
    before, after = (opt(input_ids=x, attention_mask=mask).last_hidden_state for x in (IDS, other))
    assert torch.equal(before[0, :5], after[0, :5]) and torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0, 5:], after[0, 5:])


def test_calibration_sets_the_size_of_what_leaves_a_head() -> None:
    model, seen = bert(), []
    hook = model.encoder.layer[0].attention.self.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    model(input_ids=IDS)
    hook.remove()
    opt = rewritten(model, ShiftAttention(), calibration=[{"input_ids": IDS}])
    gain = dict(opt.named_parameters())["encoder.layer.0.attention.self.gain"]
    per_head = seen[0].detach().unflatten(-1, (4, 8)).square().sum(-1).mean().sqrt()
    torch.testing.assert_close(gain.detach(), per_head.expand(4), rtol=1e-5, atol=0)


def test_it_trains_and_saves(tmp_path: object) -> None:
    opt = rewritten(bert(), ShiftAttention(taps=3))
    opt.train()
    hidden = opt(input_ids=IDS).last_hidden_state
    (hidden * torch.randn(hidden.shape)).sum().backward()  # a norm's output has the same square whatever goes in
    gains = [p for n, p in opt.named_parameters() if n.endswith(("gain", "conv"))]
    assert len(gains) == 4 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in gains)
    opt.eval()
    opt.save(tmp_path / "saved")  # type: ignore[operator]
    loaded = rewriter.load(tmp_path / "saved")  # type: ignore[operator]
    mask = torch.ones_like(IDS)
    expected = opt(input_ids=IDS, attention_mask=mask).last_hidden_state
    assert torch.equal(loaded(input_ids=IDS, attention_mask=mask)[0], expected)


def test_options_are_checked() -> None:
    with pytest.raises(PlanError, match="odd"):
        ShiftAttention(taps=4)
    with pytest.raises(PlanError, match="allow_untrained"):
        rewriter.optimize(bert(), ["fuse", ShiftAttention()], allow_untrained=False)
