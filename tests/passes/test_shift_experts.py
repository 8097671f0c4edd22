# SPDX-License-Identifier: Apache-2.0
"""The mixture of a multiplying and a shifting expert: every token gets one of the two, and the router learns."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter.errors import PlanError, UntrainedWarning
from rewriter.passes.shift_add.experts import ShiftExperts, ShiftExpertsLinear, balance_loss, route


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).double().eval()


def data(rows: int = 512) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn((rows, 24), generator=g, dtype=torch.float64)


def rewritten(**options: object) -> rewriter.Optimized:
    given = {k: options.pop(k) for k in ("calibration",) if k in options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        return rewriter.optimize(model(), [ShiftExperts(**options)], (data(4),), **given)


def test_without_calibration_nothing_changes() -> None:
    x = data()
    assert torch.equal(rewritten()(x), model()(x))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_router_shifts_the_share_it_was_asked_for(share: float) -> None:
    opt = rewritten(share=share, calibration=[(data(),)])
    found = [s.figures["shifted"] for s in opt.report.sites]
    assert all(abs(f - share) <= 0.01 for f in found)
    dense = [s.figures["pj_arithmetic_dense"] for s in opt.report.sites]
    if share == 1.0:
        assert all(s.figures["pj_arithmetic"] < d for s, d in zip(opt.report.sites, dense, strict=True))


def test_every_token_gets_the_result_of_one_expert() -> None:
    opt = rewritten(calibration=[(data(),)])
    module = opt.to_module()
    layer, x = module[0], data()
    assert isinstance(layer, ShiftExpertsLinear)
    multiplied, shifted, found = model()[0](x), layer.shift(x), layer(x)
    by_shift = (layer.probabilities(x)[:, 1] > 0.5).unsqueeze(-1)
    assert 0 < by_shift.double().mean() < 1
    assert torch.equal(found, torch.where(by_shift, shifted, multiplied))
    torch.testing.assert_close(opt(x), module(x), rtol=0, atol=1e-12)


def test_it_shifts_what_suffers_least() -> None:
    """Tokens along weights that are powers of two lose nothing: the router finds them by a coordinate that marks them."""
    g = torch.Generator().manual_seed(2)
    weight = torch.cat([2.0 ** -torch.arange(6.0).repeat(10, 1), torch.rand((10, 6), generator=g) + 0.6], dim=1).double()
    shifted = weight.clone()
    shifted[:, 6:] *= 1.3
    x = torch.rand((400, 12), generator=g, dtype=torch.float64) + 0.1
    harmless = torch.arange(400) % 2 == 0
    x[harmless, 6:] *= 0.01
    router, offset = route(weight, shifted, x, 0.5)
    scores = x @ router.T + offset
    assert ((scores[:, 1] > scores[:, 0]) == harmless).double().mean() > 0.98


def test_the_router_has_a_gradient_and_the_task_moves_it() -> None:
    opt = rewritten(calibration=[(data(),)])
    opt.train()
    x = data()
    loss = (opt(x) - model()(x).detach()).square().mean()
    loss.backward()
    routers = {n: p for n, p in opt.named_parameters() if "router" in n}
    assert len(routers) == 4 and all(p.grad is not None and p.grad.norm() > 0 for p in routers.values())
    # At the gradient's sign the router goes towards multiplying: shifting is what costs.
    assert routers["0.router_bias"].grad[0] < 0 < routers["0.router_bias"].grad[1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.floats(0.1, 10))
def test_balance_is_best_where_load_is_inverse_to_latency(latency: list[float], scale: float) -> None:
    slow = torch.tensor(latency, dtype=torch.float64)
    best = (1 / slow) / (1 / slow).sum()
    assert balance_loss(best.expand(7, -1), slow) < 1e-20
    other = best.clone()
    other[0] += 0.5
    other = other / other.sum()
    assert balance_loss(other.expand(7, -1), slow) > 0
    torch.testing.assert_close(balance_loss(other.expand(7, -1), slow), balance_loss(other.expand(7, -1), slow * scale))


def test_saving_and_options(tmp_path: Path) -> None:
    opt = rewritten(calibration=[(data(),)])
    opt.save(tmp_path / "saved")
    assert torch.equal(rewriter.load(tmp_path / "saved")(data()), opt(data()))
    with pytest.raises(PlanError, match="share"):
        ShiftExperts(share=1.5)
    with pytest.raises(PlanError, match="bits"):
        ShiftExperts(bits=1)
