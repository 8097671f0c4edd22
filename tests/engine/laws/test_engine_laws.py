# SPDX-License-Identifier: Apache-2.0
"""The engine's laws on random graphs, under a rule made from a random pattern (`recompute`)."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import rewriter
from rewriter.applying import replay
from rewriter.errors import CaptureError, PlanError
from rewriter.matcher import Match
from rewriter.passes import Fuse
from rewriter.planner import Plan
from rewriter.program import Program
from rewriter.rules import locate

from .graphs import Chance, reordered
from .recompute import RecomputePass, recompute
from .test_enumerator import Example, examples

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@dataclasses.dataclass
class Case:
    """A program, inputs for it, and a pass that may rewrite it."""

    example: Example
    program: Program
    inputs: tuple[Tensor, ...]
    rewriting: RecomputePass

    def plan(self) -> Plan:
        return rewriter.plan(self.program, [self.rewriting])

    def __repr__(self) -> str:
        return repr(self.example)


def case_of(example: Example) -> Case:
    module, inputs = module_of(example)
    return Case(example, Program.from_graph_module(module, inputs), inputs, recompute(example.pattern))


def module_of(example: Example) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    module = fx.GraphModule(example.made.root, example.made.graph)
    placeholders = example.made.graph.find_nodes(op="placeholder")
    return module, tuple(example.made.given[node.name].clone() for node in placeholders)


cases = examples(exact=True).map(case_of)
written = examples(exact=True, plants=2, edits=("write", "draw")).map(case_of)  # something is written or drawn between


@settings(max_examples=200)
@given(st.one_of(cases, written))
def test_rewriting_preserves_outputs_and_all_that_can_be_seen_of_them(case: Case) -> None:
    """Values, shapes, strides, dtypes, devices, gradients' flags, aliases, and what is written to inputs."""
    assert_same(case, case.program, rewriter.apply(case.program, case.plan()))


@settings(max_examples=60)
@given(cases)
def test_exact_means_equal_in_float64_with_gradients(case: Case) -> None:
    plan = case.plan()
    assume(plan.sites)
    after = rewriter.apply(case.program, plan)
    rewriter.verify(case.program, after, case.inputs, gradients=not has_effects(case.example)).raise_if_failed()


@settings(max_examples=60)
@given(cases)
def test_applying_twice_is_applying_once(case: Case) -> None:
    plan = case.plan()
    once = rewriter.apply(case.program, plan)
    assert rewriter.plan(once, [case.rewriting]).sites == ()
    again = rewriter.apply(once, Plan(once.digest(), ()))
    assert spelled(again) == spelled(once)
    if plan.sites:
        with pytest.raises(PlanError):
            rewriter.apply(once, plan)


@settings(max_examples=60)
@given(cases)
def test_a_stored_plan_replayed_is_the_plan_applied(case: Case) -> None:
    plan = case.plan()
    applied = rewriter.apply(case.program, plan)
    stored = Plan.from_json(plan.to_json())
    assert stored == plan
    assert spelled(rewriter.apply(case.program, stored)) == spelled(applied)
    assert spelled(replay(case.program.fork(), stored)) == spelled(applied)


@settings(max_examples=40, suppress_health_check=SLOW)
@given(examples(exact=True, plants=3).map(case_of), st.randoms(use_true_random=False))
def test_disjoint_sites_commute(case: Case, random: object) -> None:
    """Sites found in the program as it is, none inside another, in any order."""
    plan = case.plan()
    first = {site.address: site for site in locate(case.rewriting.rules()[0], case.program).sites}
    sites = [planned for planned in plan.sites if planned.address in first and planned.stage == 0]
    groups = [set(first[planned.address].match.nodes) for planned in sites]
    assume(len(sites) > 1 and len(set().union(*groups)) == sum(map(len, groups)))
    expected = rewriter.apply(case.program, dataclasses.replace(plan, sites=tuple(sites)))
    random.shuffle(sites)  # type: ignore[attr-defined]
    shuffled = rewriter.apply(case.program, dataclasses.replace(plan, sites=tuple(sites)))
    assert wiring(shuffled) == wiring(expected)
    assert_same(case, expected, shuffled)


@settings(max_examples=60)
@given(examples(exact=True), st.data())
def test_rewriting_does_not_depend_on_node_order(example: Example, data: st.DataObject) -> None:
    """Where order means nothing: without in-place and random operators, and for one output."""
    assume(not has_effects(example) and len(example.pattern.outputs) == 1)
    shuffled = Example(reordered(example.made, Chance(data.draw)), example.pattern)
    programs = []
    for case in (case_of(example), case_of(shuffled)):
        programs.append(rewriter.apply(case.program, case.plan()))
    assert wiring(programs[0]) == wiring(programs[1])


