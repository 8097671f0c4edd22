# SPDX-License-Identifier: Apache-2.0
"""Laws of the Tversky similarity, searched for counterexamples: against a loop over single features, and by algebra."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels.tversky import op
from rewriter.kernels.tversky.reference import CONVENTIONS, DIFFERENCES, FORMS, INTERSECTIONS

laws = settings(deadline=None, max_examples=25)

THETA = torch.tensor(1.3, dtype=torch.float64)


@dataclass(frozen=True)
class Drawn:
    """Inputs ``[n, d]``, features ``[K, d]``, prototypes ``[P, d]`` and the names; float64."""

    x: Tensor
    features: Tensor
    prototypes: Tensor
    intersection: str = "product"
    convention: str = "paper"
    difference: str = "ignorematch"
    form: str = "contrast"

    def __call__(self, alpha: float = 0.0, beta: float = 0.0, theta: Tensor | None = None, **options: Any) -> Tensor:
        names = (self.intersection, self.convention, self.difference, self.form)
        a, b = (torch.tensor(w, dtype=self.x.dtype) if w else None for w in (alpha, beta))
        negative = options.get("negative")
        return op.tversky(
            self.x, self.features, self.prototypes, theta, a, b, negative, None, *names,
            options.get("mirrored", False), options.get("projected", False),
        )  # fmt: skip


@st.composite
def drawn(draw: st.DrawFn, **fixed: str) -> Drawn:
    """Some scores are exactly 0 now and then: integers in small numbers."""
    n, d, k, p = (draw(st.integers(1, m)) for m in (3, 5, 7, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    whole = draw(st.booleans())

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=g, dtype=torch.float64)
        return values.round() if whole else values

    chosen = {
        "intersection": draw(st.sampled_from(INTERSECTIONS)),
        "convention": draw(st.sampled_from(CONVENTIONS)),
        "difference": draw(st.sampled_from(DIFFERENCES)),
        "form": draw(st.sampled_from(FORMS)),
    } | fixed
    return Drawn(random(n, d), random(k, d), random(p, d), **chosen)


weights = st.floats(0.1, 2.0)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------- by definition, set by set


def _common(t: Drawn, u: list[float], v: list[float]) -> float:
    """f(A∩B) from the scores of one input and one prototype, as the two conventions write it."""
    both = [(a, b) for a, b in zip(u, v, strict=True) if a > 0 and b > 0]
    psi = {
        "product": lambda a, b: a * b,
        "min": min,
        "max": max,
        "mean": lambda a, b: (a + b) / 2,
        "gmean": lambda a, b: math.sqrt(a * b),
        "softmin": lambda a, b: -math.log(math.exp(-a) + math.exp(-b)),
    }[t.intersection]
    if t.convention == "paper" or t.intersection == "product":
        return sum(psi(a, b) for a, b in both)
    return psi(sum(a for a, _ in both), sum(b for _, b in both))


def _only(t: Drawn, u: list[float], v: list[float]) -> float:
    """f(A−B)."""
    alone = sum(a for a, b in zip(u, v, strict=True) if a > 0 >= b)
    both = [(a, b) for a, b in zip(u, v, strict=True) if a > 0 and b > 0]
    if t.difference == "ignorematch":
        return alone
    if t.convention == "paper":
        return sum(a - b for a, b in both if a > b)
    return alone + max(0.0, sum(a for a, _ in both) - sum(b for _, b in both))


def _by_definition(t: Drawn, alpha: float, beta: float, theta: float) -> Tensor:
    rows = []
    for a in (t.x @ t.features.t()).tolist():
        row = []
        for b in (t.prototypes @ t.features.t()).tolist():
            common, first, second = _common(t, a, b), _only(t, a, b), _only(t, b, a)
            whole = common + alpha * first + beta * second + (t.convention == "code")
            share = common / whole if whole else 0.0
            row.append(theta * common - alpha * first - beta * second if t.form == "contrast" else share)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@given(drawn(), weights, weights)
@settings(deadline=None, max_examples=200)
def test_it_is_the_sum_over_sets_that_its_names_say(t: Drawn, alpha: float, beta: float) -> None:
    golden = _by_definition(t, alpha, beta, float(THETA))
    if t.form == "ratio":  # softmin may be negative, and a denominator that cancels says nothing
        assume(t.intersection != "softmin")
    close(t(alpha, beta, THETA), golden)


@given(drawn(intersection="product", difference="ignorematch", form="contrast"), weights, weights)
@laws
def test_the_two_products_are_the_three_sums(t: Drawn, alpha: float, beta: float) -> None:
    """[U, 1 − m_U] [θV − α(1 − m_V); −βV]ᵀ against U Vᵀ, U (1 − m_V)ᵀ and (1 − m_U) Vᵀ, with and without the pair."""
    u, v = (t.x @ t.features.t()).relu(), (t.prototypes @ t.features.t()).relu()
    negated = (-t.prototypes @ t.features.t()).relu()

    def sums(w: Tensor) -> Tensor:
        return THETA * (u @ w.t()) - alpha * (u @ (w <= 0).double().t()) - beta * ((u <= 0).double() @ w.t())

    close(t(alpha, beta, THETA), sums(v))
    close(t(alpha, beta, THETA, negative=THETA / 2), sums(v) - THETA / 2 * sums(negated))


# ------------------------------------------------------------------------------------------------------- algebra


@given(drawn(), weights, weights, st.randoms(use_true_random=False))
@laws
def test_the_order_of_features_does_not_matter(t: Drawn, alpha: float, beta: float, random: Any) -> None:
    order = list(range(len(t.features)))
    random.shuffle(order)
    close(replace(t, features=t.features[order])(alpha, beta), t(alpha, beta))


@given(drawn(), weights, weights)
@laws
def test_exchanging_the_two_exchanges_alpha_and_beta(t: Drawn, alpha: float, beta: float) -> None:
    turned = replace(t, x=t.prototypes, prototypes=t.x)
    close(turned(beta, alpha).t(), t(alpha, beta))


@given(drawn(), weights)
@laws
def test_it_is_symmetric_where_alpha_is_beta(t: Drawn, alpha: float) -> None:
    everyone = torch.cat((t.x, t.prototypes))
    similarity = replace(t, x=everyone, prototypes=everyone)(alpha, alpha)
    close(similarity, similarity.t())


def test_it_is_not_symmetric_where_they_differ() -> None:
    t = Drawn(torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), torch.ones(2, 2).double())
    assert not torch.equal(t(1.0, 0.5), replace(t, x=t.prototypes, prototypes=t.x)(1.0, 0.5).t())


@given(drawn(intersection="product", form="contrast"), weights, weights)
@laws
def test_common_features_scale_with_both(t: Drawn, a: float, b: float) -> None:
    close(replace(t, x=a * t.x, prototypes=b * t.prototypes)(), a * b * t())


@given(drawn(form="contrast"), weights, weights)
@laws
def test_every_feature_twice_is_twice_the_contrast(t: Drawn, alpha: float, beta: float) -> None:
    assume(not (t.intersection == "softmin" and t.convention == "code"))  # the softmin of sums does not scale
    close(replace(t, features=torch.cat((t.features, t.features)))(alpha, beta), 2 * t(alpha, beta))


@given(drawn(form="ratio"), weights, weights)
@laws
def test_a_ratio_lies_between_0_and_1(t: Drawn, alpha: float, beta: float) -> None:
    """Below 1 with the code's one in the denominator; the paper's is 1 for what has nothing distinctive."""
    assume(t.intersection != "softmin")
    share = t(alpha, beta)
    assert (share >= 0).all() and ((share < 1) if t.convention == "code" else (share <= 1)).all()


@given(drawn(convention="paper", form="contrast"))
@laws
def test_means_are_ordered(t: Drawn) -> None:
    softmin, low, gmean, mean, high = (
        replace(t, intersection=i)() for i in ("softmin", "min", "gmean", "mean", "max")
    )
    slack = 1e-11 * (1 + high)
    for smaller, larger in ((softmin, low), (low, gmean), (gmean, mean), (mean, high)):
        assert (smaller <= larger + slack).all()


@given(drawn(form="contrast"))
@laws
def test_the_conventions_agree_on_product_and_mean_and_are_ordered_on_min_and_max(t: Drawn) -> None:
    for intersection in ("product", "mean"):
        close(*(replace(t, intersection=intersection, convention=c)() for c in CONVENTIONS))
    paper, code = (replace(t, intersection="min", convention=c)() for c in CONVENTIONS)
    assert (paper <= code + 1e-11 * (1 + code)).all()
    paper, code = (replace(t, intersection="max", convention=c)() for c in CONVENTIONS)
    assert (paper + 1e-11 * (1 + paper) >= code).all()


@given(drawn(form="contrast", difference="ignorematch"), weights)
@laws
def test_the_beta_term_is_constant_while_the_input_has_the_same_features(t: Drawn, beta: float) -> None:
    """On an activation cell: moved a little, an input has what it had."""
    scores = t.x @ t.features.t()
    assume(bool((scores.abs() > 1e-6).all()))
    longer = replace(t, x=1.5 * t.x)
    close(longer() - longer(beta=beta), t() - t(beta=beta))


@given(drawn(), weights, weights)
@laws
def test_a_mirrored_bank_and_projected_prototypes_are_only_storage(t: Drawn, alpha: float, beta: float) -> None:
    whole = replace(t, features=torch.cat((t.features, -t.features)))
    scores = replace(t, prototypes=t.prototypes @ t.features.t())
    close(t(alpha, beta, mirrored=True), whole(alpha, beta))
    close(scores(alpha, beta, projected=True), t(alpha, beta))
    close(scores(alpha, beta, mirrored=True, projected=True), whole(alpha, beta))


# ------------------------------------------------------------------------------------ equal to a linear layer


@given(drawn(intersection="product", difference="ignorematch", form="contrast"), st.integers(0, 2**31))
@laws
def test_b1_a_signed_pair_is_any_linear_layer(t: Drawn, seed: int) -> None:
    """With any bank [G; −G] of full column rank, Π = W (GᵀG)⁻¹."""
    width = t.x.shape[1]
    g = torch.randn(width + 2, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = g.t() @ g
    assume(bool(torch.linalg.cond(gram) < 1e6))
    one = torch.ones((), dtype=torch.float64)
    pair = replace(t, features=torch.cat((g, -g)), prototypes=torch.linalg.solve(gram, t.prototypes.t()).t())
    golden = t.x @ t.prototypes.t()
    torch.testing.assert_close(pair(negative=one), golden, rtol=1e-8, atol=1e-8)
    identity = torch.eye(width, dtype=torch.float64)
    close(replace(t, features=torch.cat((identity, -identity)))(negative=one), golden)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31), weights)
@laws
def test_b2_a_single_pass_is_a_layer_of_sign_codes(width: int, count: int, seed: int, c: float) -> None:
    """W = c S G: Π = c S G⁻ᵀ, α = c."""
    g = torch.Generator().manual_seed(seed)
    bank = torch.randn(width, width, generator=g, dtype=torch.float64) + 3 * torch.eye(width, dtype=torch.float64)
    assume(bool(torch.linalg.cond(bank) < 1e3))
    signs = torch.randn(count, width, generator=g, dtype=torch.float64).sign()
    x = torch.randn(4, width, generator=g, dtype=torch.float64)
    prototypes = torch.linalg.solve(bank, (c * signs).t()).t()
    t = Drawn(x, torch.cat((bank, -bank)), prototypes)
    torch.testing.assert_close(t(alpha=c), c * x @ (signs @ bank).t(), rtol=1e-9, atol=1e-9)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
@laws
def test_b3_bounded_inputs_are_a_linear_layer_up_to_a_shift_per_row(width: int, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (4, count))
    radius = float(max(x.abs().max(), w.abs().max())) + 0.1
    ones = torch.ones(4, 1, dtype=torch.float64), torch.ones(count, 1, dtype=torch.float64)
    features = torch.cat((torch.eye(width, dtype=torch.float64), torch.full((width, 1), radius, dtype=torch.float64)), 1)
    t = Drawn(torch.cat((x, ones[0]), 1), features, torch.cat((w, ones[1]), 1))
    bias = radius * w.sum(1) + width * radius**2
    close((t(0.5, 0.5) - bias).log_softmax(-1), (x @ w.t()).log_softmax(-1))


def test_b4_a_single_pass_is_43_percent_off() -> None:
    """√(½(1 − 2/π)) = 0.426 with α = E|w| on Gaussian weights."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(400, 64, generator=g, dtype=torch.float64) for _ in range(2))
    identity = torch.eye(64, dtype=torch.float64)
    t = Drawn(x, torch.cat((identity, -identity)), w)
    golden = x @ w.t()
    error = float((t(alpha=math.sqrt(2 / math.pi)) - golden).norm() / golden.norm())
    assert error == pytest.approx(math.sqrt((1 - 2 / math.pi) / 2), rel=0.02)


# --------------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("intersection", INTERSECTIONS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_half_precision_loses_its_last_rounding_only(intersection: str, convention: str, dtype: torch.dtype) -> None:
    """Everything before it is float32: the result is the golden one, rounded."""
    g = torch.Generator().manual_seed(1)
    x, features, prototypes = (torch.randn(n, 32, generator=g).to(dtype) for n in (8, 48, 6))
    t = Drawn(x, features, prototypes, intersection, convention)
    golden = replace(t, x=x.double(), features=features.double(), prototypes=prototypes.double())(0.5, 0.25)
    unit = torch.finfo(dtype).eps * golden.abs().clamp_min(1e-3 * float(golden.abs().max()))
    assert ((t(0.5, 0.25).double() - golden).abs() <= 0.51 * unit).all()
