# SPDX-License-Identifier: Apache-2.0
"""Gradients of the ShiftAdd dense layers, each an operator of its own.

    <format>_linear_backward_x          ∂L/∂x = ∂L/∂y W
    <format>_linear_backward_scale      from ∂L/∂W = (∂L/∂y)ᵀ x, see `rewriter.kernels.shift_add.reference`
    level_linear_backward_levels        likewise

On a GPU they are kernels that materialise neither W nor ∂L/∂W. Elsewhere `compute` runs the aten formula in place, which
has derivatives itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.shift_add import codec, reference
from rewriter.kernels.shift_add.shared import linear_cost, weight_gradient
from rewriter.kernels.spec import REGISTRY, Cost, KernelSpec, tensor_bytes


def compute(operator: OpOverload, grad: Tensor, *args: Any) -> Tensor:
    """One gradient: the operator where kernels are for it, else the formula, which can be differentiated again."""
    formula = operator if on_gpu(grad) else REGISTRY[operator].reference
    result: Tensor = formula(grad, *args)
    return result


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


# ---------------------------------------------------------------------------------------------------------------- ∂L/∂x


def _bcq_x(grad: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int) -> Tensor:
    weight = codec.decode_bcq(codes, scale, shift, group, in_features, codec.compute_dtype(grad, scale))
    return grad @ weight.to(grad.dtype)


def _pot_x(grad: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int) -> Tensor:
    dtype = codec.compute_dtype(grad, scale)
    return grad @ codec.decode_pot(codes, scale, bits, terms, group, in_features, dtype).to(grad.dtype)


def _level_x(
    grad: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    dtype = codec.compute_dtype(grad, scale, levels)
    return grad @ codec.decode_levels(codes, scale, levels, bits, group, in_features, dtype).to(grad.dtype)


def _x_fake(grad: Tensor, *args: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], args[-1]))


def _x_cost(grad: Tensor, codes: Tensor, scale: Tensor, *args: Any) -> Cost:
    """The dense layer's work, the other way round."""
    out, in_features = codes.shape[0], args[-1]
    count = grad.numel() // grad.shape[-1]
    read = tensor_bytes(grad, codes, scale, *(a for a in args if isinstance(a, Tensor)))
    return Cost(2 * count * out * in_features + out * in_features, read, count * in_features * grad.element_size())


# ------------------------------------------------------------------------------------------------- scales and the table


def _bcq_scale(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    dense = weight_gradient(grad, x, codec.compute_dtype(x, scale))
    return reference.bcq_scale_gradient(dense, codes, shift, group, in_features).to(scale.dtype)


def _pot_scale(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    dense = weight_gradient(grad, x, codec.compute_dtype(x, scale))
    return reference.pot_scale_gradient(dense, codes, bits, terms, group, in_features).to(scale.dtype)


def _level_scale(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    dense = weight_gradient(grad, x, codec.compute_dtype(x, scale, levels))
    return reference.level_gradients(dense, codes, scale, levels, bits, group, in_features)[0].to(scale.dtype)


def _level_levels(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    dense = weight_gradient(grad, x, codec.compute_dtype(x, scale, levels))
    return reference.level_gradients(dense, codes, scale, levels, bits, group, in_features)[1].to(levels.dtype)


def _scale_fake(grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, *args: Any) -> Tensor:
    return scale.new_empty(scale.shape)


def _levels_fake(grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, *args: Any) -> Tensor:
    return levels.new_empty(levels.shape)


def _scale_cost(grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, *args: Any) -> Cost:
    """The product ∂yᵀ x, and one multiplication and addition per weight (and basis) to fold it."""
    out, in_features = codes.shape[0], args[-1]
    folds = codes.shape[1] if codes.dim() == 3 else 1
    tables = [a for a in args if isinstance(a, Tensor)]
    whole = linear_cost(x, out, 2 * folds * out * in_features, grad, codes, scale, *tables)
    return Cost(whole.flops, whole.bytes_read, tensor_bytes(scale))


def _levels_cost(grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, *args: Any) -> Cost:
    whole = _scale_cost(grad, x, codes, scale, levels, *args)
    return Cost(whole.flops, whole.bytes_read, tensor_bytes(levels))


# ------------------------------------------------------------------------------------------------------------ operators


def _register(
    name: str, schema: str, formula: Callable[..., Tensor], fake: Callable[..., Tensor], cost: Callable[..., Cost]
) -> OpOverload:
    where = f"rewriter.kernels.shift_add.launch_gradients:{name}"
    return KernelSpec(name, schema, formula, fake, cost, implementations={"cuda": where}).register()


_BCQ = "Tensor codes, Tensor scale, Tensor? shift, int group, int in_features) -> Tensor"
_POT = "Tensor codes, Tensor scale, int bits, int terms, int group, int in_features) -> Tensor"
_LEVEL = "Tensor codes, Tensor scale, Tensor levels, int bits, int group, int in_features) -> Tensor"

bcq_x = _register("bcq_linear_backward_x", f"(Tensor grad, {_BCQ}", _bcq_x, _x_fake, _x_cost)
pot_x = _register("pot_linear_backward_x", f"(Tensor grad, {_POT}", _pot_x, _x_fake, _x_cost)
level_x = _register("level_linear_backward_x", f"(Tensor grad, {_LEVEL}", _level_x, _x_fake, _x_cost)

bcq_scale = _register(
    "bcq_linear_backward_scale", f"(Tensor grad, Tensor x, {_BCQ}", _bcq_scale, _scale_fake, _scale_cost
)
pot_scale = _register(
    "pot_linear_backward_scale", f"(Tensor grad, Tensor x, {_POT}", _pot_scale, _scale_fake, _scale_cost
)
level_scale = _register(
    "level_linear_backward_scale", f"(Tensor grad, Tensor x, {_LEVEL}", _level_scale, _scale_fake, _scale_cost
)
level_levels = _register(
    "level_linear_backward_levels", f"(Tensor grad, Tensor x, {_LEVEL}", _level_levels, _levels_fake, _levels_cost
)
