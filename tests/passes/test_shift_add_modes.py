# SPDX-License-Identifier: Apache-2.0
"""Every mode against the same laws: reference errors beside the uniform grid, idempotence, symmetry, packing, bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.shift_add import codec
from rewriter.passes.shift_add import ShiftAdd, apot, dense, energy, measures, modes, pot
from rewriter.passes.shift_add.apot import Apot
from rewriter.passes.shift_add.bcq import BCQ, Uniform
from rewriter.passes.shift_add.dense import Dense
from rewriter.passes.shift_add.groups import split
from rewriter.passes.shift_add.layout import Layout
from rewriter.passes.shift_add.modes import Mode
from rewriter.passes.shift_add.pot import Pot

SEEDS = st.integers(0, 2**31 - 1)
MODES: dict[str, Mode] = {
    "bcq": BCQ(3),
    "bcq free": BCQ(3, "fp16"),
    "uniform": Uniform(3),
    "uniform pot": Uniform(3, "pot"),
    "pot": Pot(4),
    "pot pot": Pot(4, 1, "pot"),
    "pot sums": Pot(6, 2),
    "apot": Apot(5),
    "apot pot": Apot(5, "pot"),
    "dense": Dense(3),
    "dense pot": Dense(3, "pot"),
}
EVERY = st.sampled_from(sorted(MODES))


def gaussian(rows: int, columns: int, seed: int = 0, sigma: float = 0.02) -> Tensor:
    return sigma * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weights(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian or heavy-tailed, some exactly zero, some groups all zero."""
    g = torch.Generator().manual_seed(seed)
    w = 0.02 * torch.randn(rows, columns, generator=g)
    if seed % 3 == 1:
        w = w / (torch.rand(rows, columns, generator=g) + 0.02)
    if seed % 3 == 2:
        w = w * (torch.rand(rows, columns, generator=g) < 0.3)
    return w


def squared(weight: Tensor, decoded: Tensor, importance: Tensor | float = 1.0) -> float:
    return float((importance * (weight.double() - decoded.double()).square()).sum())


# ---------------------------------------------------------------------------------- reference figures

# Relative errors on Gaussian weights, group 128, at 1 to 8 bits; None: the mode has no such width.
LIMITS: dict[str, list[float | None]] = {
    "uniform": [0.601, 0.342, 0.189, 0.100, 0.052, 0.026, 0.013, 0.0065],
    "pot": [None, 0.44, 0.21, 0.18, 0.18, 0.18, 0.18, 0.18],
    "pot, 2 terms": [None, None, None, 0.21, None, 0.05, None, 0.032],
    "apot": [None, 0.44, 0.21, 0.105, 0.072, 0.043, 0.035, 0.024],
    "dense": [0.601, 0.40, 0.20, 0.18, 0.18, 0.18, 0.18, 0.18],
}


def build(name: str, bits: int) -> Mode:
    if name == "pot, 2 terms":
        return Pot(bits, 2)
    return {"uniform": Uniform, "pot": Pot, "apot": Apot, "dense": Dense}[name](bits)


@pytest.mark.parametrize("name", LIMITS)
def test_reference_errors_beside_the_uniform_grid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    weight = gaussian(64, 512)
    errors: list[str] = []
    for bits, limit in enumerate(LIMITS[name], 1):
        if limit is None:
            errors.append("   –  ")
            continue
        error = measures.relative_error(weight, modes.fit(weight, build(name, bits)).decode())
        errors.append(f"{error:.4f}")
        assert error <= limit, f"{bits} bits"
    with capsys.disabled():
        print(f"\n  {name:12} {' '.join(errors)}", end=" ")


def test_one_bit_and_two_free_bases_cannot_be_better() -> None:
    # One symmetric scale on n normal weights leaves 1 - 2/π of their energy, less what fitting one number gains:
    # E[n·mean|w|²] = 2/π·n + (1 - 2/π), so √((1 - 2/π)(1 - 1/128)) = 0.6005 at group 128.
    optimum = math.sqrt((1 - 2 / math.pi) * (1 - 1 / 128))
    weight = gaussian(512, 1024)
    found = measures.relative_error(weight, modes.fit(weight, BCQ(1)).decode())
    assert found == pytest.approx(optimum, abs=1e-3)


