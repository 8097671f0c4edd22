# SPDX-License-Identifier: Apache-2.0
"""What an edit checks, what it leaves on new nodes, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.traceback import NodeSource

import rewriter
from rewriter import legality
from rewriter.diffing import Diff
from rewriter.editing import Editor
from rewriter.errors import PlanError
from rewriter.matcher import Match, Miss, find
from rewriter.operators import mul, neg, relu, sigmoid
from rewriter.pattern import Pattern, Var, pattern
from rewriter.program import Program
from rewriter.propagation import Propagation
from rewriter.rewriting import Session, rewrite
from rewriter.rules import EXACT, Rule, Site, locate, provenance
from rewriter.views import LINEAR

aten = torch.ops.aten
x, y = Var("x"), Var("y")
SWISH = pattern("x·σ(x)", x * sigmoid(x))
DOUBLE = pattern("-(-x)", neg(neg(x)))

Build = Callable[[Editor, Match], Mapping[Node, Node]]


class Built(Rule):
    """A rule from a pattern and the whole of :meth:`Rule.rewrite`, to do what declared rules cannot."""

    name = "built"
    role = "built"
    contract = EXACT

    def __init__(self, of: Pattern, build: Build) -> None:
        self.of, self.build = of, build

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return find(program, self.of), ()

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def replaced_nodes(self, match: Match) -> tuple[Node, ...]:
        return match.outputs

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return self.build(edit, match)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return torch.relu(x * torch.sigmoid(x))


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) + 1


def captured() -> tuple[Program, Tensor]:
    example = torch.randn(3, 4)
    return rewriter.capture(Model().eval(), example), example


def silu(edit: Editor, match: Match) -> Mapping[Node, Node]:
    return {match.root: edit.call(aten.silu.default, match["x"])}


# ------------------------------------------------------------------------------------------------------- claims


def rebuild(edit: Editor, match: Match) -> Mapping[Node, Node]:
    """The same again."""
    return {match.root: edit.call(aten.mul.Tensor, match["x"], edit.call(aten.sigmoid.default, match["x"]))}


def nothing(edit: Editor, match: Match) -> Mapping[Node, Node]:
    return {}


def itself(edit: Editor, match: Match) -> Mapping[Node, Node]:
    return {match.root: match.root}


def forgotten(edit: Editor, match: Match) -> Mapping[Node, Node]:
    edit.call(aten.silu.default, match["x"])
    return {}


def secretly(edit: Editor, match: Match) -> Mapping[Node, Node]:
    match.root.replace_all_uses_with(edit.call(aten.silu.default, match["x"]))
    return {}


def redirected(edit: Editor, match: Match) -> Mapping[Node, Node]:
    new = edit.call(aten.silu.default, match["x"])
    match.root.replace_all_uses_with(new)
    return {match.root: new}


def in_place(edit: Editor, match: Match) -> Mapping[Node, Node]:
    match.root.args = (match["x"], match["x"])
    return silu(edit, match)


def retargeted(edit: Editor, match: Match) -> Mapping[Node, Node]:
    match.root.target = aten.add.Tensor
    return silu(edit, match)


def around_the_editor(edit: Editor, match: Match) -> Mapping[Node, Node]:
    with edit.graph.inserting_before(match.root):
        new = edit.graph.call_function(aten.silu.default, (match["x"],))
    new.meta["val"] = match.root.meta["val"]
    return {match.root: new}


def on_itself(edit: Editor, match: Match) -> Mapping[Node, Node]:
    return {match.root: edit.call(aten.relu.default, match.root)}


def elsewhere(edit: Editor, match: Match) -> Mapping[Node, Node]:
    output = edit.graph.output_node()
    added = output.all_input_nodes[0]
    added.args = (added.args[0], 2)
    return silu(edit, match)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (rebuild, "claims a change, and what it built for mul.* is what was there"),
        (nothing, "it matched, and returned nothing that stands for mul"),
        (itself, "claims a change, and what it built"),
        (forgotten, "made 1 nodes and does not say what stands for mul"),
        (secretly, "redirected the readers of what it replaces itself"),
        (redirected, "redirected the readers of what it replaces itself"),
        (in_place, r"it changed mul.* itself; a rule builds new nodes"),
        (retargeted, r"it changed .* itself; a rule builds new nodes"),
        (around_the_editor, r"made or erased nodes of the graph itself; build them with edit\.call"),
        (on_itself, "reads the value it is to replace"),
        (elsewhere, r"add.* was changed without being named as replaced"),
    ],
)
def test_what_a_rule_claims_is_what_it_did(build: Build, message: str) -> None:
    program, _ = captured()
    with pytest.raises(PlanError, match=message) as error:
        rewrite(program, [Built(SWISH, build)])
    assert str(error.value).startswith("built")
    if build is not elsewhere:  # found once per stage, so without a site
        assert "blocks.0" in str(error.value)


def test_an_honest_rule_passes() -> None:
    program, example = captured()
    expected = program.run(example)[0]
    assert len(rewrite(program, [Built(SWISH, silu)])) == 2
    torch.testing.assert_close(program.run(example)[0], expected)


# ------------------------------------------------------------------------------------------------------ refusal


def test_a_replacement_of_another_dtype_is_a_miss_and_leaves_the_graph_alone() -> None:
    program, example = captured()
    before = program.graph_module.code
    expected = program.run(example)[0]

    def halved(edit: Editor, match: Match) -> Mapping[Node, Node]:
        return {match.root: edit.call(aten.to.dtype, edit.call(aten.silu.default, match["x"]), torch.float16)}

    session = Session(program)
    rule = Built(SWISH, halved)
    sites = session.sites(rule)
    assert session.carry_out(rule, [(site, {}, {}) for site in sites]) == [None, None]
    assert [m.step for m in session.misses] == ["replacement"] * 2
    assert "dtype float16 instead of float32" in session.misses[0].reason
    assert session.sites(rule) == []  # not asked again
    program.graph.lint()
    program.rebind()
    assert program.graph_module.code == before and torch.equal(program.run(example)[0], expected)


def test_a_plan_lists_the_refused_replacement() -> None:
    @rewriter.rule(SWISH)
    def reshaped(edit: Editor, x: Node) -> Node:
        return edit.call(aten.unsqueeze.default, edit.call(aten.silu.default, x), 0)

    program, _ = captured()
    plan = rewriter.plan(program, [reshaped])
    assert plan.sites == ()
    assert [m.site for m in plan.misses if m.step == "replacement"] == ["blocks.0", "blocks.1"]
    with pytest.raises(PlanError, match=r"expected 2 sites of reshaped, found 0.*\n.*has shape"):
        rewriter.plan(program, [reshaped], expect={"reshaped": 2})


# ----------------------------------------------------------------------------------------------------- metadata


def test_every_new_node_is_complete_also_in_between() -> None:
    """Two nodes per site, and a second rule on top of the first."""

    @rewriter.rule(SWISH)
    def by_two(edit: Editor, x: Node) -> Node:
        """x·σ(x) = x·(1 + tanh(x/2))/2"""
        half = edit.call(aten.mul.Tensor, x, 0.5)
        inner = edit.call(aten.add.Tensor, edit.call(aten.tanh.default, half), 1)
        return edit.call(aten.mul.Tensor, half, inner)

    @rewriter.rule(pattern("relu(x·y)", relu(mul(x, y))))
    def clamped(edit: Editor, x: Node, y: Node) -> Node:
        """relu(x·y) = max(x·y, 0)"""
        return edit.call(aten.clamp_min.default, edit.call(aten.mul.Tensor, x, y), 0)

    program, example = captured()
    names = {n.name for n in program.graph.nodes}
    graph_ids = {id(program.graph)}
    opt = rewriter.apply(program, rewriter.plan(program, [by_two, clamped]))
    torch.testing.assert_close(opt.run(example)[0], program.run(example)[0])
    made = [n for n in opt.graph.nodes if provenance(n)]
    assert len(made) == 2 * 5  # half, tanh, add of the first rule; mul, clamp_min of the second
    for node in made:
        value = node.meta["val"]
        assert isinstance(value, Tensor) and value.dim() == 2 and value.shape[-1] == 4
        assert "test_editing.py" in node.meta["stack_trace"]
        assert list(node.meta["nn_module_stack"].values())[-1][0].startswith("blocks.")
        written = provenance(node)
        assert written["rule"] in ("by_two", "clamped") and written["site"].startswith(written["paths"][0])
        source = node.meta["from_node"][0]
        assert isinstance(source, NodeSource) and source.pass_name == f"rewriter.{written['rule']}"
        assert source.to_dict()["action"] == "replace" and source.graph_id not in graph_ids
        originals = {text.partition(":")[0] for text in written["origin"] or written["from"]}
        assert originals <= names and originals
    clamp = next(n for n in made if n.target is aten.clamp_min.default)
    assert {t.partition(":")[0] for t in provenance(clamp)["origin"]} >= {"relu", "mul", "sigmoid"}
    chain = clamp.meta["from_node"][0]
    assert chain.name == "relu" and chain.from_node == program_node(program, "relu").meta.get("from_node", [])


def program_node(program: Program, name: str) -> Node:
    return next(n for n in program.graph.nodes if n.name == name)


def test_a_diff_of_two_stages_shows_originals_against_final_nodes() -> None:
    @rewriter.rule(SWISH)
    def one(edit: Editor, x: Node) -> Node:
        return edit.call(aten.silu.default, x)

    @rewriter.rule(pattern("relu(silu)", relu(rewriter.operators.silu(x))))
    def two(edit: Editor, x: Node) -> Node:
        return edit.call(aten.clamp_min.default, edit.call(aten.silu.default, x), 0)

    program, _ = captured()
    after = rewriter.apply(program, rewriter.plan(program, [one, two]))
    diff = Diff.between(program, after)
    assert [site.path for site in diff.sites] == ["blocks.0", "blocks.1"]
    for site in diff.sites:
        assert [line.short_op for line in site.removed] == ["aten.sigmoid", "aten.mul", "aten.relu"]
        assert [line.short_op for line in site.added] == ["aten.silu", "aten.clamp_min"]
        assert {text.partition(":")[0].partition("_")[0] for text in site.added[-1].origin} == {"sigmoid", "mul", "relu"}
    assert diff.to_json()["unchanged"] == diff.unchanged == len(program.graph.nodes) - 6
    assert diff.__rich__() is not None


# -------------------------------------------------------------------------------------------------------- values


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.int64]),
            st.tuples(st.integers(1, 3), st.integers(1, 3)),
            st.booleans(),
            st.sampled_from([1, 1.0, True, 2]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_shared_values_are_those_of_each_call(calls: list[tuple[torch.dtype, tuple[int, int], bool, Any]]) -> None:
    """A value that is known from another call is what running the operator gives."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    values = Propagation(mode)
    graph = Graph()
    for dtype, shape, transposed, constant in calls:
        with mode:
            value = torch.empty(shape, dtype=dtype)
            value = value.t() if transposed else value
        node = graph.placeholder("x")
        node.meta["val"] = value
        got = values.value(aten.mul.Tensor, (node, constant), {})
        with mode:
            wanted = aten.mul.Tensor(value, constant)
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())


