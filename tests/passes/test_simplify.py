# SPDX-License-Identifier: Apache-2.0
"""`simplify` promises the same function from fewer nodes: what goes, what stays and why, and the golden run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import kinds
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kinds import KINDS
from torch import Tensor, nn

import rewriter
from rewriter.passes import Simplify
from rewriter.passes.simplify.chains import holds
from rewriter.program import Program

aten = torch.ops.aten


class Function(nn.Module):
    """A function of tensors as a model, with a parameter ``w`` of 6 × 6 at hand."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(_normal(6, 6, seed=1))

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(self, *tensors)


class Outcome:
    """A function before and after `simplify`."""

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, train: bool = False, **options: bool) -> None:
        only = dict.fromkeys(Simplify().settings(), False) | options if options else {}
        self.inputs = inputs
        self.before = rewriter.capture(Function(function).train(train), inputs)
        self.plan = rewriter.plan(self.before, [Simplify(**only)])
        self.after = rewriter.apply(self.before, self.plan)

    @property
    def rules(self) -> list[str]:
        return [site.rule.removeprefix("simplify.") for site in self.plan.sites]

    @property
    def reasons(self) -> str:
        return "\n".join(str(miss) for miss in self.plan.misses)

    def verified(self) -> Outcome:
        rewriter.verify(self.before, self.after, self.inputs).raise_if_failed()
        _check_metadata(self.after)
        return self

    def targets(self) -> list[Any]:
        return [n.target for n in self.after.graph.nodes if n.op == "call_function"]


def _check_metadata(program: Program) -> None:
    """Values in the metadata are those of a run: shapes, dtypes and strides."""
    result = program.run(*program.example)
    for node, value in zip(program.graph.output_node().args[0], result, strict=True):
        assert node.meta["val"].dtype == value.dtype and node.meta["val"].dim() == value.dim()


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X = _normal(3, 4, 6)


# ------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [["simplify"], ["fuse", "simplify"]], ids="+".join)
def test_models_compute_the_same_from_fewer_nodes(kind: str, passes: list[str]) -> None:
    opt = rewriter.optimize(kinds.build_input(kind), passes)
    samples = [opt.original.example]
    result = rewriter.verify(opt.original_program(), opt.program, samples)
    result.raise_if_failed()
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10
    assert len(opt.program.graph.nodes) < len(opt.original.graph.nodes)
    again = rewriter.plan(opt.program, ["simplify"])
    assert again.sites == ()


@pytest.mark.parametrize("kind", ["gpt2", "sequential"])
def test_undo_save_module_and_training(kind: str, tmp_path: Any) -> None:
    opt = rewriter.optimize(kinds.build_input(kind), ["simplify"])
    call = kinds.plain(kind)
    original = rewriter.optimize(kinds.build_input(kind), [])
    kinds.assert_same(call(opt.undo("simplify")), call(original))
    kinds.assert_same(call(opt.to_module()), call(kinds.build(kind)))
    opt.save(tmp_path / "model")
    kinds.assert_same(call(rewriter.load(tmp_path / "model", model=kinds.build(kind))), call(opt))
    opt.train()
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(*(kinds.tensors(call(opt)).popitem()[1] for _ in range(2)))  # dropout is back


def test_onnx(tmp_path: Any) -> None:
    opt = rewriter.optimize(kinds.build("sequential"), ["simplify"])
    opt.export_onnx(tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (x,) = kinds.plain("sequential").args
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), opt(x).detach(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.relu(x).to(torch.float32) + 1,
        lambda m, x: torch.relu(x)[:, :, :] + 1,
        lambda m, x: torch.relu(x).reshape(x.shape) + 1,
        lambda m, x: torch.relu(x).expand(x.shape) + 1,
        lambda m, x: nn.functional.dropout(torch.relu(x), 0.3, m.training) + 1,
        lambda m, x: torch.relu(x) * 1 + 1,
        lambda m, x: 1.0 * torch.relu(x) / 1 + 1,
    ],
)
def test_a_call_that_changes_nothing_goes(function: Any) -> None:
    outcome = Outcome(function, X).verified()
    assert outcome.targets() == [aten.relu.default, aten.add.Tensor]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.relu(x)[1:] + 1,
        lambda m, x: torch.relu(x)[::2] + 1,
        lambda m, x: torch.relu(x).to(torch.float64) + 1,
        lambda m, x: torch.relu(x).contiguous() + 1,
        lambda m, x: torch.relu(x) * 1.0000001 + 1,
        lambda m, x: torch.relu(x) + 0.0,  # -0.0 + 0.0 is 0.0
        lambda m, x: (x > 0) * 1,  # a number, not a truth
        lambda m, x: torch.relu(x).detach() + 1,  # stops gradients
    ],
)
def test_a_call_that_changes_something_stays(function: Any) -> None:
    assert Outcome(function, X).verified().rules == []


