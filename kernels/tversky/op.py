# SPDX-License-Identifier: Apache-2.0
"""The operator `rewriter::tversky`; importing this module registers it with torch.

One operator holds every similarity of the family, the exact signed pair S(x, Π) − S(x, −Π) included: both branches must
meet in the accumulator, before anything is rounded to the activations' dtype, so they cannot be two calls. What it
computes is written in `rewriter.kernels.tversky.reference`. Gradients flow to every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.spec import Cost, KernelSpec
from rewriter.kernels.tversky import gradient, reference
from rewriter.kernels.tversky.reference import Model

_TENSORS = 8  # x, features, prototypes, theta, alpha, beta, negative, bias; the options follow


def _fake(
    x: Tensor,
    features: Tensor,
    prototypes: Tensor,
    theta: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    negative: Tensor | None,
    bias: Tensor | None,
    intersection: str,
    convention: str,
    difference: str,
    form: str,
    mirrored: bool,
    projected: bool,
) -> Tensor:
    reference.check(x, features, prototypes, theta, alpha, beta, negative, bias, projected)
    reference.check_names(intersection, convention, difference, form)
    return x.new_empty((*x.shape[:-1], prototypes.shape[0]))


# ---------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, form = ctx.saved_tensors, ctx.options[3]
    function = tversky_backward if on_device(grad) else gradient.gradients
    found = function(grad, *inputs, *ctx.options)
    unused = 3 if form == "ratio" else None  # θ
    used = (None if t is None or i == unused else g for i, (t, g) in enumerate(zip(inputs, found, strict=True)))
    return *used, *(None for _ in ctx.options)


def on_device(x: Tensor) -> bool:
    """Whether gradients are computed by an operator with a kernel instead of differentiable aten."""
    return x.is_cuda


def _gradient_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    out = _fake(*args)
    torch._check_value(
        grad.shape == out.shape, lambda: f"tversky: grad must be {list(out.shape)}, not {list(grad.shape)}"
    )
    theta, form = args[3], args[11]
    absent = [t is None for t in args[:_TENSORS]]
    absent[3] = theta is None or form == "ratio"
    x = args[0]
    return tuple(
        x.new_empty(0) if gone else t.new_empty(t.shape) for t, gone in zip(args[:_TENSORS], absent, strict=True)
    )


def _gradient_cost(grad: Tensor, *args: Any) -> Cost:
    """About what the similarity takes three times: its sums once more, and a product for each side."""
    once = _cost(*args)
    tensors = sum(t.numel() * t.element_size() for t in args[:_TENSORS] if t is not None)
    return Cost(3 * once.flops, once.bytes_read + grad.numel() * grad.element_size(), tensors)


# -------------------------------------------------------------------------------------------------------- vmap


def _vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
    """A batched input is one more leading dimension; with other tensors batched, one call per example."""
    if in_dims[0] is not None and all(d is None for d in in_dims[1:]):
        return tversky(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    if info.batch_size == 0:
        raise NotImplementedError("tversky: vmap over features, prototypes or coefficients needs at least one example")
    examples = (
        [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(info.batch_size)
    )
    return torch.stack([tversky(*example) for example in examples]), 0


# -------------------------------------------------------------------------------------------------------- cost


def _cost(
    x: Tensor,
    features: Tensor,
    prototypes: Tensor,
    theta: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    negative: Tensor | None,
    bias: Tensor | None,
    intersection: str,
    convention: str,
    difference: str,
    form: str,
    mirrored: bool,
    projected: bool,
) -> Cost:
    """Scores of the input, scores of the prototypes unless stored, and the sums over the features.

    A matrix product of K features is 2K operations per row and prototype, a term of a sum about 4K.
    """
    width, stored, count = x.shape[-1], features.shape[0], prototypes.shape[0]
    rows = x.numel() // width if width else 0
    bank = stored * (2 if mirrored else 1)
    model = Model(theta, alpha, beta, intersection, convention, difference, form)
    if model.bilinear:
        passes = 1 if beta is None else 2
    else:
        passes = _COMMON_PASSES[convention][intersection] + _DIFFERENCE_PASSES[convention][difference] * (
            (alpha is not None) + (beta is not None)
        )
        passes = passes if negative is None else 2 * passes
    flops = (
        2 * rows * stored * width + (0 if projected else 2 * count * stored * width) + 2 * rows * count * bank * passes
    )
    tensors = (x, features, prototypes, theta, alpha, beta, negative, bias)
    read = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return Cost(flops, read, rows * count * x.element_size())


_COMMON_PASSES = {
    "paper": {"product": 1, "min": 2, "max": 4, "mean": 2, "gmean": 1, "softmin": 2},
    "code": {"product": 1, "min": 2, "max": 2, "mean": 2, "gmean": 2, "softmin": 2},
}
_DIFFERENCE_PASSES = {"paper": {"ignorematch": 1, "subtractmatch": 2}, "code": {"ignorematch": 1, "subtractmatch": 3}}

_SCHEMA = (
    "(Tensor x, Tensor features, Tensor prototypes, Tensor? theta, Tensor? alpha, Tensor? beta, Tensor? negative,"
    " Tensor? bias, str intersection, str convention, str difference, str form, bool mirrored, bool projected) -> Tensor"
)

tversky: OpOverload = KernelSpec(
    name="tversky",
    schema=_SCHEMA,
    reference=reference.tversky,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    vmap=_vmap,
    cost=_cost,
    autocast=("x",),
    implementations={"cuda": "rewriter.kernels.tversky.launch:tversky"},
).register()

tversky_backward: OpOverload = KernelSpec(
    name="tversky_backward",
    schema=_SCHEMA.replace("(Tensor x", "(Tensor grad, Tensor x").replace(
        "-> Tensor", f"-> ({', '.join(['Tensor'] * _TENSORS)})"
    ),
    reference=gradient.gradients,
    fake=_gradient_fake,
    cost=_gradient_cost,
    implementations={"cuda": "rewriter.kernels.tversky.launch:tversky_backward"},
).register()
