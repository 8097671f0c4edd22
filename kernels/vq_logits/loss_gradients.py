# SPDX-License-Identifier: Apache-2.0
"""Gradients of log Z, cross entropy and softmax of a tiers head: formulas in aten, and their operators for a GPU.

With P_j = exp(l_j + B_j − log Z), the weight t_i a loss puts on token i, and T_j = Σ_{M(i)=j} t_i:

    ∂loss/∂l_j = P_j Σ_i t_i − T_j        ∂loss/∂b_i = P_{M(i)} exp(b_i − B_{M(i)}) Σ_k t_k − t_i

For log Z the sums of t are 1 and T is 0. log_softmax is the loss with t = −gradient; softmax that with t_i = −p_i ·
gradient_i. See ``gradients.py`` for what is a formula, what an operator, and for ``wanted``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits import shared
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.gradients import Wanted, fake, given, operator
from rewriter.kernels.vq_logits.reference import code_log_mass, code_logits, code_sums, log_within, loss_dtype
from rewriter.kernels.vq_logits.shared import Grads, positions, tensor_bytes

Head = Sequence[Any]  # h ``[..., d]``, codebook, code_of, token_bias or None


def of_loss(
    ctx: Any,
    grad: Tensor,
    head: Head,
    target: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Grads:
    """Gradients of the head's four arguments, for autograd: of cross entropy, or of log Z without target."""
    wanted = _wanted(ctx)
    gradient: Callable[..., Grads] = vq_tiers_loss_backward if shared.on_gpu(head[0]) else loss
    return _given(wanted, gradient(grad, *head, target, weight, label_smoothing, ignore_index, wanted), head)


def of_log_softmax(ctx: Any, grad: Tensor, head: Head) -> Grads:
    """Gradients of the head's four arguments, for autograd; grad ``[..., V]`` is that at log p."""
    wanted = _wanted(ctx)
    gradient: Callable[..., Grads] = vq_tiers_log_softmax_backward if shared.on_gpu(head[0]) else log_softmax
    return _given(wanted, gradient(grad, *head, wanted), head)


def through_logits(
    head: Head, total: Tensor | None, per_code: Tensor | None, per_token: Tensor | None, wanted: Wanted
) -> Grads:
    """Gradients of h, codebook and token_bias; the last in at least float32.

    Args:
        head: h and what the head is made of.
        total: Σ_i t_i, ``[...]``, times the gradient of the result; None where no log Z is in it.
        per_code: T, ``[..., K]``, times the gradient; None for 0.
        per_token: Σ over positions of t, ``[V]``, times the gradient; None for 0.
    """
    h, codebook, code_of, token_bias = head
    grad_logits = None if per_code is None else -per_code
    grad_bias = None if per_token is None else -per_token
    if total is not None:
        mass = code_log_mass(code_of, token_bias, codebook.shape[0], loss_dtype(h))
        posterior = torch.softmax(code_logits(h, codebook) + mass, dim=-1) * total.unsqueeze(-1)
        grad_logits = posterior if grad_logits is None else grad_logits + posterior
        if wanted[2]:
            code = unpack_codes(code_of)
            by_code = posterior.reshape(-1, posterior.shape[-1]).sum(0)
            through = by_code.index_select(0, code) * log_within(code, token_bias, mass).exp()
            grad_bias = through if grad_bias is None else grad_bias + through
    if grad_logits is None:
        raise ValueError("through_logits needs total or per_code: without both there is no gradient")
    narrow = grad_logits.to(h.dtype)
    grad_codebook = None
    if wanted[1]:
        grad_codebook = (narrow.reshape(-1, narrow.shape[-1]).t() @ h.reshape(-1, h.shape[-1])).to(codebook.dtype)
    return narrow @ codebook.to(h.dtype) if wanted[0] else None, grad_codebook, grad_bias if wanted[2] else None


