# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of what follows a head, interpreted: values and gradients against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import Head, as_the_reference, heads, rounding_of_gradients, rounding_of_losses, small_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels.after_head import launch, linear, op
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.spec import REGISTRY
from rewriter.kernels.vq_logits import codec, shared, tiers_launch

laws = settings(deadline=None, max_examples=10)


def reference(operator: Any) -> Any:
    return REGISTRY[operator].reference


def dense(case: Head) -> Head:
    """The head with a row for each token, of its codebook's dtype."""
    rows = case.normal(case.tokens, case.h.shape[-1], dtype=case.h.dtype).to(case.codebook.dtype)
    return Head(case.h, rows, case.code_of, case.bias, case.generator)


@given(heads())
@laws
def test_softmax_and_its_logarithm(case: Head) -> None:
    unit = rounding_of_losses(case)
    as_the_reference(launch.log_softmax, reference(op.vq_tiers_log_softmax), case.args, rounding=[unit])
    as_the_reference(launch.softmax, reference(op.vq_tiers_softmax), case.args, rounding=[unit])


@given(heads(), st.sampled_from([0.0, 0.3]), st.booleans())
@laws
def test_cross_entropy_against_probabilities(case: Head, smoothing: float, weighted: bool) -> None:
    target = case.normal(*case.lead, case.tokens).softmax(-1)
    weight = case.uniform(case.tokens) if weighted else None
    args = (*case.args, target, weight, smoothing)
    unit = [2 * rounding_of_losses(case)]
    as_the_reference(launch.soft_cross_entropy, reference(op.vq_tiers_soft_cross_entropy), args, rounding=unit)


@given(heads())
@laws
def test_logsumexp_of_a_dense_head_and_its_gradients(case: Head) -> None:
    case = dense(case)
    args, grad = (case.h, case.codebook, case.bias), case.normal(*case.lead)
    as_the_reference(launch.linear_logsumexp, reference(op.linear_logsumexp), args, rounding=[rounding_of_losses(case)])
    log_z = op.linear_logsumexp(*args)
    backward = (grad, *args, log_z, [True, True, case.bias is not None])
    # log Z is given: what it was rounded by is in every probability.
    unit = rounding_of_gradients(case, grad, 1 + float(log_z.abs().max()))
    as_the_reference(
        launch.linear_logsumexp_backward, reference(linear.linear_logsumexp_backward), backward, rounding=unit
    )


@given(heads(), st.data())
@laws
def test_topk_is_that_of_the_logits(case: Head, data: st.DataObject) -> None:
    """Bit for bit those that the kernels of the logits give, of equals the smaller token first."""
    k = data.draw(st.integers(1, case.tokens))
    if k * min(k, case.codebook.shape[0]) >= case.tokens:
        with small_blocks(), pytest.raises(Unsupported, match="all logits"):
            launch.topk(*case.args, k)
        return
    with small_blocks():
        (values, tokens), logits = launch.topk(*case.args, k), tiers_launch.tiers(*case.args)
    assert values.dtype == case.h.dtype and tokens.dtype == torch.int64
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(-1, tokens), values)
    if case.h.dtype is torch.float32:  # in less, biases that differ make logits that do not
        assert torch.equal(tokens, ordered(logits)[..., :k])


def ordered(logits: Tensor) -> Tensor:
    """Tokens by falling logit, equals by rising number."""
    return logits.sort(dim=-1, descending=True, stable=True).indices


@given(heads(), st.data())
@laws
def test_topk_of_a_dense_head(case: Head, data: st.DataObject) -> None:
    case, k = dense(case), data.draw(st.integers(1, case.tokens))
    # Whole numbers, so that every order of additions gives the same logits, with many equals among them.
    h, weight = (t.double().mul(2).round().clamp(-2, 2).to(t.dtype) for t in (case.h, case.codebook))
    bias = None if case.bias is None else case.bias.round()
    with small_blocks():
        values, tokens = launch.linear_topk(h, weight, bias, k)
    logits = torch.nn.functional.linear(h.double(), weight.double(), None if bias is None else bias.double())
    assert torch.equal(tokens, ordered(logits)[..., :k])
    assert torch.equal(values, logits.gather(-1, tokens).to(h.dtype))


def test_keys_order_what_is_no_number_and_the_two_zeros() -> None:
    weight = torch.tensor([0.0, -0.0, torch.inf, 1.0, -torch.inf, torch.nan, -1.0]).unsqueeze(-1)
    with small_blocks():
        values, tokens = launch.linear_topk(torch.ones(1, 1), weight, None, 7)
    assert tokens.tolist() == [[5, 2, 3, 0, 1, 6, 4]]
    assert values[0, 0].isnan() and values[0, 1:].tolist() == [torch.inf, 1, 0, 0, -1, -torch.inf]


def plain() -> Head:
    g = torch.Generator().manual_seed(1)
    index = torch.randint(0, 30, (50,), generator=g)
    h, codebook = torch.randn(5, 20, generator=g), torch.randn(40, 20, generator=g)
    return Head(h, codebook, codec.pack_codes(index, 40), torch.randn(50, generator=g), g)


def differentiable() -> dict[str, tuple[Any, ...]]:
    case = plain()
    soft = torch.rand(5, 50, generator=case.generator).softmax(-1)
    rows = torch.randn(50, 20, generator=case.generator)
    return {
        "vq_tiers_log_softmax": case.args,
        "vq_tiers_softmax": case.args,
        "vq_tiers_cross_entropy": (*case.args, case.targets(3), torch.rand(50, generator=case.generator), 0.1, 3),
        "vq_tiers_soft_cross_entropy": (*case.args, soft, None, 0.1),
        "vq_tiers_topk": (*case.args, 3),
        "linear_logsumexp": (case.h, rows, case.bias),
        "linear_topk": (case.h, rows, case.bias, 4),
    }


@pytest.mark.parametrize("name", differentiable())
def test_autograd_by_gradient_operators_is_that_by_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = list(differentiable()[name])
    learnt = [a.requires_grad_() for a in args[:5] if isinstance(a, Tensor) and a.is_floating_point()]

    def found(chosen: list[Tensor]) -> list[Tensor]:
        out = getattr(torch.ops.rewriter, name)(*args)
        out = out[0] if isinstance(out, tuple) else out
        return list(torch.autograd.grad(out, chosen, torch.linspace(-1, 1, out.numel()).reshape(out.shape)))

    want = found(learnt)
    monkeypatch.setattr(shared, "on_gpu", lambda h: True)
    for got, formula in zip([*found(learnt), *found(learnt[1:2])], [*want, want[1]], strict=True):
        torch.testing.assert_close(got, formula)


def test_everything_has_a_device_implementation() -> None:
    for name in (*differentiable(), "linear_logsumexp_backward"):
        assert callable(REGISTRY[getattr(torch.ops.rewriter, name).default].implementation("cuda")), name


def test_opcheck_and_cost_of_the_gradient() -> None:
    h, weight, bias = differentiable()["linear_logsumexp"]
    args = (torch.ones(5), h, weight, bias, op.linear_logsumexp(h, weight, bias))
    torch.library.opcheck(linear.linear_logsumexp_backward, (*args, [True, False, True]))
    cost = REGISTRY[linear.linear_logsumexp_backward].cost
    none, every = (cost(*args, [wanted] * 3) for wanted in (False, True))
    assert none.bytes_written == 0 and every.bytes_written == 4 * (h.numel() + weight.numel() + 50)
    assert none.flops < every.flops