def test_dropout_in_training_stays() -> None:
    assert Outcome(lambda m, x: nn.functional.dropout(x, 0.5, m.training), X, train=True).rules == []


def test_a_full_slice_of_a_dynamic_dimension_goes_and_a_short_one_stays() -> None:
    assert "identity" in Outcome(lambda m, x: torch.relu(x)[: x.shape[0]] + 1, X).verified().rules
    assert Outcome(lambda m, x: torch.relu(x)[: x.shape[0] - 1] + 1, X).verified().rules == []


def test_a_copy_that_is_written_stays() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x + 2
        z = y * 1
        z.add_(1)
        return y + z

    outcome = Outcome(function, X, identity=True).verified()
    assert outcome.rules == [] and "written" in outcome.reasons


def test_a_copy_of_what_is_written_later_stays() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x + 2
        z = y * 1
        y.add_(1)
        return y + z

    outcome = Outcome(function, X, identity=True).verified()
    assert outcome.rules == [] and "written" in outcome.reasons


def test_a_copy_of_an_input_is_not_returned_as_the_input() -> None:
    outcome = Outcome(lambda m, x: x * 1, X).verified()
    assert outcome.rules == []
    (result,) = outcome.after.run(X)
    assert result.data_ptr() != X.data_ptr()


# ------------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize(
    "function, left",
    [
        (lambda m, x: torch.relu(x).transpose(1, 2).transpose(1, 2) + 1, []),
        (lambda m, x: torch.relu(x).transpose(-1, 1).mT + 1, []),
        (lambda m, x: torch.relu(x).permute(2, 0, 1).permute(1, 2, 0) + 1, []),
        (lambda m, x: torch.relu(x).permute(0, 1, 2) + 1, []),
        (lambda m, x: torch.relu(x).permute(2, 0, 1).permute(2, 0, 1) + x.sum(), [aten.permute.default]),
        (lambda m, x: torch.relu(x).permute(2, 0, 1).transpose(0, 1) + x.sum(), [aten.transpose.int]),
        (lambda m, x: m.w.t().t() + x.sum(), []),
    ],
)
def test_transposes(function: Any, left: list[Any]) -> None:
    outcome = Outcome(function, X, chains=True).verified()
    moves = {aten.transpose.int, aten.permute.default, aten.mT.default, aten.t.default}
    assert [t for t in outcome.targets() if t in moves] == left
    assert outcome.rules == ["transpose"]


@settings(max_examples=20)
@example([(1, 0, 2, 3), (0, 1, 3, 2)])
@given(st.lists(st.permutations(range(4)), min_size=1, max_size=4))
def test_any_chain_of_permutations_becomes_one_or_none(orders: list[tuple[int, ...]]) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(x)
        for order in orders:
            x = x.permute(*order)
        return x + 1

    outcome = Outcome(function, _normal(2, 3, 4, 5), chains=True).verified()
    total = list(range(4))
    for order in orders:
        total = [total[d] for d in order]
    moves = [t for t in outcome.targets() if t in (aten.permute.default, aten.transpose.int)]
    read_by_products = tuple(orders[-1]) == (0, 1, 3, 2)  # that one stays as it is, if it must stand for itself
    assert len(moves) == (total != sorted(total)) or (read_by_products and len(moves) == 2)


