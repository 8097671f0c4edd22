# SPDX-License-Identifier: Apache-2.0
"""Undo: a new `Optimized` with fewer rewrites, original tensors, and nothing learnt is lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rewriter
from rewriter.errors import PlanError
from rewriter.optimized import Optimized
from rewriter.passes import ShiftAdd

from . import kinds
from .kinds import KINDS, tokens
from .test_applying import shape

ATTENTION = "model.layers.0.self_attn"


def rules(opt: Optimized) -> list[str]:
    return [site.rule for site in opt.plan.sites]


@pytest.mark.parametrize("kind", KINDS)
def test_undoing_everything_gives_the_original_back(kind: str) -> None:
    opt = kinds.optimized(kind, "all")
    back = opt
    for name in ("vq_logits", "shift_add", "fuse"):
        if any(site.pass_name == name for site in back.plan.sites):
            back = back.undo(name)
    assert not back.plan.sites and not back.originals()
    identity = kinds.optimized(kind, "identity")
    assert shape(back.program) == shape(identity.program)
    kinds.assert_same(kinds.plain(kind)(back), kinds.plain(kind)(identity))
    assert back.state_dict().keys() == identity.state_dict().keys()
    assert len(list(back.parameters())) == len(list(identity.parameters()))  # ties are ties again
    assert rules(opt) == rules(kinds.optimized(kind, "all")) != []  # the one that was undone is as it was


@pytest.mark.parametrize("kind", KINDS)
def test_undoing_one_site_leaves_the_others(kind: str) -> None:
    opt = kinds.optimized(kind, "all")
    last = opt.plan.sites[-1]
    for name in (str(last.address), last.address.path):
        back = opt.undo(name)
        assert back.plan.sites == opt.plan.sites[:-1]
        assert (
            len(back.report.sites) == len(opt.report.sites) - 1 and back.report.bytes_after > opt.report.bytes_after
        )
    if kind in ("gpt2", "exported", "sequential"):
        select = {last.address.path: None}
        expected = rewriter.optimize(kinds.build_input(kind), kinds.passes("all"), select=select)
        torch.testing.assert_close(kinds.tensors(kinds.plain(kind)(back)), kinds.tensors(kinds.plain(kind)(expected)))


def test_by_pass_rule_and_original_path() -> None:
    opt = kinds.optimized("llama", "fuse")
    assert rules(opt).count("fuse.attention") == 2
    assert rules(opt.undo("fuse.attention")) == [name for name in rules(opt) if name != "fuse.attention"]
    assert rules(opt.undo("fuse")) == []
    assert len(opt.undo(f"{ATTENTION}.k_proj").plan.sites) == len(opt.plan.sites) - 1


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"called 'vq_logit' \(nearest: vq_logits"):
        kinds.optimized("llama", "all").undo("vq_logit")


def test_what_others_build_on_needs_cascade() -> None:
    opt = kinds.optimized("llama", "all")
    with pytest.raises(
        PlanError, match=r"shift_add\.linear at model\.layers\.0\.self_attn\.qkv_proj builds on it.*cascade=True"
    ):
        opt.undo("fuse.qkv")
    back = opt.undo("fuse.qkv", cascade=True)
    assert len(opt.plan.sites) - len(back.plan.sites) == 4  # two layers, each merged and then coded
    names = dict(back.named_parameters())
    assert torch.equal(
        names[f"{ATTENTION}.q_proj.weight"], kinds.build("llama").get_parameter(f"{ATTENTION}.q_proj.weight")
    )
    assert not [name for name in back.state_dict() if "qkv_proj" in name]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_merged_layer_that_was_trained_is_split_not_forgotten(kind: str) -> None:
    opt = copy.deepcopy(kinds.optimized(kind, "fuse"))
    with torch.no_grad():
        for parameter in opt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
    back = opt.undo("fuse")
    call = kinds.plain(kind)
    torch.testing.assert_close(kinds.tensors(call(back)), kinds.tensors(call(opt)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        next(iter(kinds.tensors(call(back)).values())),
        next(iter(kinds.tensors(call(kinds.build(kind))).values())),
        atol=1e-3,
    )


def test_other_layers_keep_what_they_learnt() -> None:
    opt = copy.deepcopy(kinds.optimized("sequential", "all"))
    with torch.no_grad():
        opt.get_parameter("0.bias").fill_(3)
    back = opt.undo("vq_logits")
    assert bool((back.get_parameter("0.bias") == 3).all()) and "0.weight_scale" in dict(back.named_parameters())
    assert torch.equal(back.get_parameter("4.weight"), kinds.build("sequential").get_parameter("4.weight"))


def test_the_two_are_apart() -> None:
    opt = copy.deepcopy(kinds.optimized("sequential", "all"))
    back = opt.undo("vq_logits")
    expected = kinds.plain("sequential")(back)
    with torch.no_grad():
        for parameter in opt.parameters():
            parameter.zero_()
    opt.train()
    assert not back.training
    kinds.assert_same(kinds.plain("sequential")(back), expected)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("llama", "double"), ("llama", "train"), ("gpt2", "half"), ("sequential", "half"), ("sequential", "train")],
)
def test_after_a_cast_or_in_training_mode(kind: str, change: str) -> None:
    opt = copy.deepcopy(kinds.optimized(kind, "all"))
    getattr(opt, change)()
    back: Any = opt
    for name in ("vq_logits", "shift_add"):
        back = back.undo(name)
    dtype = {"half": torch.float16, "double": torch.float64}.get(change, torch.float32)
    assert {p.dtype for p in back.parameters()} == {dtype} and back.training == (change == "train")
    back.eval()
    expected = getattr(kinds.build(kind), change)().eval()
    call = kinds.plain(kind).to(dtype)
    tolerance = {"half": 2e-2, "double": 1e-10}.get(change, 1e-4)
    torch.testing.assert_close(kinds.tensors(call(back)), kinds.tensors(call(expected)), rtol=0, atol=tolerance)


def test_undone_models_do_all_an_optimised_one_does(tmp_path: Any) -> None:
    back = kinds.optimized("llama", "all").undo("vq_logits")
    mask = kinds.padded(2, 6, "left")
    plain = back(input_ids=tokens(2, 6), attention_mask=mask)
    labelled = back(input_ids=tokens(2, 6), attention_mask=mask, labels=tokens(2, 6))  # captured anew
    torch.testing.assert_close(labelled.logits, plain.logits)
    back.save(tmp_path / "saved")
    for again in (rewriter.load(tmp_path / "saved"), copy.deepcopy(back)):
        kinds.assert_same(again(input_ids=tokens(2, 6), attention_mask=mask), plain)


def test_a_shared_layer_comes_back_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.again = self.layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(torch.relu(self.layer(x)))

    model, x = Twice().eval(), torch.randn(3, 16)
    opt = rewriter.optimize(model, [ShiftAdd(group=8)], example_inputs=x)
    assert not [name for name in opt.state_dict() if name.endswith("weight")]  # under neither of its names
    back = opt.undo("shift_add")
    assert back.state_dict().keys() == model.state_dict().keys()
    assert back.layer.weight is back.again.weight and torch.equal(back(x), model(x))
