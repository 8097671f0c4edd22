# SPDX-License-Identifier: Apache-2.0
"""The operators of codebook heads; importing this file registers all of them with torch.

Here: tiers, their loss without V columns, and product codes. The others have files of their own, imported below.

Gradients go to h, the codebook and the biases; codes have none. Each backward is written with the saved inputs and
differentiable aten, so second derivatives are right too. With p_j = exp(l_j + B_j − log Z):

    ∂NLL/∂l_j = p_j − 1[j = M(y)],    ∂NLL/∂b_i = p_{M(i)} · exp(b_i − B_{M(i)}) − 1[i = y].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits.codec import decode_product, flat_codes, unpack_codes
from rewriter.kernels.vq_logits.exact import vq_logits_product_exact as vq_logits_product_exact
from rewriter.kernels.vq_logits.reference import (
    IGNORE_INDEX,
    code_log_mass,
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


def _through_codes(ctx: Any, h: Tensor, codebook: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradient at the code logits l = h Cᵀ, ``[..., K]`` in at least float32 -> gradients of h and C."""
    narrow = grad.to(h.dtype)
    grad_h = narrow @ codebook.to(h.dtype) if ctx.needs_input_grad[0] else None
    grad_codebook = None
    if ctx.needs_input_grad[1]:
        grad_codebook = (narrow.reshape(-1, grad.shape[-1]).t() @ h.reshape(-1, h.shape[-1])).to(codebook.dtype)
    return grad_h, grad_codebook


def _tiers_backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, code_of, token_bias = ctx.saved_tensors
    per_token = grad.reshape(-1, grad.shape[-1]).to(loss_dtype(h))
    # Σ over the tokens of a code; along rows, because adding columns is slow.
    per_code = per_token.new_zeros((codebook.shape[0], per_token.shape[0]))
    per_code = per_code.index_add(0, unpack_codes(code_of), per_token.t())
    grad_h, grad_codebook = _through_codes(ctx, h, codebook, per_code.t().reshape(*h.shape[:-1], -1))
    grad_bias = per_token.sum(0).to(token_bias.dtype) if ctx.needs_input_grad[3] else None
    return grad_h, grad_codebook, None, grad_bias


def _partition(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Code posteriors p_j ``[..., K]`` and the code masses B_j ``[K]``."""
    wide = loss_dtype(h)
    mass = code_log_mass(code_of, token_bias, codebook.shape[0], wide)
    code_logits = torch.nn.functional.linear(h, codebook.to(h.dtype)).to(wide)
    return torch.softmax(code_logits + mass, dim=-1), mass


def _bias_through_mass(posterior: Tensor, mass: Tensor, code_of: Tensor, token_bias: Tensor) -> Tensor:
    """Σ over positions of p_{M(i)} · exp(b_i − B_{M(i)}), ``[V]``; posterior ``[..., K]`` comes times the gradient."""
    index = unpack_codes(code_of)
    total = posterior.reshape(-1, posterior.shape[-1]).sum(0)
    return total.index_select(0, index) * (token_bias.to(mass.dtype) - mass.index_select(0, index)).exp()


def _logsumexp_backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, code_of, token_bias = ctx.saved_tensors
    posterior, mass = _partition(h, codebook, code_of, token_bias)
    weighted = posterior * grad.unsqueeze(-1)
    grad_h, grad_codebook = _through_codes(ctx, h, codebook, weighted)
    grad_bias = None
    if ctx.needs_input_grad[3]:
        grad_bias = _bias_through_mass(weighted, mass, code_of, token_bias).to(token_bias.dtype)
    return grad_h, grad_codebook, None, grad_bias


def _nll_backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, code_of, token_bias, target = ctx.saved_tensors
    posterior, mass = _partition(h, codebook, code_of, token_bias)
    counted = target != IGNORE_INDEX
    token = torch.where(counted, target, 0)
    kept = torch.where(counted, grad, 0.0)
    weighted = posterior * kept.unsqueeze(-1)
    code = unpack_codes(code_of)[token].unsqueeze(-1)
    grad_h, grad_codebook = _through_codes(ctx, h, codebook, weighted.scatter_add(-1, code, -kept.unsqueeze(-1)))
    grad_bias = None
    if ctx.needs_input_grad[3]:
        grad_bias = _bias_through_mass(weighted, mass, code_of, token_bias)
        grad_bias = grad_bias.index_add(0, token.reshape(-1), -kept.reshape(-1)).to(token_bias.dtype)
    return grad_h, grad_codebook, None, grad_bias, None


def _product_backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, codes, bias = ctx.saved_tensors
    groups, per_group, dims = codebook.shape
    width = h.shape[-1]
    flat = grad.reshape(-1, grad.shape[-1])
    grad_h = grad @ decode_product(codebook.to(h.dtype), codes, width) if ctx.needs_input_grad[0] else None
    grad_codebook = None
    if ctx.needs_input_grad[1]:
        dense = (flat.t() @ h.reshape(-1, width)).to(loss_dtype(h))
        dense = torch.nn.functional.pad(dense, (0, groups * dims - width)).reshape(-1, dims)
        total = dense.new_zeros((groups * per_group, dims))
        total = total.index_add(0, flat_codes(codes, per_group).reshape(-1), dense)
        grad_codebook = total.reshape(codebook.shape).to(codebook.dtype)
    grad_bias = flat.to(loss_dtype(h)).sum(0).to(bias.dtype) if ctx.needs_input_grad[3] else None
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
    implementations={"cpu": "rewriter.kernels.vq_logits.native:vq_logits_tiers"},
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
    implementations={"cpu": "rewriter.kernels.vq_logits.native:vq_tiers_logsumexp"},
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
    implementations={"cpu": "rewriter.kernels.vq_logits.native:vq_tiers_nll"},
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
    implementations={"cpu": "rewriter.kernels.vq_logits.native:vq_logits_product"},
)

vq_logits_tiers = TIERS.register()
vq_tiers_logsumexp = LOGSUMEXP.register()
vq_tiers_nll = NLL.register()
vq_logits_product = PRODUCT.register()