@pytest.mark.parametrize(
    "function, left",
    [
        (lambda m, x: torch.relu(x).reshape(12, 6).reshape(x.shape) + 1, 0),
        (lambda m, x: torch.relu(x).view(x.shape[0], -1).view(x.shape[0], 6, 4) + 1, 1),
        (lambda m, x: torch.relu(x).flatten(0, 1).unflatten(0, (x.shape[0], 4)) + 1, 0),
        (lambda m, x: torch.relu(x).unsqueeze(1).squeeze(1) + 1, 0),
        (lambda m, x: torch.relu(x).unsqueeze(1).flatten(0, 1).view(x.shape[0], 2, 12) + 1, 1),
    ],
)
def test_reshapes(function: Any, left: int) -> None:
    outcome = Outcome(function, X, chains=True).verified()
    moves = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"}
    assert len([t for t in outcome.targets() if t.__name__.partition(".")[0] in moves]) == left
    assert outcome.rules == ["reshape"]


def test_a_reshape_that_copies_stays() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        turned = torch.relu(x).transpose(1, 2)
        return turned.reshape(-1, 4).reshape(x.shape[0], 6, 4).view(-1) + 1  # a view needs the copy's layout

    assert Outcome(function, X, chains=True).verified().rules == ["reshape"]  # of the copy, not through it


def test_a_transpose_used_elsewhere_stays_where_nothing_is_won() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        turned = torch.relu(x).permute(2, 0, 1)
        return turned.permute(2, 0, 1).sum() + turned

    assert Outcome(function, X, chains=True).verified().rules == []

    def back(m: Any, x: Tensor) -> Tensor:
        turned = torch.relu(x).permute(2, 0, 1)
        return turned.permute(1, 2, 0) * turned.sum()

    assert Outcome(back, X, chains=True).verified().rules == ["transpose"]


@pytest.mark.parametrize(
    "dtype, through, last, rules",
    [
        (torch.float16, torch.float32, torch.float16, ["cast"]),
        (torch.bfloat16, torch.float32, torch.bfloat16, ["cast"]),
        (torch.float16, torch.float32, torch.bfloat16, ["cast"]),  # one cast
        (torch.float32, torch.float16, torch.float32, []),
        (torch.float32, torch.bfloat16, torch.float32, []),
        (torch.float16, torch.bfloat16, torch.float16, []),
        (torch.float32, torch.float16, torch.bfloat16, []),
        (torch.float32, torch.int64, torch.float32, []),
    ],
)
def test_casts(dtype: torch.dtype, through: torch.dtype, last: torch.dtype, rules: list[str]) -> None:
    x = (100 * X).to(dtype)
    outcome = Outcome(lambda m, x: torch.relu(x).to(through).to(last) * 3, x, chains=True).verified()
    assert outcome.rules == rules
    assert torch.equal(*(program.run(x)[0] for program in (outcome.before, outcome.after)))
    if not rules:
        assert "rounds" in outcome.reasons


_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool,
]  # fmt: skip


@given(st.sampled_from(_DTYPES), st.sampled_from(_DTYPES), st.integers(0, 2**32))
def test_a_dtype_holds_another_only_if_every_value_comes_back(outer: torch.dtype, inner: torch.dtype, bits: int) -> None:
    if not holds(outer, inner):
        return
    raw = torch.tensor([bits - 2**31, bits * 40503, -bits], dtype=torch.int64)
    if inner.is_floating_point:
        size = torch.finfo(inner).bits
        whole = {16: torch.int16, 32: torch.int32, 64: torch.int64}[size]
        value = raw.to(whole).view(inner)
        value = value[value.isfinite()]
    else:
        value = raw.to(inner)
    assert torch.equal(value.to(outer).to(inner), value)


def test_what_dtypes_hold() -> None:
    assert holds(torch.float32, torch.bfloat16) and holds(torch.float32, torch.int8) and holds(torch.int64, torch.bool)
    assert not holds(torch.bfloat16, torch.float16) and not holds(torch.float16, torch.bfloat16)
    assert not holds(torch.float32, torch.int32) and not holds(torch.int64, torch.float16)
    assert not holds(torch.uint8, torch.int8) and not holds(torch.bool, torch.int8)


# ------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize(
    "function, products",
    [
        (lambda m, x: torch.relu(x) * 2 * 0.25 + 1, 1),
        (lambda m, x: torch.relu(x) * 2 / 2 + 1, 0),
        (lambda m, x: 3 * torch.relu(x) / 7 * 0.5 + 1, 1),
        (lambda m, x: (x * 0.5) @ (m.w * 0.25), 1),
        (lambda m, x: (x * 0.5) @ m.w * 0.25, 1),
        (lambda m, x: x @ m.w * 0.5 / 3, 1),
        (lambda m, x: (x / 2) @ (x * 3).transpose(1, 2) * 5, 1),
        (lambda m, x: (x * 0.5) @ m.w, 1),  # one product stays one
    ],
)
def test_numbers_multiply_once(function: Any, products: int) -> None:
    outcome = Outcome(function, X).verified()
    scaling = (aten.mul.Tensor, aten.div.Tensor)
    assert len([t for t in outcome.targets() if t in scaling]) == products


