# SPDX-License-Identifier: Apache-2.0
"""Laws of codebook heads, searched for counterexamples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels.vq_logits import codec, op, reference

laws = settings(deadline=None, max_examples=30)


@st.composite
def tiers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, codebook, code numbers (some codes may be unused), token biases; float64."""
    v, d = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    k = draw(st.integers(1, v))
    n = draw(st.integers(1, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 20.0]))
    h = torch.randn(n, d, generator=g, dtype=torch.float64) * scale
    codebook = torch.randn(k, d, generator=g, dtype=torch.float64)
    index = torch.randint(0, k, (v,), generator=g)
    return h, codebook, index, torch.randn(v, generator=g, dtype=torch.float64) * scale


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(st.integers(1, 70_000), st.integers(0, 2**31))
@laws
def test_packing_round_trips(codes: int, seed: int) -> None:
    index = torch.randint(0, codes, (50,), generator=torch.Generator().manual_seed(seed))
    packed = codec.pack_codes(index, codes)
    assert packed.dtype == torch.uint8 and packed.shape == (50, codec.code_bytes(codes))
    assert torch.equal(codec.unpack_codes(packed), index)


def test_code_numbers_are_little_endian() -> None:
    assert codec.pack_codes(torch.tensor([0x010203]), 1 << 17).tolist() == [[3, 2, 1]]
    assert [codec.code_bytes(k) for k in (1, 256, 257, 65536, 65537, 1 << 24)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("bad", [[-1], [5]], ids=["negative", "too_large"])
def test_code_numbers_out_of_range_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        codec.pack_codes(torch.tensor(bad), 5)


@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans(), st.integers(0, 2**31))
@laws
def test_as_many_codes_as_tokens_is_the_dense_head(dtype: torch.dtype, bias: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 16, generator=g).to(dtype)
    h, b = torch.randn(3, 16, generator=g).to(dtype), torch.randn(40, generator=g).to(dtype)
    out = op.vq_logits_tiers(h, weight, codec.pack_codes(torch.arange(40), 40), b if bias else None)
    if not bias:
        assert torch.equal(out, F.linear(h, weight))
        return
    # One more rounding: the dense head may add its bias inside the accumulation. Error in ulps of the larger term.
    wide = F.linear(h.double(), weight.double())
    ulp = torch.finfo(dtype).eps * torch.maximum(wide.abs(), (wide + b.double()).abs())
    assert ((out - F.linear(h, weight, b)).double().abs() <= 2 * ulp).all()


@given(tiers(), st.booleans(), st.data())
@laws
def test_expanded_logits_and_sums_over_codes_agree_with_their_gradients(
    case: tuple[Tensor, ...], bias: bool, data: st.DataObject
) -> None:
    h, codebook, index, b = (t.clone().requires_grad_(t.is_floating_point()) for t in case)
    code_of = codec.pack_codes(index, codebook.shape[0])
    given_bias = b if bias else None
    target = torch.tensor([data.draw(st.sampled_from([-100, *range(index.numel())])) for _ in range(h.shape[0])])
    leaves = [h, codebook] + ([b] if bias else [])
    loss = op.vq_tiers_nll(h, codebook, code_of, given_bias, target)
    logits = op.vq_logits_tiers(h, codebook, code_of, given_bias)
    dense = F.cross_entropy(logits, target, reduction="none")
    close(loss, dense)
    for a, c in zip(torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(dense.sum(), leaves), strict=True):
        close(a, c)
    log_z = op.vq_tiers_logsumexp(h, codebook, code_of, given_bias)
    logits = op.vq_logits_tiers(h, codebook, code_of, given_bias)
    close(log_z, logits.logsumexp(-1))
    want = torch.autograd.grad(logits.logsumexp(-1).sum(), leaves)
    for a, c in zip(torch.autograd.grad(log_z.sum(), leaves), want, strict=True):
        close(a, c)


@given(tiers(), st.booleans())
@laws
def test_probabilities_sum_to_one(case: tuple[Tensor, ...], bias: bool) -> None:
    h, codebook, index, b = case
    every = torch.arange(index.numel()).repeat(h.shape[0], 1)
    rows = h.unsqueeze(1).expand(-1, index.numel(), -1)
    code_of = codec.pack_codes(index, codebook.shape[0])
    p = (-op.vq_tiers_nll(rows, codebook, code_of, b if bias else None, every)).exp()
    close(p.sum(-1), torch.ones(h.shape[0], dtype=torch.float64))


@given(tiers())
@laws
def test_without_bias_no_token_gets_more_than_its_share_of_the_cluster(case: tuple[Tensor, ...]) -> None:
    h, codebook, index, _ = case
    sizes = index.bincount(minlength=codebook.shape[0])[index]
    logits = op.vq_logits_tiers(h, codebook, codec.pack_codes(index, codebook.shape[0]), None)
    assert (logits.softmax(-1) * sizes <= 1 + 1e-12).all()


