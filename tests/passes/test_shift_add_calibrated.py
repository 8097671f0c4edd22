# SPDX-License-Identifier: Apache-2.0
"""Calibrated ShiftAdd: rounding in the metric of the inputs, scaled inputs, mixed bits."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter import planner
from rewriter.errors import PlanError
from rewriter.passes import ShiftAdd
from rewriter.passes.shift_add import awq, compensate, mixed, modes
from rewriter.passes.shift_add.bcq import BCQ, Uniform
from rewriter.passes.shift_add.hessian import Metric
from rewriter.passes.shift_add.modes import Mode
from rewriter.passes.shift_add.pot import Pot

SEEDS = st.integers(0, 2**20)
MODES: dict[str, Mode] = {
    "bcq": BCQ(3, "pot"),
    "bcq, fp16 scales": BCQ(3, "fp16"),
    "pot": Pot(3),
    "pot, two terms": Pot(4, 2),
}


def gaussian(out: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def inputs(rows: int, width: int, seed: int = 1) -> Tensor:
    """Correlated, with energies that differ by orders of magnitude, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    size = torch.exp(torch.randn(width, generator=generator, dtype=torch.float64))
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(width)) * size


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def output_error(weight: Tensor, decoded: Tensor, x: Tensor) -> float:
    exact = x @ weight.double().T
    return float((x @ decoded.double().T - exact).norm() / exact.norm())


# ---------------------------------------------------------------------------------- the metric


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    for act_order in (False, True):
        metric = Metric.of(moment(inputs(200, 24)), act_order=act_order)
        ordered = metric.form[metric.order][:, metric.order]
        torch.testing.assert_close(metric.factor.T @ metric.factor @ ordered, torch.eye(24, dtype=torch.float64))
        assert torch.equal(metric.factor, metric.factor.triu())
        assert bool((metric.factor.diagonal() > 0).all())
    diagonal = metric.form.diagonal()
    assert torch.equal(diagonal[metric.order], diagonal.sort(descending=True).values)


def test_damping_is_a_share_of_the_mean_energy() -> None:
    plain = moment(inputs(200, 8))
    metric = Metric.of(plain, damping=0.25)
    torch.testing.assert_close(metric.form, plain + 0.25 * plain.diagonal().mean() * torch.eye(8, dtype=torch.float64))


def test_singular_moments_and_inputs_that_are_always_zero() -> None:
    x = inputs(3, 16)
    x[:, 5] = 0
    metric = Metric.of(moment(x), damping=0.0)
    assert bool(torch.isfinite(metric.factor).all())
    weight = gaussian(4, 16)
    fitted = compensate.fit(weight, BCQ(3, "pot"), metric, group=8).decode()
    assert bool(torch.isfinite(fitted).all())
    assert output_error(weight, fitted, x) <= output_error(
        weight, modes.fit(weight, BCQ(3, "pot"), group=8).decode(), x
    )
    nothing = Metric.of(torch.zeros(16, 16))
    assert bool(torch.isfinite(nothing.factor).all())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Metric.of(torch.eye(4), damping=-1.0), "must not be negative"),
        (lambda: Metric.of(torch.full((4, 4), float("nan"))), "no finite square matrix"),
        (lambda: Metric.of(torch.ones(4, 3)), "no finite square matrix"),
        (lambda: Metric.of(-torch.eye(4)), "no finite square matrix"),
        (lambda: Metric.of(torch.tensor([[1.0, 5.0], [5.0, 1.0]])), "negative eigenvalues"),
    ],
)
def test_moments_that_are_none_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call()


def test_a_metric_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit a weight"):
        compensate.fit(gaussian(2, 8), BCQ(3, "pot"), Metric.of(torch.eye(7)))


# ---------------------------------------------------------------------------------- laws


