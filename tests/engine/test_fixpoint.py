# SPDX-License-Identifier: Apache-2.0
"""Rounds of exact rules: they end when nothing applies, and where they would not, the error says who and how."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter.applying import rewrite as apply_plan
from rewriter.errors import PlanError
from rewriter.fixpoint import structure
from rewriter.operators import neg, relu, sigmoid, tanh
from rewriter.pattern import Var, pattern
from rewriter.planner import Plan, dumps, stages
from rewriter.program import Program
from rewriter.rewriting import rewrite

aten = torch.ops.aten
x, y = Var("x"), Var("y")


@rewriter.rule(pattern("relu(relu(x))", relu(relu(x))))
def relu_once(edit, x):
    """relu(relu(x)) = relu(x)"""
    return edit.call(aten.relu.default, x)


@rewriter.rule(pattern("-(-x)", neg(neg(x))))
def double_negation(edit, x):
    """-(-x) = x"""
    return x


@rewriter.rule(pattern("sum of negatives", neg(x) + neg(y)))
def factor_sign(edit, x, y):
    """(-x) + (-y) = -(x + y)"""
    return edit.call(aten.neg.default, edit.call(aten.add.Tensor, x, y))


@rewriter.rule(pattern("x·2", x * 2))
def as_sum(edit, x):
    """x·2 = x + x"""
    return edit.call(aten.add.Tensor, x, x)


@rewriter.rule(pattern("x + x", x + x))
def as_product(edit, x):
    """x + x = x·2"""
    return edit.call(aten.mul.Tensor, x, 2)


@rewriter.rule(pattern("swap", x * y))
def commute(edit, x, y):
    """x·y = y·x"""
    return edit.call(aten.mul.Tensor, y, x)


@rewriter.rule(pattern("tanh", tanh(x)))
def grow(edit, x):
    """tanh(x) = -tanh(-x), for ever"""
    return edit.call(aten.neg.default, edit.call(aten.tanh.default, edit.call(aten.neg.default, x)))


@rewriter.rule(pattern("sigmoid", sigmoid(x)))
def explode(edit, x):
    """A sum of two of what it matched: the graph doubles."""
    half = [edit.call(aten.sigmoid.default, x) for _ in range(2)]
    return edit.call(aten.mul.Tensor, edit.call(aten.add.Tensor, *half), 0.5)


class Chain(nn.Module):
    """A linear layer and functions after it, by name."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for name in self.names:
            x = x * 2 if name == "double" else getattr(torch, name)(x)
        return x