@given(tiers(), st.randoms(use_true_random=False))
@laws
def test_the_numbering_of_codes_does_not_matter(case: tuple[Tensor, ...], random: object) -> None:
    h, codebook, index, b = case
    order = list(range(codebook.shape[0]))
    random.shuffle(order)  # type: ignore[attr-defined]
    new = torch.tensor(order)
    moved = torch.empty_like(codebook)
    moved[new] = codebook
    a = op.vq_logits_tiers(h, codebook, codec.pack_codes(index, codebook.shape[0]), b)
    c = op.vq_logits_tiers(h, moved, codec.pack_codes(new[index], codebook.shape[0]), b)
    close(a, c)


@given(tiers(), st.booleans())
@laws
def test_merging_codes_with_equal_rows_changes_nothing(case: tuple[Tensor, ...], bias: bool) -> None:
    h, codebook, index, b = case
    doubled = torch.cat([codebook, codebook])
    k = codebook.shape[0]
    split = torch.where(torch.arange(index.numel()) % 2 == 0, index, index + k)
    target = torch.arange(h.shape[0]) % index.numel()
    args = (b if bias else None, target)
    merged = op.vq_tiers_nll(h, codebook, codec.pack_codes(index, k), *args)
    close(op.vq_tiers_nll(h, doubled, codec.pack_codes(split, 2 * k), *args), merged)


@given(tiers())
@laws
def test_a_row_added_to_every_code_leaves_the_loss_unchanged(case: tuple[Tensor, ...]) -> None:
    h, codebook, index, b = case
    code_of = codec.pack_codes(index, codebook.shape[0])
    target = torch.arange(h.shape[0]) % index.numel()
    shifted = codebook + codebook[:1]
    a = op.vq_tiers_nll(h, codebook, code_of, b, target)
    torch.testing.assert_close(op.vq_tiers_nll(h, shifted, code_of, b, target), a, rtol=1e-9, atol=1e-9)


@given(tiers())
@laws
def test_an_unused_code_counts_for_nothing(case: tuple[Tensor, ...]) -> None:
    h, codebook, index, b = case
    k = codebook.shape[0]
    extended = torch.cat([codebook, 1e3 * torch.ones_like(codebook[:1])]).requires_grad_()
    for bias in (None, b):
        want = op.vq_tiers_logsumexp(h, codebook, codec.pack_codes(index, k), bias)
        got = op.vq_tiers_logsumexp(h, extended, codec.pack_codes(index, k + 1), bias)
        close(got, want)
        (grad,) = torch.autograd.grad(got.sum(), extended)
        assert grad.isfinite().all() and not grad[k].any()