# ------------------------------------------------------------------------------------------------------- places


def test_outputs_of_which_one_is_read_before_an_input_of_another_are_refused() -> None:
    def model(early: bool) -> Callable[..., Any]:
        def forward(x: Tensor, y: Tensor) -> Tensor:
            first = torch.relu(x)
            if early:
                z = first + y
                return z, torch.relu(torch.neg(x) * z)
            z = torch.neg(y)
            return first + z, torch.relu(torch.neg(x) * z)

        return forward

    class Calling(nn.Module):
        def __init__(self, function: Callable[..., Any]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.function(x, y)

    two = pattern("two", relu(x), neg(x) * y)

    def build(edit: Editor, match: Match) -> Mapping[Node, Node]:
        first = edit.call(aten.clamp_min.default, match["x"], 0)
        return {match.outputs[0]: first, match.outputs[1]: edit.call(aten.neg.default, edit.call(aten.mul.Tensor, match["x"], match["y"]))}

    inputs = (torch.randn(3), torch.randn(3))
    program = rewriter.capture(Calling(model(early=True)), inputs)
    located = locate(Built(two, build), program)
    assert located.sites == () and "reads one output before" in located.misses[0].reason
    program = rewriter.capture(Calling(model(early=False)), inputs)
    expected = program.run(*inputs)
    assert len(rewrite(program, [Built(two, build)])) == 1
    torch.testing.assert_close(program.run(*inputs), expected)


class Doubling(Rule):
    """x Wᵀ + b = 2 · x (W/2)ᵀ + b, once: the new weight goes by the name of the old one."""

    name = "doubling"
    role = "linear"
    contract = EXACT
    parametric = True

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        taken = [m for m in LINEAR.find(program) if not provenance(m.root) and m["bias"] is None]
        return taken, ()

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        return (str(match["weight"].target),)

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return ("weight",)

    def initialise(
        self, site: Site, read: Callable[[str], Tensor], choice: Any, statistics: Any, generator: Any
    ) -> dict[str, Tensor]:
        return {"weight": nn.Parameter(read(str(site.match["weight"].target)).detach() / 2)}

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return {match.root: edit.call(aten.mul.Tensor, edit.call(aten.linear.default, match["x"], parameters["weight"]), 2)}


def test_a_tensor_made_anew_under_its_own_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)).eval()
    example = torch.randn(2, 4)
    program = rewriter.capture(model, example)
    expected, weight = program.run(example)[0], model[0].weight.detach().clone()
    journal = rewrite(program, [Doubling()])
    assert [edit.created for edit in journal] == [edit.replaced for edit in journal] == [("0.weight",), ("2.weight",)]
    assert torch.equal(program.tensor("0.weight"), weight / 2)
    assert len(program.graph.find_nodes(op="get_attr")) == 2
    torch.testing.assert_close(program.run(example)[0], expected)
    assert torch.equal(model[0].weight, weight)  # the model itself is as it was