@settings(deadline=None, max_examples=10)
@given(
    kind=st.sampled_from(sorted(MODES)),
    seed=SEEDS,
    width=st.integers(1, 24),
    group=st.integers(1, 28),
    energy=st.floats(1e-6, 1e6),
    act_order=st.booleans(),
)
def test_inputs_alike_and_uncorrelated_leave_plain_rounding(
    kind: str, seed: int, width: int, group: int, energy: float, act_order: bool
) -> None:
    weight, mode = gaussian(3, width, seed), MODES[kind]
    metric = Metric.of(energy * torch.eye(width, dtype=torch.float64), act_order=act_order)
    plain = modes.fit(weight, mode, group=group)
    fitted = compensate.fit(weight, mode, metric, group=group, visits=0)
    for role, tensor in plain.tensors().items():
        assert torch.equal(fitted.tensors()[role], tensor)


@settings(deadline=None, max_examples=10)
@given(
    kind=st.sampled_from(sorted(MODES)),
    seed=SEEDS,
    width=st.integers(2, 24),
    group=st.integers(1, 28),
    act_order=st.booleans(),
)
def test_no_row_gets_worse_than_plainly_rounded_and_none_by_another_visit(
    kind: str, seed: int, width: int, group: int, act_order: bool
) -> None:
    weight, mode = gaussian(4, width, seed).double(), MODES[kind]
    metric = Metric.of(moment(inputs(3 * width, width, seed)), act_order=act_order)
    fits = [modes.fit(weight, mode, group=group)]
    fits += [compensate.fit(weight, mode, metric, group=group, visits=v) for v in range(3)]
    costs = [metric.cost(weight - fitted.decode()) for fitted in fits]
    for before, after in itertools.pairwise(costs):
        assert bool((after <= before * (1 + 1e-9)).all())


@settings(deadline=None, max_examples=6)
@given(kind=st.sampled_from(sorted(MODES)), seed=SEEDS, power=st.integers(-6, 6))
def test_rescaled_inputs_or_weights_change_nothing(kind: str, seed: int, power: int) -> None:
    weight, mode = gaussian(4, 24, seed, torch.float64) * 2.0**40, MODES[kind]
    second = moment(inputs(100, 24, seed))
    plain = compensate.fit(weight, mode, Metric.of(second), group=8)
    louder = compensate.fit(weight, mode, Metric.of(second * 4.0**power), group=8)
    larger = compensate.fit(weight * 2.0**power, mode, Metric.of(second), group=8)
    assert torch.equal(louder.decode(), plain.decode())
    assert torch.equal(larger.decode(), plain.decode() * 2.0**power)


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("act_order", [False, True])
def test_compensation_makes_outputs_better(kind: str, act_order: bool) -> None:
    x, weight, mode = inputs(1000, 96), gaussian(32, 96), MODES[kind]
    metric = Metric.of(moment(x), act_order=act_order)
    plain = output_error(weight, modes.fit(weight, mode, group=32).decode(), x)
    sequence = output_error(weight, compensate.fit(weight, mode, metric, group=32, visits=0).decode(), x)
    visited = output_error(weight, compensate.fit(weight, mode, metric, group=32).decode(), x)
    assert sequence < 0.9 * plain
    assert visited < 0.97 * sequence


@pytest.mark.parametrize("mode", [Uniform(4, "fp16"), BCQ(4, "pot")], ids=["uniform", "bcq"])
def test_an_outlying_input_does_not_spoil_the_others(mode: Mode) -> None:
    """Real layers have inputs of hundreds of times the median energy whose weights lie outside a grid fitted to all alike."""
    x = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x += 0.05 * 470**0.5 * x[:, 7:8]
    x[:, 7] *= 470**0.5
    weight = gaussian(32, 64)
    weight[:, 7] = 0.3 * weight[:, 7].sign()  # six sigma
    found = compensate.fit(weight, mode, Metric.of(moment(x)), group=64)
    plain = modes.fit(weight, mode, group=64)
    assert output_error(weight, found.decode(), x) < 0.5 * output_error(weight, plain.decode(), x)
    others = torch.arange(64) != 7
    assert (found.decode() - weight)[:, others].norm() < 1.5 * (plain.decode() - weight)[:, others].norm()


