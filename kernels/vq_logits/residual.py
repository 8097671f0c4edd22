# SPDX-License-Identifier: Apache-2.0
"""Residual codebooks of whole rows: the operator ``vq_logits_residual``.

    l_sj = h·C[s, j],   logit_i = Σ_s l_s,a_s(i) + bias_i

S·K products with h instead of V, then S look-ups a token. One stage is a pure codebook (the tiers operator's head).
Two stages could also form log Z without V columns, Z = e^{l_1ᵀ} N e^{l_2} with the K × K matrix N that counts the tokens
of each pair of codes. N has at most V entries that are not zero, so that sum is no shorter than one over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits import gradients, shared
from rewriter.kernels.vq_logits.reference import residual_logits
from rewriter.kernels.vq_logits.shared import (
    Grads,
    check_hidden,
    check_per_token,
    positions,
    save_inputs,
    tensor_bytes,
    vmap_rule,
)


def _check(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> None:
    check_hidden(h)
    torch._check(
        codebook.dim() == 3 and codebook.shape[0] >= 1,
        lambda: f"codebook must be [S, K, d] with at least one stage, not {tuple(codebook.shape)}",
    )
    torch._check(
        h.shape[-1] == codebook.shape[2],
        lambda: f"h has width {h.shape[-1]}, the codebook {codebook.shape[2]}",
    )
    torch._check(codes.dtype == torch.uint8, lambda: f"codes must be uint8, not {codes.dtype}")
    torch._check(
        codes.dim() == 3 and codes.shape[1] == codebook.shape[0] and codes.shape[2] in (1, 2, 3),
        lambda: f"codes must be [V, {codebook.shape[0]}, 1 to 3 bytes], not {tuple(codes.shape)}",
    )
    check_per_token("bias", bias, codes)


def _residual(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    _check(h, codebook, codes, bias)
    return residual_logits(h, codebook, codes, bias)


def _fake(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    _check(h, codebook, codes, bias)
    return h.new_empty((*h.shape[:-1], codes.shape[0]))


def _backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, codes, bias = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    gradient = gradients.vq_logits_residual_backward if shared.on_gpu(h) else gradients.residual
    found = gradient(grad, h, codebook, codes, wanted)
    grad_h, grad_codebook, grad_bias = gradients.given(wanted, found, bias)
    return grad_h, grad_codebook, None, grad_bias


def _cost(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Cost:
    logits = positions(h) * codes.shape[0]
    additions = codes.shape[1] - 1 + (0 if bias is None else 1)
    flops = 2 * positions(h) * codebook.numel() + additions * logits
    return Cost(flops, tensor_bytes(h, codebook, codes, bias), logits * h.element_size())


RESIDUAL = KernelSpec(
    name="vq_logits_residual",
    schema="(Tensor h, Tensor codebook, Tensor codes, Tensor? bias) -> Tensor",
    reference=_residual,
    fake=_fake,
    setup_context=save_inputs,
    backward=_backward,
    vmap=vmap_rule("vq_logits_residual", (0,)),
    cost=_cost,
    autocast=("h",),
    implementations={"cuda": "rewriter.kernels.vq_logits.tiers_launch:residual"},
)

vq_logits_residual = RESIDUAL.register()
