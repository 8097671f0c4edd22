# SPDX-License-Identifier: Apache-2.0
"""`puma` promises bounds: checked on dense grids, at break points, at both ends of the number line, and in every dtype."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter.errors import PlanError
from rewriter.optimized import Optimized
from rewriter.passes import Puma
from rewriter.passes.puma.gelu import F1, GELU_ERROR, LEFT, MIDDLE, RIGHT
from rewriter.passes.puma.softmax import EXP_ERROR, LOWEST

INF, NAN = math.inf, math.nan
GONE = ("erf", "gelu", "exp", "softmax", "tanh")


class Gelu(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "written":
            return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
        return F.gelu(x, approximate=self.spelling)


class Softmax(nn.Module):
    def __init__(self, spelling: str = "operator") -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "operator":
            return torch.softmax(x, -1)
        if self.spelling == "float":
            return torch.softmax(x, -1, dtype=torch.float32)
        e = torch.exp(x - x.amax(-1, keepdim=True)) if self.spelling == "written" else torch.exp(x)
        return e / e.sum(-1, keepdim=True)


def optimized(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> Optimized:
    return rewriter.optimize(model, passes=["puma"], example_inputs=(torch.randn(*shape, dtype=dtype),))


@pytest.fixture(scope="module")
def gelus() -> dict[str, Optimized]:
    return {spelling: optimized(Gelu(spelling), 2, 3) for spelling in ("none", "tanh", "written")}


@pytest.fixture(scope="module")
def softmax() -> Optimized:
    return optimized(Softmax(), 2, 3)


def operators(opt: Optimized) -> list[str]:
    return [str(node.target) for node in opt.program.graph.nodes if node.op == "call_function"]


# --------------------------------------------------------------------------------------------------------- GELU


def adversarial() -> Tensor:
    """A dense grid, the break points with their neighbours, and the ends of the number line, ``[n, 1]``."""
    breaks = torch.tensor([LEFT, MIDDLE, RIGHT, 0.0], dtype=torch.float64)
    ends = [torch.nextafter(breaks, torch.full_like(breaks, side)) for side in (-INF, INF)]
    huge = torch.tensor([10.0**e for e in (-300, -30, 2, 8, 30, 300)], dtype=torch.float64)
    grid = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    return torch.cat((grid, breaks, *ends, huge, -huge)).unsqueeze(1)


@pytest.mark.parametrize("spelling", ["none", "tanh", "written"])
def test_a_gelu_is_within_its_bound(gelus: dict[str, Optimized], spelling: str) -> None:
    x = adversarial()
    opt, exact = gelus[spelling], F.gelu(x, approximate="tanh" if spelling == "tanh" else "none")
    assert not any(name in str(call) for call in operators(opt) for name in GONE)
    error = float((opt(x) - exact).abs().max())
    assert error <= GELU_ERROR
    assert error >= 0.97 * GELU_ERROR  # the bound is no larger than it has to be
    assert opt.report.sites[0].contract == str(Puma().rules()[0].contract)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gelu_in_low_precision_rounds_once_more(dtype: torch.dtype) -> None:
    opt = optimized(Gelu("none"), 2, 3, dtype=dtype)
    x = torch.linspace(-9, 9, 20_001).to(dtype).unsqueeze(1)
    exact = F.gelu(x.double())
    error = (opt(x).double() - exact).abs()
    assert opt(x).dtype == dtype
    assert bool((error <= GELU_ERROR + torch.finfo(dtype).eps * (exact.abs() + 1)).all())


def test_what_is_not_finite(gelus: dict[str, Optimized]) -> None:
    got = gelus["none"](torch.tensor([[INF, -INF, NAN]], dtype=torch.float64))
    assert got[0, 0] == INF and got[0, 1] == 0.0 and got[0, 2].isnan()


def test_gradients_are_finite_and_near(gelus: dict[str, Optimized]) -> None:
    x = adversarial().requires_grad_()
    (got,) = torch.autograd.grad(gelus["none"](x).sum(), x)
    (want,) = torch.autograd.grad(F.gelu(x).sum(), x)
    assert bool(got.isfinite().all())
    slope = 0.5 + sum(2 * i * c * RIGHT ** (2 * i - 1) for i, c in enumerate(F1))  # of the middle polynomial at 3
    last = torch.tensor(RIGHT, dtype=torch.float64, requires_grad=True)
    (true_slope,) = torch.autograd.grad(F.gelu(last), last)
    assert math.isclose(float((got - want).abs().max()), slope - float(true_slope), rel_tol=1e-6)  # 0.21, the largest


# ------------------------------------------------------------------------------------------------------ softmax


def exponentials(probabilities: Tensor) -> Tensor:
    """Probabilities beside the largest of their row: the exponentials they were made of."""
    return probabilities / probabilities.amax(-1, keepdim=True)


def test_an_exponential_is_within_its_bound(softmax: Optimized) -> None:
    below = torch.linspace(-40, 0, 100_001, dtype=torch.float64)
    edge = torch.tensor([LOWEST], dtype=torch.float64)
    near = [torch.nextafter(edge, torch.full_like(edge, side)) for side in (-INF, INF)]
    d = torch.cat((below, edge, *near, torch.tensor([-1e30, -INF], dtype=torch.float64)))
    rows = torch.stack((torch.zeros_like(d), d), 1)
    assert not any(name in str(call) for call in operators(softmax) for name in GONE)
    error = (exponentials(softmax(rows)) - exponentials(torch.softmax(rows, -1))).abs()
    assert 0.97 * EXP_ERROR <= float(error.max()) <= EXP_ERROR


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12), shift=st.floats(-1e6, 1e6), scale=st.floats(0, 3)
)
def test_any_row_sums_to_one_within_the_bound(
    softmax: Optimized, values: list[float], shift: float, scale: float
) -> None:
    row = scale * torch.tensor([values, values[::-1]], dtype=torch.float64) + shift
    got = softmax(row)
    assert torch.allclose(got.sum(-1), torch.ones(2, dtype=torch.float64), rtol=1e-12)
    assert bool((got >= 0).all())
    assert float((exponentials(got) - exponentials(torch.softmax(row, -1))).abs().max()) <= EXP_ERROR + 1e-9


@pytest.mark.parametrize(("length", "worst"), [(16, 0.04), (64, 0.08), (256, 0.14), (1024, 0.21)])
def test_long_rows_are_off_by_what_the_page_says(softmax: Optimized, length: int, worst: float) -> None:
    """One value above n − 1 equal ones: the bound is on exponentials, not on probabilities."""
    below = torch.linspace(-14, 0, 400, dtype=torch.float64).unsqueeze(1).expand(-1, length).clone()
    below[:, 0] = 0.0
    error = float((softmax(below) - torch.softmax(below, -1)).abs().max())
    assert abs(error - worst) < 0.005


def test_masked_positions_have_no_weight_and_no_gradient(softmax: Optimized) -> None:
    x = torch.tensor([[0.3, -INF, -1.0], [0.1, 0.2, -INF]], dtype=torch.float64, requires_grad=True)
    out = softmax(x)
    (out * torch.arange(6, dtype=torch.float64).view(2, 3)).sum().backward()
    assert out[0, 1] == 0.0 and out[1, 2] == 0.0
    assert x.grad is not None and bool(x.grad.isfinite().all()) and x.grad[0, 1] == 0.0 and x.grad[1, 2] == 0.0


@pytest.mark.parametrize("row", [[-INF, -INF], [INF, 0.0], [NAN, 0.0]])
def test_where_softmax_is_nan_so_is_this(softmax: Optimized, row: list[float]) -> None:
    x = torch.tensor([row, [0.0, 0.0]], dtype=torch.float64)
    got = softmax(x)
    assert bool(torch.softmax(x, -1)[0].isnan().all()) and bool(got[0].isnan().all())
    assert got[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spelling", ["operator", "float", "written"])
def test_low_precision_and_spellings(spelling: str, dtype: torch.dtype) -> None:
    opt = optimized(Softmax(spelling), 4, 7, dtype=dtype)
    assert not any(name in str(call) for call in operators(opt) for name in GONE)
    x = (4 * torch.randn(200, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    got, eager = opt(x), Softmax(spelling)(x)
    assert got.dtype == eager.dtype
    error = (got.double() - torch.softmax(x.double(), -1)).abs()
    # Both sums are at least 1, so a probability is off by no more than all exponentials of its row together.
    assert float(error.max()) <= 6 * EXP_ERROR + torch.finfo(got.dtype).eps


def test_a_softmax_that_overflows_is_left() -> None:
    opt = optimized(Softmax("unstable"), 2, 3)
    assert any("exp" in call for call in operators(opt))
    misses = rewriter.explain(opt.original_program(), Puma().rules()[1])
    assert any("no maximum is subtracted" in miss.reason for miss in misses)


def test_options() -> None:
    assert [rule.name for rule in Puma(softmax=False).rules()] == ["puma.gelu"]
    with pytest.raises(PlanError, match="leave nothing to do"):
        Puma(gelu=False, softmax=False)