def test_codes_that_no_single_change_improves() -> None:
    # After enough visits every code is the best one with all others fixed: the exact coordinate minimum.
    weight, mode = gaussian(2, 12, dtype=torch.float64), Pot(3)
    metric = Metric.of(moment(inputs(60, 12)))
    fitted = compensate.fit(weight, mode, metric, group=12, visits=30)
    decoded, cost = fitted.decode(), metric.cost(weight - fitted.decode())
    grid = mode.grid(mode.scales_of(fitted)[:, 0])
    for column in range(12):
        for level, sign in itertools.product(range(grid.levels.shape[1]), (1, -1)):
            other = decoded.clone()
            other[:, column] = sign * grid.levels[:, level]
            assert bool((metric.cost(weight - other) >= cost * (1 - 1e-9)).all())


def test_blocks_and_chunks_of_rows_change_nothing_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mode = gaussian(12, 40), BCQ(3, "fp16")
    for act_order, visits in ((False, 0), (True, 2)):
        metric = Metric.of(moment(inputs(300, 40)), act_order=act_order)
        whole = compensate.fit(weight, mode, metric, group=16, visits=visits).decode()
        assert torch.allclose(
            compensate.fit(weight, mode, metric, group=16, visits=visits, rows_per_chunk=5).decode(), whole
        )
        with monkeypatch.context() as patch:
            patch.setattr(compensate, "BLOCK", 7)
            assert torch.allclose(compensate.fit(weight, mode, metric, group=16, visits=visits).decode(), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_keeps_its_scales(dtype: torch.dtype) -> None:
    x, weight = inputs(300, 40), gaussian(8, 40, dtype=dtype)
    for mode in MODES.values():
        fitted = compensate.fit(weight, mode, Metric.of(moment(x)), group=16)
        assert fitted.scale.dtype is dtype and fitted.decode().dtype is dtype
        plain = modes.fit(weight, mode, group=16)
        assert output_error(weight, fitted.decode(), x) < output_error(weight, plain.decode(), x)


# ---------------------------------------------------------------------------------- scaled inputs


@settings(deadline=None, max_examples=6)
@given(kind=st.sampled_from(sorted(MODES)), seed=SEEDS, group=st.integers(1, 28))
def test_scaled_inputs_are_powers_of_two_and_never_worse(kind: str, seed: int, group: int) -> None:
    weight, mode, x = gaussian(6, 24, seed), MODES[kind], inputs(100, 24, seed)
    scale = awq.input_scale(weight, mode, moment(x), group=group)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    scaled = modes.fit((weight.double() / scale).float(), mode, group=group).decode().double() * scale
    plain = modes.fit(weight, mode, group=group).decode()
    assert output_error(weight, scaled, x) <= output_error(weight, plain, x) * (1 + 1e-9)


def test_inputs_of_one_size_need_no_scale() -> None:
    assert torch.equal(awq.input_scale(gaussian(4, 8), Pot(3), torch.eye(8)), torch.ones(8, dtype=torch.float64))
    assert torch.equal(awq.input_scale(gaussian(4, 8), Pot(3), torch.zeros(8, 8)), torch.ones(8, dtype=torch.float64))


def test_a_few_loud_inputs_get_finer_weights() -> None:
    x = inputs(500, 64)
    x[:, :2] *= 100
    weight, mode = gaussian(32, 64), BCQ(3, "pot")
    scale = awq.input_scale(weight, mode, moment(x), group=64)
    assert float(scale[:2].max()) < float(scale[2:].median())
    scaled = modes.fit((weight.double() / scale).float(), mode, group=64).decode().double() * scale
    assert output_error(weight, scaled, x) < 0.7 * output_error(weight, modes.fit(weight, mode, group=64).decode(), x)


# ---------------------------------------------------------------------------------- mixed bits


@settings(deadline=None, max_examples=50)
@given(
    layers=st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 4096)), min_size=1, max_size=12),
    mean_bits=st.floats(1, 8),
)
def test_bits_stay_within_the_budget_and_use_it(layers: list[tuple[float, int]], mean_bits: float) -> None:
    scores, sizes = [c for c, _ in layers], [n for _, n in layers]
    bits = mixed.allocate(scores, sizes, mean_bits)
    assert all(1 <= b <= 8 for b in bits)
    spent = sum(b * n for b, n in zip(bits, sizes, strict=True))
    assert spent <= mean_bits * sum(sizes) + 1e-6
    # What is left buys no further bit for any layer that may have one.
    high = min(8, int(mean_bits) + mixed.SPREAD)
    assert all(b == high or spent + n > mean_bits * sum(sizes) for b, n in zip(bits, sizes, strict=True))


