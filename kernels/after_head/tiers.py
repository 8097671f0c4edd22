# SPDX-License-Identifier: Apache-2.0
"""The operators after a tiers head: softmax and its logarithm, cross entropy against tokens or probabilities, topk.

Their gradients are in ``kernels/vq_logits/loss_gradients.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.after_head import reference
from rewriter.kernels.after_head.reference import soft_weights
from rewriter.kernels.after_head.shared import Pair, check_probabilities, check_smoothing, fake_topk
from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.gradients import given
from rewriter.kernels.vq_logits.loss_gradients import of_log_softmax, of_loss, through_logits
from rewriter.kernels.vq_logits.reference import loss_dtype
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
    return of_log_softmax(ctx, grad, ctx.saved_tensors)


def _softmax_backward(ctx: Any, grad: Tensor) -> Grads:
    *head, p = ctx.saved_tensors
    return of_log_softmax(ctx, grad * p, head)


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
    *head, target, weight = ctx.saved_tensors
    found = of_loss(ctx, grad, head, target, weight, ctx.label_smoothing, ctx.ignore_index)
    return (*found, None, None, None, None)


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
    return (*of_log_softmax(ctx, -t, head), grad_target, None, None)


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
    # k numbers per position: sums of few, on every device by this formula.
    h, codebook, code_of, token_bias, token = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    wide = grad.to(loss_dtype(h))
    per_code = torch.zeros((*h.shape[:-1], codebook.shape[0]), dtype=wide.dtype, device=h.device)
    per_code = per_code.scatter_add(-1, unpack_codes(code_of)[token], -wide)
    per_token = None
    if wanted[2]:
        per_token = torch.zeros(code_of.shape[0], dtype=wide.dtype, device=h.device)
        per_token = per_token.index_add(0, token.reshape(-1), -wide.reshape(-1))
    found = through_logits((h, codebook, code_of, token_bias), None, per_code, per_token, wanted)
    grad_h, grad_codebook, grad_bias = given(wanted, found, token_bias)
    return grad_h, grad_codebook, None, grad_bias, None


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
    implementations={"cuda": "rewriter.kernels.after_head.launch:log_softmax"},
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
    implementations={"cuda": "rewriter.kernels.after_head.launch:softmax"},
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
    implementations={"cuda": "rewriter.kernels.after_head.launch:cross_entropy"},
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
    implementations={"cuda": "rewriter.kernels.after_head.launch:soft_cross_entropy"},
)

TOPK = KernelSpec(
    name="vq_tiers_topk",
    schema=f"({_HEAD}, int k) -> (Tensor, Tensor)",
    reference=_topk,
    fake=_topk_fake,
    setup_context=_topk_save,
    backward=_topk_backward,
    vmap=vmap_rule("vq_tiers_topk", (0,)),
    cost=_topk_cost,
    autocast=("h",),
    implementations={
        "cpu": "rewriter.kernels.vq_logits.native:vq_tiers_topk",
        "cuda": "rewriter.kernels.after_head.launch:topk",
    },
)

vq_tiers_log_softmax = LOG_SOFTMAX.register()
vq_tiers_softmax = SOFTMAX.register()
vq_tiers_cross_entropy = CROSS_ENTROPY.register()
vq_tiers_soft_cross_entropy = SOFT_CROSS_ENTROPY.register()
vq_tiers_topk = TOPK.register()
