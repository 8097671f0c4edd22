# SPDX-License-Identifier: Apache-2.0
"""How dense heads become codebooks: k-means, tiers, product codes, the choice of a size, and the modules."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.errors import PlanError
from rewriter.kernels.vq_logits.codec import decode_product, decode_tiers, unpack_codes
from rewriter.passes.vq_logits import product
from rewriter.passes.vq_logits.choosing import choose, dense_bytes, head_kl, split_sample
from rewriter.passes.vq_logits.kmeans import argmax, assign, kmeans
from rewriter.passes.vq_logits.metric import RIDGE, HeadMetric, head_metric
from rewriter.passes.vq_logits.modules import VQLogitsProduct, VQLogitsTiers
from rewriter.passes.vq_logits.product import DIMS, ProductHead, fit_product
from rewriter.passes.vq_logits.tiers import best_singletons, fit_tiers, floor

laws = settings(deadline=None, max_examples=25)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def language_head(v: int = 600, d: int = 20, n: int = 600) -> tuple[Tensor, Tensor, Tensor]:
    """A head with Zipf-like frequencies: weight ``[v, d]`` (fp16 values), hidden states ``[n, d]``, counts ``[v]``."""
    g = seeded(3)
    spectrum = torch.logspace(0, -1.2, d)
    hidden = F.rms_norm(torch.randn(n, d, generator=g) * spectrum, (d,))
    hidden[:, 0] = 1.5
    weight = torch.randn(v, d, generator=g) * 0.5
    weight[:, 0] -= 0.8 * torch.arange(1, v + 1).log()
    turn = torch.linalg.qr(torch.randn(d, d, generator=g)).Q  # trained models favour no axes
    weight, hidden = (weight @ turn).half().float(), hidden @ turn
    counts = (F.linear(hidden, weight).softmax(-1).mean(0) * 1e5).long()
    return weight, hidden, counts


@pytest.fixture(autouse=True)
def global_randomness_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global generator was advanced"


# -- k-means -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 5), st.data())
@laws
def test_kmeans_assigns_every_point_to_its_nearest_centroid(groups: int, n: int, w: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    g = seeded(data.draw(st.integers(0, 2**31)))
    points = torch.randn(groups, n, w, generator=g, dtype=torch.float64)
    weights = torch.rand(n, generator=g, dtype=torch.float64)
    found = kmeans(points, k, weights=weights, generator=g)
    distance = torch.cdist(points, found.centroids).square()
    chosen = distance.gather(2, found.code.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=1e-9, atol=1e-9)


def test_kmeans_never_gets_worse_with_more_iterations() -> None:
    points = torch.randn(2, 500, 3, generator=seeded())
    inertia = [
        float(kmeans(points, 20, generator=seeded(1), iterations=n, tolerance=0).inertia.sum()) for n in range(8)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(inertia))
    assert inertia[-1] < 0.9 * inertia[0]


def test_kmeans_is_near_the_known_optimum() -> None:
    # Scalar Gaussian, 8 levels: Lloyd-Max distortion 0.03454 (Max 1960).
    points = torch.randn(1, 20_000, 1, generator=seeded())
    found = kmeans(points, 8, generator=seeded(1), iterations=60, tolerance=1e-5)
    assert float(found.inertia) / 20_000 <= 0.0355


def test_kmeans_finds_separated_clusters_whatever_their_size() -> None:
    centres = torch.randn(30, 8, generator=seeded()) * 50
    sizes = torch.arange(1, 31)
    points = torch.repeat_interleave(centres, sizes, 0) + 0.01 * torch.randn(int(sizes.sum()), 8, generator=seeded(1))
    found = kmeans(points, 30, generator=seeded(2), iterations=50)
    assert float(found.inertia) / points.shape[0] < 1e-2


def test_kmeans_follows_the_weights() -> None:
    points = torch.randn(1, 400, 2, generator=seeded())
    heavy = torch.ones(400)
    heavy[:10] = 1e4
    found = kmeans(points, 12, weights=heavy, generator=seeded(1))
    _, distance = assign(points, found.centroids)
    assert float(distance[0, :10].max()) < 1e-2 < float(distance[0, 10:].mean())


@pytest.mark.parametrize("distinct", [1, 3], ids=["constant", "three_values"])
def test_kmeans_with_fewer_distinct_points_than_codes(distinct: int) -> None:
    points = torch.randn(distinct, 4, generator=seeded()).repeat(20 // distinct, 1)
    found = kmeans(points, 10, generator=seeded(1))
    assert found.centroids.isfinite().all()
    torch.testing.assert_close(found.centroids[0, found.code[0]], points)


def test_kmeans_reseeds_codes_that_lose_their_points() -> None:
    # Seeds fall on the heavy heap; the light points far away only get codes because empty ones are moved to them.
    heap = torch.zeros(500, 2)
    far = torch.tensor([[100.0, 0], [0, 100], [-100, 0], [0, -100]])
    weights = torch.cat([torch.full((500,), 1e6), torch.ones(4)])
    found = kmeans(torch.cat([heap, far]), 8, weights=weights, generator=seeded(0))
    assert found.code[0, 500:].unique().numel() == 4
    assert float(found.inertia) < 1e-3


def test_kmeans_is_a_function_of_its_generator() -> None:
    points = torch.randn(2, 300, 3, generator=seeded())
    a, b, c = (kmeans(points, 16, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a.centroids, b.centroids) and torch.equal(a.code, b.code)
    assert not torch.equal(a.centroids, c.centroids)


def test_kmeans_result_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(1, 300, 3, generator=seeded(), dtype=torch.float64)
    whole = kmeans(points, 16, generator=seeded(1))
    monkeypatch.setattr("rewriter.passes.vq_logits.kmeans.CHUNK", 64)
    parts = kmeans(points, 16, generator=seeded(1))
    assert torch.equal(whole.code, parts.code)
    torch.testing.assert_close(whole.centroids, parts.centroids, rtol=1e-12, atol=1e-12)


def test_kmeans_never_forms_all_distances() -> None:
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    points = torch.randn(1, 40_000, 8, generator=seeded())
    with Sizes():
        kmeans(points, 256, generator=seeded(1), iterations=2)
    assert 8 * max(sizes) < 40_000 * 256, "all distances at once would take 40 000 x 256 numbers"


def test_argmax_takes_the_first_of_equals_as_torch_does() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])
    assert argmax(scores).tolist() == [1, 0]
    many = torch.randn(50, 33, generator=seeded())
    assert torch.equal(argmax(many), many.argmax(-1))


@pytest.mark.parametrize("codes", [0, 6])
def test_kmeans_refuses_more_codes_than_points(codes: int) -> None:
    with pytest.raises(PlanError, match="5 points"):
        kmeans(torch.zeros(5, 2), codes, generator=seeded())


# -- the metric --------------------------------------------------------------------------------------------------


def test_the_form_from_hidden_states_has_the_total_and_the_means_of_the_true_hessians() -> None:
    weight, hidden, _ = language_head(40, 6, 200)
    form = head_metric("kl", weight, hidden=hidden)
    p = F.linear(hidden, weight).softmax(-1)
    uncertain = p * (1 - p)
    hessians = torch.einsum("ni,na,nb->iab", uncertain, hidden, hidden)
    assert form.shared is not None and form.mean is not None
    unridged = form.shared - form.shared.diagonal().mean() * RIDGE / (1 + RIDGE) * torch.eye(6)
    outer = form.mean.unsqueeze(2) * form.mean.unsqueeze(1)
    model = (form.weight[:, None, None] * (unridged + outer)).sum(0) / form.weight.sum()
    torch.testing.assert_close(model, hessians.sum(0) / uncertain.sum(), rtol=2e-2, atol=2e-3)
    likely = uncertain.sum(0) > 0.1 * uncertain.sum(0).mean()
    means = (uncertain.t() @ hidden) / uncertain.sum(0).unsqueeze(-1)
    torch.testing.assert_close(form.mean[likely], means[likely], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(form.probability, p.mean(0))


def test_the_quadratic_model_predicts_the_kl_of_small_errors() -> None:
    weight, hidden, _ = language_head(200, 10, 500)
    form = head_metric("kl", weight, hidden=hidden)
    error = 0.02 * torch.randn(weight.shape, generator=seeded(1))
    p = F.linear(hidden, weight).softmax(-1)
    true = (p * (p.log() - F.linear(hidden, weight + error).log_softmax(-1))).sum(-1).mean()
    assert form.shared is not None and form.mean is not None
    cost = ((error @ form.shared) * error).sum(-1) + (error * form.mean).sum(-1).square()
    total = (p * (1 - p)).sum(-1).mean()
    predicted = 0.5 * total * (form.weight * cost).sum() / form.weight.sum()
    assert 0.8 < float(predicted / true) < 1.25


@pytest.mark.parametrize(
    ("metric", "given_", "message"),
    [
        ("whitened", {}, "needs calibration"),
        ("kl", {}, "needs calibration"),
        ("kl", {"second_moment": torch.eye(20)}, "needs calibration"),
        ("euclid", {}, "unknown metric 'euclid'.*plain"),
        ("kl", {"counts": torch.ones(601)}, "another tokenizer"),
        ("auto", {"hidden": torch.full((4, 20), math.nan)}, "hidden.*NaN"),
        ("auto", {"second_moment": torch.full((20, 20), math.inf)}, "second_moment.*infinite"),
    ],
    ids=["whitened", "kl", "kl_without_counts", "unknown", "counts", "nan_hidden", "inf_moment"],
)
def test_metrics_without_sound_statistics_are_refused(metric: str, given_: dict[str, Any], message: str) -> None:
    weight, _, _ = language_head()
    for fit in (lambda **k: fit_product(weight, **k), lambda **k: fit_tiers(weight, codes=60, **k)):
        with pytest.raises(PlanError, match=message):
            fit(metric=metric, generator=seeded(), **given_)


# -- tiers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tiers_with_a_code_per_token_are_the_dense_head_bit_for_bit(dtype: torch.dtype) -> None:
    g = seeded()
    weight, bias = torch.randn(50, 8, generator=g).to(dtype), torch.randn(50, generator=g).to(dtype)
    head = fit_tiers(weight, codes=50, head_bias=bias, generator=g)
    assert torch.equal(decode_tiers(head.codebook, head.code_of), weight)
    assert head.token_bias is not None and torch.equal(head.token_bias, bias)
    h = torch.randn(4, 8, generator=g).to(dtype)
    plain = VQLogitsTiers(fit_tiers(weight, codes=50, generator=g))
    assert torch.equal(plain(h), F.linear(h, weight))


def test_frequent_tokens_become_singletons() -> None:
    weight, _, counts = language_head()
    head = fit_tiers(weight, codes=80, singletons=30, counts=counts, generator=seeded())
    index = unpack_codes(head.code_of)
    frequent = counts.argsort(descending=True, stable=True)[:30]
    assert torch.equal(index[frequent], torch.arange(30))
    assert torch.equal(head.codebook[index[frequent]], weight[frequent])
    assert head.token_bias is not None and not head.token_bias[frequent].any()
    assert int((index < 30).sum()) == 30 and head.singletons == 30


def test_without_counts_the_worst_fitted_rows_become_singletons() -> None:
    weight = 0.1 * torch.randn(300, 6, generator=seeded())
    odd = torch.arange(0, 300, 30)
    weight[odd] = 20 * torch.randn(10, 6, generator=seeded(1))
    head = fit_tiers(weight.half().float(), codes=9, singletons=4, generator=seeded(2))
    index = unpack_codes(head.code_of)
    assert set((index < 4).nonzero().flatten().tolist()) <= set(odd.tolist())


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
@laws
def test_tiers_biases_keep_shares_and_cluster_masses(seed: int, counted: bool, biased: bool) -> None:
    g = seeded(seed)
    weight = torch.randn(60, 5, generator=g)
    counts = torch.randint(0, 100, (60,), generator=g) if counted else None
    beta = torch.randn(60, generator=g) if biased else None
    head = fit_tiers(weight, codes=12, counts=counts, head_bias=beta, generator=g)
    index = unpack_codes(head.code_of)
    assert head.token_bias is not None
    dense = torch.ones(60) if beta is None else beta.exp()
    share = dense if counts is None else counts + 0.5
    for j in index.unique():
        members = index == j
        torch.testing.assert_close(head.token_bias[members].exp().sum(), dense[members].sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head.token_bias[members].softmax(0), share[members] / share[members].sum())


def test_with_hidden_states_token_probabilities_match_the_dense_head_on_average() -> None:
    weight, hidden, _ = language_head()
    head = fit_tiers(weight, codes=80, hidden=hidden, metric="kl", generator=seeded())
    dense = F.linear(hidden, weight).softmax(-1).mean(0)
    tiers = VQLogitsTiers(head)(hidden).softmax(-1).mean(0).detach()
    assert float((dense - tiers).abs().sum()) < 0.02


def test_calibration_improves_tiers() -> None:
    weight, hidden, counts = language_head()
    fitted, judged = hidden[:300], hidden[300:]
    plain, counted, full = (
        head_kl(weight, None, fit_tiers(weight, codes=80, generator=seeded(), **given_), judged)
        for given_ in ({}, {"counts": counts}, {"hidden": fitted, "metric": "kl"})
    )
    assert full < counted < plain


def test_more_codes_lower_the_error_of_tiers() -> None:
    weight, hidden, _ = language_head()
    kl = [
        head_kl(weight, None, fit_tiers(weight, codes=k, hidden=hidden, metric="kl", generator=seeded()), hidden)
        for k in (10, 40, 160, 600)
    ]
    assert kl == sorted(kl, reverse=True) and kl[-1] < 1e-9


@given(st.integers(0, 2**31))
@laws
def test_no_codebook_beats_the_floor(seed: int) -> None:
    g = seeded(seed)
    counts, index = torch.randint(1, 50, (30,), generator=g), torch.randint(0, 7, (30,), generator=g)
    index[:7] = torch.arange(7)
    p = counts.double() / counts.sum()
    code_of = index.to(torch.uint8).unsqueeze(1)
    # The best model of this structure without context: exact cluster masses, exact shares inside.
    mass = torch.zeros(7, dtype=torch.float64).index_add(0, index, p)
    nll = -(p * p.log()).sum()
    within = nll - -(mass * mass.log()).sum()
    assert floor(counts, code_of) == pytest.approx(float(within), abs=1e-12)
    sizes = index.bincount(minlength=7)[index]
    assert floor(counts, code_of, bias=False) == pytest.approx(float((p * sizes.double().log()).sum()), abs=1e-12)
    assert 0 <= floor(counts, code_of) <= floor(counts, code_of, bias=False) + 1e-12


def test_floor_of_singletons_is_zero_and_of_one_cluster_the_unigram_entropy() -> None:
    counts = torch.tensor([4, 2, 1, 1])
    assert floor(counts, torch.arange(4, dtype=torch.uint8).unsqueeze(1)) == pytest.approx(0, abs=1e-12)
    together = torch.zeros(4, 1, dtype=torch.uint8)
    assert floor(counts, together) == pytest.approx(1.75 * math.log(2))
    assert floor(counts, together, bias=False) == pytest.approx(math.log(4))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_automatic_number_of_singletons_lowers_the_floor(bias: bool) -> None:
    zipf = 1 / torch.arange(1, 2001)
    index = torch.cat([torch.arange(400), torch.randint(0, 400, (1600,), generator=seeded())])

    def of(m: int) -> float:
        spread = torch.where(torch.arange(2000) < m, index, m + index % (400 - m))
        spread[m:400] = torch.arange(m, 400)
        tail = spread[m:][torch.randperm(2000 - m, generator=seeded(1))]
        packed = torch.cat([spread[:m], tail])
        return floor(zipf, torch.stack([packed & 255, packed >> 8], 1).to(torch.uint8), bias=bias)

    best = best_singletons(zipf / zipf.sum(), 400, bias=bias)
    assert 0 < best < 399
    assert of(best) <= min(of(0), of(40), of(390)) + 1e-3


@pytest.mark.parametrize("asked", [-1, 40, 500])
def test_a_number_of_singletons_that_leaves_no_code_for_the_rest_is_refused(asked: int) -> None:
    with pytest.raises(PlanError, match="singletons"):
        fit_tiers(torch.randn(100, 4, generator=seeded()), codes=40, singletons=asked, generator=seeded())


# -- product codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("width", [5, 16], ids=["width5", "width16"])
def test_product_codes_cover_any_width(dims: int, width: int) -> None:
    weight = torch.randn(300, width, generator=seeded())
    head = fit_product(weight, dims=dims, generator=seeded(1))
    groups = -(-width // dims)
    assert head.codebook.shape == (groups, 256, dims) and head.codes.shape == (300, groups)
    padding = head.codebook.transpose(1, 2).reshape(groups * dims, 256)[width:]
    assert not padding.any()
    decoded = decode_product(head.codebook, head.codes, width)
    assert float((decoded - weight).norm() / weight.norm()) < {2: 0.15, 3: 0.3, 4: 0.4, 6: 0.55, 8: 0.65}[dims]


def test_fewer_dimensions_per_group_lower_the_error() -> None:
    weight, hidden, counts = language_head(600, 24)
    for given_ in ({}, {"counts": counts}, {"hidden": hidden}):
        kl = [
            head_kl(weight, None, fit_product(weight, dims=d, codes=64, generator=seeded(), **given_), hidden)
            for d in sorted(DIMS, reverse=True)
        ]
        assert kl == sorted(kl, reverse=True)


def test_every_visit_lowers_the_cost() -> None:
    weight, hidden, _ = language_head()
    for form in (head_metric("kl", weight, hidden=hidden), head_metric("plain", weight)):
        fit = product.ProductFit(weight, 6, form)
        fit.start(32, seeded())
        costs = [fit.cost()]
        for _ in range(4):
            fit.sweep()
            costs.append(fit.cost())
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(costs))
        fit.weigh_means(1.0)
        assert fit.cost() == pytest.approx(costs[-1], rel=1e-3), "the running error drifted"


def test_rounding_in_sequence_beats_rounding_each_group_alone() -> None:
    # The classic case: strongly correlated dimensions, where errors of one group can be made up for by another.
    weight = torch.randn(400, 48, generator=seeded())
    mix = torch.linalg.qr(torch.randn(48, 48, generator=seeded(1))).Q
    shared = mix @ torch.diag(torch.logspace(0, -3, 48)) @ mix.t()
    fit = product.ProductFit(weight, 3, HeadMetric(torch.ones(400), shared))
    fit.start(64, seeded(2))
    alone = fit.cost()
    fit.round_in_sequence()
    assert fit.cost() < 0.6 * alone


def test_joint_assignment_beats_k_means_in_each_group() -> None:
    weight, hidden, _ = language_head(600, 64, 2000)
    heads = (fit_product(weight, codes=64, hidden=hidden[:1000], sweeps=n, generator=seeded()) for n in (0, 6))
    alone, joint = (head_kl(weight, None, head, hidden[1000:]) for head in heads)
    assert joint < 0.7 * alone


def test_calibration_improves_product_codes() -> None:
    weight, hidden, counts = language_head(n=2000)
    fitted, judged = hidden[:1000], hidden[1000:]
    moment = fitted.t() @ fitted / 1000
    plain, whitened, counted, full = (
        head_kl(weight, None, fit_product(weight, codes=128, generator=seeded(), **given_), judged)
        for given_ in ({}, {"second_moment": moment}, {"second_moment": moment, "counts": counts}, {"hidden": fitted})
    )
    assert full < counted < whitened < plain


def test_a_row_common_to_all_tokens_costs_nothing() -> None:
    weight, hidden, _ = language_head()
    shifted = weight + torch.randn(20, generator=seeded(1)).half()
    heads = (fit_product(w, codes=32, generator=seeded(), hidden=hidden) for w in (weight, shifted))
    a, b = (head_kl(weight, None, head, hidden) for head in heads)
    assert b == pytest.approx(a, rel=0.25)


def test_as_many_codes_as_tokens_are_exact() -> None:
    weight = torch.randn(60, 10, generator=seeded()).half().float()
    head = fit_product(weight, codes=60, generator=seeded(1))
    torch.testing.assert_close(decode_product(head.codebook, head.codes, 10), weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_codebooks_have_the_weights_dtype_and_survive_float16(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 8, generator=seeded()).to(dtype)
    for codebook in (
        fit_product(weight, generator=seeded(), sweeps=2).codebook,
        fit_tiers(weight, codes=60, generator=seeded()).codebook,
    ):
        assert codebook.dtype == dtype
        assert torch.equal(codebook.half().to(dtype), codebook)


@pytest.mark.parametrize("scale", [1e8, 1e-8], ids=["huge", "tiny"])
def test_weights_outside_the_range_of_float16_keep_their_codebook_wide(scale: float) -> None:
    weight = torch.randn(300, 8, generator=seeded()) * scale
    head = fit_product(weight, generator=seeded(), sweeps=2)
    decoded = decode_product(head.codebook, head.codes, 8)
    assert float((decoded - weight).norm() / weight.norm()) < 0.3


def test_fits_are_functions_of_their_generator() -> None:
    weight, hidden, _ = language_head()
    a, b = (fit_product(weight, codes=32, hidden=hidden, sweeps=2, generator=seeded(5)) for _ in range(2))
    assert torch.equal(a.codebook, b.codebook) and torch.equal(a.codes, b.codes)
    c, d = (fit_tiers(weight, codes=64, hidden=hidden, generator=seeded(5)) for _ in range(2))
    assert torch.equal(c.codebook, d.codebook) and torch.equal(c.code_of, d.code_of)


def test_degenerate_heads_stay_finite() -> None:
    for weight in (torch.zeros(300, 8), torch.ones(300, 8), torch.eye(300, 8)):
        flat = ({"hidden": torch.zeros(4, 8)}, {"hidden": torch.ones(4, 8)}, {"second_moment": torch.zeros(8, 8)})
        for given_ in ({}, *flat):
            head = fit_product(weight, generator=seeded(), sweeps=2, **given_)
            assert head.codebook.isfinite().all()
            torch.testing.assert_close(decode_product(head.codebook, head.codes, 8), weight, rtol=1e-2, atol=1e-2)
            assert fit_tiers(weight, codes=40, generator=seeded(), **given_).codebook.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"codes": 256}, "256 codes for a head of 100 tokens"), ({"codes": 257}, "1 to 256"), ({"codes": 0}, "1 to 256"),
     ({"dims": 5, "codes": 9}, "2, 3, 4, 6, 8")],
    ids=["more_than_tokens", "more_than_a_byte", "none", "dims"],
)  # fmt: skip
def test_impossible_product_codebooks_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fit_product(torch.randn(100, 8, generator=seeded()), generator=seeded(), **options)


@pytest.mark.parametrize("codes", [0, 101])
def test_impossible_tiers_are_refused(codes: int) -> None:
    with pytest.raises(PlanError, match=f"{codes} codes for a head of 100 tokens"):
        fit_tiers(torch.randn(100, 8, generator=seeded()), codes=codes, generator=seeded())


def test_heads_share_nothing_with_the_parameters_they_come_from() -> None:
    weight = torch.nn.Parameter(torch.randn(600, 8, generator=seeded()).half().float())
    bias = torch.nn.Parameter(torch.randn(600, generator=seeded()))
    hidden = torch.randn(40, 8, generator=seeded())
    choice = choose(weight, head_bias=bias, hidden=hidden, generator=seeded())
    for head in (
        choice.head,
        fit_product(weight, head_bias=bias, generator=seeded(), sweeps=1),
        fit_tiers(weight, codes=600, head_bias=bias, generator=seeded()),
        fit_tiers(weight, codes=50, head_bias=bias, bias=False, generator=seeded()),
    ):
        offset = head.bias if isinstance(head, ProductHead) else head.token_bias
        assert offset is not None and torch.equal(offset, bias)
        for made in (head.codebook, offset):
            assert not made.requires_grad
            assert made.untyped_storage().data_ptr() not in (
                weight.untyped_storage().data_ptr(), bias.untyped_storage().data_ptr()
            )  # fmt: skip


# -- the choice --------------------------------------------------------------------------------------------------


def test_kl_of_a_head_is_the_definition() -> None:
    weight, hidden, _ = language_head(300, 8, 50)
    bias = torch.randn(300, generator=seeded())
    head = fit_product(weight, head_bias=bias, generator=seeded(), sweeps=1)
    p = F.linear(hidden.double(), weight.double(), bias.double()).log_softmax(-1)
    q = F.linear(hidden.double(), decode_product(head.codebook, head.codes, 8).double(), bias.double()).log_softmax(-1)
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert head_kl(weight, bias, head, hidden) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("max_kl", [1.0, 0.02, 1e-9], ids=["loose", "tight", "impossible"])
def test_the_smallest_head_under_the_limit_is_chosen(max_kl: float) -> None:
    weight, hidden, _ = language_head(2000, 20)
    choice = choose(weight, hidden=hidden, max_kl=max_kl, generator=seeded())
    under = [c for c in choice.tried if c.kl is not None and c.kl <= max_kl]
    assert [c.bytes for c in choice.tried] == sorted(c.bytes for c in choice.tried)
    assert choice.kept == bool(under)
    expected = under[0] if under else min(choice.tried, key=lambda c: c.kl or math.inf)
    assert choice.chosen == expected
    assert choice.chosen.bytes == choice.head.bytes < dense_bytes(weight, None)
    assert choice.chosen.kl == pytest.approx(head_kl(weight, None, choice.head, split_sample(hidden)[1]))
    assert len(choice.tried) <= 3, "five sizes need at most three fits"
    if max_kl == 1.0:
        assert choice.chosen.dims == 8


@pytest.mark.parametrize(("n", "fitted"), [(2, 1), (3, 2), (4, 3), (8192, 6144)], ids=str)
def test_the_sample_that_judges_is_not_the_one_that_fits(n: int, fitted: int) -> None:
    hidden = torch.arange(n).unsqueeze(1).float()
    fitting, judging = split_sample(hidden)
    assert fitting.shape[0] == fitted and torch.equal(torch.cat([fitting, judging]), hidden)


def test_one_hidden_state_cannot_be_split() -> None:
    with pytest.raises(PlanError, match="at least 2 hidden states"):
        choose(torch.zeros(600, 8), hidden=torch.zeros(1, 8), generator=seeded())


def test_without_calibration_the_default_is_256_codes_per_4_dimensions_unmeasured() -> None:
    weight, _, _ = language_head(2000, 20)
    choice = choose(weight, generator=seeded())
    assert choice.head.codebook.shape == (5, 256, 4)
    assert (choice.chosen.dims, choice.chosen.codes, choice.chosen.kl, choice.kept) == (4, 256, None, False)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_head_too_small_to_gain_is_left_alone(calibrated: bool) -> None:
    weight, hidden, _ = language_head(200, 8, 20)
    with pytest.raises(PlanError, match="no codebook head is smaller"):
        choose(weight, hidden=hidden if calibrated else None, generator=seeded())


def test_sizes_that_would_not_gain_are_not_chosen() -> None:
    # fp16 head of 300 tokens: 2·300·16 bytes; codebooks of 256 entries alone take 2·256·16, codes 16/dims per token.
    weight, hidden, _ = language_head(300, 16)
    choice = choose(weight, hidden=hidden, max_kl=1e-9, generator=seeded())
    assert not choice.kept and all(c.bytes < dense_bytes(weight, None) for c in choice.tried)
    assert min(c.dims for c in choice.tried) == 4, "2 or 3 dimensions per group would take more than the dense head"


@pytest.mark.parametrize("max_kl", [0.0, -1.0, math.nan])
def test_a_limit_that_is_no_number_of_nats_is_refused(max_kl: float) -> None:
    with pytest.raises(PlanError, match="max_kl"):
        choose(torch.zeros(600, 8), max_kl=max_kl, generator=seeded())


# -- the modules -------------------------------------------------------------------------------------------------


def modules() -> list[VQLogitsTiers | VQLogitsProduct]:
    weight, _, counts = language_head()
    bias = torch.randn(600, generator=seeded())
    return [
        VQLogitsTiers(fit_tiers(weight, codes=60, counts=counts, generator=seeded())),
        VQLogitsTiers(fit_tiers(weight, codes=60, counts=counts, bias=False, generator=seeded())),
        VQLogitsProduct(fit_product(weight, head_bias=bias, sweeps=1, generator=seeded()), 20),
        VQLogitsProduct(fit_product(weight, sweeps=1, generator=seeded()), 20),
    ]


@pytest.mark.parametrize("which", range(4), ids=["tiers", "tiers_no_bias", "product_bias", "product"])
def test_modules_equal_the_dense_head_they_report_and_round_trip(which: int) -> None:
    module = modules()[which]
    h = torch.randn(2, 3, 20, generator=seeded())
    out = module(h)
    torch.testing.assert_close(out, F.linear(h, module.weight, module.bias), rtol=1e-4, atol=1e-4)
    roles = {"codebook", "code_of", "token_bias"} if which < 2 else {"codebook", "codes", "bias"}
    state = module.state_dict()
    assert set(state) == roles - ({"token_bias", "bias"} if which % 2 else set())
    assert {n for n, _ in module.named_parameters()} == set(state) - {"code_of", "codes"}
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.codebook.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(h), out)
    half = copy.deepcopy(module).half()
    assert half(h.half()).dtype == torch.float16
    assert half.state_dict()["code_of" if which < 2 else "codes"].dtype == torch.uint8
    assert "in_features=20, out_features=600" in repr(module)


@pytest.mark.parametrize("which", range(4), ids=["tiers", "tiers_no_bias", "product_bias", "product"])
def test_modules_train(which: int) -> None:
    module = modules()[which]
    h, target = torch.randn(64, 20, generator=seeded()), torch.randint(0, 600, (64,), generator=seeded(1))
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = module.nll(h, target).mean() if isinstance(module, VQLogitsTiers) else F.cross_entropy(module(h), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_tiers_losses_equal_those_of_their_logits() -> None:
    module = modules()[0]
    assert isinstance(module, VQLogitsTiers)
    h, target = torch.randn(5, 20, generator=seeded()), torch.tensor([3, -100, 0, 599, 77])
    torch.testing.assert_close(module.nll(h, target), F.cross_entropy(module(h), target, reduction="none"))
    torch.testing.assert_close(module.logsumexp(h), module(h).logsumexp(-1))


def test_a_transformers_model_takes_the_heads() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=20, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 600, (2, 7), generator=seeded())
    for module in (modules()[0], modules()[3]):
        model.set_output_embeddings(module)
        assert model.get_output_embeddings().weight.shape == (600, 20)
        out = model(input_ids=ids, labels=ids)
        assert out.logits.shape == (2, 7, 600)
        out.loss.backward()
        assert module.codebook.grad is not None and module.codebook.grad.any()
        assert model.generate(ids[:, :3], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 7)