def test_bits_are_those_of_the_least_total_sensitivity() -> None:
    scores, sizes = [5.0, 0.3, 40.0, 1.0], [8, 8, 8, 8]
    bits = mixed.allocate(scores, sizes, 3.0)

    def total(given: tuple[int, ...]) -> float:
        return sum(c * 4.0**-b for c, b in zip(scores, given, strict=True))

    allowed = [b for b in itertools.product(range(2, 5), repeat=4) if sum(b) <= 12]
    assert total(tuple(bits)) == min(map(total, allowed))


def test_sensitivity_has_no_unit() -> None:
    weight, second = gaussian(8, 16), moment(inputs(100, 16))
    plain = mixed.sensitivity(weight, Metric.of(second))
    assert mixed.sensitivity(3 * weight, Metric.of(4 * second)) == pytest.approx(plain)
    assert mixed.sensitivity(0 * weight, Metric.of(second)) == 0
    # Inputs that can make up for one another's errors make a layer less sensitive.
    assert plain < mixed.sensitivity(weight, Metric.of(torch.diag(second.diagonal())))


# ---------------------------------------------------------------------------------- the pass


class Tiny(nn.Module):
    """An embedding and two linear layers, the first with inputs of very different energy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.up = nn.Linear(24, 48)
        self.down = nn.Linear(48, 24, bias=False)
        with torch.no_grad():
            self.up.weight[:, :3] *= 0.1
            self.embed.weight[:, :3] *= 20

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.embed(ids))))
        return y


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    return list(torch.randint(0, 50, (16, 20), generator=torch.Generator().manual_seed(3)).split(4))


def rewritten(model: nn.Module, data: list[Tensor] | None, **options: object) -> rewriter.Optimized:
    one = ShiftAdd(group=16, **{"bits": 3, "embeddings": True, **options})  # type: ignore[arg-type]
    return rewriter.optimize(model, [one], example_inputs=(torch.randint(0, 50, (2, 6)),), calibration=data)


def distance(model: nn.Module, other: nn.Module, data: list[Tensor]) -> float:
    ids = torch.cat(data)
    with torch.no_grad():
        return float((model(ids) - other(ids)).norm() / model(ids).norm())


def test_data_is_used_where_it_is_given(tiny: nn.Module, data: list[Tensor]) -> None:
    calibrated, plain = rewritten(tiny, data), rewritten(tiny, data, compensate=False)
    without = rewritten(tiny, None)
    assert distance(without, plain, data) == 0
    for site, before in zip(calibrated.report.sites, plain.report.sites, strict=True):
        if "output_error" in site.figures:
            assert site.figures["output_error"] < 0.95 * before.figures["output_error"]
    assert distance(tiny, calibrated, data) < 0.9 * distance(tiny, plain, data)
    assert [s.choice.get("compensate") for s in calibrated.plan.sites] == [True] * 3
    assert not any("compensate" in s.choice for s in (*plain.plan.sites, *without.plan.sites))


def test_embeddings_are_rounded_in_the_metric_of_the_outputs(tiny: nn.Module, data: list[Tensor]) -> None:
    only = {"up": None, "down": None}
    one = ShiftAdd(bits=4, group=8, embeddings=True)
    example = (torch.randint(0, 50, (2, 6)),)
    calibrated = rewriter.optimize(tiny, [one], select=only, example_inputs=example, calibration=data)
    plain = rewriter.optimize(tiny, [one], select=only, example_inputs=example)
    assert len(calibrated.plan.sites) == len(plain.plan.sites) == 1
    assert distance(tiny, calibrated, data) < 0.9 * distance(tiny, plain, data)


@pytest.mark.parametrize("options", [{"compensate": True}, {"awq": True}, {"mean_bits": 3.0}])
def test_options_that_need_data_say_so(tiny: nn.Module, options: dict[str, object]) -> None:
    with pytest.raises(PlanError, match=r"shift_add\.\w+ at \w+: .* needs calibration data of this site; give calib"):
        rewritten(tiny, None, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compensate": "yes"}, "must be True, False or 'auto'"),
        ({"damping": -0.1}, "must be 0 to 1"),
        ({"damping": float("nan")}, "must be 0 to 1"),
        ({"mean_bits": 0.5}, "must be 1 to 8"),
        ({"mean_bits": 8.5}, "must be 1 to 8"),
        ({"mean_bits": 1.5, "mode": "pot"}, "must be 2 to 8 in mode pot"),
        ({"mean_bits": 4.0, "mode": "pot", "terms": 2}, "contradict"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ShiftAdd(**options)  # type: ignore[arg-type]


def test_scaled_inputs_stay_in_the_model(tiny: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    scaled, plain = (rewritten(tiny, data, awq=awq, compensate=False) for awq in (True, False))
    figures, before = ({s.paths[0]: s.figures for s in o.report.sites} for o in (scaled, plain))
    assert figures["up"]["output_error"] < 0.9 * before["up"]["output_error"]
    # one fp16 scale per input, over 48 outputs
    assert figures["up"]["bits"] == pytest.approx(before["up"]["bits"] + 16 / 48)
    names = dict(scaled.named_buffers())
    assert any(name.endswith("up.input_scale") for name in names)
    ids = data[0]
    torch.testing.assert_close(scaled.to_module()(ids), scaled(ids))
    scaled.save(tmp_path / "scaled")
    assert torch.equal(rewriter.load(tmp_path / "scaled")(ids), scaled(ids))
    half = copy.deepcopy(scaled).bfloat16()
    assert half(ids).dtype is torch.bfloat16
    torch.testing.assert_close(half(ids).float(), scaled(ids), rtol=0.05, atol=0.1)


def test_both_together_are_better_than_each(tiny: nn.Module, data: list[Tensor]) -> None:
    def error(awq: bool, compensate: bool) -> float:
        opt = rewritten(tiny, data, awq=awq, compensate=compensate, embeddings=False)
        return next(s.figures["output_error"] for s in opt.report.sites if s.paths[0] == "up")

    assert error(True, True) < min(error(True, False), error(False, True))
    assert max(error(True, False), error(False, True)) < error(False, False)


@pytest.mark.parametrize("mode", ["bcq", "pot"])
def test_mixed_bits_are_in_the_plan(tiny: nn.Module, data: list[Tensor], mode: str, tmp_path: Path) -> None:
    opt = rewritten(tiny, data, mean_bits=3.0, mode=mode)
    bits = {s.address.path: s.choice.get("bits") for s in opt.plan.sites}
    assert bits["embed"] is None
    assert sum(b for b in bits.values() if b) <= 6  # of two layers of one size
    again = planner.Plan.from_json(json.loads(planner.dumps(opt.plan)))
    assert again == opt.plan
    assert dict(opt.named_buffers())["up.weight_codes"].numel() == 48 * 24 * bits["up"] // 8
    opt.save(tmp_path / "mixed")
    assert torch.equal(rewriter.load(tmp_path / "mixed")(data[0]), opt(data[0]))
    torch.testing.assert_close(opt.to_module()(data[0]), opt(data[0]))


def test_a_plan_with_data_needs_data(tiny: nn.Module, data: list[Tensor]) -> None:
    opt = rewritten(tiny, data)
    program = rewriter.capture(tiny, (torch.randint(0, 50, (2, 6)),))
    with pytest.raises(PlanError, match="statistics"):
        rewriter.apply(program, opt.plan)


def test_mixed_bits_say_that_merged_weights_do_not_exist_yet() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    x = torch.randn(2, 5, 32)
    with pytest.raises(PlanError, match="leave that pass out"):
        rewriter.optimize(Branches(), ["fuse", ShiftAdd(mean_bits=3)], (x,), calibration=[(x,)])
