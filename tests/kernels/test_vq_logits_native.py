# SPDX-License-Identifier: Apache-2.0
"""The CPU code of codebook heads against the float64 references: ragged sizes, strides, ties, threads, codes outside."""

from __future__ import annotations

import platform
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from rewriter.kernels.after_head import reference as after
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.native import library
from rewriter.kernels.vq_logits import codec, native, op, reference

DTYPES = (torch.float32, torch.bfloat16)
laws = settings(max_examples=40)
Head = tuple[Tensor, Tensor, Tensor, Tensor | None]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(head: Head) -> Head:
    h, codebook, codes, bias = head
    return h.double(), codebook.double(), codes, None if bias is None else bias.double()


def near(own: Callable[..., Tensor], eager: Callable[..., Tensor], head: Head, *targets: Tensor) -> None:
    """No further from the float64 result than twice what the reference in this dtype loses, and a rounding of the result.

    What it loses is its worst error over these hidden states and 32 others: that of a single number may be nothing at all.
    """
    h, *rest = head
    found, golden = own(*head, *targets), eager(*wide(head), *targets)
    assert found.shape == golden.shape
    if not found.numel():
        return
    others = randn(32, h.shape[-1], seed=0).to(h.dtype)
    theirs = 0.0
    for x, target in ((h, targets), (others, tuple(t.reshape(-1)[:1].expand(32) for t in targets))):
        case = (x, *rest)
        theirs = max(theirs, float((eager(*case, *target).double() - eager(*wide(case), *target)).abs().max()))
    unit = torch.finfo(found.dtype).eps * golden.abs().max()
    assert float((found.double() - golden).abs().max()) <= 2 * theirs + float(unit)


@st.composite
def tiers(draw: st.DrawFn, whole: bool = False) -> tuple[torch.dtype, Head]:
    """Hidden states with any leading dimensions, and a head: 1 to 3 bytes a code, one token or several blocks of them.

    ``whole``: of small integers, whose products are the same in any order of summing.
    """
    lead = draw(st.sampled_from([(), (1,), (2,), (3,), (2, 5), (0,)]))
    width, codes = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 37, 256, 257, 3000]))
    tokens, seed = draw(st.sampled_from([1, 2, 100, 2047, 2048, 5001])), draw(st.integers(0, 2**31))
    code = torch.randint(0, codes, (tokens,), generator=torch.Generator().manual_seed(seed))
    packed = codec.pack_codes(
        code, draw(st.sampled_from([codes, codes, 1 << 16, 1 << 20]).filter(lambda n: n >= codes))
    )
    bias = draw(st.sampled_from([None, 1.0, 30.0]))
    dtype = draw(st.sampled_from(DTYPES))
    h, codebook = (
        ((2 * x).round() if whole else x).to(dtype)
        for x in (randn(*lead, width, seed=seed + 1), randn(codes, width, seed=seed + 2))
    )
    if draw(st.booleans()):  # columns of something larger
        codebook = torch.cat([codebook, codebook.new_full((codes, 3), torch.nan)], 1)[:, :width]
        packed = torch.cat([packed, packed.new_full((tokens, 1), 255)], 1)[:, :-1]
    return dtype, (h, codebook, packed, None if bias is None else bias * randn(tokens, seed=seed + 3))


@given(tiers())
@laws
def test_logits(case: tuple[torch.dtype, Head]) -> None:
    dtype, head = case
    near(native.vq_logits_tiers, reference.tiers_logits, head)
    assert native.vq_logits_tiers(*head).dtype is dtype


@given(tiers(), st.data())
@laws
def test_losses(case: tuple[torch.dtype, Head], data: st.DataObject) -> None:
    _, head = case
    lead, tokens = head[0].shape[:-1], head[2].shape[0]
    seed = data.draw(st.integers(0, 2**31))
    target = torch.randint(0, tokens, lead, generator=torch.Generator().manual_seed(seed))
    target = torch.where(randn(*lead, 1, seed=seed)[..., 0] > 1, reference.IGNORE_INDEX, target)
    near(native.vq_tiers_nll, reference.tiers_nll, head, target)
    near(native.vq_tiers_logsumexp, reference.tiers_logsumexp, head)