class Shared(nn.Module):
    """One layer called twice, as in ALBERT; once more with an operator the rule does not see, where asked for."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(torch.relu(self.layer(x))))
        return x + self.layer.weight.sum() if self.other else x


@pytest.mark.parametrize("other", [False, True])
def test_an_exact_rule_takes_all_readers_of_a_shared_layer_or_none(other: bool) -> None:
    program = rewriter.capture(Shared(other).eval(), torch.randn(2, 4))
    located = locate(Doubling(), program)
    if other:
        assert located.sites == ()
        assert [m.reason for m in located.misses] == ["layer.weight is also read by sum_1"] * 2
        return
    assert len(located.sites) == 1 and len(located.sites[0].matches) == 2
    expected = program.run(*program.example)[0]
    assert len(rewrite(program, [Doubling()])) == 1
    torch.testing.assert_close(program.run(*program.example)[0], expected)


def picky(rule: Rule) -> Rule:
    """The same rule, but for calls on the output of a relu."""

    class Picky(type(rule)):  # type: ignore[misc]
        def refusal(self, program: Program, match: Match) -> str | None:
            return "it follows a relu" if match["x"].target is aten.relu.default else super().refusal(program, match)

    copied = Picky.__new__(Picky)
    copied.__dict__.update(rule.__dict__)
    return copied


@pytest.mark.parametrize("rule", [Doubling(), rewriter.passes.ShiftAdd(group=4).rules()[0]], ids=lambda rule: rule.name)
def test_one_refused_call_of_a_shared_layer_refuses_all(rule: Rule) -> None:
    program = rewriter.capture(Shared(False).eval(), torch.randn(2, 4))
    assert [len(site.matches) for site in locate(rule, program).sites] == [2]
    located = locate(picky(rule), program)
    assert located.sites == ()
    assert sorted(m.reason for m in located.misses if m.step == "guard") == [
        "another place that reads layer.weight cannot be rewritten: it follows a relu",
        "it follows a relu",
    ]


@pytest.mark.parametrize("rule", [Doubling(), rewriter.passes.ShiftAdd(group=4).rules()[0]], ids=lambda rule: rule.name)
def test_a_layer_that_is_also_called_inside_a_body_is_left_alone(rule: Rule) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x + self.layer(x)

    program = rewriter.capture(Mixed().eval(), torch.randn(2, 4))
    located = locate(rule, program)
    assert located.sites == ()
    assert any("layer.weight is also read inside a body of wrap_with_autocast" in m.reason for m in located.misses)


# ----------------------------------------------------------------------------------------------- bodies of control flow


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda a: a.neg().neg() + 1, lambda a: a - 1, (x,)) + x.neg().neg()


def test_a_match_inside_a_body_is_a_miss_with_its_reason() -> None:
    @rewriter.rule(DOUBLE)
    def double_neg(edit: Editor, x: Node) -> Node:
        return x

    program = rewriter.capture(Branching(), torch.randn(3, 4))
    reason = "it lies inside a body of cond at the top level; rules rewrite the main graph only"
    for misses in (rewriter.explain(program, double_neg), rewriter.explain(program, DOUBLE), rewriter.plan(program, [double_neg]).misses):
        inside = [m for m in misses if m.step == "region"]
        assert [m.reason for m in inside] == [reason]
        assert not inside[0].source.startswith("<")  # generated code is nobody's line
    plan = rewriter.plan(program, [double_neg])
    assert len(plan.sites) == 1
    after = rewriter.apply(program, plan)
    for example in (torch.rand(3, 4), -torch.rand(3, 4)):
        torch.testing.assert_close(after.run(example)[0], program.run(example)[0])
    with pytest.raises(PlanError, match="inside a body of cond"):
        rewriter.plan(program, [double_neg], expect={"double_neg": 2})


def test_a_body_inside_a_body() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def positive(a: Tensor) -> Tensor:
                return torch.cond(a.sum() > 1, lambda b: b.neg().neg(), lambda b: b + 1, (a,))

            return torch.cond(x.sum() > 0, positive, lambda a: a - 1, (x,))

    program = rewriter.capture(Nested(), torch.randn(3, 4))
    assert [m.step for m in rewriter.explain(program, DOUBLE)] == ["region"]


# --------------------------------------------------------------------------------------------------------- cost


def synthetic(blocks: int) -> Program:
    """Per block x·σ(x) and nine other nodes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph = Graph()
    with FakeTensorMode():
        value = torch.empty(4)
    node = graph.placeholder("x")
    node.meta["val"] = value
    for _ in range(blocks):
        gate = graph.call_function(aten.sigmoid.default, (node,))
        node = graph.call_function(aten.mul.Tensor, (node, gate))
        for _ in range(8):
            node = graph.call_function(aten.relu.default, (node,))
    graph.output([node])
    for made in graph.nodes:
        made.meta.setdefault("val", value)
    return Program.from_graph_module(GraphModule(nn.Module(), graph))



def test_an_edit_does_not_search_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps over all nodes are counted by stage, whatever the number of sites."""
    counts = []
    for blocks in (5, 50):
        program = synthetic(blocks)
        sweeps = 0
        original = torch.fx.graph._node_list.__iter__

        def counted(self: Any, original: Any = original) -> Any:
            nonlocal sweeps
            sweeps += 1
            return original(self)

        monkeypatch.setattr(torch.fx.graph._node_list, "__iter__", counted)
        assert len(rewrite(program, [Built(SWISH, silu)])) == blocks
        monkeypatch.undo()
        counts.append(sweeps)
    assert counts[0] == counts[1] < 25
