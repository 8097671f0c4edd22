# SPDX-License-Identifier: Apache-2.0
"""Gradients of logits: formulas in aten, and the operators a GPU computes them with.

On the CPU a backward is the formula itself, so that second derivatives are right too. On a GPU it is an operator, whose
reference the formula is and which has kernels; it has no derivative of its own. Each takes ``wanted``, which of its
results are needed; the operators return empty tensors for the others, the formulas None.

A logit's gradient goes to its token's bias and, summed over the tokens of a code, to the code logit l = h·C: from there
∂/∂h is a product with C and ∂/∂C one with h. Gradients of losses are in ``loss_gradients.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.vq_logits.codec import decode_exact, decode_product, flat_codes, unpack_codes
from rewriter.kernels.vq_logits.reference import loss_dtype
from rewriter.kernels.vq_logits.shared import Grads, positions, tensor_bytes

Wanted = Sequence[bool]

# -- formulas ----------------------------------------------------------------------------------------------------


def tiers(grad: Tensor, h: Tensor, codebook: Tensor, code_of: Tensor, wanted: Wanted) -> Grads:
    """Gradients of h, codebook and token_bias; the last in at least float32."""
    grad_h, grad_codebook, grad_bias = residual(grad, h, codebook.unsqueeze(0), code_of.unsqueeze(1), wanted)
    return grad_h, None if grad_codebook is None else grad_codebook.squeeze(0), grad_bias


def residual(grad: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, wanted: Wanted) -> Grads:
    """Gradients of h, codebook and bias; the last in at least float32."""
    stages, per_stage, width = codebook.shape
    per_token = grad.reshape(-1, grad.shape[-1]).to(loss_dtype(h))
    grad_h = grad_codebook = None
    if wanted[0] or wanted[1]:
        index = unpack_codes(codes)
        # Gradient at the code logits, [S·K, positions]: a sum over the tokens of each code, along rows, because adding
        # columns is slow.
        by_code = per_token.new_zeros((stages * per_stage, per_token.shape[0]))
        for stage in range(stages):
            by_code = by_code.index_add(0, index[:, stage] + stage * per_stage, per_token.t())
        narrow = by_code.to(h.dtype)
        if wanted[0]:
            grad_h = (narrow.t() @ codebook.to(h.dtype).reshape(-1, width)).reshape(h.shape)
        if wanted[1]:
            grad_codebook = (narrow @ h.reshape(-1, width)).to(codebook.dtype).reshape(codebook.shape)
    return grad_h, grad_codebook, per_token.sum(0) if wanted[2] else None


def product(grad: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, wanted: Wanted) -> Grads:
    """Gradients of h, codebook and bias; the last in at least float32."""
    width = h.shape[-1]
    flat = grad.reshape(-1, grad.shape[-1])
    grad_h = grad @ decode_product(codebook.to(h.dtype), codes, width) if wanted[0] else None
    grad_codebook = None
    if wanted[1]:
        grad_codebook = _to_groups((flat.t() @ h.reshape(-1, width)).to(loss_dtype(h)), codebook, codes)
    return grad_h, grad_codebook, flat.to(loss_dtype(h)).sum(0) if wanted[2] else None


def exact(
    grad: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, exact: Tensor, exact_of: Tensor, wanted: Wanted
) -> Grads:
    """Gradients of h, codebook, bias and exact rows; the bias's in at least float32."""
    width, wide = h.shape[-1], loss_dtype(h)
    flat = grad.reshape(-1, grad.shape[-1])
    grad_h = None
    if wanted[0]:
        grad_h = grad @ decode_exact(codebook.to(h.dtype), codes, exact.to(h.dtype), exact_of)
    grad_codebook = grad_exact = None
    if wanted[1] or wanted[3]:
        rows = unpack_codes(exact_of)
        dense = (flat.t() @ h.reshape(-1, width)).to(wide)  # gradient of the decoded head, [V, d]
        grad_exact = dense.index_select(0, rows).to(exact.dtype)
        grad_codebook = _to_groups(dense.index_fill(0, rows, 0.0), codebook, codes)
    return grad_h, grad_codebook, flat.to(wide).sum(0) if wanted[2] else None, grad_exact