def test_the_scale_of_q_becomes_that_of_the_attention() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        q = (x @ m.w * 0.25).view(x.shape[0], 4, 2, 3).transpose(1, 2)
        k = x.view(x.shape[0], 4, 2, 3).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, k, scale=1.0)

    outcome = Outcome(function, X).verified()
    assert outcome.rules == ["scale"] and aten.mul.Tensor not in outcome.targets()
    (attention,) = outcome.after.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert attention.kwargs["scale"] == 0.25


@pytest.mark.parametrize(
    "function, x, reason",
    [
        (lambda m, x: torch.relu(x) * 2 * 0.25, X.half(), "float16"),
        (lambda m, x: torch.relu(x) * 1e30 * 1e-30, X, "size of a scale"),
        (lambda m, x: torch.relu(x) * 0.0 * 2, X, "size of a scale"),
    ],
)
def test_scales_that_stay(function: Any, x: Tensor, reason: str) -> None:
    outcome = Outcome(function, x)
    assert outcome.rules == [] and reason in outcome.reasons


def test_a_scaled_value_used_elsewhere_stays() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        half = torch.relu(x) * 0.5
        return half * 3 + half

    assert Outcome(function, X).verified().rules == []


def test_integers_are_not_scaled() -> None:
    outcome = Outcome(lambda m, x: x // 2 * 3 * 5 / 2, torch.arange(12).view(3, 4), scales=True)
    assert outcome.rules == []


# ------------------------------------------------------------------------------------------------- shift


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.softmax(x @ m.w + 3.5, -1),
        lambda m, x: torch.softmax(x @ m.w - 3.5, 1),
        lambda m, x: torch.log_softmax(2 + x @ m.w, -1),
        lambda m, x: torch.softmax((y := x @ m.w) - y.amax(-1, keepdim=True), -1),
        lambda m, x: torch.softmax((y := x @ m.w) - y.max(-1, keepdim=True).values, -1),
        lambda m, x: torch.softmax((y := x @ m.w) - y.amax(-1, keepdim=True).detach(), -1),
        lambda m, x: torch.log_softmax((y := x @ m.w) - y.logsumexp(-1, keepdim=True), -1),
    ],
)
def test_a_shift_of_the_whole_row_drops(function: Any) -> None:
    outcome = Outcome(function, X).verified()
    assert outcome.rules[:1] == ["shift"]
    assert outcome.targets()[:-1] == [aten.matmul.default]


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda m, x: torch.softmax(x + math.inf, -1), "not finite"),
        (lambda m, x: torch.softmax(x + 1e9, -1), "rounds x"),
        (lambda m, x: torch.softmax(x + x.log().sum(-1, keepdim=True), -1), "may be infinite"),
        (lambda m, x: torch.softmax(x - x.amax(1, keepdim=True), 1) + torch.softmax(x - x.amin(1, keepdim=True), 1), "amin"),
        (lambda m, x: torch.softmax(x - x.amax(-1, keepdim=True), 1), ""),  # not constant along dim 1
        (lambda m, x: torch.softmax(x + m.w[0], -1), ""),
        (lambda m, x: torch.softmax(3.5 - x, -1), ""),
    ],
)
def test_shifts_that_stay(function: Any, reason: str) -> None:
    outcome = Outcome(function, X, shift=True)
    assert outcome.rules.count("shift") == ("amin" in reason) and reason in outcome.reasons


def test_rows_that_see_nothing_stay_as_they_were() -> None:
    x = X.clone()
    x[0, 0] = -math.inf
    x[1, 1, 2] = math.inf
    outcome = Outcome(lambda m, x: torch.softmax(x - x.amax(-1, keepdim=True), -1), x)
    assert outcome.rules == ["shift"]
    torch.testing.assert_close(outcome.after.run(x), outcome.before.run(x), equal_nan=True)


# ------------------------------------------------------------------------------------------------- common and dead


