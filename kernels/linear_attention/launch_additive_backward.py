# SPDX-License-Identifier: Apache-2.0
"""The gradient of `linear_attention` on a GPU: the forward again, then the kernels of `gradient_kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Shipped
from rewriter.kernels.linear_attention import gradient_kernels, layout
from rewriter.kernels.linear_attention.launch_additive import Call, call, example, outputs_of, states_of, tiles
from rewriter.kernels.linear_attention.launch_common import dense, pointer, summed


def backward(grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """``linear_attention_backward``: gradients of the inputs that need one, in their dtypes.

    Args:
        grads: of the outputs, the state and the normaliser.
        rest: the operator's arguments, and for each whether its gradient is wanted.

    Raises:
        Unsupported: as the forward.
    """
    *inputs, needs = rest
    x = call(*inputs)
    batch, features, values = x.sizes
    last = x.k.new_empty((batch, x.heads, features, values), dtype=torch.float32)
    states, zs = states_of(x, last, x.k.new_empty((batch, x.heads, features), dtype=torch.float32))
    rho, omega = _row_factors(x, states, zs, grads[0])
    more = {**pointer("do", dense(grads[0])), "rho_ptr": rho, "omega_ptr": omega}
    first, first_z = torch.empty_like(last), x.k.new_empty((batch, x.heads, features), dtype=torch.float32)
    dstates, dzs = _state_gradients(x, more, grads[1:], first, first_z)
    found: list[Tensor | None] = [None] * len(needs)
    if needs[2]:
        found[2] = _value_gradients(x, more, dstates)
    if needs[0] or needs[1] or needs[3]:
        found[0], found[1], found[3] = _key_gradients(x, more, states, zs, dstates, dzs)
    found[5], found[6] = first, first_z
    return [
        dx.to(argument.dtype)
        for dx, argument, needed in zip(found, inputs, needs, strict=True)
        if needed and dx is not None
    ]


def _row_factors(x: Call, states: Tensor, zs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """ρ and ω ``[B, H, T]``, for which the outputs are computed again."""
    rho = x.q.new_full(x.q.shape[:3], x.scale, dtype=torch.float32)
    if not x.normalise:
        return rho, torch.zeros_like(rho)
    out = x.q.new_empty((*x.q.shape[:3], x.sizes[2]), dtype=torch.float32)
    weight = torch.empty_like(rho)
    outputs_of(x, states, zs, out, weight)
    empty = weight == 0
    rho = x.scale / weight.masked_fill(empty, 1.0)
    return rho, (-rho * (grad.float() * out).sum(-1)).masked_fill_(empty, 0.0)


def _state_gradients(
    x: Call, more: dict[str, Any], grads: Sequence[Tensor], first: Tensor, first_z: Tensor
) -> tuple[Tensor, Tensor]:
    """dS and dz at the end of every chunk, and before the first one into ``first``; without causality those only."""
    batch, features, values = x.sizes
    dstates, dzs = x.kept()
    configs = tiles(x, warps=8, stages=1) if x.wide else tiles(x)
    x.start(
        gradient_kernels.state_gradients_kernel,
        lambda c: (batch * x.heads, triton.cdiv(features, c["BF"]), triton.cdiv(values, c["BV"])),
        configs,
        **more,
        dlast_ptr=grads[0].float().contiguous(),
        dlast_z_ptr=grads[1].float().contiguous(),
        dstates_ptr=dstates,
        dzs_ptr=dzs,
        dfirst_ptr=first,
        dfirst_z_ptr=first_z,
        q_length=x.q.shape[2],
        q_chunks=triton.cdiv(x.q.shape[2], x.size),
    )
    return (dstates, dzs) if x.causal else (first, first_z)


def _value_gradients(x: Call, more: dict[str, Any], dstates: Tensor) -> Tensor:
    batch, length, values = x.sizes[0], x.k.shape[2], x.sizes[2]
    dv = x.v.new_empty((batch, x.heads, length, values), dtype=_summand(x, x.v))
    narrow = not x.wide and x.decay.form < 2
    x.start(
        gradient_kernels.value_gradients_kernel,
        lambda c: (batch * x.heads, x.chunks, triton.cdiv(values, c["BV"])),
        tiles(x, warps=8) if narrow else tiles(x, stages=1),
        **more,
        dstates_ptr=dstates,
        dv_ptr=dv,
    )
    return summed(dv, x.v.shape[1], x.v.dtype)


def _key_gradients(
    x: Call, more: dict[str, Any], states: Tensor, zs: Tensor, dstates: Tensor, dzs: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of q, k and the decay."""
    (batch, features, _), length, q_length = x.sizes, x.k.shape[2], x.q.shape[2]
    [config] = configs = tiles(x, warps=8, stages=2 if x.decay.form == 2 else 1, most_values=32)
    parts = triton.cdiv(features, config.constants["BF"])
    dq = x.q.new_empty((*x.q.shape[:3], features))
    dk = x.k.new_empty((batch, x.heads, length, features), dtype=_summand(x, x.k))
    shape = {0: None, 1: (parts, batch, x.heads, length), 2: (batch, x.heads, length, features)}[x.decay.form]
    dg = None if shape is None else x.k.new_empty(shape, dtype=torch.float32)
    x.start(
        gradient_kernels.key_gradients_kernel,
        lambda c: (batch * x.heads, triton.cdiv(max(length, q_length), x.size), parts),
        configs,
        **more,
        states_ptr=states,
        zs_ptr=zs,
        dstates_ptr=dstates,
        dzs_ptr=dzs,
        dq_ptr=dq,
        dk_ptr=dk,
        dg_ptr=dg,
        batches=batch,
        q_length=q_length,
    )
    dk = summed(dk, x.k.shape[1], x.k.dtype)
    return dq, dk, None if dg is None else decay_gradient(x.log_decay, x.keep, dg.sum(0) if x.decay.form == 1 else dg)


