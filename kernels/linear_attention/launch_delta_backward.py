# SPDX-License-Identifier: Apache-2.0
"""The gradient of `delta_attention` on a GPU: the forward again, then the kernels of `delta_gradient_kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped
from rewriter.kernels.linear_attention import delta_gradient_kernels, gradient_kernels, launch_delta
from rewriter.kernels.linear_attention.launch_additive_backward import decay_gradient
from rewriter.kernels.linear_attention.launch_common import WIDEST_FEATURES, block, dense, pointer, summed
from rewriter.kernels.linear_attention.launch_delta import Call


def backward(grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """``delta_attention_backward``: gradients of the inputs that need one, in their dtypes.

    Args:
        grads: of the output and the state.
        rest: the operator's arguments, and for each whether its gradient is wanted.

    Raises:
        Unsupported: as the forward.
    """
    *inputs, needs = rest
    x = launch_delta.prepared(*[*inputs, False])
    batch, features, values = x.k.shape[0], x.k.shape[3], x.v.shape[3]
    inverses, raw = x.inverses(raw=True)
    last = x.k.new_empty((batch, x.heads, features, values), dtype=torch.float32)
    states, written, old = x.states(inverses, last)
    do = pointer("do", dense(grads[0]))

    written_gradient = _through_outputs(x, do)
    dstates, first = _state_gradients(x, do, grads[1], old, written_gradient)
    dv, dbeta = _value_gradients(x, raw, states, written, written_gradient)
    found: list[Tensor | None] = [None] * len(needs)
    found[2] = summed(dv, inputs[2].shape[1], torch.float32)
    found[3] = summed(dbeta, inputs[3].shape[1], torch.float32)
    found[6] = first
    if needs[0] or needs[1] or needs[4]:
        found[0], dk, dg = _key_gradients(x, do, states, written, dv, dstates)
        found[1] = summed(dk, inputs[1].shape[1], torch.float32)
        found[4] = None if dg is None else decay_gradient(inputs[4], x.keep, dg)
    return [
        dx.to(argument.dtype)
        for dx, argument, needed in zip(found, inputs, needs, strict=True)
        if needed and dx is not None
    ]


def _tiles(x: Call) -> dict[str, int]:
    most = 32 if x.k.dtype is torch.float32 else 64
    return {"BF": block(x.k.shape[3], most), "BV": block(x.v.shape[3], most)}


def _through_outputs(x: Call, do: dict[str, Any]) -> Tensor:
    """(Q Kᵀ ⊙ D)ᵀ G, what the queries of its chunk want of each token's writing, ``[B, Hs, T, Dv]``."""
    values = x.v.shape[3]
    du = x.k.new_empty((x.k.shape[0], x.heads, x.k.shape[2], values), dtype=torch.float32)
    x.start(
        gradient_kernels.value_gradients_kernel,
        lambda c: (x.rows, x.chunks, triton.cdiv(values, c["BV"])),
        Config(_tiles(x), num_warps=8 if x.k.dtype is torch.float32 else 4, num_stages=1),
        **do,
        rho_ptr=x.q.new_full(x.q.shape[:3], x.scale, dtype=torch.float32),
        dstates_ptr=None,
        dv_ptr=du,
    )
    return du


def _state_gradients(x: Call, do: dict[str, Any], last: Tensor, old: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """dS at the end of every chunk, and before the first; completes dU."""
    (batch, _, _, features), values = x.k.shape, x.v.shape[3]
    wide = x.k.dtype is torch.float32
    dtype = torch.bfloat16 if x.k.dtype is torch.bfloat16 else torch.float32
    dstates = x.k.new_empty((batch, x.heads, x.chunks, features, values), dtype=dtype)
    first = x.k.new_empty((batch, x.heads, features, values), dtype=torch.float32)
    sizes = {"BF": block(features, WIDEST_FEATURES), "BV": 16}
    x.start(
        delta_gradient_kernels.delta_state_gradients_kernel,
        lambda c: (x.rows, triton.cdiv(values, c["BV"])),
        Config(sizes, num_warps=8 if wide else 4, num_stages=1),
        **do,
        old_ptr=old,
        dlast_ptr=last.float().contiguous(),
        du_ptr=du,
        dstates_ptr=dstates,
        dfirst_ptr=first,
    )
    return dstates, first


def _value_gradients(x: Call, raw: Tensor | None, states: Tensor, written: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """dV and dβ by state."""
    sizes, values = _tiles(x), x.v.shape[3]
    parts = triton.cdiv(values, sizes["BV"])
    dv = torch.empty_like(du)
    dbeta = du.new_empty((parts, *du.shape[:3]))
    x.start(
        delta_gradient_kernels.delta_value_gradients_kernel,
        lambda c: (x.rows, x.chunks, parts),
        Config(sizes, num_warps=4, num_stages=1),
        inverses_ptr=raw,
        states_ptr=states,
        written_ptr=written,
        du_ptr=du,
        dv_ptr=dv,
        dbeta_ptr=dbeta,
        batches=x.k.shape[0],
    )
    return dv, dbeta.sum(0)


def _key_gradients(
    x: Call, do: dict[str, Any], states: Tensor, written: Tensor, dv: Tensor, dstates: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of q, k and the decay."""
    (batch, _, length, features), values = x.k.shape, x.v.shape[3]
    most = 16 if x.k.dtype is torch.float32 else 32
    sizes = {"BF": block(features, most), "BV": block(values, most)}
    parts = triton.cdiv(features, sizes["BF"])
    dq = x.q.new_empty((*x.q.shape[:3], features))
    dk = dv.new_empty((batch, x.heads, length, features))
    dg = None if x.log_decay is None else dv.new_empty((parts, batch, x.heads, length))
    x.start(
        delta_gradient_kernels.delta_key_gradients_kernel,
        lambda c: (x.rows, x.chunks, parts),
        Config(sizes, num_warps=8, num_stages=1),
        **do,
        states_ptr=states,
        written_ptr=written,
        dv_ptr=dv,
        dstates_ptr=dstates,
        dq_ptr=dq,
        dk_ptr=dk,
        dg_ptr=dg,
        batches=batch,
    )
    return dq, dk, None if dg is None else dg.sum(0)


def _example(*arguments: Any, **options: Any) -> tuple[Any, ...]:
    """A call that wants all gradients, on the meta device."""
    inputs = launch_delta.example(*arguments, **options)
    q, k, v, *_ = inputs
    grads = [q.new_empty((*q.shape[:3], v.shape[3])), k.new_empty((2, 8, k.shape[3], v.shape[3]), dtype=torch.float32)]
    return grads, *inputs, [isinstance(a, Tensor) and a.is_floating_point() for a in inputs]


SHIPPED = (
    Shipped("delta_attention_backward bf16", backward, partial(_example, torch.bfloat16)),
    Shipped("delta_attention_backward gated bf16", backward, partial(_example, torch.bfloat16, decay=True)),
    Shipped("delta_attention_backward fp32", backward, partial(_example, torch.float32, features=64), matrix="none"),
)
