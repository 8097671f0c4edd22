# SPDX-License-Identifier: Apache-2.0
"""Exact rows, projections, residual stages, SimVQ, and every structure through the pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter.errors import PlanError
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.passes import VQLogits
from rewriter.passes.vq_logits import modules, simvq
from rewriter.passes.vq_logits.choosing import choose, head_kl, split_sample
from rewriter.passes.vq_logits.exact import fit_exact
from rewriter.passes.vq_logits.heads import CodebookHead, ExactHead
from rewriter.passes.vq_logits.metric import head_metric
from rewriter.passes.vq_logits.product import ProductFit, fit_product
from rewriter.passes.vq_logits.projected import fit_projected
from rewriter.passes.vq_logits.residual import ResidualFit, fit_residual
from rewriter.passes.vq_logits.tiers import fit_tiers

laws = settings(deadline=None, max_examples=15)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def language_head(v: int = 400, d: int = 16, n: int = 500) -> tuple[Tensor, Tensor]:
    """A head with Zipf-like frequencies: weight ``[v, d]`` (fp16 values) and hidden states ``[n, d]`` of falling spectrum."""
    g = seeded(3)
    hidden = F.rms_norm(torch.randn(n, d, generator=g) * torch.logspace(0, -1.2, d), (d,))
    hidden[:, 0] = 1.5
    weight = torch.randn(v, d, generator=g) * 0.5
    weight[:, 0] -= 0.8 * torch.arange(1, v + 1).log()
    turn = torch.linalg.qr(torch.randn(d, d, generator=g)).Q  # trained models favour no axes
    return (weight @ turn).half().float(), hidden @ turn


def size(weight: Tensor, wanted: int) -> int:
    """A number of codes for heads of any size: as many as wanted, or half of the tokens."""
    return min(wanted, weight.shape[0] // 2)


FITS: dict[str, Any] = {
    "product": lambda w, **o: fit_product(w, codes=size(w, 64), dims=4, **o),
    "exact": lambda w, **o: fit_exact(w, codes=size(w, 64), dims=4, rows=20, **o),
    "rotated": lambda w, **o: fit_projected(w, codes=size(w, 64), dims=4, rank=w.shape[1], **o),
    "lowrank": lambda w, **o: fit_projected(w, codes=size(w, 64), dims=4, rank=w.shape[1] - 2, **o),
    "residual": lambda w, **o: fit_residual(w, codes=size(w, 64), stages=3, **o),
    "tiers": lambda w, **o: fit_tiers(w, codes=size(w, 120), **o),
    "pure": lambda w, **o: fit_tiers(w, codes=size(w, 200), singletons=0, bias=False, **o),
}


@pytest.mark.parametrize("structure", FITS)
def test_every_metric_changes_the_fit_and_calibration_pays(structure: str) -> None:
    weight, hidden = language_head()
    fitting, judging = split_sample(hidden)
    kls = {
        m: head_kl(weight, None, FITS[structure](weight, hidden=fitting, metric=m, generator=seeded()), judging)
        for m in ("plain", "whitened", "kl")
    }
    assert len(set(kls.values())) == 3, "two metrics gave the same head: one of them is not used"
    assert kls["kl"] < kls["plain"]


@pytest.mark.parametrize("structure", FITS)
@given(st.integers(0, 2**31))
@laws
def test_a_logit_errs_by_no_more_than_its_rows_error_times_the_hidden_state(structure: str, seed: int) -> None:
    g = seeded(seed)
    weight = torch.randn(40, 12, generator=g)
    head = FITS[structure](weight, generator=g)
    h = torch.randn(5, 12, generator=g)
    bias = getattr(head, "token_bias", None)
    logits = head.logits(h).double() - (0 if bias is None else bias.double())
    distance = (weight - head.dense()[:, :12]).double().norm(dim=1)
    bound = h.double().norm(dim=1, keepdim=True) * distance
    assert ((logits - F.linear(h.double(), weight.double())).abs() <= bound * (1 + 1e-5) + 1e-4).all()


@pytest.mark.parametrize("structure", FITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_heads_keep_the_weights_dtype_and_the_dense_bias(structure: str, dtype: torch.dtype) -> None:
    weight, _ = language_head(60, 12)
    beta = torch.randn(60, generator=seeded(1)).to(dtype)
    head = FITS[structure](weight.to(dtype), head_bias=beta, generator=seeded())
    assert all(t.dtype in (dtype, torch.uint8) and t.is_contiguous() for t in head.tensors().values())
    if structure != "tiers":
        bias = head.tensors().get("bias", head.tensors().get("token_bias"))
        assert bias is not None and torch.equal(bias, beta)
    assert head.logits(torch.zeros(2, 12, dtype=dtype)).dtype == dtype
    again = type(head).of(head.tensors())
    assert torch.equal(again.logits(torch.ones(2, 12, dtype=dtype)), head.logits(torch.ones(2, 12, dtype=dtype)))


# -- exact rows ----------------------------------------------------------------------------------------------------


def test_the_rows_kept_are_those_that_would_cost_most_and_are_the_dense_ones() -> None:
    weight, hidden = language_head()
    head = fit_exact(weight, rows=25, dims=4, codes=16, hidden=hidden, generator=seeded())
    kept = unpack_codes(head.exact_of)
    assert torch.equal(head.exact, weight[kept]) and kept.unique().numel() == 25
    fit = ProductFit(weight, 4, head_metric("kl", weight, hidden=hidden))
    fit.start(16, seeded())
    fit.descend(6)
    cost = fit.cost_per_token()
    others = torch.ones(weight.shape[0], dtype=torch.bool).index_fill(0, kept, False)
    assert cost[kept].min() >= cost[others].max()
    likely = F.linear(hidden, weight).softmax(-1).mean(0)
    assert likely[kept].mean() > 5 * likely[others].mean(), "mostly frequent tokens"


def test_exact_rows_buy_more_than_the_same_rows_without_a_second_fit_and_more_rows_buy_more() -> None:
    weight, hidden = language_head()
    fitting, judging = split_sample(hidden)
    known: dict[str, Any] = {"dims": 4, "codes": 16, "hidden": fitting}
    plain = fit_product(weight, **known, generator=seeded())
    kls = []
    for rows in (10, 40, 160):
        head = fit_exact(weight, rows=rows, **known, generator=seeded())
        kls.append(head_kl(weight, None, head, judging))
        patched = ExactHead(plain.codebook, plain.codes, None, head.exact, head.exact_of)
        assert kls[-1] < head_kl(weight, None, patched, judging)
    assert head_kl(weight, None, plain, judging) > kls[0] > kls[1] > kls[2]


def test_all_rows_exact_is_the_dense_head_bit_for_bit() -> None:
    weight, hidden = language_head(50, 8)
    head = fit_exact(weight, rows=50, codes=8, generator=seeded())
    assert torch.equal(head.logits(hidden), F.linear(hidden, weight))


# -- rotation and low rank -------------------------------------------------------------------------------------------


def test_a_rotation_lowers_the_error_of_a_head_whose_directions_are_not_alike() -> None:
    weight, hidden = language_head()
    fitting, judging = split_sample(hidden)
    known: dict[str, Any] = {"dims": 4, "codes": 16, "hidden": fitting}
    plain = head_kl(weight, None, fit_product(weight, **known, generator=seeded()), judging)
    turned = head_kl(weight, None, fit_projected(weight, rank=16, **known, generator=seeded()), judging)
    assert turned < 0.9 * plain


def test_low_rank_with_a_code_per_token_is_the_best_low_rank_head_of_the_metric() -> None:
    weight, hidden = language_head(100, 8)
    form = head_metric("whitened", weight, hidden=hidden)
    head = fit_projected(weight, rank=4, dims=4, codes=100, hidden=hidden, metric="whitened", generator=seeded())
    assert form.shared is not None
    root = torch.linalg.cholesky(form.shared.double())
    error = ((head.dense().double() - weight.double()) @ root).square().sum()
    lost = torch.linalg.svdvals(weight.double() @ root)[4:].square().sum()  # Eckart and Young
    assert float(error) == pytest.approx(float(lost), rel=1e-3)


def test_error_falls_with_the_rank() -> None:
    weight, hidden = language_head()
    kls = [
        head_kl(weight, None, fit_projected(weight, rank=r, codes=64, hidden=hidden, generator=seeded()), hidden)
        for r in (8, 12, 16)
    ]
    assert kls[0] > kls[1] > kls[2]


# -- residual stages -------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**31))
@laws
def test_no_joint_round_raises_the_error(stages: int, codes: int, seed: int) -> None:
    weight = torch.randn(60, 6, generator=seeded(seed), dtype=torch.float64).float()
    fit = ResidualFit(weight, head_metric("auto", weight))
    fit.start(stages, codes, seeded(seed))
    before = fit.cost()
    for _ in range(4):
        fit.sweep()
        after = fit.cost()
        assert after <= before * (1 + 1e-5) + 1e-9
        before = after


def test_joint_rounds_beat_stages_in_sequence_and_more_stages_beat_fewer() -> None:
    weight, hidden = language_head()
    costs = {}
    for stages in (1, 2, 3):
        fit = ResidualFit(weight, head_metric("kl", weight, hidden=hidden))
        fit.start(stages, 16, seeded())
        start = fit.cost()
        for _ in range(4):
            fit.sweep()
        costs[stages] = fit.cost()
        assert costs[stages] < start * (0.95 if stages > 1 else 1.0)
    assert costs[1] > costs[2] > costs[3]


def test_the_beam_finds_what_a_full_search_finds_in_two_stages() -> None:
    weight = torch.randn(50, 6, generator=seeded())
    fit = ResidualFit(weight, head_metric("plain", weight))
    fit.start(2, 6, seeded())
    fit.encode()
    pairs = (fit.books[0][:, None] + fit.books[1][None]).flatten(0, 1)
    best = torch.cdist(fit.points, pairs).square().amin(1)
    # A beam of 8 holds all 6 codes of the first stage, so here the search is complete.
    torch.testing.assert_close(fit.error(), best, rtol=1e-4, atol=1e-5)


# -- SimVQ -----------------------------------------------------------------------------------------------------------


def trainable_heads() -> dict[str, nn.Module]:
    weight, hidden = language_head(80, 12)
    return {n: modules.of(fit(weight, hidden=hidden, generator=seeded()), 12) for n, fit in FITS.items()}


@pytest.mark.parametrize("structure", FITS)
def test_simvq_changes_nothing_at_first_and_merging_changes_nothing_after_training(structure: str) -> None:
    head, h = trainable_heads()[structure], torch.randn(3, 12, generator=seeded())
    keys = set(head.state_dict())
    before = head(h)
    simvq.reparameterise(head)
    assert torch.equal(head(h), before)
    frozen = head.get_parameter("parametrizations.codebook.original").clone()
    moving = [p for p in head.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(moving, lr=0.05)
    F.cross_entropy(head(h), torch.tensor([1, 2, 3])).backward()
    optimiser.step()
    trained = head(h).detach()
    assert not torch.equal(trained, before)
    assert torch.equal(head.get_parameter("parametrizations.codebook.original"), frozen)
    simvq.merge(head)
    assert torch.equal(head(h), trained)
    assert set(head.state_dict()) == keys and head.get_parameter("codebook").requires_grad


def test_simvq_moves_codes_that_no_token_uses() -> None:
    head = trainable_heads()["residual"]
    head.codes = torch.zeros_like(head.codes)  # every token uses code 0 of each stage
    plain = torch.autograd.grad(head(torch.ones(1, 12))[0, 0], head.codebook)[0]
    assert not plain[:, 1:].any()
    simvq.reparameterise(head)
    before = head.codebook.detach().clone()
    head(torch.ones(1, 12))[0, 0].backward()
    with torch.no_grad():
        linear = head.get_parameter("parametrizations.codebook.0.linear")
        linear -= 0.1 * linear.grad
    moved = (head.codebook != before).any(-1).float().mean()
    assert moved > 0.95, "all codes move but those at right angles to the gradient"


def test_simvq_refuses_what_it_cannot_do() -> None:
    head = trainable_heads()["product"]
    with pytest.raises(ValueError, match="nothing to merge"):
        simvq.merge(head)
    with pytest.raises(ValueError, match="no parameter 'codebook'"):
        simvq.reparameterise(nn.Linear(2, 2))
    simvq.reparameterise(head, train_codes=True)
    assert head.get_parameter("parametrizations.codebook.original").requires_grad
    with pytest.raises(ValueError, match="merge it first"):
        simvq.reparameterise(head)


# -- the choice ------------------------------------------------------------------------------------------------------


def test_exact_rows_are_chosen_where_they_save_bytes() -> None:
    weight, hidden = language_head(1500, 24, 600)
    counts = (0, 10, 40)
    with_rows = choose(weight, hidden=hidden, max_kl=0.0425, exact_rows=counts, generator=seeded())
    without = choose(weight, hidden=hidden, max_kl=0.0425, generator=seeded())
    assert with_rows.kept and without.kept and with_rows.chosen.exact_rows > 0
    assert with_rows.chosen.bytes == with_rows.head.bytes < without.chosen.bytes
    judged = head_kl(weight, None, with_rows.head, split_sample(hidden)[1])
    assert with_rows.chosen.kl == pytest.approx(judged) and judged <= 0.0425


# -- through the pass ------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Tokens in, logits out: an embedding, a norm and a head."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, 16)
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 600, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))


SETTINGS: dict[str, dict[str, Any]] = {
    "pure": {"structure": "pure", "codes": 60},
    "residual": {"structure": "residual", "codes": 32, "stages": 3},
    "lowrank": {"structure": "lowrank", "codes": 32, "rank": 8},
    "rotated": {"structure": "product", "codes": 32, "rotate": True},
    "exact": {"structure": "product", "codes": 32, "exact_rows": 12},
    "auto": {"structure": "auto", "exact_rows": 5, "max_kl": 10.0},
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_structure_is_planned_applied_saved_and_put_back(setting: str, bias: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, ids = Small(bias).eval(), torch.randint(0, 600, (8, 40), generator=seeded())
    options = VQLogits(**SETTINGS[setting])
    opt = rewriter.optimize(model, [options], example_inputs=(ids[:2],), calibration=[ids])
    (site,) = opt.report.sites
    assert site.figures["head_kl"] >= 0 and (setting != "pure" or site.figures["floor_nats"] > 0)
    logits = opt(ids)
    back = opt.to_module()
    torch.testing.assert_close(back(ids), logits)
    back(ids).sum().backward()
    assert all(p.grad is not None for name, p in back.named_parameters() if name.startswith("head"))
    opt.save(tmp_path / "model")
    assert torch.equal(rewriter.load(tmp_path / "model")(ids), logits)
    replayed = rewriter.apply(
        rewriter.capture(model, (ids[:2],)),
        opt.plan,
        rewriter.calibrate(rewriter.capture(model, (ids[:2],)), [options], [ids]),
    )
    assert {n.target for n in replayed.graph.nodes} == {n.target for n in opt.program.graph.nodes}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "tiers", "exact_rows": 4}, "exact_rows=4 does nothing with structure='tiers'"),
        ({"structure": "lowrank", "rotate": True}, "rotate=True does nothing"),
        ({"structure": "product", "rank": 8}, "use structure='lowrank'"),
        ({"structure": "product", "stages": 3}, "use structure='residual'"),
        ({"structure": "product", "rotate": True, "exact_rows": 4}, "exclude each other"),
        ({"structure": "pure", "singletons": 4}, "singletons=4 does nothing with structure='pure'; use .*'tiers'"),
        ({"structure": "product", "bias": False}, "bias=False does nothing"),
        ({"structure": "tiers", "dims": 8}, "use structure='auto' or 'product' or 'lowrank'"),
        ({"structure": "residual", "stages": 0}, "stages=0"),
        ({"exact_rows": -1}, "exact_rows=-1"),
        ({"structure": "lowrank", "rank": 0}, "rank=0"),
        ({"structure": "pur"}, "nearest: pure"),
    ],
)
def test_options_that_do_nothing_or_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        VQLogits(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "product", "exact_rows": 601}, "exact_rows=601 is more than the 600 tokens"),
        ({"structure": "lowrank", "rank": 17}, "rank=17 for a head of width 16"),
        ({"structure": "residual", "codes": 601}, "codes=601 is more than the 600 tokens"),
    ],
)
def test_sizes_that_do_not_fit_the_head_are_refused_when_planning(options: dict[str, Any], message: str) -> None:
    ids = torch.randint(0, 600, (2, 5), generator=seeded())
    with pytest.raises(PlanError, match=message):
        rewriter.optimize(Small(False).eval(), [VQLogits(**options)], example_inputs=(ids,))


@pytest.mark.parametrize(
    "fit",
    [
        lambda w: fit_exact(w, rows=0, codes=8, generator=seeded()),
        lambda w: fit_exact(w, rows=51, codes=8, generator=seeded()),
        lambda w: fit_projected(w, rank=9, codes=8, generator=seeded()),
        lambda w: fit_residual(w, codes=51, generator=seeded()),
        lambda w: fit_residual(w, codes=8, stages=0, generator=seeded()),
    ],
    ids=["no_rows", "rows", "rank", "codes", "stages"],
)
def test_fits_refuse_impossible_sizes(fit: Any) -> None:
    with pytest.raises(PlanError):
        fit(torch.randn(50, 8, generator=seeded()))


def test_a_head_knows_its_bytes() -> None:
    weight, _ = language_head(100, 8)
    head: CodebookHead = fit_exact(weight, rows=10, codes=16, dims=4, generator=seeded())
    assert head.bytes == 2 * 2 * 16 * 4 + 100 * 2 + 10 * 8 * 2 + 10
