# SPDX-License-Identifier: Apache-2.0
"""The operators for heads with a row per token, dense or decoded from codes: ``linear_logsumexp`` and ``linear_topk``.

Forward and backward walk the vocabulary in chunks, so that no tensor of positions times vocabulary exists.

    ∂ log Z / ∂ logit_i = exp(logit_i − log Z)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.after_head import reference
from rewriter.kernels.after_head.shared import Pair, check_linear, fake_topk
from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits import shared
from rewriter.kernels.vq_logits.gradients import Wanted, fake, given, operator
from rewriter.kernels.vq_logits.reference import loss_dtype
from rewriter.kernels.vq_logits.shared import Grads, check_k, positions, tensor_bytes, vmap_rule


def _logsumexp(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(h, weight, bias)
    return reference.linear_logsumexp(h, weight, bias)


def _logsumexp_fake(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(h, weight, bias)
    return h.new_empty(h.shape[:-1], dtype=loss_dtype(h))


def _save_with_output(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _logsumexp_gradients(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, log_z: Tensor, wanted: Wanted
) -> Grads:
    """Gradients of h, weight and bias; the last in at least float32."""
    flat = h.reshape(-1, h.shape[-1])
    grad_h, rows, offsets = None, [], []
    for start in range(0, weight.shape[0], reference.CHUNK):
        logits = reference.row_logits(h, weight, bias, start)
        share = (logits - log_z.unsqueeze(-1)).exp() * grad.unsqueeze(-1)
        narrow = share.to(h.dtype)
        if wanted[0]:
            part = narrow @ weight[start : start + reference.CHUNK].to(h.dtype)
            grad_h = part if grad_h is None else grad_h + part
        per_row = narrow.reshape(-1, narrow.shape[-1])
        if wanted[1]:
            rows.append(per_row.t() @ flat)
        if wanted[2]:
            offsets.append(share.reshape(per_row.shape).sum(0))
    return grad_h, torch.cat(rows).to(weight.dtype) if rows else None, torch.cat(offsets) if offsets else None


def _logsumexp_backward(ctx: Any, grad: Tensor) -> Grads:
    h, weight, bias, log_z = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradient = linear_logsumexp_backward if shared.on_gpu(h) else _logsumexp_gradients
    return tuple(given(wanted, gradient(grad, h, weight, bias, log_z, wanted), bias))


def _topk(h: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Pair:
    check_linear(h, weight, bias)
    check_k(k, weight.shape[0])
    return reference.linear_topk(h, weight, bias, k)


def _topk_fake(h: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Pair:
    check_linear(h, weight, bias)
    check_k(k, weight.shape[0])
    return fake_topk(h, k)


def _topk_save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    h, weight, bias, _ = inputs
    ctx.save_for_backward(h, weight, bias, output[1])


def _topk_backward(ctx: Any, grad: Tensor, _: Any) -> Grads:
    h, weight, bias, token = ctx.saved_tensors
    grad_h = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_h = (grad.unsqueeze(-1) * weight[token].to(h.dtype)).sum(-2)
    if ctx.needs_input_grad[1]:
        outer = (grad.unsqueeze(-1) * h.unsqueeze(-2)).reshape(-1, h.shape[-1])
        grad_weight = torch.zeros_like(weight).index_add(0, token.reshape(-1), outer.to(weight.dtype))
    if ctx.needs_input_grad[2]:
        grad_bias = torch.zeros_like(bias).index_add(0, token.reshape(-1), grad.reshape(-1).to(bias.dtype))
    return grad_h, grad_weight, grad_bias, None


def _logsumexp_cost(h: Tensor, weight: Tensor, bias: Tensor | None) -> Cost:
    # Per logit: product, bias, subtract the maximum, exponential, add up.
    flops = positions(h) * (2 * weight.numel() + (3 if bias is None else 4) * weight.shape[0])
    return Cost(flops, tensor_bytes(h, weight, bias), positions(h) * loss_dtype(h).itemsize)


def _topk_cost(h: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Cost:
    flops = positions(h) * (2 * weight.numel() + (0 if bias is None else 1) * weight.shape[0])
    return Cost(flops, tensor_bytes(h, weight, bias), positions(h) * k * (h.element_size() + 8))


def _logsumexp_backward_cost(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, log_z: Tensor, wanted: Wanted
) -> Cost:
    # Per logit: the product once more, minus log Z, exponential, times the gradient; a product for each gradient.
    flops = positions(h) * (2 * (1 + sum(wanted[:2])) * weight.numel() + (3 + wanted[2]) * weight.shape[0])
    written = tensor_bytes(h) * wanted[0] + tensor_bytes(weight) * wanted[1] + 4 * weight.shape[0] * wanted[2]
    return Cost(flops, tensor_bytes(grad, h, weight, bias, log_z), written)


LOGSUMEXP = KernelSpec(
    name="linear_logsumexp",
    schema="(Tensor h, Tensor weight, Tensor? bias) -> Tensor",
    reference=_logsumexp,
    fake=_logsumexp_fake,
    setup_context=_save_with_output,
    backward=_logsumexp_backward,
    vmap=vmap_rule("linear_logsumexp", (0,)),
    cost=_logsumexp_cost,
    autocast=("h",),
    implementations={"cuda": "rewriter.kernels.after_head.launch:linear_logsumexp"},
)

LOGSUMEXP_BACKWARD = KernelSpec(
    name="linear_logsumexp_backward",
    schema="(Tensor grad, Tensor h, Tensor weight, Tensor? bias, Tensor log_z, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    reference=operator(_logsumexp_gradients, (1, 2, None)),
    fake=fake((1, 2, None), tokens=(2, 0)),
    cost=_logsumexp_backward_cost,
    implementations={"cuda": "rewriter.kernels.vq_logits.loss_launch:linear_logsumexp_backward"},
)

TOPK = KernelSpec(
    name="linear_topk",
    schema="(Tensor h, Tensor weight, Tensor? bias, int k) -> (Tensor, Tensor)",
    reference=_topk,
    fake=_topk_fake,
    setup_context=_topk_save,
    backward=_topk_backward,
    vmap=vmap_rule("linear_topk", (0,)),
    cost=_topk_cost,
    autocast=("h",),
    implementations={"cuda": "rewriter.kernels.after_head.launch:linear_topk"},
)

linear_logsumexp_backward = LOGSUMEXP_BACKWARD.register()
linear_logsumexp = LOGSUMEXP.register()
linear_topk = TOPK.register()
