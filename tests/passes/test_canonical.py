# SPDX-License-Identifier: Apache-2.0
"""`canonical` promises the same function: golden runs with gradients in the usual dtypes, refusals, save, ONNX, undo."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from rewriter.passes import Canonical

aten = torch.ops.aten
WIDTH = 12
EPS = 1e-6
C = math.sqrt(2 / math.pi)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Around(nn.Module):
    """A written-out function between two linears, with a weight and a bias of its own."""

    def __init__(self, function: Callable[..., Tensor], weight: Tensor | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.weight = nn.Parameter(torch.rand(WIDTH, generator=generator) + 0.5 if weight is None else weight)
        self.bias = nn.Parameter(torch.randn(WIDTH, generator=generator))
        self.function = function
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) if parameter.dim() > 1 else parameter.data

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.weight, self.bias))


def rms(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def llama(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return w * (wide * rms(wide)).to(x.dtype)


def gemma(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    wide = x.float()
    return ((wide * rms(wide)) * (1.0 + w.float())).type_as(x)


def t5(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    normed = x * rms(x.to(torch.float32))
    return w * (normed.to(w.dtype) if w.dtype in (torch.float16, torch.bfloat16) else normed)


def in_float64(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    wide = x.double()
    return w * (wide * rms(wide)).to(x.dtype)


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * w + b


def cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    mean = wide.mean(-1, keepdim=True)
    normed = (wide - mean) * torch.rsqrt((wide - mean).pow(2).mean(-1, keepdim=True) + EPS)
    return (w.to(torch.float32) * normed).to(x.dtype)


def new_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0))))


def shifted_softmax(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def shifted_log_softmax(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = x - x.amax(-1, keepdim=True).detach()
    return z - z.exp().sum(-1, keepdim=True).log()


# name: (function, the rule that takes it, the operator that stands there afterwards)
FORMS: dict[str, tuple[Callable[..., Tensor], str, Any]] = {
    "llama": (llama, "rms_norm", aten.rms_norm.default),
    "gemma": (gemma, "rms_norm", aten.rms_norm.default),
    "t5": (t5, "rms_norm", aten.rms_norm.default),
    "rms_norm in float64": (in_float64, "rms_norm", aten.rms_norm.default),
    "rms_norm over a root": (lambda x, w, b: x / torch.sqrt((x * x).mean(-1, True) + EPS), "rms_norm", aten.rms_norm.default),
    "layer": (layer, "layer_norm", aten.layer_norm.default),
    "cohere": (cohere, "layer_norm", aten.layer_norm.default),
    "new_gelu": (new_gelu, "gelu", aten.gelu.default),
    "erf gelu": (lambda x, w, b: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu", aten.gelu.default),
    "silu": (lambda x, w, b: x * torch.sigmoid(x), "silu", aten.silu.default),
    "softmax": (shifted_softmax, "softmax", aten.softmax.int),
    "log_softmax": (shifted_log_softmax, "log_softmax", aten.log_softmax.int),
    "logsumexp": (lambda x, w, b: x - x.logsumexp(-1, keepdim=True), "log_softmax", aten.log_softmax.int),
}  # fmt: skip


def sample(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def canonical(model: nn.Module, *inputs: Any, **options: Any) -> tuple[rewriter.Program, rewriter.Program, list[str]]:
    """The program before and after, and the rules of the sites."""
    before = rewriter.capture(model, inputs)
    plan = rewriter.plan(before, [Canonical(**options)])
    return before, rewriter.apply(before, plan), [site.rule.removeprefix("canonical.") for site in plan.sites]


def targets(program: rewriter.Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, d) for n in FORMS for d in DTYPES), ("llama", torch.float64), ("layer", torch.float64)]
)
def test_golden_run_with_gradients(name: str, dtype: torch.dtype) -> None:
    function, rule, operator = FORMS[name]
    model = Around(function).eval().to(dtype)
    before, after, rules = canonical(model, sample(dtype))
    assert rules == [rule] and targets(after).count(operator) == 1
    small = {aten.linear.default, operator, aten.to.dtype, aten.add.Tensor, aten.type_as.default}
    assert set(targets(after)) <= small  # nothing of the written form is left but casts
    samples = [(sample(dtype, seed) * scale,) for seed, scale in ((0, 1.0), (1, 0.1), (2, 30.0))]
    result = rewriter.verify(before, after, samples).raise_if_failed()
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10
    assert len(result.gradients) >= 5


@pytest.mark.parametrize("name", FORMS)
def test_applying_twice_is_applying_once(name: str) -> None:
    _, after, _ = canonical(Around(FORMS[name][0]).eval(), sample())
    assert rewriter.plan(after, ["canonical"]).sites == ()


def test_a_layer_norm_far_from_zero_keeps_its_digits() -> None:
    model = Around(layer).eval()
    model.first.bias.data += 1000.0
    before, after, _ = canonical(model, sample())
    rewriter.verify(before, after, [(sample(),)]).raise_if_failed()


# ------------------------------------------------------------------------------------------------------- loss


class Loss(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 7)
        self.function = function

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.function(self.head(x + self.embed(target)), target)  # which says that their sizes agree


def picked(x: Tensor, target: Tensor) -> Tensor:
    return x.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll": lambda x, t: F.nll_loss(x.flatten(0, 1).log_softmax(-1), t.flatten()),
    "nll in float32": lambda x, t: F.nll_loss(x.flatten(0, 1).log_softmax(-1, torch.float32), t.flatten(), reduction="sum"),
    "nll, ignoring": lambda x, t: F.nll_loss(x.transpose(1, 2).log_softmax(1), t, ignore_index=3),
    "gather": lambda x, t: -picked(x, t),
    "gather of a matrix": lambda x, t: -picked(x.flatten(0, 1), t.flatten()),
    "mean": lambda x, t: -picked(x, t).mean(),
    "sum": lambda x, t: (-picked(x, t)).sum(),
    "written log-softmax": lambda x, t: -(x - x.logsumexp(-1, True)).gather(-1, t.unsqueeze(-1)).squeeze(-1).mean(),
    "masked": lambda x, t: (-picked(x, t) * (t != 3)).sum() / (t != 3).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Loss(LOSSES[name]).eval().to(dtype)

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(length)
        return sample(dtype)[:1, :1].new_empty(batch, length, WIDTH).copy_(
            torch.randn(batch, length, WIDTH, generator=generator)
        ), torch.randint(0, 7, (batch, length), generator=generator)

    before, after, rules = canonical(model, *inputs(4, 5))
    assert rules[-1] == "cross_entropy" and aten.log_softmax.int not in targets(after)
    assert targets(after).count(aten.cross_entropy_loss.default) == 1
    # A loss is one number, so that its error on one input is a lottery; a dozen inputs say what is usual.
    samples = [inputs(4, 5), inputs(3, 8), *(inputs(8, length) for length in range(55, 65))]
    rewriter.verify(before, after, samples).raise_if_failed()


# --------------------------------------------------------------------------------------------------- refusals


def reasons(model: nn.Module, *inputs: Any, **options: Any) -> str:
    plan = rewriter.plan(rewriter.capture(model, inputs), [Canonical(**options)])
    assert plan.sites == ()
    return "\n".join(str(miss) for miss in plan.misses)


def plain_softmax(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def log_of_softmax(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.softmax(-1).log()


@pytest.mark.parametrize("function", [plain_softmax, log_of_softmax])
def test_what_overflows_as_written_is_taken_only_on_demand(function: Callable[..., Tensor]) -> None:
    model = Around(function).eval()
    assert "overflows or underflows where the operator does not" in reasons(model, sample())
    before, after, rules = canonical(model, sample(), stabilise=True)
    assert len(rules) == 1
    rewriter.verify(before, after, [(sample(),)]).raise_if_failed()  # where nothing overflows: the same function
    large = (sample() * 1000,)
    assert not before.graph_module(*large)[0].isfinite().all()
    assert after.graph_module(*large)[0].isfinite().all()
    assert not rewriter.verify(before, after, [large]).passed  # and there it is another one


def test_a_gelu_with_a_shorter_constant_is_refused() -> None:
    def bloom(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    assert "a constant of the formula is off by 1.0e-09" in reasons(Around(bloom).eval(), sample())


def test_a_value_that_is_returned_too_is_kept() -> None:
    class Showing(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            e = torch.exp(x - x.amax(-1, keepdim=True))
            return e / e.sum(-1, keepdim=True), e

    assert "needed outside the match" in reasons(Showing(), sample())


def test_an_in_place_write_between_is_refused() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            s = torch.sigmoid(x)
            x.add_(1.0)
            return x * s

    assert "silu" not in canonical(Writing(), sample())[2]


def test_targets_that_may_be_fewer_than_rows_are_refused() -> None:
    class Loose(nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return -picked(x, target).mean()  # gather reads the first rows only, where targets are fewer

    inputs = (sample(), torch.randint(0, WIDTH, (4, 5)))
    assert "a target for every row" in reasons(Loose(), *inputs)


def test_options_choose_the_rules() -> None:
    for option in ("layer_norm", "rms_norm", "gelu", "silu", "softmax", "log_softmax", "cross_entropy"):
        rules = Canonical(**{option: False}).rules()
        assert len(rules) == 6 and f"canonical.{option}" not in [rule.name for rule in rules]


# --------------------------------------------------------------------------------------- save, export and undo


class Everything(nn.Module):
    """Every form once."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Around(FORMS[name][0]) for name in ("llama", "gemma", "layer", "new_gelu", "silu"))
        self.embed, self.head = nn.Embedding(7, WIDTH), nn.Linear(3, 7)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.embed(target)
        total = sum(part(x) for part in self.parts)
        logits = self.head(total)
        e = torch.exp(logits - logits.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True), -picked(logits, target).mean()