def loss(
    grad: Tensor,
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    wanted: Wanted,
) -> Grads:
    """Gradients of h, codebook and token_bias of cross entropy, ``[...]``; of log Z without target."""
    head = (h, codebook, code_of, token_bias)
    if target is None:
        return through_logits(head, grad, None, None, wanted)
    tokens, wide = code_of.shape[0], loss_dtype(h)
    code = unpack_codes(code_of)
    counted = target != ignore_index
    token = torch.where(counted, target, 0)
    kept = torch.where(counted, grad, 0.0)
    # t_i = (1 − ε) w_y [i = y] + ε/V w_i, times the gradient
    own = (1 - label_smoothing) * (kept if weight is None else kept * weight.to(wide)[token])
    total, per_code = own, kept.new_zeros((*kept.shape, codebook.shape[0]))
    per_token = kept.new_zeros(tokens) if wanted[2] else None
    if label_smoothing:
        share = torch.ones(tokens, dtype=wide, device=h.device) if weight is None else weight.to(wide)
        share = share * (label_smoothing / tokens)
        total = own + kept * share.sum()
        per_code = kept.unsqueeze(-1) * code_sums(share, code, codebook.shape[0])
        per_token = None if per_token is None else kept.sum() * share
    per_code = per_code.scatter_add(-1, code[token].unsqueeze(-1), own.unsqueeze(-1))
    if per_token is not None:
        per_token = per_token.index_add(0, token.reshape(-1), own.reshape(-1))
    return through_logits(head, total, per_code, per_token, wanted)


def log_softmax(
    grad: Tensor, h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, wanted: Wanted
) -> Grads:
    """Gradients of h, codebook and token_bias of log p, ``[..., V]``."""
    t = -grad.to(loss_dtype(h))
    per_code = code_sums(t, unpack_codes(code_of), codebook.shape[0])
    per_token = t.reshape(-1, t.shape[-1]).sum(0) if wanted[2] else None
    return through_logits((h, codebook, code_of, token_bias), t.sum(-1), per_code, per_token, wanted)


def _wanted(ctx: Any) -> list[bool]:
    return [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]


def _given(wanted: Wanted, found: Sequence[Tensor | None], head: Head) -> Grads:
    grad_h, grad_codebook, grad_bias = given(wanted, found, head[3])
    return grad_h, grad_codebook, None, grad_bias


# -- as operators ------------------------------------------------------------------------------------------------


def _cost(grad: Tensor, h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, *rest: Any) -> Cost:
    # The code logits once more, their softmax, and a product for each gradient; per token its share of the mass.
    wanted = rest[-1]
    tokens, codes = code_of.shape[0], codebook.shape[0]
    flops = positions(h) * (2 * (1 + sum(wanted[:2])) * codebook.numel() + 6 * codes) + 3 * tokens
    if grad.shape[-1:] == (tokens,) and grad.dim() == h.dim():
        flops += grad.numel()
    read = tensor_bytes(grad, h, codebook, code_of, token_bias, *(a for a in rest if isinstance(a, Tensor)))
    written = tensor_bytes(h) * wanted[0] + tensor_bytes(codebook) * wanted[1] + 4 * tokens * wanted[2]
    return Cost(flops, read, written)


_HEAD = "Tensor grad, Tensor h, Tensor codebook, Tensor code_of, Tensor? token_bias"
_OF_HEAD = (1, 2, None)

LOSS = KernelSpec(
    name="vq_tiers_loss_backward",
    schema=f"({_HEAD}, Tensor? target, Tensor? weight, float label_smoothing, int ignore_index, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    reference=operator(loss, _OF_HEAD),
    fake=fake(_OF_HEAD, tokens=(3, 0)),
    cost=_cost,
    implementations={"cuda": "rewriter.kernels.vq_logits.loss_launch:loss_backward"},
)

LOG_SOFTMAX = KernelSpec(
    name="vq_tiers_log_softmax_backward",
    schema=f"({_HEAD}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    reference=operator(log_softmax, _OF_HEAD),
    fake=fake(_OF_HEAD, tokens=(3, 0)),
    cost=_cost,
    implementations={"cuda": "rewriter.kernels.vq_logits.loss_launch:weighted_backward"},
)

vq_tiers_loss_backward = LOSS.register()
vq_tiers_log_softmax_backward = LOG_SOFTMAX.register()
