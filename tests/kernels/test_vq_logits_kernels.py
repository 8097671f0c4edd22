# SPDX-License-Identifier: Apache-2.0
"""The codebook heads' Triton kernels, interpreted: values and gradients against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import (
    DTYPES,
    WAYS,
    Head,
    as_the_reference,
    heads,
    laid_out,
    rounding_of_gradients,
    rounding_of_losses,
    small_blocks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.codegen.shipped import rows
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.spec import REGISTRY
from rewriter.kernels.vq_logits import codec, gradients, loss_gradients, op, shared
from rewriter.kernels.vq_logits import launch as shipped
from rewriter.kernels.vq_logits import loss_launch as losses
from rewriter.kernels.vq_logits import product_launch as products
from rewriter.kernels.vq_logits import tiers_launch as tiers

laws = settings(deadline=None, max_examples=10)
wanteds = st.lists(st.booleans(), min_size=3, max_size=3)


def reference(operator: Any) -> Any:
    return REGISTRY[operator].reference


# -- tiers and residual stages -----------------------------------------------------------------------------------


@given(heads(), st.booleans())
@laws
def test_tiers(case: Head, blocks: bool) -> None:
    as_the_reference(tiers.tiers, reference(op.vq_logits_tiers), case.args, blocks)


@given(heads(stages=True))
@laws
def test_residual_stages(case: Head) -> None:
    as_the_reference(tiers.residual, reference(op.vq_logits_residual), case.args)


@given(heads(), wanteds)
@laws
def test_gradients_of_tiers(case: Head, wanted: list[bool]) -> None:
    args = (case.normal(*case.lead, case.tokens, dtype=case.h.dtype), *case.args[:3], wanted)
    as_the_reference(tiers.tiers_backward, reference(gradients.vq_logits_tiers_backward), args)


@given(heads(stages=True), wanteds)
@laws
def test_gradients_of_residual_stages(case: Head, wanted: list[bool]) -> None:
    args = (case.normal(*case.lead, case.tokens, dtype=case.h.dtype), *case.args[:3], wanted)
    as_the_reference(tiers.residual_backward, reference(gradients.vq_logits_residual_backward), args)


def test_a_code_with_most_tokens_and_codes_with_none() -> None:
    """The sums over a code go on over many turns, and begin and end within one."""
    g = torch.Generator().manual_seed(0)
    index = torch.tensor([3] * 61 + [0, 5, 5, 7, 3])
    grad, codes = torch.randn(3, len(index), generator=g, dtype=torch.float64), 9
    with small_blocks():
        out = torch.zeros(3, codes)
        tiers.sums_by_code(grad.float(), index, codes, out)
    want = torch.zeros(codes, 3, dtype=torch.float64).index_add(0, index, grad.t()).t()
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-5)


# -- losses ------------------------------------------------------------------------------------------------------


@given(heads(), st.booleans())
@laws
def test_logsumexp(case: Head, blocks: bool) -> None:
    as_the_reference(losses.logsumexp, reference(op.vq_tiers_logsumexp), case.args, blocks, [rounding_of_losses(case)])


@given(heads())
@laws
def test_negative_log_likelihood(case: Head) -> None:
    args = (*case.args, case.targets(ignored=-100))
    as_the_reference(losses.nll, reference(op.vq_tiers_nll), args, rounding=[rounding_of_losses(case)])


@given(heads(), st.sampled_from([0.0, 0.2, 1.0]), st.booleans(), st.sampled_from([-100, 0]))
@laws
def test_cross_entropy_and_its_gradients(case: Head, smoothing: float, weighted: bool, ignored: int) -> None:
    from rewriter.kernels.after_head.op import vq_tiers_cross_entropy

    weight = case.uniform(case.tokens) if weighted else None
    rest = (case.targets(ignored), weight, smoothing, ignored)
    unit = [rounding_of_losses(case)]
    as_the_reference(losses.cross_entropy, reference(vq_tiers_cross_entropy), (*case.args, *rest), rounding=unit)
    grad = case.normal(*case.lead)
    wanted = [True, True, case.bias is not None]
    args = (grad, *case.args, *rest, wanted)
    unit = rounding_of_gradients(case, grad)
    as_the_reference(losses.loss_backward, reference(loss_gradients.vq_tiers_loss_backward), args, rounding=unit)


@given(heads(), wanteds)
@laws
def test_gradients_of_logsumexp(case: Head, wanted: list[bool]) -> None:
    wanted = [*wanted[:2], wanted[2] and case.bias is not None]
    grad = case.normal(*case.lead)
    args = (grad, *case.args, None, None, 0.0, -100, wanted)
    unit = rounding_of_gradients(case, grad)
    as_the_reference(losses.loss_backward, reference(loss_gradients.vq_tiers_loss_backward), args, rounding=unit)


@given(heads())
@laws
def test_gradients_of_log_softmax(case: Head) -> None:
    grad = case.normal(*case.lead, case.tokens)
    args = (grad, *case.args, [True, True, case.bias is not None])
    unit = rounding_of_gradients(case, grad.abs().sum(-1))  # at a code the gradients of all tokens meet, and cancel
    as_the_reference(
        losses.weighted_backward, reference(loss_gradients.vq_tiers_log_softmax_backward), args, rounding=unit
    )


def plain(dtype: torch.dtype = torch.float32) -> Head:
    g = torch.Generator().manual_seed(1)
    index = torch.randint(0, 30, (50,), generator=g)
    h, codebook = torch.randn(5, 20, generator=g), torch.randn(40, 20, generator=g)
    return Head(h.to(dtype), codebook.to(dtype), codec.pack_codes(index, 40), torch.randn(50, generator=g), g)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_a_number_stays_in_its_row(value: float) -> None:
    case = plain()
    case.h[2, 3] = value
    case.codebook[:, 3].abs_()
    with small_blocks():
        logits, log_z = tiers.tiers(*case.args), losses.logsumexp(*case.args)
        summed = tiers.tiers_backward(logits, *case.args[:3], [True, True, True])
    for got, operator in ((logits, op.vq_logits_tiers), (log_z, op.vq_tiers_logsumexp)):
        torch.testing.assert_close(got, operator(*case.args), equal_nan=True, rtol=1e-5, atol=1e-5)
    want = gradients.vq_logits_tiers_backward(logits, *case.args[:3], [True, True, True])
    for ours, theirs in zip(summed, want, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_biases_of_minus_infinity_take_tokens_and_codes_away() -> None:
    case = plain()
    first = codec.unpack_codes(case.code_of) == codec.unpack_codes(case.code_of)[0]
    case.bias[first] = -torch.inf
    case.bias[1] = -torch.inf
    with small_blocks():
        log_z = losses.logsumexp(*case.args)
    assert log_z.isfinite().all()
    torch.testing.assert_close(log_z, tiers_logits(case).logsumexp(-1), rtol=1e-6, atol=1e-6)


def tiers_logits(case: Head) -> Tensor:
    return op.vq_logits_tiers(*case.args)


@pytest.mark.parametrize("large", [200.0, 3000.0])
def test_logits_far_from_zero(large: float) -> None:
    """e^x of them is infinite or 0; log Z is not."""
    case = plain()
    for sign in (1, -1):
        shifted = Head(case.h, case.codebook, case.code_of, case.bias + sign * large, case.generator)
        with small_blocks():
            log_z = losses.logsumexp(*shifted.args)
        torch.testing.assert_close(log_z, tiers_logits(shifted).logsumexp(-1), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("bad", [50, -1, 2**40])
def test_a_target_that_is_no_token_has_no_loss_and_no_gradient(bad: int) -> None:
    case, target = plain(), torch.tensor([1, bad, -100, 4, 5])
    with small_blocks():
        loss = losses.nll(*case.args, target)
    assert loss.isnan().tolist() == [False, True, False, False, False] and loss[2] == 0


# -- product codes -----------------------------------------------------------------------------------------------


@st.composite
def product_heads(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `heads`, for product codes with a ragged last group, whose padding is no number."""
    positions = draw(st.sampled_from([1, 2, 3, 4, 5, 13, 16, 17, 20]))
    tokens, width, dims = draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    per_group, dtype = draw(st.sampled_from([1, 7, 150, 256])), draw(st.sampled_from(DTYPES))
    parameters = draw(st.sampled_from([dtype, torch.float32]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = -(-width // dims)
    codebook = torch.randn(groups, per_group, dims, generator=g).to(dtype).to(parameters)
    codebook[-1, :, width - (groups - 1) * dims :] = torch.nan
    h = laid_out(draw(st.sampled_from(WAYS)), torch.randn(positions, width, generator=g).to(dtype))
    codes = torch.randint(0, per_group, (tokens, groups), generator=g).to(torch.uint8)
    bias = torch.randn(tokens, generator=g).to(parameters) if draw(st.booleans()) else None
    return h, laid_out(draw(st.sampled_from(WAYS[:2])), codebook), codes, bias


@given(product_heads(), st.booleans())
@laws
def test_product(case: tuple[Any, ...], blocks: bool) -> None:
    as_the_reference(products.product, reference(op.vq_logits_product), case, blocks)


@pytest.mark.parametrize("positions", [2, 9, 20], ids=["tables", "tiles", "decoded"])
def test_padding_of_the_last_group_is_not_used(positions: int) -> None:
    g = torch.Generator().manual_seed(5)
    h, codebook = torch.randn(positions, 6, generator=g).bfloat16(), torch.randn(2, 7, 4, generator=g).bfloat16()
    codebook[1, :, 2:] = torch.nan
    codes = torch.randint(0, 7, (40, 2), generator=g).to(torch.uint8)
    as_the_reference(products.product, reference(op.vq_logits_product), (h, codebook, codes, None))


@given(product_heads(), wanteds)
@laws
def test_gradients_of_product(case: tuple[Any, ...], wanted: list[bool]) -> None:
    h, codebook, codes, _ = case
    grad = torch.randn(h.shape[0], codes.shape[0], generator=torch.Generator().manual_seed(3)).to(h.dtype)
    args = (grad, h, codebook, codes, wanted)
    as_the_reference(products.product_backward, reference(gradients.vq_logits_product_backward), args)


@given(product_heads(), st.data())
@laws
def test_exact_rows_and_their_gradients(case: tuple[Any, ...], data: st.DataObject) -> None:
    h, codebook, codes, bias = case
    g, tokens = torch.Generator().manual_seed(4), codes.shape[0]
    kept = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens, unique=True)))
    exact = torch.randn(len(kept), h.shape[1], generator=g).to(h.dtype).to(codebook.dtype)
    exact_of = codec.pack_codes(kept, 300)
    as_the_reference(
        products.product_exact, reference(op.vq_logits_product_exact), (h, codebook, codes, bias, exact, exact_of)
    )
    grad = torch.randn(h.shape[0], tokens, generator=g).to(h.dtype)
    wanted = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
    args = (grad, h, codebook, codes, exact, exact_of, wanted)
    as_the_reference(products.product_exact_backward, reference(gradients.vq_logits_product_exact_backward), args)