def everything() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Everything().eval(), (sample(), torch.randint(0, 7, (4, 5)))


def test_save_and_load(tmp_path: Path) -> None:
    model, inputs = everything()
    opt = rewriter.optimize(model, ["canonical"], example_inputs=inputs)
    assert len(opt.plan.sites) == 7
    opt.save(tmp_path / "saved")
    loaded = rewriter.load(tmp_path / "saved")
    for actual, expected in zip(loaded(*inputs), opt(*inputs), strict=True):
        assert torch.equal(actual, expected)


def test_other_dtypes_and_modes_of_one_optimized_model() -> None:
    model, inputs = everything()
    opt = rewriter.optimize(model, ["canonical"], example_inputs=inputs)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.2)):
        expected = copy.deepcopy(model).to(dtype)(inputs[0].to(dtype), inputs[1])
        actual = opt.to(dtype)(inputs[0].to(dtype), inputs[1])
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_undo_gives_back_the_written_form() -> None:
    model, inputs = everything()
    opt = rewriter.optimize(model, ["canonical"], example_inputs=inputs)
    undone = opt.undo("canonical.rms_norm")
    rules = [site.rule for site in undone.plan.sites]
    assert "canonical.rms_norm" not in rules and len(rules) == 5
    rewriter.verify(opt.original_program(), undone.program, [inputs]).raise_if_failed()


def test_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = everything()
    opt = rewriter.optimize(model, ["canonical"], example_inputs=inputs)
    path = tmp_path / "model.onnx"
    opt.export_onnx(path)
    session = onnxruntime.InferenceSession(str(path))
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    for actual, expected in zip(session.run(None, feeds), opt(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected.detach(), rtol=1e-4, atol=1e-5)
