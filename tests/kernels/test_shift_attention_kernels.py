# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of attention by additions against the aten reference in float64, under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.shift_attention import launch, op, reference

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    """q, k, v contiguous, with heads and tokens swapped, or every second column; padding anywhere; any options."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    batch, heads, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from((40, 70, 7, 1)))
    dim, width = draw(st.sampled_from((16, 33, 5, 1))), draw(st.sampled_from((33, 8, 1)))
    dtype, order = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(("swapped", "plain", "columns")))

    def one(size: int) -> Tensor:
        if order == "swapped":
            return torch.randn(batch, tokens, heads, size, generator=g).to(dtype).transpose(1, 2)
        if order == "columns":
            return torch.randn(batch, heads, tokens, 2 * size, generator=g).to(dtype)[..., ::2]
        return torch.randn(batch, heads, tokens, size, generator=g).to(dtype)

    keep = torch.rand((tokens, batch), generator=g).t() < 0.7 if draw(st.booleans()) else None
    gain = torch.randn(heads, generator=g).to(dtype) if draw(st.booleans()) else None
    taps = draw(st.sampled_from((3, 9, 1, None)))
    conv = None if taps is None else torch.randn(heads, taps, generator=g).to(dtype)
    return one(dim), one(dim), one(width), keep, gain, conv


def wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def judge(found: Tensor, own: Tensor, golden: Tensor, summed: float = 0.0) -> None:
    """Twice what the reference loses, an ulp of the largest entry, and what products of split factors of size
    ``summed`` lose where they cancel."""
    assert found.dtype is own.dtype and found.shape == golden.shape and found.is_contiguous()
    if golden.numel():
        products = summed * (2**-21 if found.dtype is torch.float32 else 2**-15)
        ulps = torch.finfo(found.dtype).eps * golden.abs().max()
        allowed = 2 * (own.double() - golden).abs().max() + ulps + products
        assert (found.double() - golden).abs().max() <= allowed


def sizes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None
) -> tuple[float, ...]:
    """Bounds of what is added up for each gradient: one token sees its own ∂a cancel against a, and gets nearly zero."""
    seen = torch.ones(q.shape[0], 1, q.shape[2], 1) if keep is None else keep[:, None, :, None].double()
    v, q_bits, k_bits = v * seen, reference.binary_codes(q), reference.binary_codes(k) * seen
    sums = k_bits.transpose(-1, -2) @ v
    a = reference.RESIDUAL * v + reference.ANGLE * (q_bits @ sums)
    to_sum = grad.norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-12)
    to_sum = to_sum if gain is None else to_sum * gain.abs()[:, None]
    mixed = to_sum.sum() * q.shape[3] ** 0.5
    near = torch.zeros(()) if conv is None else conv.abs().sum() * grad.abs().max()
    to_q = (to_sum * sums.norm(dim=(-1, -2))[..., None] / q.norm(dim=-1)).max()
    to_k = (v.norm(dim=-1) * mixed / k.norm(dim=-1)).max()
    to_v = to_sum.max() + mixed * q.shape[3] ** 0.5 + near
    found = (to_q, to_k, to_v, grad.abs().sum(), grad.abs().sum() * v.abs().max())
    return tuple(float(size) for size in found)


@settings(deadline=None, max_examples=10)
@given(inputs(), st.sampled_from((32, 512)))
def test_it_is_the_reference(args: Inputs, span: int) -> None:
    with pytest.MonkeyPatch.context() as patch, interpreting():
        patch.setattr(launch, "SPAN", span)  # so that sequences of a few tokens are summed in parts
        found = launch.additive_attention(*args)
    judge(found, reference.additive_attention(*args), reference.additive_attention(*wide(args)), 1.0)


@settings(deadline=None, max_examples=10)
@given(inputs(), st.sampled_from((32, 512)), st.integers(0, 99))
def test_its_gradients_are_the_reference(args: Inputs, span: int, seed: int) -> None:
    grad = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(seed)).to(args[0].dtype)
    with pytest.MonkeyPatch.context() as patch, interpreting():
        patch.setattr(launch, "SPAN", span)
        found = launch.additive_attention_backward(grad, *args)
    own, golden = reference.all_gradients(grad, *args), reference.all_gradients(*wide((grad, *args)))
    for each in zip(found, own, golden, sizes(*wide((grad, *args))), strict=True):
        judge(*each)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_where_the_reference_sends_it(position: int, value: float) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=g) for _ in range(3))
    (q, k, v)[position][0, 1, 33, 5] = value
    with interpreting():
        found = launch.additive_attention(q, k, v, None, None, None)
    own = reference.additive_attention(q, k, v, None, None, None)
    assert torch.equal(found.isnan(), own.isnan()) and own.isnan().any()
    torch.testing.assert_close(found, own, equal_nan=True)


def test_what_no_kernel_does_is_said() -> None:
    x = torch.randn(1, 1, 3, 65)
    with interpreting(), pytest.raises(Unsupported, match="above 64"):
        launch.additive_attention(x, x, x, None, None, None)
    with interpreting(), pytest.raises(Unsupported, match="float64"):
        launch.additive_attention(*(x[..., :4].double(),) * 3, None, None, None)


def test_training_on_a_gpu_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g).requires_grad_() for shape in ((1, 2, 5, 4),) * 3 + ((2,), (2, 3))]

    def train() -> tuple[Tensor, ...]:
        q, k, v, gain, conv = leaves
        return torch.autograd.grad(op.additive_attention(q, k, v, None, gain, conv).square().sum(), leaves)

    expected = train()
    called = []

    def backward(*args: Any) -> tuple[Tensor, ...]:
        called.append(args)
        with interpreting():
            return launch.additive_attention_backward(*args)

    monkeypatch.setattr(op, "on_gpu", lambda x: True)
    monkeypatch.setattr(op, "additive_attention_backward", backward)
    for a, b in zip(train(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(called) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_opcheck_of_the_gradient(whole: bool) -> None:
    g = torch.Generator().manual_seed(0)
    grad, q, k, v = (torch.randn(2, 3, 5, 4, generator=g) for _ in range(4))
    options = (torch.ones(2, 5, dtype=torch.bool), torch.randn(3), torch.randn(3, 3)) if whole else (None, None, None)
    torch.library.opcheck(op.additive_attention_backward, (grad, q, k, v, *options))
