# SPDX-License-Identifier: Apache-2.0
"""The operator `rewriter::additive_attention` and its gradient. Importing this module registers them with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.batching import one_call_each
from rewriter.kernels.shift_attention import reference
from rewriter.kernels.spec import Cost, KernelSpec, tensor_bytes

SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? gain, Tensor? conv) -> Tensor"


def _fake(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None) -> Tensor:
    reference.check(q, k, v, keep, gain, conv)
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
    """Examples of one batch do not see each other, so a batched q, k, v, keep is a larger batch."""
    activations, parameters = range(4), range(4, 6)
    if any(in_dims[i] is not None for i in parameters):
        return one_call_each(additive_attention, info.batch_size, in_dims, args)
    flat = list(args)
    for i in activations:
        if args[i] is not None:
            alike = in_dims[i] is None
            examples = args[i].expand(info.batch_size, *args[i].shape) if alike else args[i].movedim(in_dims[i], 0)
            flat[i] = examples.flatten(0, 1)
    return additive_attention(*flat).unflatten(0, (info.batch_size, -1)), 0


def _cost(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None) -> Cost:
    """Additions where a bit is set, half of them on average; linear in the number of tokens."""
    tokens, dim, width = q.numel() // q.shape[-1], q.shape[-1], v.shape[-1]
    additions = 2 * tokens * dim * width // 2 + tokens * width * (4 + (0 if conv is None else 2 * conv.shape[1]))
    return Cost(additions, tensor_bytes(q, k, v, keep, gain, conv), tokens * width * q.element_size())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if not on_gpu(grad):  # aten, which can be differentiated again
        return reference.gradients(grad, *ctx.saved_tensors, needs=needs)
    to_q, to_k, to_v, to_gain, to_conv = additive_attention_backward(grad, *ctx.saved_tensors)
    each = (to_q, to_k, to_v, None, to_gain, to_conv)
    return tuple(found if needed else None for found, needed in zip(each, needs, strict=True))


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _gradient_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_q, to_k, to_v = (x.new_empty(x.shape) for x in (q, k, v))
    to_gain, to_conv = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (gain, conv))
    return to_q, to_k, to_v, to_gain, to_conv


def _gradient_cost(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None
) -> Cost:
    """Two sums over tokens and four products with their results, where the forward has one of each."""
    forward = _cost(q, k, v, keep, gain, conv)
    written = tensor_bytes(q, k, v, gain, conv)
    return Cost(3 * forward.flops, forward.bytes_read + tensor_bytes(grad), written)


additive_attention_backward: OpOverload = KernelSpec(
    name="additive_attention_backward",
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? gain, Tensor? conv)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    reference=reference.all_gradients,
    fake=_gradient_fake,
    cost=_gradient_cost,
    implementations={"cuda": "rewriter.kernels.shift_attention.launch:additive_attention_backward"},
).register()

additive_attention: OpOverload = KernelSpec(
    name="additive_attention",
    schema=SCHEMA,
    reference=reference.additive_attention,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    vmap=_vmap,
    cost=_cost,
    autocast=("q", "k", "v"),
    implementations={"cuda": "rewriter.kernels.shift_attention.launch:additive_attention"},
).register()