def test_sums_of_terms_start_a_third_lower_each() -> None:
    assert [pot.offsets(terms) for terms in (1, 2, 3, 4)] == [(0,), (0, 2), (0, 2, 3), (0, 2, 3, 5)]


# ---------------------------------------------------------------------------------- levels


def test_additive_powers_of_two_are_those_of_the_paper() -> None:
    # The sets of build_power_value in the authors' code, times two: their largest power is 1/2.
    published = {
        3: [{0, 1, 1 / 2, 1 / 4}],
        4: [{0, 1, 1 / 2, 1 / 8}, {0, 1 / 4}],
        5: [{0, 1, 1 / 4, 1 / 16}, {0, 1 / 2, 1 / 8, 1 / 32}],
        6: [{0, 1, 1 / 4, 1 / 32}, {0, 1 / 2, 1 / 8, 1 / 64}, {0, 1 / 16}],
        7: [{0, 1, 1 / 8, 1 / 64}, {0, 1 / 2, 1 / 16, 1 / 128}, {0, 1 / 4, 1 / 32, 1 / 256}],
    }
    for bits, terms in published.items():
        table = apot.level_table(bits)
        assert table.levels.tolist() == sorted({sum(p) for p in itertools.product(*terms)})
        assert len(table.levels) == 2 ** (bits - 1)  # no two sums alike
        assert Apot(bits).powers == len(terms)
    assert apot.level_table(2).levels.tolist() == [0, 1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_free_levels_are_the_powers_of_two(bits: int) -> None:
    table = dense.level_table(bits)
    assert table.levels.tolist() == sorted(2.0**-e for e in range(2 ** (bits - 1)))
    assert (table.values != 0).all()


@pytest.mark.parametrize("name", MODES)
def test_every_level_is_its_words_value_and_zero_has_one_word(name: str) -> None:
    mode = MODES[name]
    scales = mode.fit_group(gaussian(5, 64), mode.rounding(gaussian(5, 64), 64))
    grid = mode.grid(scales)
    assert (grid.levels.diff(dim=-1) >= 0).all()
    rows = torch.cat((-grid.levels.flip(-1), grid.levels), dim=-1)
    values, words = grid.nearest(rows)
    assert torch.equal(values, rows)
    assert torch.equal((mode.design(words, scales) @ _coefficients(mode, scales)).squeeze(-1), values)
    assert int(words.max()) < 1 << mode.bits
    assert len(set(words[rows == 0].tolist())) <= 1


def _coefficients(mode: Mode, scales: Tensor) -> Tensor:
    return scales[:, : mode.coefficients].unsqueeze(-1)


# ---------------------------------------------------------------------------------- laws


@settings(deadline=None, max_examples=40)
@given(name=EVERY, seed=SEEDS, width=st.integers(1, 40), group=st.integers(1, 48))
def test_signs_zeros_and_idempotence(name: str, seed: int, width: int, group: int) -> None:
    weight, mode = weights(3, width, seed), MODES[name]
    fitted = modes.fit(weight, mode, group=group)
    decoded = fitted.decode()
    assert decoded.shape == weight.shape == fitted.shape
    assert torch.equal(modes.fit(-weight, mode, group=group).decode(), -decoded)  # Q(-w) = -Q(w)
    assert torch.equal(modes.nearest(decoded, fitted, mode).decode(), decoded)  # Q(Q(w)) = Q(w)
    again = modes.nearest(weight, fitted, mode)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), fitted.tensors().values(), strict=True))
    assert not ((decoded != 0) & (weight != 0) & (decoded.sign() != weight.sign())).any()
    if isinstance(mode, Pot | Apot):
        assert not decoded[weight == 0].any()  # zero is a level


@settings(deadline=None, max_examples=25)
@given(name=EVERY, seed=SEEDS, width=st.integers(1, 40), power=st.integers(-20, 40))
def test_scaling_by_a_power_of_two_commutes(name: str, seed: int, width: int, power: int) -> None:
    # Far above fp16, scales keep the weight's precision, so no scale is clipped or subnormal: equality is exact.
    weight, mode = weights(3, width, seed) * 2.0**40, MODES[name]
    decoded = modes.fit(weight, mode, group=16).decode()
    assert torch.equal(modes.fit(weight * 2.0**power, mode, group=16).decode(), decoded * 2.0**power)