def _to_groups(dense: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Gradient of the decoded head ``[V, d]`` -> of the codebook ``[G, C, w]``: a sum over the tokens of each code."""
    groups, per_group, dims = codebook.shape
    parts = torch.nn.functional.pad(dense, (0, groups * dims - dense.shape[1])).reshape(-1, dims)
    total = parts.new_zeros((groups * per_group, dims))
    total = total.index_add(0, flat_codes(codes, per_group).reshape(-1), parts)
    return total.reshape(codebook.shape).to(codebook.dtype)


# -- as operators ------------------------------------------------------------------------------------------------


def operator(formula: Callable[..., Grads], places: Sequence[int | None]) -> Callable[..., tuple[Tensor, ...]]:
    """The reference of a gradient's operator: fresh tensors for what is wanted, empty ones for the rest.

    Args:
        formula: its last argument is ``wanted``.
        places: for each result the argument whose dtype it has; None for a bias, in at least float32.
    """

    def reference(*args: Any) -> tuple[Tensor, ...]:
        found = formula(*args)
        return tuple(
            _empty(args, place) if not want or g is None else g.contiguous()
            for want, g, place in zip(args[-1], found, places, strict=True)
        )

    return reference


def fake(places: Sequence[int | None], tokens: tuple[int, int]) -> Callable[..., tuple[Tensor, ...]]:
    """The fake of `operator`; ``tokens`` is an argument and its dimension as long as a bias."""

    def made(*args: Any) -> tuple[Tensor, ...]:
        argument, dimension = tokens
        results = []
        for want, place in zip(args[-1], places, strict=True):
            like = _empty(args, place)
            shape = args[argument].shape[dimension : dimension + 1 or None] if place is None else args[place].shape
            results.append(like.new_empty(shape) if want else like)
        return tuple(results)

    return made


def _empty(args: Sequence[Any], place: int | None) -> Tensor:
    h: Tensor = args[1]
    return h.new_empty(0, dtype=loss_dtype(h) if place is None else args[place].dtype)


def given(wanted: Wanted, grads: Sequence[Tensor | None], bias: Tensor | None) -> list[Tensor | None]:
    """Results of formula or operator as autograd takes them: None for what is not wanted, the third in bias's dtype."""
    found = [g if want else None for want, g in zip(wanted, grads, strict=True)]
    if found[2] is not None and bias is not None:
        found[2] = found[2].to(bias.dtype)
    return found


def _tiers_cost(grad: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, wanted: Wanted) -> Cost:
    # An addition per token (and stage) for the sums over codes, one for the bias; two products at most.
    logits, products = grad.numel(), sum(wanted[:2])
    additions = logits * ((codes.shape[1] if codes.dim() == 3 else 1) * bool(products) + bool(wanted[2]))
    written = tensor_bytes(h) * wanted[0] + tensor_bytes(codebook) * wanted[1] + 4 * codes.shape[0] * wanted[2]
    flops = additions + 2 * products * positions(h) * codebook.numel()
    return Cost(flops, tensor_bytes(grad, h, codebook, codes), written)


def _product_cost(grad: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, wanted: Wanted) -> Cost:
    tokens, width = grad.shape[-1], h.shape[-1]
    flops = 2 * sum(wanted[:2]) * grad.numel() * width + tokens * width * wanted[1] + grad.numel() * wanted[2]
    written = tensor_bytes(h) * wanted[0] + tensor_bytes(codebook) * wanted[1] + 4 * tokens * wanted[2]
    return Cost(flops, tensor_bytes(grad, h, codebook, codes), written)


def _exact_cost(
    grad: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, exact: Tensor, exact_of: Tensor, wanted: Wanted
) -> Cost:
    extra = Cost(0, tensor_bytes(exact, exact_of), tensor_bytes(exact) * wanted[3])
    return _product_cost(grad, h, codebook, codes, [wanted[0], wanted[1] or wanted[3], wanted[2]]) + extra


_CODEBOOK = "Tensor grad, Tensor h, Tensor codebook, Tensor codes"

TIERS = KernelSpec(
    name="vq_logits_tiers_backward",
    schema=f"({_CODEBOOK}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    reference=operator(tiers, (1, 2, None)),
    fake=fake((1, 2, None), tokens=(0, -1)),
    cost=_tiers_cost,
    implementations={"cuda": "rewriter.kernels.vq_logits.tiers_launch:tiers_backward"},
)

RESIDUAL = KernelSpec(
    name="vq_logits_residual_backward",
    schema=f"({_CODEBOOK}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    reference=operator(residual, (1, 2, None)),
    fake=fake((1, 2, None), tokens=(0, -1)),
    cost=_tiers_cost,
    implementations={"cuda": "rewriter.kernels.vq_logits.tiers_launch:residual_backward"},
)

PRODUCT = KernelSpec(
    name="vq_logits_product_backward",
    schema=f"({_CODEBOOK}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    reference=operator(product, (1, 2, None)),
    fake=fake((1, 2, None), tokens=(0, -1)),
    cost=_product_cost,
    implementations={"cuda": "rewriter.kernels.vq_logits.product_launch:product_backward"},
)

EXACT = KernelSpec(
    name="vq_logits_product_exact_backward",
    schema=f"({_CODEBOOK}, Tensor exact, Tensor exact_of, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=operator(exact, (1, 2, None, 4)),
    fake=fake((1, 2, None, 4), tokens=(0, -1)),
    cost=_exact_cost,
    implementations={"cuda": "rewriter.kernels.vq_logits.product_launch:product_exact_backward"},
)

vq_logits_tiers_backward = TIERS.register()
vq_logits_residual_backward = RESIDUAL.register()
vq_logits_product_backward = PRODUCT.register()
vq_logits_product_exact_backward = EXACT.register()