def test_equal_calls_are_computed_once() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return torch.relu(x @ m.w).sum(-1) * torch.relu(x @ m.w).sum(-1)

    outcome = Outcome(function, X).verified()
    assert outcome.rules == ["common"] * 3 and len(outcome.targets()) == 4


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.relu(x) + torch.sigmoid(x),
        lambda m, x: x.sum(0) * x.sum(1)[:, :1].sum(),
        lambda m, x: (x * 1.5) * (x * 2.5),
        lambda m, x: x.to(torch.float64) * x.to(torch.int64),
        lambda m, x: torch.rand_like(x) - torch.rand_like(x),
        lambda m, x: nn.functional.dropout(x, 0.5) - nn.functional.dropout(x, 0.5),
    ],
)
def test_different_calls_stay(function: Any) -> None:
    assert "common" not in Outcome(function, X, common=True).rules


def test_a_write_in_between_makes_equal_calls_different() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        first = torch.sigmoid(y)
        y.add_(1)
        return first * torch.sigmoid(y)

    assert "common" not in Outcome(function, X, common=True).verified().rules


def test_copies_of_which_one_is_written_stay_two() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        first, second = x * 2, x * 2
        first.add_(1)
        return first * second

    outcome = Outcome(function, X, common=True).verified()
    assert outcome.rules == [] and "written" in outcome.reasons


def test_two_outputs_stay_two_tensors() -> None:
    outcome = Outcome(lambda m, x: (torch.relu(x), torch.relu(x)), X).verified()
    a, b = outcome.after.run(X)
    assert outcome.rules == [] and a.data_ptr() != b.data_ptr()
    assert "returned" in outcome.reasons


def test_dead_values_go_with_what_was_computed_for_them() -> None:
    outcome = Outcome(lambda m, x: torch.relu(x), X)
    program = outcome.before.fork()
    (relu,) = program.graph.find_nodes(op="call_function", target=aten.relu.default)
    with program.graph.inserting_before(relu):
        first = program.graph.call_function(aten.sin.default, (relu.args[0],))
        second = program.graph.call_function(aten.cos.default, (first,))
        noise = program.graph.call_function(aten.rand_like.default, (relu.args[0],))
    for node in (first, second, noise):
        node.meta = dict(relu.meta)
    program.rebind()
    plan = rewriter.plan(program, ["simplify"])
    assert [s.rule for s in plan.sites] == ["simplify.dead"]
    assert "random numbers" in "\n".join(map(str, plan.misses))
    after = rewriter.apply(program, plan)
    assert [n.target for n in after.graph.nodes if n.op == "call_function"] == [aten.rand_like.default, aten.relu.default]


# ------------------------------------------------------------------------------------------------- together

_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "flat and back": lambda x: x.reshape(x.shape[0], -1).view(x.shape),
    "half scale": lambda x: x * 0.5,
    "third": lambda x: x / 3,
    "wide and back": lambda x: x.double().float(),
    "slice": lambda x: x[:, :],
    "softmax": lambda x: torch.softmax(x + 2, -1),
    "twice": lambda x: torch.tanh(x) + torch.tanh(x),
    # Bounded, so that three of them in a row do not turn rounding into chaos.
    "matmul": lambda x: torch.tanh((x * 0.7) @ (x * 0.3).mT) @ torch.tanh(x) / 6,
    "write": lambda x: (x * 1).mul_(1.25),
    "copy": lambda x: x.contiguous(),
}


@settings(max_examples=25)
@example(["flat and back", "flat and back"])  # chains that overlap in a value read by both
@given(st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=7))
def test_any_mixture_computes_the_same_and_nothing_is_left_to_do(names: list[str]) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        for name in names:
            x = _STEPS[name](x)
        return x @ m.w[: x.shape[-1], : x.shape[-1]] + 1

    outcome = Outcome(function, _normal(2, 6, 6))
    result = rewriter.verify(outcome.before, outcome.after, outcome.inputs)
    # What is computed, in float64; how well, in float32, is a lottery of single bits for compositions like these.
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10
    assert len(outcome.after.graph.nodes) <= len(outcome.before.graph.nodes)
    again = rewriter.plan(outcome.after, ["simplify"])
    assert not again.sites or len(rewriter.apply(outcome.after, again).graph.nodes) < len(outcome.after.graph.nodes)
