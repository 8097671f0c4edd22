# SPDX-License-Identifier: Apache-2.0
"""Laws of what follows a head, searched for counterexamples: everything equals the same on all V logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels.after_head import op, reference
from rewriter.kernels.vq_logits import codec
from rewriter.kernels.vq_logits.op import vq_logits_tiers, vq_tiers_nll

laws = settings(deadline=None, max_examples=30)


@dataclass(frozen=True)
class Case:
    """A tiers head, some of whose codes may be unused; float64, everything that is learnt requires gradients."""

    h: Tensor
    codebook: Tensor
    code_of: Tensor
    bias: Tensor | None
    generator: torch.Generator

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.h, self.codebook, self.code_of, self.bias

    @property
    def tokens(self) -> int:
        return self.code_of.shape[0]

    @property
    def logits(self) -> Tensor:
        return vq_logits_tiers(*self.head)

    def grads(self, value: Tensor) -> list[Tensor]:
        learnt = [t for t in (self.h, self.codebook, self.bias) if t is not None]
        seed = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
        return list(torch.autograd.grad(value, learnt, seed, retain_graph=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    v, d, n = draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    k = draw(st.integers(1, v))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 20.0]))
    h = torch.randn(n, d, generator=g, dtype=torch.float64) * scale
    codebook = torch.randn(k, d, generator=g, dtype=torch.float64)
    code_of = codec.pack_codes(torch.randint(0, k, (v,), generator=g), k)
    bias = torch.randn(v, generator=g, dtype=torch.float64) * scale if draw(st.booleans()) else None
    for tensor in (h, codebook, bias):
        if tensor is not None:
            tensor.requires_grad_()
    return Case(h, codebook, code_of, bias, g)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def both(case: Case, ours: Tensor, dense: Tensor) -> None:
    """Values and gradients; those of large losses in proportion."""
    close(ours, dense)
    for a, b in zip(case.grads(ours), case.grads(dense), strict=True):
        scale = max(1.0, float(b.abs().max()))
        close(a / scale, b / scale)


@given(cases())
@laws
def test_log_softmax_and_softmax_are_those_of_the_logits(case: Case) -> None:
    both(case, op.vq_tiers_log_softmax(*case.head), F.log_softmax(case.logits, -1))
    both(case, op.vq_tiers_softmax(*case.head), F.softmax(case.logits, -1))
    close(op.vq_tiers_softmax(*case.head).sum(-1), torch.ones(case.h.shape[0], dtype=torch.float64))


@given(cases(), st.sampled_from([0.0, 0.1, 1.0]), st.booleans(), st.sampled_from([-100, 0]))
@laws
def test_cross_entropy_is_that_of_the_logits(case: Case, smoothing: float, weighted: bool, ignored: int) -> None:
    target = torch.randint(0, case.tokens, case.h.shape[:1], generator=case.generator)
    target[0] = ignored
    weight = torch.rand(case.tokens, generator=case.generator, dtype=torch.float64) if weighted else None
    ours = op.vq_tiers_cross_entropy(*case.head, target, weight, smoothing, ignored)
    options = {"weight": weight, "label_smoothing": smoothing, "ignore_index": ignored, "reduction": "none"}
    both(case, ours, F.cross_entropy(case.logits, target, **options))


@given(cases(), st.sampled_from([0.0, 0.3]), st.booleans())
@laws
def test_cross_entropy_against_probabilities_is_that_of_the_logits(
    case: Case, smoothing: float, weighted: bool
) -> None:
    noise = torch.randn(case.h.shape[0], case.tokens, generator=case.generator, dtype=torch.float64)
    target = noise.softmax(-1).requires_grad_()
    weight = torch.rand(case.tokens, generator=case.generator, dtype=torch.float64) if weighted else None
    ours = op.vq_tiers_soft_cross_entropy(*case.head, target, weight, smoothing)
    dense = F.cross_entropy(case.logits, target, weight=weight, label_smoothing=smoothing, reduction="none")
    both(case, ours, dense)
    close(*(torch.autograd.grad(loss.sum(), target, retain_graph=True)[0] for loss in (ours, dense)))


@given(cases())
@laws
def test_probabilities_of_one_token_are_that_token(case: Case) -> None:
    target = torch.randint(0, case.tokens, case.h.shape[:1], generator=case.generator)
    sharp = F.one_hot(target, case.tokens).double()
    close(op.vq_tiers_soft_cross_entropy(*case.head, sharp, None, 0.0), vq_tiers_nll(*case.head, target))


@given(cases(), st.data())
@laws
def test_topk_is_that_of_the_logits_and_orders_equals_by_token(case: Case, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, case.tokens))
    values, tokens = op.vq_tiers_topk(*case.head, k)
    logits = case.logits
    close(values, logits.topk(k).values)
    assert torch.equal(tokens, ordered(logits)[..., :k])
    both(case, values, logits.gather(-1, tokens))


@given(cases())
@laws
def test_a_head_by_rows_is_the_dense_head(case: Case) -> None:
    weight = case.codebook.detach()[codec.unpack_codes(case.code_of)].requires_grad_()
    logits = F.linear(case.h, weight, case.bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK", 7)
        log_z = op.linear_logsumexp(case.h, weight, case.bias)
        close(log_z, logits.logsumexp(-1))
        got, want = (torch.autograd.grad(z.sum(), weight, retain_graph=True)[0] for z in (log_z, logits.logsumexp(-1)))
        close(got, want)
        k = min(5, case.tokens)
        values, tokens = op.linear_topk(case.h, weight, case.bias, k)
    close(values, logits.topk(k).values)
    close(logits.gather(-1, tokens), values)


@given(st.integers(0, 2**31), st.integers(1, 12))
@laws
def test_equal_values_are_ordered_by_id(seed: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 4, (3, 12), generator=g).float()
    values[values == 0] = -torch.inf
    ids = torch.randperm(12, generator=g)
    place = reference.largest(values, ids, k)
    for row, got in zip(values, place, strict=True):
        want = sorted(range(12), key=lambda i: (-float(row[i]), int(ids[i])))
        assert got.tolist() == want[:k]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_topk_in_low_precision_is_bit_equal_to_the_logits(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    h, codebook = torch.randn(5, 16, generator=g).to(dtype), torch.randn(40, 16, generator=g)
    code_of = codec.pack_codes(torch.randint(0, 40, (300,), generator=g), 40)
    bias = torch.randn(300, generator=g)
    logits = vq_logits_tiers(h, codebook, code_of, bias)
    values, tokens = op.vq_tiers_topk(h, codebook, code_of, bias, 10)
    assert torch.equal(values, logits.topk(10).values)
    assert torch.equal(values, logits.gather(-1, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["tokens", "probabilities"])
def test_losses_lose_no_more_than_eager(soft: bool, dtype: torch.dtype) -> None:
    """Root mean square errors against float64 over many positions: within twice those of the same on logits."""
    g = torch.Generator().manual_seed(4)
    h, codebook = torch.randn(512, 32, generator=g).to(dtype), torch.randn(40, 32, generator=g).to(dtype)
    code_of = codec.pack_codes(torch.randint(0, 40, (300,), generator=g), 40)
    bias, target = torch.randn(300, generator=g).to(dtype), torch.randint(0, 300, (512,), generator=g)
    ours = op.vq_tiers_soft_cross_entropy if soft else op.vq_tiers_cross_entropy
    given = (torch.rand(512, 300, generator=g) * 8).softmax(-1) if soft else target
    rest = () if soft else (-100,)
    golden = ours(h.double(), codebook.double(), code_of, bias.double(), given, None, 0.1, *rest)
    logits = vq_logits_tiers(h, codebook, code_of, bias).float()
    eager = F.cross_entropy(logits, given, label_smoothing=0.1, reduction="none")
    got = ours(h, codebook, code_of, bias, given, None, 0.1, *rest)
    after, before = ((loss.double() - golden).square().mean().sqrt() for loss in (got, eager))
    assert after <= 2 * before


def ordered(logits: Tensor) -> Tensor:
    """Tokens by falling logit, equals by rising number."""
    return logits.sort(dim=-1, descending=True, stable=True).indices
