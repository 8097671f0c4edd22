# SPDX-License-Identifier: Apache-2.0
"""The ShiftAdd operators. Importing this module registers them with torch.

    bcq_linear, bcq_embedding        weights as sums of binary bases
    pot_linear, pot_embedding        weights as sums of signed powers of two
    level_linear, level_embedding    weights as indices into a table (`rewriter.kernels.shift_add.levels`)

Layouts are described in `rewriter.kernels.shift_add.codec`. Gradients flow to activations, scales, tables and bias.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.batching import leading
from rewriter.kernels.shift_add import gradients, reference
from rewriter.kernels.shift_add.levels import level_embedding as level_embedding
from rewriter.kernels.shift_add.levels import level_linear as level_linear
from rewriter.kernels.shift_add.shared import (
    Gradients,
    bias_gradient,
    embedding_cost,
    linear_cost,
    row_gradients,
    scatter_rows,
)
from rewriter.kernels.spec import Cost, KernelSpec

# ---------------------------------------------------------------------------------- fakes


def _bcq_linear_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    group: int,
    in_features: int,
) -> Tensor:
    reference.check_bcq(codes, scale, shift, group, in_features)
    reference.check_linear(x, bias, codes.shape[0], in_features)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _bcq_embedding_fake(
    ids: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    reference.check_bcq(codes, scale, shift, group, in_features)
    reference.check_ids(ids)
    return scale.new_empty((*ids.shape, in_features))


def _pot_linear_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    terms: int,
    group: int,
    in_features: int,
) -> Tensor:
    reference.check_pot(codes, scale, bits, terms, group, in_features)
    reference.check_linear(x, bias, codes.shape[0], in_features)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _pot_embedding_fake(
    ids: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    reference.check_pot(codes, scale, bits, terms, group, in_features)
    reference.check_ids(ids)
    return scale.new_empty((*ids.shape, in_features))


# ---------------------------------------------------------------------------------- autograd


def _save_bcq_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, shift, bias, ctx.group, ctx.in_features = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, codes, scale, shift)


def _bcq_linear_backward(ctx: Any, grad: Tensor) -> Gradients:
    x, codes, scale, shift = ctx.saved_tensors
    weight = (codes, scale, shift, ctx.group, ctx.in_features)
    grad_x = gradients.compute(gradients.bcq_x, grad, *weight) if ctx.needs_input_grad[0] else None
    grad_scale = gradients.compute(gradients.bcq_scale, grad, x, *weight) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_scale, None, bias_gradient(ctx, grad, 4), None, None


def _save_pot_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, bias, ctx.bits, ctx.terms, ctx.group, ctx.in_features = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, codes, scale)


def _pot_linear_backward(ctx: Any, grad: Tensor) -> Gradients:
    x, codes, scale = ctx.saved_tensors
    weight = (codes, scale, ctx.bits, ctx.terms, ctx.group, ctx.in_features)
    grad_x = gradients.compute(gradients.pot_x, grad, *weight) if ctx.needs_input_grad[0] else None
    grad_scale = gradients.compute(gradients.pot_scale, grad, x, *weight) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_scale, bias_gradient(ctx, grad, 3), None, None, None, None


def _save_bcq_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, codes, scale, shift, ctx.group, ctx.in_features = inputs
    ctx.save_for_backward(ids, codes, scale, shift)


def _bcq_embedding_backward(ctx: Any, grad: Tensor) -> Gradients:
    ids, codes, scale, shift = ctx.saved_tensors
    flat, rows = row_gradients(grad, ids, scale, ctx.in_features)
    chosen = None if shift is None else shift.index_select(0, flat)
    per_row = reference.bcq_scale_gradient(rows, codes.index_select(0, flat), chosen, ctx.group, ctx.in_features)
    return None, None, scatter_rows(per_row, flat, scale), None, None, None


def _save_pot_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, codes, scale, ctx.bits, ctx.terms, ctx.group, ctx.in_features = inputs
    ctx.save_for_backward(ids, codes, scale)


def _pot_embedding_backward(ctx: Any, grad: Tensor) -> Gradients:
    ids, codes, scale = ctx.saved_tensors
    flat, rows = row_gradients(grad, ids, scale, ctx.in_features)
    per_row = reference.pot_scale_gradient(
        rows, codes.index_select(0, flat), ctx.bits, ctx.terms, ctx.group, ctx.in_features
    )
    return None, None, scatter_rows(per_row, flat, scale), None, None, None, None


# ---------------------------------------------------------------------------------- cost


def _bcq_linear_cost(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    group: int,
    in_features: int,
) -> Cost:
    out, bits = codes.shape[0], codes.shape[1]
    return linear_cost(x, out, bits * out * in_features, codes, scale, shift, bias)


def _pot_linear_cost(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    terms: int,
    group: int,
    in_features: int,
) -> Cost:
    return linear_cost(x, codes.shape[0], terms * codes.shape[0] * in_features, codes, scale, bias)


def _bcq_embedding_cost(
    ids: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Cost:
    return embedding_cost(ids, codes.shape[1], in_features, scale, codes, shift)


def _pot_embedding_cost(
    ids: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Cost:
    return embedding_cost(ids, terms, in_features, scale, codes)


# ---------------------------------------------------------------------------------- operators

bcq_linear: OpOverload = KernelSpec(
    name="bcq_linear",
    schema=(
        "(Tensor x, Tensor codes, Tensor scale, Tensor? shift, Tensor? bias, int group, int in_features) -> Tensor"
    ),
    reference=reference.bcq_linear,
    fake=_bcq_linear_fake,
    setup_context=_save_bcq_linear,
    backward=_bcq_linear_backward,
    vmap=leading(lambda: bcq_linear),
    cost=_bcq_linear_cost,
    autocast=("x",),
    implementations={
        "cpu": "rewriter.kernels.shift_add.native:bcq_linear",
        "cuda": "rewriter.kernels.shift_add.launch:bcq_linear",
    },
).register()

bcq_embedding: OpOverload = KernelSpec(
    name="bcq_embedding",
    schema="(Tensor ids, Tensor codes, Tensor scale, Tensor? shift, int group, int in_features) -> Tensor",
    reference=reference.bcq_embedding,
    fake=_bcq_embedding_fake,
    setup_context=_save_bcq_embedding,
    backward=_bcq_embedding_backward,
    vmap=leading(lambda: bcq_embedding),
    cost=_bcq_embedding_cost,
    implementations={
        "cpu": "rewriter.kernels.shift_add.native:bcq_embedding",
        "cuda": "rewriter.kernels.shift_add.launch_embedding:bcq_embedding",
    },
).register()

pot_linear: OpOverload = KernelSpec(
    name="pot_linear",
    schema=(
        "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int bits, int terms, int group,"
        " int in_features) -> Tensor"
    ),
    reference=reference.pot_linear,
    fake=_pot_linear_fake,
    setup_context=_save_pot_linear,
    backward=_pot_linear_backward,
    vmap=leading(lambda: pot_linear),
    cost=_pot_linear_cost,
    autocast=("x",),
    implementations={
        "cpu": "rewriter.kernels.shift_add.native:pot_linear",
        "cuda": "rewriter.kernels.shift_add.launch:pot_linear",
    },
).register()

pot_embedding: OpOverload = KernelSpec(
    name="pot_embedding",
    schema=("(Tensor ids, Tensor codes, Tensor scale, int bits, int terms, int group, int in_features) -> Tensor"),
    reference=reference.pot_embedding,
    fake=_pot_embedding_fake,
    setup_context=_save_pot_embedding,
    backward=_pot_embedding_backward,
    vmap=leading(lambda: pot_embedding),
    cost=_pot_embedding_cost,
    implementations={
        "cpu": "rewriter.kernels.shift_add.native:pot_embedding",
        "cuda": "rewriter.kernels.shift_add.launch_embedding:pot_embedding",
    },
).register()