@settings(deadline=None, max_examples=25)
@given(name=EVERY, seed=SEEDS, width=st.integers(1, 40), group=st.integers(1, 48))
def test_packing_round_trip(name: str, seed: int, width: int, group: int) -> None:
    mode = MODES[name]
    g = torch.Generator().manual_seed(seed)
    weight = gaussian(4, width, seed)
    scales = mode.scales_of(modes.fit(weight, mode, group=group))
    words = torch.randint(0, 1 << mode.bits, (4, width), generator=g)
    packed = mode.assemble(words, scales, group, torch.float32)
    assert torch.equal(mode.scales_of(packed), scales)
    of = [scales[:, i // group] for i in range(width)]
    columns = [mode.design(words[:, i : i + 1], of[i]) @ _coefficients(mode, of[i]) for i in range(width)]
    torch.testing.assert_close(packed.decode().double(), torch.cat(columns, 1).squeeze(-1), rtol=1e-6, atol=0)
    layout = Layout.of(packed)
    assert layout == Layout.planned(mode, group, width)
    assert set(packed.tensors()) == set(layout.roles)
    assert torch.equal(layout.codes(packed.tensors()).decode(), packed.decode())
    stored = packed.codes.numel() * 8
    assert stored >= mode.bits * 4 * width and stored < (mode.bits * width + 8 * max(mode.bits, 1)) * 4


@pytest.mark.parametrize("family", ["pot", "dense", "bcq"])
@settings(deadline=None, max_examples=10)
@given(seed=SEEDS)
def test_error_never_grows_with_bits_where_grids_are_nested(family: str, seed: int) -> None:
    weight = weights(4, 40, seed)
    build = {"pot": Pot, "dense": Dense, "bcq": BCQ}[family]
    errors = [squared(weight, modes.fit(weight, build(b), group=20).decode()) for b in range(2, 7)]
    slack = 1e-9 * float(weight.double().square().sum())
    for wider, narrower in zip(errors[1:], errors, strict=False):
        assert wider <= narrower * (1 + 1e-3) + slack  # scales of two grids are found by the same search, not the same


def test_error_falls_with_bits_and_terms_on_gaussian_weights() -> None:
    weight = gaussian(32, 256)

    def error(mode: Mode) -> float:
        return measures.relative_error(weight, modes.fit(weight, mode).decode())

    for build in (Uniform, Apot):
        errors = [error(build(bits)) for bits in range(2, 9)]
        assert errors == sorted(errors, reverse=True)
    sums = [error(Pot(3 * terms, terms)) for terms in (1, 2, 3)]
    assert sums == sorted(sums, reverse=True)


@settings(deadline=None, max_examples=50)
@given(w=st.floats(2.0**-6, 1.0), terms=st.integers(1, 5))
def test_each_term_leaves_at_most_a_third(w: float, terms: int) -> None:
    """Greedy sums, rounding in the linear domain: |w - Σ_t v_t| ≤ 3^-S |w|; the levels of a table are no worse."""
    residual = w
    for _ in range(terms):
        e = math.floor(math.log2(abs(residual))) if residual else 0
        nearest = min((math.copysign(2.0**k, residual) for k in (e, e + 1)), key=lambda v: abs(residual - v))
        residual = residual - nearest if residual else 0.0
    assert abs(residual) <= 3.0**-terms * w * (1 + 1e-12)
    if terms <= 2:
        mode = Pot({1: 5, 2: 8}[terms], terms)
        value, _ = mode.grid(torch.ones(1, 1, dtype=torch.float64)).nearest(torch.tensor([[w]]).double())
        if w >= 2.0**-5:  # the exponents of 8 bits in two terms end at 2^-8
            assert abs(float(value) - w) <= 3.0**-terms * w


@settings(deadline=None, max_examples=25)
@given(name=EVERY, seed=SEEDS, batch=st.integers(1, 4))
def test_a_table_of_partial_sums_multiplies_as_the_dense_weight(name: str, seed: int, batch: int) -> None:
    """LUT ≡ dense: y = Σ over octets and bases of table[byte] equals x Ŵᵀ on the decoded weight (fp64)."""
    weight, x = gaussian(3, 40, seed), gaussian(batch, 40, seed + 1, 1.0).double()
    mode = MODES[name]
    fitted = modes.fit(weight, mode, group=8)
    expected = x @ fitted.decode(torch.float64).t()
    actual = _by_tables(x, fitted, mode)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def _by_tables(x: Tensor, fitted: modes.Codes, mode: Mode) -> Tensor:
    octets = x.view(len(x), -1, 8)
    scales = mode.scales_of(fitted)  # one group per octet
    if isinstance(mode, BCQ | Uniform):
        every_byte = codec.unpack_bits(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 8).double() * 2 - 1
        tables = octets @ every_byte.t()  # [batch, octet, 256]: all signed sums of 8 inputs
        picked = tables[:, torch.arange(octets.shape[1]), fitted.codes.long()]  # [batch, out, bits, octet]
        return torch.einsum("zobg,ogb->zo", picked, scales)
    words = codec.unpack_stream(fitted.codes, mode.bits, 40).view(3, -1, 8).long()
    unit = mode.table.values[words]  # sums of powers of two: shifts and adds of the inputs
    return torch.einsum("zgi,ogi,og->zo", octets, unit, scales[..., 0])


# ---------------------------------------------------------------------------------- importance and scales


@settings(deadline=None, max_examples=12)
@given(name=EVERY, seed=SEEDS, shared=st.booleans())
def test_importance_lowers_the_error_it_weighs(name: str, seed: int, shared: bool) -> None:
    weight, mode = gaussian(4, 48, seed), MODES[name]
    g = torch.Generator().manual_seed(seed)
    importance = torch.rand(48 if shared else (4, 48), generator=g).pow(4) * 5
    plain = squared(weight, modes.fit(weight, mode, group=24).decode(), importance.double())
    weighed = squared(weight, modes.fit(weight, mode, group=24, importance=importance).decode(), importance.double())
    assert weighed <= plain * 1.02  # a search with local optima, here over other ones
    for constant in (1.0, 2.0**-30, 3e5):
        same = modes.fit(weight, mode, group=24, importance=torch.full((48,), constant))
        assert torch.equal(same.decode(), modes.fit(weight, mode, group=24).decode())


def test_importance_must_fit() -> None:
    weight, mode = gaussian(4, 48), Pot(4)
    for bad, message in (
        (torch.ones(47), "does not fit"),
        (torch.ones(3, 48), "does not fit"),
        (-torch.ones(48), "not negative"),
        (torch.full((48,), float("nan")), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            modes.fit(weight, mode, importance=bad)
    # A group nobody asks for is fitted as if all its weights counted alike.
    ignored = torch.cat((torch.zeros(24), torch.ones(24)))
    assert torch.equal(
        modes.fit(weight, mode, group=24, importance=ignored).decode(), modes.fit(weight, mode, group=24).decode()
    )


@pytest.mark.parametrize("name", [n for n in MODES if n.endswith(" pot")])
def test_scales_are_powers_of_two(name: str) -> None:
    scale = modes.fit(gaussian(8, 256), MODES[name], group=32).scale
    assert scale.gt(0).all() and (torch.frexp(scale).mantissa == 0.5).all()


@pytest.mark.parametrize("name", MODES)
def test_fitting_group_by_group_is_fitting_the_weight(name: str) -> None:
    """The pieces that calibrated fits are made of give what `modes.fit` gives."""
    weight, mode = gaussian(6, 40), MODES[name]
    whole = modes.fit(weight, mode, group=16)
    rounding = mode.rounding(weight, 16)
    words, scales = [], []
    for part in torch.split(weight, 16, dim=1):
        scales.append(mode.fit_group(part, rounding))
        words.append(mode.grid(scales[-1]).nearest(part)[1])
    again = mode.assemble(torch.cat(words, 1), torch.stack(scales, 1), 16, weight.dtype)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors().values(), again.tensors().values(), strict=True))


@pytest.mark.parametrize("name", MODES)
def test_refitted_scales_are_least_squares_and_keep_the_codes(name: str) -> None:
    weight, mode = gaussian(6, 32).double() * 2.0**40, MODES[name]  # scales in full precision
    rounding = mode.rounding(weight, 32)
    scales = mode.fit_group(weight, rounding)
    _, words = mode.grid(scales).nearest(weight)
    design = mode.design(words, scales)
    solution = torch.linalg.lstsq(design, weight.unsqueeze(-1)).solution.squeeze(-1)
    refitted = mode.refit(scales, solution, rounding)
    if not mode.power_of_two:
        torch.testing.assert_close(refitted[:, : mode.coefficients], solution)
        assert squared(weight, (design @ solution.unsqueeze(-1)).squeeze(-1)) <= squared(
            weight, (design @ _coefficients(mode, scales)).squeeze(-1)
        ) * (1 + 1e-9)
    assert torch.equal(mode.design(words, refitted), design)
    assert not mode.refit(scales, -solution.abs(), rounding)[:, :1].gt(0).any()


def test_moments_agree_whichever_way_they_are_counted() -> None:
    # More levels than weights take another path through `Groups.moments`.
    weight, importance = gaussian(5, 12), torch.rand(12, generator=torch.Generator().manual_seed(1))
    unit = pot.level_table(4, 1).levels
    few = split(weight, 12, importance)
    scale = torch.full((5,), 0.5, dtype=torch.float64)
    dense_levels = torch.cat((unit, torch.linspace(10, 11, 20, dtype=torch.float64)))  # never nearest
    for a, b in zip(few.moments(scale, unit), few.moments(scale, dense_levels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------- options and energy


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "apot", "bits": 1}, "mode apot must be 2 to 8"),
        ({"mode": "additive"}, "unknown mode"),
        ({"mode": "apot", "terms": 2}, "belongs to mode pot"),
        ({"mode": "uniform", "scale": "fp32"}, "unknown scale"),
        ({"mode": "pot", "bits": 1}, "contradict"),
        ({"mode": "dense", "bits": 9}, "1 to 8"),
    ],
)
def test_options_that_no_mode_can_follow(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ShiftAdd(**options)  # type: ignore[arg-type]


def test_options_name_their_mode() -> None:
    assert ShiftAdd().spelling() == BCQ(4, "pot")
    assert ShiftAdd(scale="fp16").spelling() == BCQ(4, "fp16")
    assert ShiftAdd(mode="uniform", scale="pot").spelling() == Uniform(4, "pot")
    assert ShiftAdd(mode="pot", bits=8, terms=2).spelling() == Pot(8, 2, "fp16")
    assert ShiftAdd(mode="apot", bits=5).spelling() == Apot(5)
    assert ShiftAdd(mode="dense", bits=1, scale="pot").spelling() == Dense(1, "pot")


def test_energy_is_that_of_the_table() -> None:
    # ShiftAddLLM's own example: 8 products in fp16 take 12.0 pJ, 3-bit binary codes 2.76 pJ, 2-bit 1.84 pJ.
    wide = 1 << 20  # rows share the tables of the inputs, and a wide group its scale
    for bits, expected in ((3, 2.76), (2, 1.84)):
        spent = energy.linear(BCQ(bits), wide, 8, 8, bits)
        groups = wide * (energy.MULTIPLY + energy.ADD)
        tables = 255 * energy.ADD
        assert (spent["pj_arithmetic"] - groups - tables) / wide == pytest.approx(expected)
        assert spent["pj_arithmetic_dense"] / wide == pytest.approx(12.0)
    spent = energy.linear(Pot(4, 1, "pot"), 3, 16, 8, 4.5)
    assert spent["pj_arithmetic"] == pytest.approx(3 * 16 * 0.55 + 3 * 2 * 0.55)
    assert spent["pj_weights"] == pytest.approx(3 * 16 * 4.5 * 12.5)
    assert spent["pj_weights_dense"] == pytest.approx(3 * 16 * 200)
    assert energy.linear(Apot(5), 3, 16, 16, 5)["pj_arithmetic"] == pytest.approx(3 * 16 * 1.1 + 3 * 1.5)
    free = energy.linear(BCQ(2, "fp16"), 3, 16, 16, 4)["pj_arithmetic"]
    assert free == pytest.approx(2 * 255 * 0.4 + 3 * 2 * 2 * 0.77 + 2 * 3 * 1.5)
    assert energy.lookup(16, 4.5) == {"pj_weights": 16 * 4.5 * 12.5, "pj_weights_dense": 16 * 200}
