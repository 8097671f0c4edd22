# SPDX-License-Identifier: Apache-2.0
"""The operators after a tiers head: softmax and its logarithm, cross entropy against tokens or probabilities, topk.

With P_j = exp(l_j + B_j − log Z), the weight t_i a loss puts on token i, and T_j = Σ_{M(i)=j} t_i:

    ∂loss/∂l_j = P_j Σ_i t_i − T_j        ∂loss/∂b_i = P_{M(i)} exp(b_i − B_{M(i)}) Σ_k t_k − t_i

log_softmax is the loss with t = −gradient; softmax that with t_i = −p_i · gradient_i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.after_head import reference
from rewriter.kernels.after_head.reference import code_logits, code_sums, log_within, soft_weights
from rewriter.kernels.after_head.shared import Pair, check_probabilities, check_smoothing, fake_topk, topk_vmap
from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.reference import code_log_mass, loss_dtype
from rewriter.kernels.vq_logits.shared import (
    Grads,
    check_k,
    check_target,
    check_tiers,
    positions,
    save_inputs,
    tensor_bytes,
    vmap_rule,
)

# -- gradients common to all -------------------------------------------------------------------------------------


def _through(
    ctx: Any,
    head: tuple[Tensor, Tensor, Tensor, Tensor | None],
    total: Tensor | None,
    per_code: Tensor,
    per_token: Tensor | None,
) -> Grads:
    """Gradients of h, codebook, code_of (none) and token_bias.

    Args:
        head: h ``[..., d]`` and what the head is made of.
        total: Σ_i t_i, ``[...]``, times the gradient of the result; None where no log Z is in it.
        per_code: T, ``[..., K]``, times the gradient.
        per_token: Σ over positions of t, ``[V]``, times the gradient; None where the bias needs none.
    """
    h, codebook, code_of, token_bias = head
    grad_logits, grad_bias = -per_code, None if per_token is None else -per_token
    if total is not None:
        code = unpack_codes(code_of)
        mass = code_log_mass(code_of, token_bias, codebook.shape[0], per_code.dtype)
        posterior = torch.softmax(code_logits(h, codebook) + mass, dim=-1) * total.unsqueeze(-1)
        grad_logits = grad_logits + posterior
        if grad_bias is not None:
            by_code = posterior.reshape(-1, posterior.shape[-1]).sum(0)
            grad_bias = grad_bias + by_code.index_select(0, code) * log_within(code, token_bias, mass).exp()
    narrow = grad_logits.to(h.dtype)
    grad_codebook = None
    if ctx.needs_input_grad[1]:
        grad_codebook = (narrow.reshape(-1, narrow.shape[-1]).t() @ h.reshape(-1, h.shape[-1])).to(codebook.dtype)
    return (
        narrow @ codebook.to(h.dtype) if ctx.needs_input_grad[0] else None,
        grad_codebook,
        None,
        None if grad_bias is None or token_bias is None else grad_bias.to(token_bias.dtype),
    )


def _summed(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]).sum(0)


# -- softmax -----------------------------------------------------------------------------------------------------


def _log_softmax(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    return reference.tiers_log_softmax(h, codebook, code_of, token_bias)


def _softmax(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    return reference.tiers_softmax(h, codebook, code_of, token_bias)


def _softmax_fake(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    check_tiers(h, codebook, code_of, token_bias)
    return h.new_empty((*h.shape[:-1], code_of.shape[0]), dtype=loss_dtype(h))


def _log_softmax_backward(ctx: Any, grad: Tensor) -> Grads:
    return _from_weights(ctx, ctx.saved_tensors, -grad)


def _softmax_backward(ctx: Any, grad: Tensor) -> Grads:
    *head, p = ctx.saved_tensors
    return _from_weights(ctx, head, -grad * p)


def _from_weights(ctx: Any, head: Any, t: Tensor) -> Grads:
    _, codebook, code_of, _ = head
    per_code = code_sums(t, unpack_codes(code_of), codebook.shape[0])
    return _through(ctx, head, t.sum(-1), per_code, _summed(t) if ctx.needs_input_grad[3] else None)


def _save_with_output(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _softmax_cost(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Cost:
    # Per code as for log Z; per token one step of its code's mass, once, and one operation per position.
    tokens, n = code_of.shape[0], positions(h)
    flops = n * (2 * codebook.numel() + 5 * codebook.shape[0] + tokens) + 3 * tokens
    return Cost(flops, tensor_bytes(h, codebook, code_of, token_bias), n * tokens * loss_dtype(h).itemsize)


# -- cross entropy -----------------------------------------------------------------------------------------------


def _cross_entropy(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    _check_loss(h, codebook, code_of, token_bias, weight, label_smoothing)
    check_target(h, target)
    return reference.tiers_cross_entropy(
        h, codebook, code_of, token_bias, target, weight, label_smoothing, ignore_index
    )


def _cross_entropy_fake(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    _check_loss(h, codebook, code_of, token_bias, weight, label_smoothing)
    check_target(h, target)
    return h.new_empty(h.shape[:-1], dtype=loss_dtype(h))


def _check_loss(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
) -> None:
    check_tiers(h, codebook, code_of, token_bias)
    torch._check(
        weight is None or weight.shape == code_of.shape[:1],
        lambda: f"weight must be [{code_of.shape[0]}], one per token, not {tuple(weight.shape)}",  # type: ignore[union-attr]
    )
    check_smoothing(label_smoothing)


def _cross_entropy_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.label_smoothing, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _cross_entropy_backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, code_of, token_bias, target, weight = ctx.saved_tensors
    smoothing, tokens, wide = ctx.label_smoothing, code_of.shape[0], loss_dtype(h)
    code = unpack_codes(code_of)
    counted = target != ctx.ignore_index
    token = torch.where(counted, target, 0)
    kept = torch.where(counted, grad, 0.0)
    # t_i = (1 − ε) w_y [i = y] + ε/V w_i, times the gradient
    own = (1 - smoothing) * (kept if weight is None else kept * weight.to(wide)[token])
    share = torch.ones(tokens, dtype=wide, device=h.device) if weight is None else weight.to(wide)
    share = share * (smoothing / tokens)
    per_code = kept.unsqueeze(-1) * code_sums(share, code, codebook.shape[0])
    per_code = per_code.scatter_add(-1, code[token].unsqueeze(-1), own.unsqueeze(-1))
    per_token = None
    if ctx.needs_input_grad[3]:
        per_token = (kept.sum() * share).index_add(0, token.reshape(-1), own.reshape(-1))
    total = own + kept * share.sum()
    head = (h, codebook, code_of, token_bias)
    return (*_through(ctx, head, total, per_code, per_token), None, None, None, None)


def _soft_cross_entropy(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    _check_loss(h, codebook, code_of, token_bias, weight, label_smoothing)
    check_probabilities(h, target, code_of.shape[0])
    return reference.tiers_soft_cross_entropy(h, codebook, code_of, token_bias, target, weight, label_smoothing)


def _soft_cross_entropy_fake(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    _check_loss(h, codebook, code_of, token_bias, weight, label_smoothing)
    check_probabilities(h, target, code_of.shape[0])
    return h.new_empty(h.shape[:-1], dtype=loss_dtype(h))


def _soft_cross_entropy_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.label_smoothing = inputs
    ctx.save_for_backward(*tensors)


def _soft_cross_entropy_backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, code_of, token_bias, target, weight = ctx.saved_tensors
    head, wide = (h, codebook, code_of, token_bias), loss_dtype(h)
    t = soft_weights(target.to(wide), weight, ctx.label_smoothing) * grad.unsqueeze(-1)
    grad_target = None
    if ctx.needs_input_grad[4]:
        surprise = -reference.tiers_log_softmax(h, codebook, code_of, token_bias) * grad.unsqueeze(-1)
        surprise = surprise * (1 - ctx.label_smoothing)
        grad_target = (surprise if weight is None else surprise * weight.to(wide)).to(target.dtype)
    return (*_from_weights(ctx, head, t), grad_target, None, None)


def _loss_cost(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int = 0,
) -> Cost:
    # Per code logit: add the mass, subtract the maximum, exponential, add up, and with smoothing times its share. Per
    # token: one step of its code's mass. Per target: two operations (of probabilities there is one for each token).
    per_code = 6 if label_smoothing or target.is_floating_point() else 4
    flops = positions(h) * (2 * codebook.numel() + per_code * codebook.shape[0]) + 3 * code_of.shape[0]
    read = tensor_bytes(h, codebook, code_of, token_bias, target, weight)
    return Cost(flops + 2 * target.numel(), read, positions(h) * loss_dtype(h).itemsize)


# -- topk --------------------------------------------------------------------------------------------------------


def _topk(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, k: int) -> Pair:
    check_tiers(h, codebook, code_of, token_bias)
    check_k(k, code_of.shape[0])
    return reference.tiers_topk(h, codebook, code_of, token_bias, k)


def _topk_fake(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, k: int) -> Pair:
    check_tiers(h, codebook, code_of, token_bias)
    check_k(k, code_of.shape[0])
    return fake_topk(h, k)


def _topk_save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    *head, _ = inputs
    ctx.save_for_backward(*head, output[1])


def _topk_backward(ctx: Any, grad: Tensor, _: Any) -> Grads:
    h, codebook, code_of, token_bias, token = ctx.saved_tensors
    wide = grad.to(loss_dtype(h))
    per_code = torch.zeros((*h.shape[:-1], codebook.shape[0]), dtype=wide.dtype, device=h.device)
    per_code = per_code.scatter_add(-1, unpack_codes(code_of)[token], -wide)
    per_token = None
    if ctx.needs_input_grad[3]:
        per_token = torch.zeros(code_of.shape[0], dtype=wide.dtype, device=h.device)
        per_token = per_token.index_add(0, token.reshape(-1), -wide.reshape(-1))
    return (*_through(ctx, (h, codebook, code_of, token_bias), None, per_code, per_token), None)


def _topk_cost(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, k: int) -> Cost:
    codes, tokens = codebook.shape[0], code_of.shape[0]
    candidates = min(k * min(k, codes), tokens)
    flops = positions(h) * (2 * codebook.numel() + codes + candidates)
    return Cost(flops, tensor_bytes(h, codebook, code_of, token_bias), positions(h) * k * (h.element_size() + 8))


# -- the operators -----------------------------------------------------------------------------------------------

_HEAD = "Tensor h, Tensor codebook, Tensor code_of, Tensor? token_bias"

LOG_SOFTMAX = KernelSpec(
    name="vq_tiers_log_softmax",
    schema=f"({_HEAD}) -> Tensor",
    reference=_log_softmax,
    fake=_softmax_fake,
    setup_context=save_inputs,
    backward=_log_softmax_backward,
    vmap=vmap_rule("vq_tiers_log_softmax", (0,)),
    cost=_softmax_cost,
    autocast=("h",),
)

SOFTMAX = KernelSpec(
    name="vq_tiers_softmax",
    schema=f"({_HEAD}) -> Tensor",
    reference=_softmax,
    fake=_softmax_fake,
    setup_context=_save_with_output,
    backward=_softmax_backward,
    vmap=vmap_rule("vq_tiers_softmax", (0,)),
    cost=_softmax_cost,
    autocast=("h",),
)

CROSS_ENTROPY = KernelSpec(
    name="vq_tiers_cross_entropy",
    schema=f"({_HEAD}, Tensor target, Tensor? weight, float label_smoothing, int ignore_index) -> Tensor",
    reference=_cross_entropy,
    fake=_cross_entropy_fake,
    setup_context=_cross_entropy_save,
    backward=_cross_entropy_backward,
    vmap=vmap_rule("vq_tiers_cross_entropy", (0, 4)),
    cost=_loss_cost,
    autocast=("h",),
)

SOFT_CROSS_ENTROPY = KernelSpec(
    name="vq_tiers_soft_cross_entropy",
    schema=f"({_HEAD}, Tensor target, Tensor? weight, float label_smoothing) -> Tensor",
    reference=_soft_cross_entropy,
    fake=_soft_cross_entropy_fake,
    setup_context=_soft_cross_entropy_save,
    backward=_soft_cross_entropy_backward,
    vmap=vmap_rule("vq_tiers_soft_cross_entropy", (0, 4)),
    cost=_loss_cost,
    autocast=("h",),
)

TOPK = KernelSpec(
    name="vq_tiers_topk",
    schema=f"({_HEAD}, int k) -> (Tensor, Tensor)",
    reference=_topk,
    fake=_topk_fake,
    setup_context=_topk_save,
    backward=_topk_backward,
    vmap=topk_vmap("vq_tiers_topk"),
    cost=_topk_cost,
    autocast=("h",),
    implementations={"cpu": "rewriter.kernels.vq_logits.native:vq_tiers_topk"},
)

vq_tiers_log_softmax = LOG_SOFTMAX.register()
vq_tiers_softmax = SOFTMAX.register()
vq_tiers_cross_entropy = CROSS_ENTROPY.register()
vq_tiers_soft_cross_entropy = SOFT_CROSS_ENTROPY.register()
vq_tiers_topk = TOPK.register()
