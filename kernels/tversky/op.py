# SPDX-License-Identifier: Apache-2.0
"""The operator `rewriter::tversky`; importing this module registers it with torch.

One operator holds every similarity of the family, the exact signed pair S(x, Π) − S(x, −Π) included: both branches must
meet in the accumulator, before anything is rounded to the activations' dtype, so they cannot be two calls. What it
computes is written in `rewriter.kernels.tversky.reference`. Gradients flow to every tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.batching import leading
from rewriter.kernels.spec import Cost, KernelSpec, tensor_bytes
from rewriter.kernels.tversky import gradient, reference
from rewriter.kernels.tversky.arguments import TENSORS, Arguments


def _fake(*args: Any) -> Tensor:
    a = Arguments.checked(*args)
    return a.x.new_empty((*a.x.shape[:-1], a.prototypes.shape[0]))


# ---------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


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
    a = Arguments(*args)
    used = replace(a, theta=None) if a.form == "ratio" else a
    return tuple(a.x.new_empty(0) if t is None else t.new_empty(t.shape) for t in used.tensors)


def _gradient_cost(grad: Tensor, *args: Any) -> Cost:
    """About what the similarity takes three times: its sums once more, and a product for each side."""
    once = _cost(*args)
    return Cost(3 * once.flops, once.bytes_read + tensor_bytes(grad), tensor_bytes(*Arguments(*args).tensors))


# -------------------------------------------------------------------------------------------------------- cost


def _cost(*args: Any) -> Cost:
    """Scores of the input, scores of the prototypes unless stored, and the sums over the features.

    A matrix product of K features is 2K operations per row and prototype, a term of a sum about 4K.
    """
    a = Arguments(*args)
    width, stored, count = a.x.shape[-1], a.features.shape[0], a.prototypes.shape[0]
    rows = a.x.numel() // width if width else 0
    bank = stored * (2 if a.mirrored else 1)
    if reference.is_bilinear(a.intersection, a.difference, a.form):
        passes = 1 if a.beta is None else 2
    else:
        distinctive = _DIFFERENCE_PASSES[a.convention][a.difference]
        passes = _COMMON_PASSES[a.convention][a.intersection]
        passes += distinctive * ((a.alpha is not None) + (a.beta is not None))
        passes = passes if a.negative is None else 2 * passes
    scores = 2 * rows * stored * width + (0 if a.projected else 2 * count * stored * width)
    flops = scores + 2 * rows * count * bank * passes
    return Cost(flops, tensor_bytes(*a.tensors), rows * count * a.x.element_size())


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
    vmap=leading(lambda: tversky),
    cost=_cost,
    autocast=("x",),
    implementations={"cuda": "rewriter.kernels.tversky.launch:tversky"},
).register()

tversky_backward: OpOverload = KernelSpec(
    name="tversky_backward",
    schema=_SCHEMA.replace("(Tensor x", "(Tensor grad, Tensor x").replace(
        "-> Tensor", f"-> ({', '.join(['Tensor'] * TENSORS)})"
    ),
    reference=gradient.gradients,
    fake=_gradient_fake,
    cost=_gradient_cost,
    implementations={"cuda": "rewriter.kernels.tversky.launch:tversky_backward"},
).register()
