# SPDX-License-Identifier: Apache-2.0
"""The operators of codebook heads; importing this file registers all of them with torch.

Here: tiers, their loss without V columns, and product codes. The others have files of their own, imported below.

Gradients go to h, the codebook and the biases; codes have none. On the CPU each backward is written with the saved
inputs and differentiable aten, so second derivatives are right too; on a GPU it is an operator with kernels, which has
none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits import gradients, loss_gradients, shared
from rewriter.kernels.vq_logits.exact import vq_logits_product_exact as vq_logits_product_exact
from rewriter.kernels.vq_logits.reference import (
    IGNORE_INDEX,
    loss_dtype,
    product_logits,
    tiers_logits,
    tiers_logsumexp,
    tiers_nll,
)
from rewriter.kernels.vq_logits.residual import vq_logits_residual as vq_logits_residual
from rewriter.kernels.vq_logits.shared import (
    Grads,
    check_product,
    check_target,
    check_tiers,
    positions,
    save_inputs,
    tensor_bytes,
    vmap_rule,
)

# -- references with their checks, and fakes ---------------------------------------------------------------------


def _tiers(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    return tiers_logits(h, codebook, code_of, token_bias)


def _tiers_fake(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    return h.new_empty((*h.shape[:-1], code_of.shape[0]))


def _nll(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, target: Tensor) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    check_target(h, target)
    return tiers_nll(h, codebook, code_of, token_bias, target)


def _nll_fake(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, target: Tensor) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    check_target(h, target)
    return h.new_empty(h.shape[:-1], dtype=loss_dtype(h))


def _logsumexp(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    return tiers_logsumexp(h, codebook, code_of, token_bias)


def _logsumexp_fake(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    return h.new_empty(h.shape[:-1], dtype=loss_dtype(h))


def _product(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    check_product(h, codebook, codes, bias)
    return product_logits(h, codebook, codes, bias)


def _product_fake(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    check_product(h, codebook, codes, bias)
    return h.new_empty((*h.shape[:-1], codes.shape[0]))


# -- gradients ---------------------------------------------------------------------------------------------------


def _wanted(ctx: Any) -> list[bool]:
    """Which gradients of h, codebook and bias are needed."""
    return [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]


def _tiers_backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, code_of, token_bias = ctx.saved_tensors
    wanted = _wanted(ctx)
    gradient = gradients.vq_logits_tiers_backward if shared.on_gpu(h) else gradients.tiers
    found = gradient(grad, h, codebook, code_of, wanted)
    grad_h, grad_codebook, grad_bias = gradients.given(wanted, found, token_bias)
    return grad_h, grad_codebook, None, grad_bias


def _logsumexp_backward(ctx: Any, grad: Tensor) -> Grads:
    return loss_gradients.of_loss(ctx, grad, ctx.saved_tensors, None, None, 0.0, IGNORE_INDEX)


def _nll_backward(ctx: Any, grad: Tensor) -> Grads:
    *head, target = ctx.saved_tensors
    return (*loss_gradients.of_loss(ctx, grad, head, target, None, 0.0, IGNORE_INDEX), None)


def _product_backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, codes, bias = ctx.saved_tensors
    wanted = _wanted(ctx)
    gradient = gradients.vq_logits_product_backward if shared.on_gpu(h) else gradients.product
    found = gradient(grad, h, codebook, codes, wanted)
    grad_h, grad_codebook, grad_bias = gradients.given(wanted, found, bias)
    return grad_h, grad_codebook, None, grad_bias


# -- work of one call --------------------------------------------------------------------------------------------


def _tiers_cost(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Cost:
    logits = positions(h) * code_of.shape[0]
    flops = 2 * positions(h) * codebook.numel() + (0 if token_bias is None else logits)
    return Cost(flops, tensor_bytes(h, codebook, code_of, token_bias), logits * h.element_size())


def _logsumexp_cost(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Cost:
    # Per code logit: add the mass, subtract the maximum, exponential, add up. Per token: one step of its code's mass.
    flops = positions(h) * (2 * codebook.numel() + 4 * codebook.shape[0]) + 3 * code_of.shape[0]
    return Cost(flops, tensor_bytes(h, codebook, code_of, token_bias), positions(h) * loss_dtype(h).itemsize)


def _nll_cost(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, target: Tensor) -> Cost:
    return _logsumexp_cost(h, codebook, code_of, token_bias) + Cost(2 * positions(h), tensor_bytes(target), 0)


def _product_cost(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Cost:
    logits = positions(h) * codes.shape[0]
    flops = 2 * logits * h.shape[-1] + (0 if bias is None else logits)
    return Cost(flops, tensor_bytes(h, codebook, codes, bias), logits * h.element_size())


# -- the operators -----------------------------------------------------------------------------------------------

TIERS = KernelSpec(
    name="vq_logits_tiers",
    schema="(Tensor h, Tensor codebook, Tensor code_of, Tensor? token_bias) -> Tensor",
    reference=_tiers,
    fake=_tiers_fake,
    setup_context=save_inputs,
    backward=_tiers_backward,
    vmap=vmap_rule("vq_logits_tiers", (0,)),
    cost=_tiers_cost,
    autocast=("h",),
    implementations={
        "cpu": "rewriter.kernels.vq_logits.native:vq_logits_tiers",
        "cuda": "rewriter.kernels.vq_logits.tiers_launch:tiers",
    },
)

LOGSUMEXP = KernelSpec(
    name="vq_tiers_logsumexp",
    schema="(Tensor h, Tensor codebook, Tensor code_of, Tensor? token_bias) -> Tensor",
    reference=_logsumexp,
    fake=_logsumexp_fake,
    setup_context=save_inputs,
    backward=_logsumexp_backward,
    vmap=vmap_rule("vq_tiers_logsumexp", (0,)),
    cost=_logsumexp_cost,
    autocast=("h",),
    implementations={
        "cpu": "rewriter.kernels.vq_logits.native:vq_tiers_logsumexp",
        "cuda": "rewriter.kernels.vq_logits.loss_launch:logsumexp",
    },
)

NLL = KernelSpec(
    name="vq_tiers_nll",
    schema="(Tensor h, Tensor codebook, Tensor code_of, Tensor? token_bias, Tensor target) -> Tensor",
    reference=_nll,
    fake=_nll_fake,
    setup_context=save_inputs,
    backward=_nll_backward,
    vmap=vmap_rule("vq_tiers_nll", (0, 4)),
    cost=_nll_cost,
    autocast=("h",),
    implementations={
        "cpu": "rewriter.kernels.vq_logits.native:vq_tiers_nll",
        "cuda": "rewriter.kernels.vq_logits.loss_launch:nll",
    },
)

PRODUCT = KernelSpec(
    name="vq_logits_product",
    schema="(Tensor h, Tensor codebook, Tensor codes, Tensor? bias) -> Tensor",
    reference=_product,
    fake=_product_fake,
    setup_context=save_inputs,
    backward=_product_backward,
    vmap=vmap_rule("vq_logits_product", (0,)),
    cost=_product_cost,
    autocast=("h",),
    implementations={
        "cpu": "rewriter.kernels.vq_logits.native:vq_logits_product",
        "cuda": "rewriter.kernels.vq_logits.product_launch:product",
    },
)

vq_logits_tiers = TIERS.register()
vq_tiers_logsumexp = LOGSUMEXP.register()
vq_tiers_nll = NLL.register()
vq_logits_product = PRODUCT.register()