@settings(max_examples=200)
@given(st.one_of(cases, written))
def test_every_match_is_rewritten_or_refused_with_a_reason(case: Case) -> None:
    rule = case.rewriting.rules()[0]
    matches, _ = rule.find(case.program)
    located = locate(rule, case.program)
    taken = {match.root for site in located.sites for match in site.matches}
    assert len(taken) + len(located.misses) == len(matches)
    for match in matches:
        reason = rule.refusal(case.program, match)
        assert (match.root in taken) == (reason is None)
        if has_written_or_drawn(case.program, match):
            assert reason is not None and reason.split(":")[0] in ("mutation", "random", "region", "alias")


@settings(max_examples=8, suppress_health_check=SLOW)
@given(examples(exact=True))
def test_undo_after_apply_is_nothing_and_saving_keeps_all(example: Example) -> None:
    module, inputs = module_of(example)
    try:
        opt = rewriter.optimize(module, [recompute(example.pattern)], example_inputs=inputs, dynamic_shapes="static")
        plain = rewriter.optimize(module, [Fuse()], example_inputs=inputs, dynamic_shapes="static")
    except CaptureError:
        assume(False)
    assume(opt.plan.sites and not plain.plan.sites)
    back = opt.undo("recompute")
    assert spelled(back.program) == spelled(plain.program)
    with tempfile.TemporaryDirectory() as folder:
        opt.save(Path(folder) / "saved")
        loaded = rewriter.load(Path(folder) / "saved")
    outputs = [run(one.program, inputs)[0] for one in (plain, opt, back, loaded)]
    for other in outputs[1:]:
        assert all(map(identical, outputs[0], other))


# ------------------------------------------------------------------------------------------------ what is compared


def assert_same(case: Case, before: Program, after: Program) -> None:
    (expected, given_before), (found, given_after) = run(before, case.inputs), run(after, case.inputs)
    assert all(map(identical, expected, found)), (expected, found)
    assert all(map(identical, given_before, given_after))  # what is written to inputs
    assert [described(t) for t in expected] == [described(t) for t in found]
    assert aliases([*expected, *given_before]) == aliases([*found, *given_after])


def run(program: Program, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the inputs as the program left them; under one seed."""
    given = [tensor.clone() for tensor in inputs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return program.run(*given), given


def identical(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.allclose(one.double(), other.double(), rtol=0, atol=0, equal_nan=True)


def described(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def aliases(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor the first one that shares its storage."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return [storages.index(storage) for storage in storages]


def spelled(program: Program) -> list[object]:
    """The graph without names: operators, literals and wiring, in order."""
    place = {node: number for number, node in enumerate(n for n in program.graph.nodes if n.op != "get_attr")}

    def spell(operand: fx.Node) -> str:
        return f"%{operand.target if operand.op == 'get_attr' else place[operand]}"

    return [
        (n.op, str(n.target) if n.op == "call_function" else "", str(fx.node.map_arg((n.args, n.kwargs), spell)))
        for n in place
    ]


def wiring(program: Program) -> list[str]:
    """A digest of what each output computes: equal for graphs that differ in the order of their nodes only."""
    digests: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        given = fx.node.map_arg((node.args, node.kwargs), lambda operand: digests[operand])
        digests[node] = hashlib.sha256(f"{node.op} {node.target} {given}".encode()).hexdigest()
    return [digests[node] for node in program.graph.output_node().all_input_nodes]


def has_effects(example: Example) -> bool:
    facts = example.made.facts()
    return any(facts.written(node) or facts.is_random(node) for node in example.made.graph.nodes)


def has_written_or_drawn(program: Program, match: Match) -> bool:
    """Whether a match draws random numbers, or what it reads is written before its first output. Told by names."""
    place = program.facts.position
    first = min(map(place, match.outputs))
    writes = [(place(n), n.args[0]) for n in program.graph.nodes if in_place(n)]
    for node in match.nodes:
        if "dropout" in str(node.target) and node.args[2] and node.args[1]:
            return True
        if any(place(node) < at < first and value in node.all_input_nodes for at, value in writes):
            return True
    return False


def in_place(node: fx.Node) -> bool:
    return str(getattr(node.target, "__name__", "")).split(".")[0].endswith("_")
