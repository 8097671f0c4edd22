# SPDX-License-Identifier: Apache-2.0
"""Exact rows beside a product code: the operator ``vq_logits_product_exact``.

    ŵ_i = exact_r for i = exact_of[r], else [C_1[a_1(i)], …, C_G[a_G(i)]];   logit_i = h·ŵ_i + bias_i

A codebook is least sure of itself where it matters most, at the few tokens that are likely; those keep their rows.
Tokens in ``exact_of`` must differ from one another (as the passes write them): of two rows for one token either may win.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits import gradients, shared
from rewriter.kernels.vq_logits.reference import exact_logits
from rewriter.kernels.vq_logits.shared import (
    Grads,
    check_product,
    positions,
    save_inputs,
    tensor_bytes,
    vmap_rule,
)


def check_exact(
    h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, exact: Tensor, exact_of: Tensor
) -> None:
    """A product head, exact ``[m, d]`` and exact_of uint8 ``[m, 1 to 3 bytes]``."""
    check_product(h, codebook, codes, bias)
    torch._check(
        exact.dim() == 2 and exact.shape[1] == h.shape[-1],
        lambda: f"exact must be [m, {h.shape[-1]}], not {tuple(exact.shape)}",
    )
    torch._check(exact_of.dtype == torch.uint8, lambda: f"exact_of must be uint8, not {exact_of.dtype}")
    torch._check(
        exact_of.dim() == 2 and exact_of.shape[0] == exact.shape[0] and exact_of.shape[1] in (1, 2, 3),
        lambda: f"exact_of must be [{exact.shape[0]}, 1 to 3 bytes], not {tuple(exact_of.shape)}",
    )


def _exact(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, exact: Tensor, exact_of: Tensor) -> Tensor:
    check_exact(h, codebook, codes, bias, exact, exact_of)
    return exact_logits(h, codebook, codes, bias, exact, exact_of)


def _fake(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, exact: Tensor, exact_of: Tensor) -> Tensor:
    check_exact(h, codebook, codes, bias, exact, exact_of)
    return h.new_empty((*h.shape[:-1], codes.shape[0]))


def _backward(ctx: Any, grad: Tensor) -> Grads:
    h, codebook, codes, bias, exact, exact_of = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[3], needs[4]]
    gradient = gradients.vq_logits_product_exact_backward if shared.on_gpu(h) else gradients.exact
    found = gradient(grad, h, codebook, codes, exact, exact_of, wanted)
    grad_h, grad_codebook, grad_bias, grad_exact = gradients.given(wanted, found, bias)
    return grad_h, grad_codebook, None, grad_bias, grad_exact, None


def _cost(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, exact: Tensor, exact_of: Tensor) -> Cost:
    logits = positions(h) * codes.shape[0]
    flops = 2 * logits * h.shape[-1] + (0 if bias is None else logits)
    return Cost(flops, tensor_bytes(h, codebook, codes, bias, exact, exact_of), logits * h.element_size())


EXACT = KernelSpec(
    name="vq_logits_product_exact",
    schema="(Tensor h, Tensor codebook, Tensor codes, Tensor? bias, Tensor exact, Tensor exact_of) -> Tensor",
    reference=_exact,
    fake=_fake,
    setup_context=save_inputs,
    backward=_backward,
    vmap=vmap_rule("vq_logits_product_exact", (0,)),
    cost=_cost,
    autocast=("h",),
    implementations={
        "cpu": "rewriter.kernels.vq_logits.native:vq_logits_product_exact",
        "cuda": "rewriter.kernels.vq_logits.product_launch:product_exact",
    },
)

vq_logits_product_exact = EXACT.register()
