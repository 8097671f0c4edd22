# SPDX-License-Identifier: Apache-2.0
"""Undo: a new `Optimized` with fewer rewrites, original tensors, and nothing learnt is lost."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import rewriter
from rewriter import registry
from rewriter.errors import PlanError
from rewriter.operators import mul, neg, sigmoid, silu
from rewriter.optimized import Optimized
from rewriter.passes import ShiftAdd
from rewriter.pattern import Var, pattern
from rewriter.rules import EXACT, Pass, Rule
from rewriter.views import LINEAR

from . import kinds
from .kinds import KINDS, tokens
from .test_applying import shape

aten = torch.ops.aten
x = Var("x")
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


# --------------------------------------------------------------------------------------------------- several rounds


@rewriter.rule(pattern("σ(x)·x", sigmoid(x) * x))
def undo_silu(edit: Any, x: Any) -> Any:
    """σ(x)·x = silu(x)"""
    return edit.call(aten.silu.default, x)


@rewriter.rule(pattern("-(silu(-x))", neg(silu(neg(x)))))
def undo_mirrored(edit: Any, x: Any) -> Any:
    """-silu(-x) = x·σ(-x)"""
    return edit.call(aten.mul.Tensor, x, edit.call(aten.sigmoid.default, edit.call(aten.neg.default, x)))


@rewriter.rule(pattern("-(-x)", neg(neg(x))))
def undo_negation(edit: Any, x: Any) -> Any:
    """-(-x) = x"""
    return x


class Mirrored(nn.Module):
    """Per layer -silu(-x), the silu written out; the second one is not mirrored."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = -self.layers[0](x)
        x = -(torch.sigmoid(x) * x)
        x = self.layers[1](x)
        return torch.sigmoid(x) * x + 1


def mirrored(passes: list[Any]) -> tuple[Mirrored, Optimized, torch.Tensor]:
    model, example = Mirrored().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    return model, rewriter.optimize(model, passes, example_inputs=example), example


def test_a_site_that_another_rewrote_in_turn_refuses_and_names_it() -> None:
    model, opt, example = mirrored([undo_silu, undo_mirrored])
    assert rules(opt) == ["undo_silu", "undo_silu", "undo_mirrored"]
    first, second, third = (str(site.address) for site in opt.plan.sites)
    assert opt.report.sites[2].based_on == (first,)
    with pytest.raises(PlanError, match=r"cannot be undone alone: undo_mirrored at .* builds on it; .*cascade=True"):
        opt.undo(first)
    back = opt.undo(first, cascade=True)
    assert [str(site.address) for site in back.plan.sites] == [second]
    assert [str(site.address) for site in opt.undo(third).plan.sites] == [first, second]
    for one in (opt, back, opt.undo(third), opt.undo("undo_silu", cascade=True)):
        torch.testing.assert_close(one(example), model(example), rtol=1e-14, atol=1e-14)


def test_one_site_of_the_first_round_comes_back_and_the_later_rounds_stay() -> None:
    model, opt, example = mirrored([undo_silu, undo_mirrored])
    second = str(opt.plan.sites[1].address)
    back = opt.undo(second)
    assert rules(back) == ["undo_silu", "undo_mirrored"]
    names = [str(node.target) for node in back.program.graph.nodes]
    assert names.count("aten.sigmoid.default") == 2 and "aten.silu.default" not in names
    torch.testing.assert_close(back(example), model(example), rtol=1e-14, atol=1e-14)