def decay_gradient(log_decay: Tensor | None, keep: Tensor | None, dg: Tensor) -> Tensor | None:
    """From dg per step ``[B, Hs, T]`` or ``[B, Hs, T, F]`` to the gradient of ``log_decay``.

    Padding does not decay, and decays below `layout.LOWEST_LOG_DECAY` are taken for it: neither has a gradient.
    """
    if log_decay is None:
        return None
    dg = layout.only(keep, dg)
    heads = log_decay.shape[0 if log_decay.dim() == 1 else 1]
    dg = summed(dg, heads, torch.float32)
    if log_decay.dim() == 1:
        dg = dg.sum((0, 2))
    return torch.where(log_decay >= layout.LOWEST_LOG_DECAY, dg, 0.0)


def _summand(x: Call, of: Tensor) -> torch.dtype:
    """float32 for gradients that are yet to be summed over states that share a head."""
    return of.dtype if of.shape[1] == x.heads else torch.float32


def _example(*arguments: Any) -> tuple[Any, ...]:
    """A call that wants all gradients, on the meta device."""
    inputs = example(*arguments)
    q, _, v, _, _, state, normaliser, *_ = inputs
    grads = [q.new_empty((*q.shape[:3], v.shape[3])), state, normaliser]
    return grads, *inputs, [isinstance(a, Tensor) and a.is_floating_point() for a in inputs]


SHIPPED = (
    Shipped("linear_attention_backward bf16", backward, partial(_example, torch.bfloat16)),
    Shipped("linear_attention_backward fp32", backward, partial(_example, torch.float32), matrix="none"),
    Shipped("linear_attention_backward both ways bf16", backward, partial(_example, torch.bfloat16, 1024, None, False)),
    Shipped("linear_attention_backward fixed decay bf16", backward, partial(_example, torch.bfloat16, 4096, 1)),
    Shipped("linear_attention_backward gate bf16", backward, partial(_example, torch.bfloat16, 4096, 4), matrix="mma"),
    Shipped("linear_attention_backward gate fp32", backward, partial(_example, torch.float32, 4096, 4), matrix="none"),
)