def captured(names: list[str]) -> tuple[Program, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Chain(names).double().eval()
    example = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return rewriter.capture(model, example), example


def operators(program: Program) -> list[str]:
    return [str(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function"]


# ------------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_a_chain_collapses_to_one(count: int) -> None:
    """Overlapping sites wait for the next round."""
    program, example = captured(["relu"] * count)
    plan = rewriter.plan(program, [relu_once])
    applied = rewriter.apply(program, plan)
    assert operators(applied) == ["linear", "relu"]
    assert torch.equal(applied.run(example)[0], program.run(example)[0])
    assert len(plan.sites) == count - 1
    assert sorted({s.stage for s in plan.sites}) == list(range(len(stages(plan))))
    assert rewriter.plan(applied, [relu_once]).sites == ()


def test_one_rule_makes_work_for_another() -> None:
    """-(-x) appears only after the signs were factored out, and is found whichever rule comes first."""

    class Signs(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return -((-x) + (-y))

    inputs = (torch.randn(3), torch.randn(3))
    program = rewriter.capture(Signs(), inputs)
    for passes in ([double_negation, factor_sign], [factor_sign, double_negation]):
        plan = rewriter.plan(program, passes)
        assert [s.rule for s in plan.sites] == ["factor_sign", "double_negation"]
        applied = rewriter.apply(program, plan)
        assert operators(applied) == ["add"]
        torch.testing.assert_close(applied.run(*inputs), program.run(*inputs), rtol=0, atol=0)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["relu", "neg", "tanh"]), max_size=12))
def test_rewriting_in_place_is_planning_and_applying(names: list[str]) -> None:
    program, example = captured(names)
    expected = rewriter.apply(program, rewriter.plan(program, [relu_once, double_negation]))
    journal = rewrite(program, [relu_once, double_negation])
    assert structure(program.graph) == structure(expected.graph)
    assert torch.equal(program.run(example)[0], expected.run(example)[0])
    assert rewrite(program, [relu_once, double_negation]) == ()
    pairs = sum(first == second != "tanh" for first, second in itertools.pairwise(names))
    assert bool(journal) == bool(pairs)


def test_a_rule_is_asked_again_only_after_a_change() -> None:
    asked: list[str] = []
    rule = relu_once.rules()[0]

    class Counting(type(rule)):  # type: ignore[misc]
        def matches(self, program: Program) -> Any:
            asked.append(self.name)
            return super().matches(program)

    program, _ = captured(["tanh"])
    assert rewrite(program, [Counting(rule.of, rule.build, rule.wanted)]) == ()
    assert len(asked) == 1
    program, _ = captured(["relu", "relu", "tanh"])
    assert len(rewrite(program, [Counting(rule.of, rule.build, rule.wanted)])) == 1
    assert len(asked) == 3


def test_only_exact_rules_are_applied_without_a_plan() -> None:
    program, _ = captured([])
    with pytest.raises(PlanError, match=r"only EXACT rules.*shift_add\.linear"):
        rewrite(program, [rewriter.passes.ShiftAdd()])


# ------------------------------------------------------------------------------------------------- no end to it


def test_rules_that_fight_are_both_named_and_the_cycle_is_shown() -> None:
    program, _ = captured(["relu", "double"])
    before = structure(program.graph)
    with pytest.raises(PlanError) as error:
        rewriter.plan(program, [as_sum, as_product])
    text = str(error.value)
    assert "as_sum and as_product undo each other's work" in text
    assert "mul(relu, 2) → add(relu, relu)" in text.replace("relu_1", "relu")
    assert "→ mul(relu, 2)" in text
    assert "nothing was changed" in text and structure(program.graph) == before


def test_a_rule_that_undoes_itself_is_named() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * y

    program = rewriter.capture(Product(), (torch.randn(3), torch.randn(3)))
    with pytest.raises(PlanError, match="rule commute undoes its own work") as error:
        rewriter.plan(program, [commute])
    shown = [line.rpartition(": ")[2] for line in str(error.value).splitlines()[1:3]]
    assert shown == [f"mul({a}, {b}) → mul({b}, {a})" for a, b in (("tensors_0", "tensors_1"), ("tensors_1", "tensors_0"))]


def test_a_rule_that_feeds_itself_is_named_with_the_growth() -> None:
    program, _ = captured(["tanh", "relu", "relu"])
    with pytest.raises(PlanError, match=r"after 32 rounds these rules still apply: grow; nodes .*: 8, 10, 12") as error:
        rewriter.plan(program, [grow])
    assert "tanh(" in str(error.value)


def test_a_graph_that_explodes_is_stopped_long_before_the_bound() -> None:
    program, _ = captured(["sigmoid"])
    with pytest.raises(PlanError, match="still apply: explode") as error:
        rewriter.plan(program, [explode])
    rounds = int(str(error.value).split()[1])
    assert rounds < 16


# --------------------------------------------------------------------------------------------------- the plan


def several_rounds() -> tuple[Program, Plan, Tensor]:
    program, example = captured(["relu"] * 5 + ["neg"] * 4 + ["tanh"])
    return program, rewriter.plan(program, [relu_once, double_negation]), example


def test_addresses_are_one_per_site_over_all_rounds() -> None:
    _, plan, _ = several_rounds()
    addresses = [str(s.address) for s in plan.sites]
    assert len(set(addresses)) == len(addresses) > 4
    assert {s.address.round for s in plan.sites} >= {0, 1}


def test_a_plan_of_several_rounds_survives_json() -> None:
    program, plan, example = several_rounds()
    again = Plan.from_json(json.loads(dumps(plan)))
    assert again == plan and dumps(again) == dumps(plan)
    for one in (plan, again):
        applied = rewriter.apply(program, one)
        assert operators(applied) == ["linear", "relu", "tanh"]
        assert torch.equal(applied.run(example)[0], program.run(example)[0])


def test_the_order_of_sites_in_a_plan_does_not_matter() -> None:
    program, plan, _ = several_rounds()
    backwards = Plan(plan.structure, plan.sites[::-1])
    expected = structure(rewriter.apply(program, plan).graph)
    assert structure(rewriter.apply(program, backwards).graph) == expected


def test_a_plan_of_the_first_schema_is_grouped_by_neighbours() -> None:
    program, _ = captured(["relu", "relu", "tanh", "neg", "neg"])
    data = rewriter.plan(program, [relu_once, double_negation]).to_json()
    old = data | {"schema": 1, "sites": [{k: v for k, v in s.items() if k != "stage"} for s in data["sites"]]}
    for site in old["sites"]:
        del site["address"]["round"]
    plan = Plan.from_json(old)
    assert [s.stage for s in plan.sites] == [0, 1]
    assert operators(apply_plan(program.fork(), plan).program) == ["linear", "relu", "tanh"]


def test_misses_are_those_of_the_final_program() -> None:
    program, _ = captured(["relu", "relu", "tanh", "relu"])
    plan = rewriter.plan(program, [relu_once])
    assert len(plan.sites) == 1
    assert len([m for m in plan.misses if m.rule == "relu_once"]) == 2  # one relu is left in each place