# -- as torch operators ------------------------------------------------------------------------------------------


def gradient_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of each gradient operator."""
    case = plain()
    g, (h, codebook, code_of, bias) = case.generator, case.args
    per_token = torch.randn(5, 50, generator=g)
    book, codes = torch.randn(5, 7, 4, generator=g), torch.randint(0, 7, (50, 5), generator=g).to(torch.uint8)
    exact, exact_of = torch.randn(2, 20, generator=g), codec.pack_codes(torch.tensor([4, 9]), 50)
    stages = (codebook.view(2, 20, 20), codec.pack_codes(torch.randint(0, 20, (50, 2), generator=g), 20))
    loss = (case.targets(ignored=3), torch.rand(50, generator=g), 0.1, 3)
    return {
        "vq_logits_tiers_backward": (per_token, h, codebook, code_of, [True] * 3),
        "vq_logits_residual_backward": (per_token, h, *stages, [True, False, True]),
        "vq_logits_product_backward": (per_token, h, book, codes, [False, True, True]),
        "vq_logits_product_exact_backward": (per_token, h, book, codes, exact, exact_of, [True, True, False, True]),
        "vq_tiers_loss_backward": (per_token[:, 0].clone(), h, codebook, code_of, bias, *loss, [True] * 3),
        "vq_tiers_log_softmax_backward": (per_token, h, codebook, code_of, bias, [True] * 3),
    }


@pytest.mark.parametrize("name", gradient_calls())
def test_opcheck_of_gradients(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.rewriter, name).default, gradient_calls()[name])


@pytest.mark.parametrize("name", gradient_calls())
def test_cost_of_gradients_counts_what_is_wanted(name: str) -> None:
    args = gradient_calls()[name]
    spec = REGISTRY[getattr(torch.ops.rewriter, name).default]
    none, every = (spec.cost(*args[:-1], [wanted] * len(args[-1])) for wanted in (False, True))
    assert none.bytes_written == 0 < every.bytes_written and none.flops < every.flops


def differentiable() -> dict[str, tuple[Any, ...]]:
    calls = gradient_calls()
    h, codebook, code_of, bias = plain().args
    _, _, stages, codes, _ = calls["vq_logits_residual_backward"]
    _, _, book, groups, exact, exact_of, _ = calls["vq_logits_product_exact_backward"]
    return {
        "vq_logits_tiers": (h, codebook, code_of, bias),
        "vq_logits_residual": (h, stages, codes, bias),
        "vq_logits_product": (h, book, groups, bias),
        "vq_logits_product_exact": (h, book, groups, bias, exact, exact_of),
        "vq_tiers_logsumexp": (h, codebook, code_of, bias),
        "vq_tiers_nll": (h, codebook, code_of, bias, plain().targets(ignored=-100)),
    }


@pytest.mark.parametrize("name", differentiable())
def test_autograd_by_gradient_operators_is_that_by_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [a.requires_grad_() if a.is_floating_point() else a for a in differentiable()[name]]
    learnt = [a for a in args if a.requires_grad]

    def found(chosen: list[Tensor]) -> list[Tensor]:
        out = getattr(torch.ops.rewriter, name)(*args)
        return list(torch.autograd.grad(out, chosen, torch.linspace(-1, 1, out.numel()).reshape(out.shape)))

    want = found(learnt)
    monkeypatch.setattr(shared, "on_gpu", lambda h: True)
    for chosen in (learnt, learnt[1:2]):
        for got, formula in zip(found(chosen), want if chosen is learnt else want[1:2], strict=True):
            torch.testing.assert_close(got, formula)


def test_everything_has_a_device_implementation() -> None:
    for name in (*differentiable(), *gradient_calls()):
        spec = REGISTRY[getattr(torch.ops.rewriter, name).default]
        assert callable(spec.implementation("cuda")), name


def test_what_is_left_to_the_reference() -> None:
    h, codebook, code_of, bias = plain().args
    with interpreting():
        with pytest.raises(Unsupported, match="float64"):
            tiers.tiers(h.double(), codebook, code_of, bias)
        with pytest.raises(Unsupported, match="empty"):
            losses.logsumexp(h[:0], codebook, code_of, bias)
        with pytest.raises(Unsupported, match="float64"):
            products.product(h, codebook.view(5, 40, 4).double(), torch.zeros(3, 5, dtype=torch.uint8), None)


def test_float32_is_not_multiplied_as_tf32() -> None:
    """Triton 3.7 does so for some kernels on sm_100, whatever ``input_precision`` says; ours must not be among them."""
    for case in shipped.SHIPPED:
        if "float32" in case.name:
            for target in ("sm_90", "sm_100"):
                assert not [row.compiled.kernel for row in rows(case, target) if row.compiled.matrix], case.name
