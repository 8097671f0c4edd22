# SPDX-License-Identifier: Apache-2.0
"""``level_linear`` and ``level_embedding``: weights as indices into a small table under a group scale.

    y = x Wᵀ + b,  W[o, i] = scale[o, i // group] · levels[word_i]

One pair of operators for every grid: additive powers of two, sums of signed powers, zero-free shifts. A grid that is
learned instead of derived is the same operator; gradients flow to the table too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.batching import leading
from rewriter.kernels.shift_add import codec, gradients, reference
from rewriter.kernels.shift_add.shared import (
    Gradients,
    bias_gradient,
    embedding_cost,
    linear_cost,
    row_gradients,
    scatter_rows,
    weight_gradient,
)
from rewriter.kernels.spec import Cost, KernelSpec


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    reference.check_levels(codes, scale, levels, bits, group, in_features)
    reference.check_linear(x, bias, codes.shape[0], in_features)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _embedding_fake(
    ids: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    reference.check_levels(codes, scale, levels, bits, group, in_features)
    reference.check_ids(ids)
    return scale.new_empty((*ids.shape, in_features))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, levels, bias, ctx.bits, ctx.group, ctx.in_features = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, codes, scale, levels)


def _linear_backward(ctx: Any, grad: Tensor) -> Gradients:
    x, codes, scale, levels = ctx.saved_tensors
    weight = (codes, scale, levels, ctx.bits, ctx.group, ctx.in_features)
    needs_x, _, needs_scale, needs_levels, *_ = ctx.needs_input_grad
    grad_x = gradients.compute(gradients.level_x, grad, *weight) if needs_x else None
    grad_scale = grad_levels = None
    if gradients.on_gpu(grad):
        grad_scale = gradients.level_scale(grad, x, *weight) if needs_scale else None
        grad_levels = gradients.level_levels(grad, x, *weight) if needs_levels else None
    elif needs_scale or needs_levels:  # both from one ∂W
        dense = weight_gradient(grad, x, codec.compute_dtype(x, scale, levels))
        by_scale, by_level = reference.level_gradients(dense, *weight)
        grad_scale, grad_levels = by_scale.to(scale.dtype), by_level.to(levels.dtype)
    return grad_x, None, grad_scale, grad_levels, bias_gradient(ctx, grad, 4), None, None, None


def _save_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, codes, scale, levels, ctx.bits, ctx.group, ctx.in_features = inputs
    ctx.save_for_backward(ids, codes, scale, levels)


def _embedding_backward(ctx: Any, grad: Tensor) -> Gradients:
    ids, codes, scale, levels = ctx.saved_tensors
    flat, rows = row_gradients(grad, ids, scale, ctx.in_features)
    rows = rows.to(codec.compute_dtype(rows, levels))
    chosen = (codes.index_select(0, flat), scale.index_select(0, flat), levels)
    per_row, by_level = reference.level_gradients(rows, *chosen, ctx.bits, ctx.group, ctx.in_features)
    return None, None, scatter_rows(per_row, flat, scale), by_level.to(levels.dtype), None, None, None


def _linear_cost(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Cost:
    return linear_cost(x, codes.shape[0], codes.shape[0] * in_features, codes, scale, levels, bias)


def _embedding_cost(
    ids: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Cost:
    rows = embedding_cost(ids, 1, in_features, scale, codes)
    return rows + Cost(0, levels.numel() * levels.element_size(), 0)


level_linear: OpOverload = KernelSpec(
    name="level_linear",
    schema=(
        "(Tensor x, Tensor codes, Tensor scale, Tensor levels, Tensor? bias, int bits, int group,"
        " int in_features) -> Tensor"
    ),
    reference=reference.level_linear,
    fake=_linear_fake,
    setup_context=_save_linear,
    backward=_linear_backward,
    vmap=leading(lambda: level_linear),
    cost=_linear_cost,
    autocast=("x",),
    implementations={
        "cpu": "rewriter.kernels.shift_add.native:level_linear",
        "cuda": "rewriter.kernels.shift_add.launch:level_linear",
    },
).register()

level_embedding: OpOverload = KernelSpec(
    name="level_embedding",
    schema="(Tensor ids, Tensor codes, Tensor scale, Tensor levels, int bits, int group, int in_features) -> Tensor",
    reference=reference.level_embedding,
    fake=_embedding_fake,
    setup_context=_save_embedding,
    backward=_embedding_backward,
    vmap=leading(lambda: level_embedding),
    cost=_embedding_cost,
    implementations={
        "cpu": "rewriter.kernels.shift_add.native:level_embedding",
        "cuda": "rewriter.kernels.shift_add.launch_embedding:level_embedding",
    },
).register()
