# SPDX-License-Identifier: Apache-2.0
"""Attention by additions: its formula, its laws, its gradients, and everything torch asks of an operator."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.launching import Config, launch
from rewriter.kernels.shift_attention import reference
from rewriter.kernels.shift_attention.kernels import coded_product, product
from rewriter.kernels.shift_attention.op import additive_attention
from rewriter.kernels.spec import REGISTRY

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def inputs(
    seed: int = 0, batch: int = 2, heads: int = 3, tokens: int = 5, dim: int = 4, width: int = 6, *,
    padded: bool = True, gained: bool = True, taps: int | None = 3, dtype: torch.dtype = torch.float64,
) -> Inputs:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    keep = torch.rand((batch, tokens), generator=g) < 0.7 if padded else None
    return (
        draw(batch, heads, tokens, dim), draw(batch, heads, tokens, dim), draw(batch, heads, tokens, width), keep,
        draw(heads) if gained else None, None if taps is None else draw(heads, taps),
    )  # fmt: skip


drawn = st.builds(
    inputs, st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 6),
    st.integers(1, 5), padded=st.booleans(), gained=st.booleans(), taps=st.sampled_from((None, 1, 3, 9)),
)  # fmt: skip


def by_loops(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None) -> Tensor:
    """The formula, token by token and without a matrix product."""
    batch, heads, tokens, _ = q.shape
    out = torch.zeros_like(v)
    for b in range(batch):
        seen = [m for m in range(tokens) if keep is None or keep[b, m]]
        for h in range(heads):
            for n in range(tokens):
                total = 0.5 * v[b, h, n] * (n in seen)
                for m in seen:
                    bits = (q[b, h, n] > q[b, h, n].mean()) & (k[b, h, m] > k[b, h, m].mean())
                    total = total + int(bits.sum()) / math.pi * v[b, h, m]
                length = total.norm()
                out[b, h, n] = total / length if length > 0 else total
                if gain is not None:
                    out[b, h, n] *= gain[h]
                for t in range(0 if conv is None else conv.shape[1]):
                    m = n + t - conv.shape[1] // 2
                    if m in seen:
                        out[b, h, n] += conv[h, t] * v[b, h, m]
    return out


@settings(deadline=None, max_examples=25)
@given(drawn)
def test_it_is_the_formula(given_: Inputs) -> None:
    torch.testing.assert_close(additive_attention(*given_), by_loops(*given_), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(drawn, st.integers(0, 100))
def test_an_input_does_not_see_the_rest_of_its_batch(given_: Inputs, seed: int) -> None:
    """The published code takes one threshold for the whole batch and fails this."""
    together = additive_attention(*given_)
    moved = [x.clone() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 4 else x for x in given_]
    for x in moved[:3]:
        x[1:] += torch.randn(x[1:].shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) * 10
    assert torch.equal(additive_attention(*moved)[:1], together[:1])


@settings(deadline=None, max_examples=20)
@given(drawn, st.floats(0.01, 100))
def test_codes_ignore_the_scale_and_a_constant_of_each_token(given_: Inputs, scale: float) -> None:
    q = given_[0]
    bits = reference.binary_codes(q)
    assert set(bits.unique().tolist()) <= {0.0, 1.0}
    spread = (q - q.mean(-1, keepdim=True)).abs()
    clear = spread > 1e-9 * q.abs().amax(-1, keepdim=True)  # not so near the threshold that rounding decides
    for other in (q * scale, q + scale):
        assert torch.equal(reference.binary_codes(other)[clear], bits[clear])


@settings(deadline=None, max_examples=20)
@given(drawn, st.randoms(use_true_random=False))
def test_tokens_have_no_order_without_the_convolution(given_: Inputs, random: object) -> None:
    q, k, v, keep, gain, _ = given_
    order = list(range(q.shape[2]))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = additive_attention(
        q[:, :, order], k[:, :, order], v[:, :, order], keep if keep is None else keep[:, order], gain, None
    )
    torch.testing.assert_close(moved, additive_attention(q, k, v, keep, gain, None)[:, :, order], rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(drawn)
def test_padding_is_as_if_it_were_not_there(given_: Inputs) -> None:
    q, k, v, _, gain, _ = given_
    junk = [torch.cat([x, torch.full_like(x, 3.5)], dim=2) for x in (q, k, v)]
    keep = torch.arange(2 * q.shape[2]).lt(q.shape[2]).expand(q.shape[0], -1)
    found = additive_attention(*junk, keep, gain, None)[:, :, : q.shape[2]]
    torch.testing.assert_close(found, additive_attention(q, k, v, None, gain, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_loses_what_rounding_loses(dtype: torch.dtype) -> None:
    narrow = inputs(seed=3, tokens=40, dim=16, dtype=dtype)
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in narrow)
    found, golden = additive_attention(*narrow), additive_attention(*wide)
    assert found.dtype is dtype
    error = (found.double() - golden).norm() / golden.norm()
    assert error < torch.finfo(dtype).eps  # one rounding of the result


def test_gradients_of_what_has_some() -> None:
    q, k, v, keep, gain, conv = inputs(padded=True)
    v, gain, conv = (x.requires_grad_() for x in (v, gain, conv))
    assert torch.autograd.gradcheck(lambda *x: additive_attention(q, k, x[0], keep, x[1], x[2]), (v, gain, conv))
    assert torch.autograd.gradcheck(lambda x: additive_attention(q, k, x, None, None, None), (v,))


@settings(deadline=None, max_examples=20)
@given(drawn)
def test_gradients_are_those_of_the_straight_through_reference(given_: Inputs) -> None:
    leaves = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in given_]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    weight = torch.randn(leaves[2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((additive_attention(*leaves) * weight).sum(), wanted)
    expected = torch.autograd.grad((reference.additive_attention(*leaves) * weight).sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max() + 1))


@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full: bool) -> None:
    args = inputs(padded=full, gained=full, taps=3 if full else None, dtype=torch.float32)
    leaves = tuple(x.requires_grad_() if x is not None and x.is_floating_point() else x for x in args)
    torch.library.opcheck(additive_attention, leaves)


def test_vmap_over_activations_and_over_parameters() -> None:
    q, k, v, keep, gain, conv = inputs(batch=4)
    rows = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
    keeps = keep.reshape(2, 2, -1)
    mapped = torch.vmap(additive_attention, in_dims=(0, 0, 0, 0, None, None))(*rows, keeps, gain, conv)
    torch.testing.assert_close(mapped.flatten(0, 1), additive_attention(q, k, v, keep, gain, conv))
    gains = torch.stack([gain, 2 * gain])
    each = torch.vmap(additive_attention, in_dims=(None, None, None, None, 0, None))(q, k, v, keep, gains, None)
    torch.testing.assert_close(each[1], 2 * each[0])


def test_autocast_and_cost() -> None:
    args = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert additive_attention(*args).dtype is torch.bfloat16
    q, k, v, *rest = inputs(tokens=8, dtype=torch.float32)
    double = tuple(torch.cat([x, x], dim=2) for x in (q, k, v))
    cost = REGISTRY[additive_attention].cost
    assert cost(*double, None, *rest[1:]).flops == 2 * cost(q, k, v, None, *rest[1:]).flops


def test_wrong_shapes_are_named() -> None:
    q, k, v, keep, gain, conv = inputs()
    for wrong, name in (((q[:, :2], k, v, keep, gain, conv), "one shape"), ((q, k, v, keep, gain[:2], conv), "gain"),
                        ((q, k, v, keep, gain, conv[:, :2]), "taps"), ((q, k, v, keep[:1], gain, conv), "keep")):  # fmt: skip
        with pytest.raises(RuntimeError, match=name):
            additive_attention(*wrong)


@triton.jit
def _split_products(a_ptr, b_ptr, codes_ptr, out_ptr, coded_ptr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    order = tl.arange(0, SIZE)
    at = order[:, None] * SIZE + order[None, :]
    b, nothing = tl.load(b_ptr + at), tl.zeros([SIZE, SIZE], dtype=tl.float32)
    tl.store(out_ptr + at, product(tl.load(a_ptr + at), b, nothing, WIDE))
    tl.store(coded_ptr + at, coded_product(tl.load(codes_ptr + at), b, nothing, WIDE))


@pytest.mark.parametrize("wide", [True, False])
def test_products_of_split_factors_lose_what_the_parts_left_out_hold(wide: bool) -> None:
    """No part may be missing, which the rounding of a narrow result would hide: every term is off by its last bits.

    Two bfloat16 parts of a float32 hold 16 of its bits; what is left out is a product of two second parts.
    """
    g = torch.Generator().manual_seed(0)
    a, b = (1 + torch.rand(16, 16, generator=g) for _ in range(2))
    codes = (torch.rand(16, 16, generator=g) < 0.5).float()
    out, coded = torch.empty(16, 16), torch.empty(16, 16)
    arguments = {"a_ptr": a, "b_ptr": b, "codes_ptr": codes, "out_ptr": out, "coded_ptr": coded}
    with interpreting():
        launch(_split_products, lambda c: (1,), arguments, {"WIDE": wide, "SIZE": 16}, [Config()])
    for found, left in ((out, a), (coded, codes)):
        golden = left.double() @ b.double()
        assert ((found - golden).abs() <= golden * (2**-21 if wide else 2**-15)).all()