def test_what_is_found_only_after_a_site_needs_it() -> None:
    """No node of the first rewrite is in the second: it took away what stood between."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.sigmoid(x)
            return torch.neg(torch.neg(self.layer(x))).mul(1) + x

    @rewriter.rule(pattern("linear·1", mul(Var("x", (lambda facts, node: node.target is aten.linear.default,)), 1)))
    def undo_unit(edit: Any, x: Any) -> Any:
        """x·1 = x, where x is a linear"""
        return x

    model, example = Hidden().eval(), torch.randn(3, 4)
    opt = rewriter.optimize(model, [undo_unit, undo_negation], example_inputs=example)
    assert rules(opt) == ["undo_negation", "undo_unit"]
    with pytest.raises(PlanError, match=r"undo_unit at .* is found only after it"):
        opt.undo("undo_negation")
    assert rules(opt.undo("undo_unit")) == ["undo_negation"]
    assert rules(opt.undo("undo_negation", cascade=True)) == []


class _Halving(Rule):
    """x Wᵀ = 2 · x (W/2)ᵀ, where the last value is not doubled yet; the weight keeps its name."""

    name = "halving"
    role = "linear"
    contract = EXACT
    parametric = True

    def __init__(self, times: int) -> None:
        self.times = times

    def find(self, program: Any) -> Any:
        def doubled(match: Any) -> int:
            value, count = next(iter(match.root.users), None), 0
            while value is not None and value.target is aten.mul.Tensor:
                value, count = next(iter(value.users), None), count + 1
            return count

        return [m for m in LINEAR.find(program) if m["bias"] is None and doubled(m) < self.times], ()

    def replaced_tensors(self, match: Any) -> tuple[str, ...]:
        return (str(match["weight"].target),)

    def roles(self, match: Any, choice: Any) -> tuple[str, ...]:
        return ("weight",)

    def initialise(self, site: Any, read: Any, choice: Any, statistics: Any, generator: Any) -> Any:
        return {"weight": nn.Parameter(read(str(site.match["weight"].target)).detach() / 2)}

    def rewrite(self, edit: Any, match: Any, parameters: Any, choice: Any) -> Any:
        return {match.root: edit.call(aten.mul.Tensor, edit.call(aten.linear.default, match["x"], parameters["weight"]), 2)}


@registry.register
@dataclasses.dataclass(frozen=True)
class Halving(Pass):
    """For tests: one parameter rewritten several times under one name."""

    name = "undo_halving"
    contract = EXACT
    times: int = 2

    def rules(self) -> tuple[Rule, ...]:
        return (_Halving(self.times),)


def test_a_parameter_that_two_rounds_rewrote_under_one_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()).eval()
    example = torch.randn(3, 4)
    opt = rewriter.optimize(model, [Halving()], example_inputs=example)
    assert [(site.address.round, site.stage) for site in opt.plan.sites] == [(0, 0), (1, 1)]
    assert torch.equal(opt.get_parameter("0.weight"), model[0].weight / 4)
    assert torch.equal(opt.originals()["0.weight"], model[0].weight)
    torch.testing.assert_close(opt(example), model(example))
    torch.testing.assert_close(opt(torch.randn(7, 4).relu()).shape, torch.Size([7, 4]))
    first, second = (str(site.address) for site in opt.plan.sites)
    with pytest.raises(PlanError, match="builds on it"):
        opt.undo(first)
    with pytest.raises(PlanError, match="made the tensors it replaced, whose values were not kept"):
        opt.undo(second)
    for name in (first, second):
        back = opt.undo(name, cascade=True)
        assert back.plan.sites == () and torch.equal(back.get_parameter("0.weight"), model[0].weight)
        assert torch.equal(back(example), model(example))


def test_albert_is_rewritten_once_for_all_its_layers() -> None:
    config = hf.AlbertConfig(
        vocab_size=64, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    model = hf.AlbertModel(config, add_pooling_layer=False).eval()
    opt = rewriter.optimize(model, ["fuse", ShiftAdd(group=8, bits=8)])
    assert rules(opt).count("fuse.qkv") == 1
    linear = torch.ops.rewriter.bcq_linear.default
    calls = [n for n in opt.program.graph.nodes if n.target is linear]
    assert len(calls) == 3 * 4 + 1  # qkv, dense, ffn and ffn_output of three layers, and the mapping before them
    assert len({n.args[1] for n in calls}) == 4 + 1
    ids = torch.randint(2, 64, (2, 7))
    back = opt.undo("shift_add").undo("fuse")
    torch.testing.assert_close(back(ids).last_hidden_state, model(ids).last_hidden_state)
