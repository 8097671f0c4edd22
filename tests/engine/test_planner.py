# SPDX-License-Identifier: Apache-2.0
"""Plans: decisions that survive JSON, name their sites by module path, and obey ``select`` and ``expect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.errors import LegalityError, PlanError
from rewriter.optimizing import carry_out
from rewriter.passes import ShiftAdd, VQLogits
from rewriter.planner import Plan, dumps

from . import kinds
from .kinds import KINDS, tokens

Q, K, V = (f"model.layers.0.self_attn.{r}_proj" for r in "qkv")


def llama_plan(passes: list[Any], **options: Any) -> Plan:
    return rewriter.plan(kinds.optimized("llama", "identity").program, passes, **options)


def taken(plan: Plan) -> dict[str, str]:
    return {path: site.rule for site in plan.sites for path in site.paths}


def why(plan: Plan, rule: str, path: str) -> str:
    return "\n".join(miss.reason for miss in plan.misses if miss.rule == rule and miss.site == path)


# -------------------------------------------------------------------------------------------------- as data


@pytest.mark.parametrize("kind", KINDS)
def test_json_and_back(kind: str) -> None:
    plan = kinds.optimized(kind, "all").plan
    text = dumps(plan)
    again = Plan.from_json(json.loads(text))
    assert again == plan and dumps(again) == text


@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_the_same_model_gives_the_same_bytes(kind: str) -> None:
    """Also with other weights and another capture: a plan is about structure."""
    found = []
    for seed in (7, 7, 8):
        program = rewriter.capture(kinds.build(kind, seed=seed))
        found.append(dumps(rewriter.plan(program, kinds.passes("all"))))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_the_same_plan_gives_the_same_files(kind: str, tmp_path: Path) -> None:
    """Every byte that is saved: graph, tensors, plan, manifest."""
    plan = kinds.optimized(kind, "all").plan
    for name in ("first", "second"):
        carry_out(kinds.build(kind), Plan.from_json(json.loads(dumps(plan)))).save(tmp_path / name)
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("first", "second")]
    assert files[0].keys() == files[1].keys() >= {"graph.json", "plan.json", "model.safetensors"}
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def test_a_plan_holds_no_tensor_and_no_node_name() -> None:
    opt = kinds.optimized("llama", "all")
    text = dumps(opt.plan)
    assert len(text) < 40_000
    names = {node.name for node in opt.original.graph.nodes if node.op == "call_function" and "_" in node.name}
    assert not [name for name in names if f'"{name}"' in text]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"schema": None}, "schema None"),
        ({"sites": 3}, "not a plan"),
        ({"sites": [{"address": {}}]}, "not a plan"),
    ],
)
def test_what_is_no_plan_is_refused(change: dict[str, Any], message: str) -> None:
    data = kinds.optimized("sequential", "all").plan.to_json()
    with pytest.raises(PlanError, match=message):
        Plan.from_json(data | change)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pass", "shift_ad", "unknown pass 'shift_ad' .*nearest: shift_add"),
        ("rule", "shift_add.linea", "has no rule 'shift_add.linea'"),
        ("version", 9, "version 1 here, 9 in the plan"),
        ("settings", {"bitz": 4}, "no option 'bitz'.*nearest: bits"),
    ],
)
def test_a_plan_for_rules_that_are_not_here_is_refused(field: str, value: Any, message: str) -> None:
    data = kinds.optimized("sequential", "all").plan.to_json()
    data["sites"][0][field] = value
    with pytest.raises(PlanError, match=message):
        Plan.from_json(data)


# ---------------------------------------------------------------------------------------------- re-applying


@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_a_plan_fits_a_checkpoint_with_other_weights(kind: str) -> None:
    plan = Plan.from_json(kinds.optimized(kind, "all").plan.to_json())
    other = kinds.build(kind, seed=8)
    expected = rewriter.optimize(other, kinds.passes("all"))
    again = carry_out(other, plan)
    kinds.assert_same(kinds.plain(kind)(again), kinds.plain(kind)(expected))
    program = expected.original_program()
    applied = rewriter.apply(program, plan)
    for a, b in zip(applied.run(*program.example), expected.program.run(*program.example), strict=True):
        assert torch.equal(a, b)


def test_a_plan_for_another_structure_is_refused() -> None:
    plan = kinds.optimized("sequential", "all").plan
    wider = nn.Sequential(
        nn.Linear(40, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 512)
    ).eval()
    with pytest.raises(PlanError, match=r"made for a program of structure \w+, this one is \w+.*rewriter\.plan"):
        rewriter.apply(rewriter.capture(wider), plan)
    with pytest.raises(PlanError, match="structure"):
        carry_out(kinds.build("llama"), plan)


def test_a_plan_with_statistics_is_refused_without() -> None:
    model = kinds.build("llama")
    program = rewriter.capture(model)
    passes = [VQLogits(structure="product")]
    statistics = rewriter.calibrate(program, passes, [tokens(4, 16)])
    plan = rewriter.plan(program, passes, statistics=statistics)
    assert plan.statistics_digest == statistics.digest()
    with pytest.raises(PlanError, match="calibration statistics"):
        rewriter.apply(program, plan)
    with pytest.raises(PlanError, match="calibration statistics"):
        carry_out(model, plan)
    assert rewriter.apply(program, plan, statistics).graph.find_nodes(
        op="call_function", target=torch.ops.rewriter.vq_logits_product.default
    )
    assert len(carry_out(model, plan, calibration=[tokens(4, 16)]).plan.sites) == 1


# --------------------------------------------------------------------------------------------------- select


def test_an_exact_path_beats_a_regular_expression_and_the_first_expression_wins() -> None:
    select = {
        r"re:.*layers\.0\..*": None,
        r"re:.*mlp.*": "shift_add",
        "model.layers.0.mlp.up_proj": "shift_add",
        r"re:.*self_attn.*": None,
        "lm_head": None,
    }
    plan = llama_plan([ShiftAdd(group=32)], select=select)
    assert taken(plan).keys() == {
        "model.layers.0.mlp.up_proj",
        *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")),
    }
    assert (
        why(plan, "shift_add.linear", "model.layers.0.mlp.down_proj")
        == r"protected by select['re:.*layers\\.0\\..*']"
    )
    assert why(plan, "shift_add.linear", "lm_head") == "protected by select['lm_head']"


def test_a_regular_expression_matches_whole_paths() -> None:
    plan = llama_plan([ShiftAdd(group=32)], select={"re:mlp": None})
    assert "model.layers.0.mlp.up_proj" in taken(plan)


def test_select_names_the_original_paths_of_a_merged_site() -> None:
    for path in (K, "model.layers.0.self_attn.qkv_proj"):
        plan = llama_plan(["fuse", ShiftAdd(group=32)], select={path: None})
        merged = [site.address.path for site in plan.sites if site.rule == "fuse.qkv"]
        assert merged == ["model.layers.1.self_attn.qkv_proj"]
        dense = [site.address.path for site in plan.sites if site.rule == "shift_add.linear"]
        assert Q in dense  # on its own, for it is not merged
        assert (K in dense) == (path != K)


def test_select_gives_a_site_to_the_less_specific_pass() -> None:
    both = [ShiftAdd(group=32), VQLogits()]
    assert taken(llama_plan(both))["lm_head"] == "vq_logits.head"
    plan = llama_plan(both, select={"lm_head": "shift_add"})
    assert taken(plan)["lm_head"] == "shift_add.linear"
    assert "given to shift_add by select" in why(plan, "vq_logits.head", "lm_head")


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"lm_heat": "vq_logits"}, r"vq_logits at 'lm_heat', but nothing there matches \(nearest: lm_head"),
        ({"lm_head": "shift_add"}, r"names pass 'shift_add', which is not among passes=\['vq_logits'\]"),
        ({"re:(": None}, "not a regular expression"),
    ],
)
def test_a_select_that_cannot_be_met_is_an_error(select: dict[str, str | None], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        llama_plan(["vq_logits"], select=select)


def test_selecting_a_weight_that_must_be_left_alone_is_a_legality_error() -> None:
    model = kinds.build("sequential")
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    program = rewriter.capture(model)
    assert "NaN" in why(rewriter.plan(program, ["shift_add"]), "shift_add.linear", "0")
    with pytest.raises(LegalityError, match=r"shift_add at '0'.*'0\.weight' has NaN"):
        rewriter.plan(program, ["shift_add"], select={"0": "shift_add"})


# --------------------------------------------------------------------------------------------------- expect


def test_expect_counts_by_pass_and_by_rule() -> None:
    plan = llama_plan(["fuse", "shift_add", "vq_logits"], expect={"fuse": 6, "fuse.qkv": 2, "vq_logits": 1})
    assert sum(site.pass_name == "fuse" for site in plan.sites) == 6


def test_expect_lists_the_nearest_misses() -> None:
    with pytest.raises(
        PlanError,
        match=r"expected 9 sites of shift_add, found \d+; nearest misses:\n.*lm_head.*taken by vq_logits\.head",
    ):
        llama_plan(["vq_logits", "shift_add"], expect={"shift_add": 9})
    with pytest.raises(PlanError, match=r"expect names 'shift_ad'.*nearest: shift_add"):
        llama_plan(["shift_add"], expect={"shift_ad": 9})


# ------------------------------------------------------------------------------------------------ conflicts


def test_the_more_specific_view_wins_whatever_the_order() -> None:
    for passes in (["shift_add", "vq_logits"], ["vq_logits", "shift_add"]):
        plan = llama_plan(passes)
        assert taken(plan)["lm_head"] == "vq_logits.head"
        assert why(plan, "shift_add.linear", "lm_head") == "taken by vq_logits.head"


def test_list_order_settles_the_rest() -> None:
    plan = llama_plan([ShiftAdd(group=32, bits=3), ShiftAdd(group=32, bits=2)])
    assert {site.settings["bits"] for site in plan.sites} == {3}
    assert why(plan, "shift_add.linear", Q) == "taken by shift_add.linear"


class Shared(nn.Module):
    """One layer called twice, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.layer(torch.relu(self.layer(x)))))


def test_a_shared_layer_is_one_site_with_both_calls_rewritten() -> None:
    model = Shared().eval()
    opt = rewriter.optimize(model, [ShiftAdd(group=32, bits=8)], example_inputs=torch.randn(2, 32))
    assert [site.address.path for site in opt.plan.sites] == ["layer", "last"]
    assert len(opt.program.graph.find_nodes(op="call_function", target=torch.ops.rewriter.bcq_linear.default)) == 3
    assert sum("weight_codes" in name for name, _ in opt.named_buffers()) == 2
    x = torch.randn(5, 32)
    torch.testing.assert_close(opt(x), model(x), rtol=0, atol=0.1)
    torch.testing.assert_close(opt(x), opt.to_module()(x))


def test_planning_does_not_touch_the_program() -> None:
    program = kinds.optimized("llama", "identity").program
    before = program.graph_module.code, {n: t._version for n, t in program.tensors().items()}
    rewriter.plan(program, kinds.passes("all"))
    assert (program.graph_module.code, {n: t._version for n, t in program.tensors().items()}) == before