@given(st.integers(1, 6), st.integers(1, 17), st.integers(1, 30), st.booleans(), st.integers(0, 2**31))
@laws
def test_product_is_the_dense_head_on_the_decoded_weight(dims: int, width: int, v: int, bias: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    groups, per_group = -(-width // dims), 7
    codebook = torch.randn(groups, per_group, dims, generator=g, dtype=torch.float64)
    codes = torch.randint(0, per_group, (v, groups), generator=g).to(torch.uint8)
    h = torch.randn(3, width, generator=g, dtype=torch.float64)
    b = torch.randn(v, generator=g, dtype=torch.float64) if bias else None
    golden = torch.zeros(3, v, dtype=torch.float64)
    padded = F.pad(h, (0, groups * dims - width)).view(3, groups, dims)
    for i in range(v):
        chosen = torch.stack([codebook[j, int(codes[i, j])] for j in range(groups)])
        golden[:, i] = (padded * chosen).sum((1, 2)) + (0.0 if b is None else b[i])
    close(op.vq_logits_product(h, codebook, codes, b), golden)
    close(F.linear(h, codec.decode_product(codebook, codes, width), b), golden)


# -- exact rows and residual stages ------------------------------------------------------------------------------


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states ``[3, d]``, product codebook with a ragged last group, codes, and a dense head; float64."""
    dims, width, v = draw(st.integers(1, 6)), draw(st.integers(1, 17)), draw(st.integers(1, 30))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, per_group = -(-width // dims), 7
    codebook = torch.randn(groups, per_group, dims, generator=g, dtype=torch.float64)
    codes = torch.randint(0, per_group, (v, groups), generator=g).to(torch.uint8)
    h = torch.randn(3, width, generator=g, dtype=torch.float64)
    return h, codebook, codes, torch.randn(v, width, generator=g, dtype=torch.float64)


@given(products(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), st.data())
@laws
def test_exact_rows_are_the_dense_heads_bit_for_bit(
    case: tuple[Tensor, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    h, codebook, codes, dense = (t.to(dtype) if t.is_floating_point() else t for t in case)
    v = codes.shape[0]
    kept = torch.tensor(data.draw(st.lists(st.integers(0, v - 1), min_size=1, max_size=v, unique=True)))
    out = reference.exact_logits(h, codebook, codes, None, dense[kept], codec.pack_codes(kept, v))
    assert torch.equal(out[:, kept], F.linear(h, dense)[:, kept])
    others = [i for i in range(v) if i not in kept.tolist()]
    assert torch.equal(out[:, others], reference.product_logits(h, codebook, codes, None)[:, others])
    # The operator multiplies with the exact rows alone; the order of its sums is its own.
    out = op.vq_logits_product_exact(h, codebook, codes, None, dense[kept], codec.pack_codes(kept, v))
    assert torch.equal(out[:, others], op.vq_logits_product(h, codebook, codes, None)[:, others])
    if dtype is not torch.float64:
        assert torch.equal(out[:, kept], F.linear(h, dense[kept]))


@given(products(), st.randoms(use_true_random=False))
@laws
def test_the_numbering_of_codes_in_a_group_does_not_matter(case: tuple[Tensor, ...], random: object) -> None:
    h, codebook, codes, _ = case
    moved, renumbered = torch.empty_like(codebook), torch.empty_like(codes)
    for group in range(codebook.shape[0]):
        order = list(range(codebook.shape[1]))
        random.shuffle(order)  # type: ignore[attr-defined]
        moved[group, order] = codebook[group]
        renumbered[:, group] = torch.tensor(order, dtype=torch.uint8)[codes[:, group].long()]
    want = op.vq_logits_product(h, codebook, codes, None)
    assert torch.equal(op.vq_logits_product(h, moved, renumbered, None), want)


@st.composite
def stages(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, codebooks ``[S, K, d]``, code numbers ``[V, S]``, biases; float64."""
    s, v, d = draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(st.integers(1, 9))
    k = draw(st.integers(1, v))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    h = torch.randn(3, d, generator=g, dtype=torch.float64)
    codebook = torch.randn(s, k, d, generator=g, dtype=torch.float64)
    return h, codebook, torch.randint(0, k, (v, s), generator=g), torch.randn(v, generator=g, dtype=torch.float64)


@given(stages(), st.booleans())
@laws
def test_residual_logits_are_sums_over_stages(case: tuple[Tensor, ...], bias: bool) -> None:
    h, codebook, index, b = case
    golden = torch.zeros(h.shape[0], index.shape[0], dtype=torch.float64)
    for i in range(index.shape[0]):
        row = sum(codebook[s, int(index[i, s])] for s in range(codebook.shape[0]))
        golden[:, i] = h @ row + (b[i] if bias else 0.0)
    packed = codec.pack_codes(index, codebook.shape[1])
    close(op.vq_logits_residual(h, codebook, packed, b if bias else None), golden)
    close(F.linear(h, codec.decode_residual(codebook, packed), b if bias else None), golden)


@given(tiers(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@laws
def test_one_stage_is_a_pure_codebook_bit_for_bit(case: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    h, codebook, index, _ = (t.to(dtype) if t.is_floating_point() else t for t in case)
    packed = codec.pack_codes(index, codebook.shape[0])
    # The references; the order in which operators sum is their own.
    pure = reference.tiers_logits(h, codebook, packed, None)
    assert torch.equal(reference.residual_logits(h, codebook[None], packed[:, None], None), pure)


@given(stages(), st.integers(0, 2))
@laws
def test_a_row_added_to_a_whole_stage_leaves_probabilities_unchanged(case: tuple[Tensor, ...], stage: int) -> None:
    h, codebook, index, b = case
    packed = codec.pack_codes(index, codebook.shape[1])
    shifted = codebook.clone()
    shifted[min(stage, codebook.shape[0] - 1)] += codebook[0, :1]
    want = op.vq_logits_residual(h, codebook, packed, b).log_softmax(-1)
    close(op.vq_logits_residual(h, shifted, packed, b).log_softmax(-1), want)


@given(stages())
@laws
def test_bf16_residual_logits_lose_no_more_than_the_stages_own_products(case: tuple[Tensor, ...]) -> None:
    # Each stage's product is rounded once, their sum in float32 is not, and the result once more.
    h, codebook, index, _ = (t.bfloat16() if t.is_floating_point() else t for t in case)
    packed = codec.pack_codes(index, codebook.shape[1])
    wide = torch.stack([F.linear(h.double(), book.double()) for book in codebook])  # [S, n, K]
    terms = torch.stack([wide[s].index_select(-1, index[:, s]) for s in range(codebook.shape[0])])
    bound = torch.finfo(torch.bfloat16).eps / 2 * (1.01 * terms.abs().sum(0) + 1.01 * terms.sum(0).abs())
    accumulation = h.shape[-1] * torch.finfo(torch.float32).eps * terms.abs().amax()
    products = (h.double().abs() @ codebook.double().abs().amax((0, 1)).unsqueeze(-1)) * torch.finfo(torch.float32).eps
    error = (op.vq_logits_residual(h, codebook, packed, None).double() - terms.sum(0)).abs()
    assert (error <= bound + accumulation + h.shape[-1] * len(codebook) * products).all()
