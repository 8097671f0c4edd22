# SPDX-License-Identifier: Apache-2.0
"""The pointwise functions of emitted kernels against torch's in float64: digits, NaN, infinities and signs of zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from interpreter import Interpreted
from torch import Tensor

from rewriter.kernels.emitted import functions

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the infinities that are tried

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "expm1": torch.expm1,
    "log1p": torch.log1p,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
}
ULP = torch.finfo(torch.float32).eps


@triton.jit
def one(x_ptr, out_ptr, count, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, FUNCTION(tl.load(x_ptr + at, mask=at < count, other=0.0)), mask=at < count)


@triton.jit
def two(x_ptr, y_ptr, out_ptr, count, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = (tl.load(p + at, mask=at < count, other=0.0) for p in (x_ptr, y_ptr))
    tl.store(out_ptr + at, FUNCTION(x, y), mask=at < count)


@triton.jit
def three(x_ptr, out_ptr, count, a, b, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, FUNCTION(tl.load(x_ptr + at, mask=at < count, other=0.0), a, b), mask=at < count)


def values() -> Tensor:
    """Every size from 1e-30 to 1e4 on both sides, and what is none."""
    sizes = torch.logspace(-30, 4, 400)
    special = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), 0.25, -0.25, 0.5, -0.5, -1.0])
    return torch.cat([sizes, -sizes, torch.linspace(-9, 9, 200), special])


def ran(kernel: Any, function: str, *tensors: Tensor, **numbers: float) -> Tensor:
    out = torch.empty_like(tensors[0])
    block = 1 << (out.numel() - 1).bit_length()
    Interpreted(kernel)[(1,)](*tensors, out, out.numel(), FUNCTION=getattr(functions, function), BLOCK=block, **numbers)
    return out


def same(got: Tensor, want: Tensor, ulps: float) -> None:
    """Equal where it is no number or infinite, and up to a relative error elsewhere."""
    finite = want.isfinite() & (want.abs() < torch.finfo(torch.float32).max)
    assert torch.equal(got[~finite].double().nan_to_num(7.0), want[~finite].float().double().nan_to_num(7.0))
    lost = (got[finite] - want[finite]).abs() / want[finite].abs().clamp_min(torch.finfo(torch.float32).tiny)
    assert float(lost.max()) <= ulps * ULP


@pytest.mark.parametrize("name", ["relu", "tanh", "expm1", "log1p"])
def test_relative_error(name: str) -> None:
    x = values()
    same(ran(one, name, x), UNARY[name](x.double()), 6)


@pytest.mark.parametrize("name", ["sigmoid", "silu", "gelu", "gelu_tanh"])
def test_absolute_error(name: str) -> None:
    """Where one is added to what nearly is minus one, digits of the tail are lost, in torch's float32 as well."""
    x = values()
    got, gold = ran(one, name, x), UNARY[name](x.double())
    assert torch.equal(got.isnan(), gold.isnan()) and torch.equal(got.isinf(), gold.isinf())
    known = gold.isfinite()
    assert float(((got - gold).abs() / gold.abs().clamp_min(1.0))[known].max()) <= 4 * ULP


@pytest.mark.parametrize("name", BINARY)
def test_comparisons(name: str) -> None:
    x = torch.tensor([0.0, 1.0, -2.0, float("inf"), -float("inf"), float("nan")])
    a, b = (t.flatten() for t in torch.meshgrid(x, x, indexing="ij"))
    if name.startswith("clamp"):  # a bound is a number
        a, b = a[~b.isnan()], b[~b.isnan()]
    assert torch.equal(ran(two, name, a, b).nan_to_num(7.0), BINARY[name](a, b).nan_to_num(7.0))


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_elu(alpha: float) -> None:
    x = values()
    out = torch.empty_like(x)
    Interpreted(two)[(1,)](x, torch.full_like(x, alpha), out, x.numel(), FUNCTION=functions.elu, BLOCK=2048)
    same(out, F.elu(x.double(), alpha), 6)


@pytest.mark.parametrize(("beta", "threshold"), [(1.0, 20.0), (2.0, 5.0)])
def test_softplus(beta: float, threshold: float) -> None:
    x = values()
    got, gold = ran(three, "softplus", x, a=beta, b=threshold), F.softplus(x.double(), beta, threshold)
    assert torch.equal(got.isnan(), gold.isnan()) and torch.equal(got.isinf(), gold.isinf())
    known = gold.isfinite() & (gold > torch.finfo(torch.float32).tiny)
    assert float(((got - gold).abs() / gold)[known].max()) <= 16 * ULP
