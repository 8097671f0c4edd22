# SPDX-License-Identifier: Apache-2.0
"""Laws of applying, on random networks, and what an edit leaves behind."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

import rewriter
from rewriter.applying import rewrite
from rewriter.errors import PlanError
from rewriter.passes import ShiftAdd
from rewriter.planner import Plan
from rewriter.program import Program
from rewriter.rules import provenance

from . import kinds

PASS = ShiftAdd(group=8, bits=3)


class Network(nn.Module):
    """Linears and activations in any order, layers possibly called more than once."""

    def __init__(self, layers: list[nn.Linear], order: list[int], activations: list[str], skips: list[bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.order, self.activations, self.skips = order, activations, skips

    def forward(self, x: Tensor) -> Tensor:
        for index, name, skip in zip(self.order, self.activations, self.skips, strict=True):
            y = getattr(torch, name)(self.layers[index](x))
            x = x + y if skip else y
        return x


@st.composite
def networks(draw: st.DrawFn) -> Network:
    width = draw(st.integers(3, 12))
    count = draw(st.integers(1, 4))
    length = draw(st.integers(1, 6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**16)))
        layers = [nn.Linear(width, width, bias=draw(st.booleans())) for _ in range(count)]
    order = draw(st.lists(st.integers(0, count - 1), min_size=length, max_size=length))
    names = draw(st.lists(st.sampled_from(["relu", "tanh", "sigmoid"]), min_size=length, max_size=length))
    skips = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return Network(layers, order, names, skips).eval()


def captured(network: Network) -> tuple[Program, Tensor]:
    x = torch.randn(3, network.layers[0].in_features, generator=torch.Generator().manual_seed(0))
    return rewriter.capture(network, x), x


def shape(program: Program) -> list[object]:
    """The graph without names: operators, literals and wiring."""
    place = {node: i for i, node in enumerate(n for n in program.graph.nodes if n.op != "get_attr")}

    def spelled(value: fx.Node) -> object:
        return value.target if value.op == "get_attr" else place[value]

    return [
        (n.op, str(n.target) if n.op == "call_function" else "", map_arg(n.args, spelled), map_arg(n.kwargs, spelled))
        for n in place
    ]


few = settings(max_examples=12)


@few
@given(networks())
def test_applying_twice_is_applying_once(network: Network) -> None:
    """What was rewritten is no site any more."""
    program, x = captured(network)
    plan = rewriter.plan(program, [PASS])
    assert len(plan.sites) == len(set(network.order))
    once = rewriter.apply(program, plan)
    assert rewriter.plan(once, [PASS]).sites == ()
    again = rewriter.apply(once, Plan(once.digest(), ()))
    assert shape(again) == shape(once) and torch.equal(again.run(x)[0], once.run(x)[0])
    with pytest.raises(PlanError):
        rewriter.apply(once, plan)


@few
@given(networks(), st.randoms(use_true_random=False))
def test_sites_commute(network: Network, random: object) -> None:
    program, x = captured(network)
    plan = rewriter.plan(program, [PASS])
    expected = rewriter.apply(program, plan)
    sites = list(plan.sites)
    random.shuffle(sites)  # type: ignore[attr-defined]
    shuffled = rewriter.apply(program, Plan(plan.structure, tuple(sites)))
    assert shape(shuffled) == shape(expected)
    assert torch.equal(shuffled.run(x)[0], expected.run(x)[0])


@few
@given(networks())
def test_the_plan_applied_is_the_model_optimised(network: Network) -> None:
    program, x = captured(network)
    applied = rewriter.apply(program, rewriter.plan(program, [PASS]))
    opt = rewriter.optimize(network, [PASS], example_inputs=x)
    assert torch.equal(applied.run(x)[0], opt(x))
    assert shape(applied) == shape(opt.program)


@few
@given(networks())
def test_undo_after_apply_is_nothing(network: Network) -> None:
    program, x = captured(network)
    opt = rewriter.optimize(network, [PASS], example_inputs=x)
    back = opt.undo("shift_add")
    assert shape(back.program) == shape(program)
    assert torch.equal(back(x), network(x))
    assert dict(back.named_parameters()).keys() == dict(network.named_parameters()).keys()


@few
@given(networks())
def test_the_program_that_was_rewritten_is_untouched(network: Network) -> None:
    program, x = captured(network)
    before = shape(program), program.run(x)[0], {n: t.clone() for n, t in program.tensors().items()}
    rewriter.apply(program, rewriter.plan(program, [PASS]))
    assert shape(program) == before[0] and torch.equal(program.run(x)[0], before[1])
    assert all(torch.equal(t, before[2][n]) for n, t in program.tensors().items())


# ----------------------------------------------------------------------------------------- what edits leave


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_new_node_says_what_it_is_and_where_it_came_from(kind: str) -> None:
    opt = kinds.optimized(kind, "all")
    created = [node for node in opt.program.graph.nodes if provenance(node)]
    assert len(created) >= len(opt.plan.sites)
    addresses = {str(site.address): site for site in opt.plan.sites}
    for node in created:
        written = provenance(node)
        assert "val" in node.meta and "nn_module_stack" in node.meta and "stack_trace" in node.meta, node
        site = addresses[written["site"]]
        assert written["rule"] == site.rule and written["paths"] == list(site.paths) and written["from"]
    opt.program.graph.lint()


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_recorded_shapes_and_dtypes_are_what_the_program_computes(kind: str) -> None:
    program = kinds.optimized(kind, "all").program
    wrong = []

    class Checking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            expected = n.meta.get("val")
            if isinstance(value, Tensor) and isinstance(expected, Tensor):
                same = (
                    value.dtype == expected.dtype
                    and value.dim() == expected.dim()
                    and all(
                        not isinstance(e, int) or e == a for a, e in zip(value.shape, expected.shape, strict=True)
                    )
                )
                if not same:
                    wrong.append((n, value.shape, value.dtype, expected.shape, expected.dtype))
            return value

    with torch.no_grad():
        Checking(program.graph_module).run(*program.example)
    assert not wrong


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_outputs_keep_shapes_strides_dtypes_and_gradient_flags(kind: str) -> None:
    opt = kinds.optimized(kind, "all")
    example = opt.program.example
    for before, after in zip(opt.original_program().run(*example), opt.program.run(*example), strict=True):
        assert (after.shape, after.dtype, after.device, after.requires_grad) == (
            before.shape,
            before.dtype,
            before.device,
            before.requires_grad,
        )
        assert after.stride() == before.stride()


def test_frozen_weights_stay_frozen() -> None:
    model = kinds.build("llama").requires_grad_(False)
    opt = rewriter.optimize(model, kinds.passes("all"))
    assert not [name for name, p in opt.named_parameters() if p.requires_grad]


def test_the_journal_names_every_edit() -> None:
    opt = kinds.optimized("llama", "fuse")
    program = opt.original_program()
    application = rewrite(program.fork(), opt.plan)
    assert [edit.rule for edit in application.journal] == [site.rule for site in opt.plan.sites]
    for edit in application.journal:
        assert edit.added and edit.removed
    merged = [edit for edit in application.journal if edit.rule == "fuse.qkv"]
    assert merged[0].created == ("model.layers.0.self_attn.qkv_proj.weight",) and len(merged[0].replaced) == 3


def test_progress_counts_every_site() -> None:
    seen: list[tuple[str, int, int]] = []
    opt = rewriter.optimize(kinds.build("sequential"), kinds.passes("all"), progress=lambda *step: seen.append(step))
    rewritten = [step for step in seen if step[2] == len(opt.plan.sites) and step[0] not in ("capture", "plan")]
    assert [done for _, done, _ in rewritten] == list(range(len(opt.plan.sites) + 1))
    assert all(0 <= done <= total for _, done, total in seen)


def test_bytes_are_accounted_for() -> None:
    """What the sites save is what the model saves."""
    for kind in kinds.KINDS:
        report = kinds.optimized(kind, "all").report
        saved = sum(s.bytes_before - s.bytes_after for s in report.sites if s.rule != "fuse.qkv")
        assert report.bytes_before - report.bytes_after == saved, kind
        assert report.bytes_after < report.bytes_before


def test_combinations_of_settings_give_the_outputs_their_error_predicts() -> None:
    model = kinds.build("sequential")
    call = kinds.plain("sequential")
    errors = []
    for bits in (2, 3, 4, 6, 8):
        opt = rewriter.optimize(model, [ShiftAdd(group=32, bits=bits)])
        errors.append(float((call(opt) - call(model)).norm() / call(model).norm()))
    assert all(b < a for a, b in itertools.pairwise(errors))