@given(tiers(whole=True), st.data())
@laws
def test_topk_is_that_of_all_logits_ties_included(case: tuple[torch.dtype, Head], data: st.DataObject) -> None:
    _, head = case
    k = data.draw(st.sampled_from([1, 2, 50, 3000]).map(lambda n: min(n, head[2].shape[0])))
    if not head[0].numel():
        return
    logits = reference.tiers_logits(*head)
    place = after.largest(logits, torch.arange(logits.shape[-1]), k)
    values, tokens = native.vq_tiers_topk(*head, k)
    assert torch.equal(tokens, place) and torch.equal(values, logits.gather(-1, place))


@pytest.mark.parametrize("largest_bias", [2.0, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_undefined_logits(dtype: torch.dtype, largest_bias: float) -> None:
    packed = codec.pack_codes(torch.tensor([0, 1, 2, 3, 3]), 5)  # no token has the last code
    codebook, bias = randn(5, 8, seed=0).to(dtype), torch.tensor([0.0, -torch.inf, 0.0, 1.0, largest_bias])
    for value in (torch.inf, -torch.inf, torch.nan):
        for rows in (1, 3):
            h = randn(rows, 8, seed=1).to(dtype)
            h[rows // 2, 2] = value
            for function, own in (
                (reference.tiers_logits, native.vq_logits_tiers),
                (reference.tiers_logsumexp, native.vq_tiers_logsumexp),
            ):
                wanted, found = function(h, codebook, packed, bias), own(h, codebook, packed, bias)
                torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    h, codebook, bias = randn(3, 24, seed=0), randn(300, 24, seed=1), randn(9001, seed=2)
    code = torch.randint(0, 300, (9001,), generator=torch.Generator().manual_seed(3))
    head = (h, codebook, codec.pack_codes(code, 300), bias)
    book, codes = randn(6, 256, 4, seed=4), torch.randint(0, 256, (9001, 6)).to(torch.uint8)
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: native.vq_logits_tiers(*head),
        lambda: native.vq_tiers_logsumexp(*head),
        lambda: native.vq_logits_product(h, book, codes, bias),
    )
    before = torch.get_num_threads()
    alone = [call() for call in calls]
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(call(), one) for call, one in zip(calls, alone, strict=True))
    finally:
        torch.set_num_threads(before)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows, dims, width = draw(st.sampled_from([1, 2, 4, 5, 8, 9, 19])), draw(st.integers(1, 7)), draw(st.integers(1, 90))
    per_group, tokens = draw(st.sampled_from([1, 7, 255, 256])), draw(st.sampled_from([1, 100, 1024, 2100]))
    groups, seed, dtype = -(-width // dims), draw(st.integers(0, 2**31)), draw(st.sampled_from(DTYPES))
    codes = torch.randint(0, per_group, (tokens, groups), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    bias = randn(tokens, seed=seed + 1) if draw(st.booleans()) else None
    h, codebook = randn(rows, width, seed=seed + 2).to(dtype), randn(groups, per_group, dims, seed=seed + 3).to(dtype)
    return h, codebook, codes, bias


@given(products())
@laws
def test_product(head: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    near(native.vq_logits_product, reference.product_logits, head)


@pytest.mark.parametrize("way", ["own", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_by_either_product(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are held at a time; the last ones are padded to eight, or alone."""
    monkeypatch.setattr(native.choosing, "fastest", lambda kind, ways: next(name for name in ways if name == way))
    code = torch.randint(0, 50, (1500,), generator=torch.Generator().manual_seed(3))
    for rows in (64 + 8 + 1, 64 + 8 + 5):
        h, codebook = randn(rows, 33, seed=rows).to(dtype), randn(50, 33, seed=1).to(dtype)
        for bias in (None, randn(1500, seed=2)):
            head = (h, codebook, codec.pack_codes(code, 50), bias)
            near(native.vq_logits_tiers, reference.tiers_logits, head)
            near(native.vq_tiers_nll, reference.tiers_nll, head, code.new_tensor(range(rows)))


@pytest.mark.parametrize("without", ["avx512bf16", "avx512f"])
def test_without_the_widest_instructions(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is multiplied as float32; without AVX-512 torch multiplies, and product heads run another function."""
    flags = (*native._FLAGS, "-O1")  # which compiles in a third of the time
    if platform.machine() in ("x86_64", "AMD64"):
        flags = (*flags, f"-mno-{without}")
    tiers_library = library(native._HERE / "tiers.cpp", {}, native._TIERS, flags)
    monkeypatch.setattr(native, "_tiers", lambda: tiers_library)
    monkeypatch.setattr(native, "_own_product", native._own_product.__wrapped__)
    assert without == "avx512bf16" or not native._own_product()
    test_logits()
    test_losses()
    test_topk_is_that_of_all_logits_ties_included()
    if without == "avx512f":
        product_library = library(native._HERE / "product.cpp", {}, native._PRODUCT, flags)
        monkeypatch.setattr(native, "_product", lambda: product_library)
        test_product()


# --------------------------------------------------------------------------------------- what is left to the reference


def test_codes_and_targets_outside_are_the_references_error() -> None:
    h, codebook = randn(2, 8, seed=0), randn(4, 8, seed=1)
    outside = torch.tensor([[0], [4]], dtype=torch.uint8)
    for call in (native.vq_logits_tiers, native.vq_tiers_logsumexp):
        with pytest.raises(Unsupported, match="outside"):
            call(h, codebook, outside, None)
    with pytest.raises(RuntimeError, match="out of DATA bounds"):
        op.vq_logits_tiers(h, codebook, outside, None)
    inside = torch.tensor([[0], [3]], dtype=torch.uint8)
    for target in (2, -1):
        with pytest.raises(Unsupported, match="outside"):
            native.vq_tiers_nll(h, codebook, inside, None, torch.full((2,), target))
    with pytest.raises(Unsupported, match="outside"):
        native.vq_logits_product(h, randn(2, 5, 4, seed=2), torch.full((3, 2), 5, dtype=torch.uint8), None)


def test_wrong_shapes_are_refused_before_memory_is_read() -> None:
    h, codebook, codes, bias = (
        randn(2, 8, seed=0),
        randn(4, 8, seed=1),
        torch.zeros(5, 1).to(torch.uint8),
        randn(5, seed=2),
    )
    wrong: tuple[Head, ...] = (
        (h[0, 0], codebook, codes, bias),
        (h[:, :7], codebook, codes, bias),
        (h, codebook[0], codes, bias),
        (h, codebook, codes[:, 0], bias),
        (h, codebook, codes.expand(5, 4), bias),
        (h, codebook, codes[:, :0], bias),
        (h, codebook, codes.long(), bias),
        (h, codebook, codes, bias[:4]),
    )
    for head in wrong:
        with pytest.raises(RuntimeError, match=r"must|has width"):
            native.vq_logits_tiers(*head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_the_references(dtype: torch.dtype) -> None:
    h, codebook = randn(2, 8, seed=0).to(dtype), randn(4, 8, seed=1).to(dtype)
    packed = torch.tensor([[0], [3]], dtype=torch.uint8)
    with pytest.raises(Unsupported, match=str(dtype)):
        native.vq_logits_tiers(h, codebook, packed, None)
    assert torch.equal(op.vq_logits_tiers(h, codebook, packed, None), reference.tiers_logits(h, codebook, packed, None))
