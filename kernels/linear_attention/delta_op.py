# SPDX-License-Identifier: Apache-2.0
"""The operator ``rewriter::delta_attention``; the rule and its forms are in `delta`."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.linear_attention import checks, delta, layout
from rewriter.kernels.linear_attention.transforms import backward_of, batched_by
from rewriter.kernels.spec import Cost, KernelSpec, Recurrence, tensor_bytes


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    chunk: int,
) -> None:
    checks.activations(q=q, k=k, v=v)
    checks.shape("k", k, (q.shape[0], k.shape[1], q.shape[2], q.shape[3]))
    checks.shape("v", v, (q.shape[0], v.shape[1], q.shape[2], v.shape[3]))
    checks.check(beta.dim() == 3, f"beta must be [batch, heads, time], not {list(beta.shape)}")
    checks.check(beta.is_floating_point(), f"beta must be floating, not {beta.dtype}")
    checks.shape("beta", beta, (q.shape[0], beta.shape[1], q.shape[2]))
    checks.decay(log_decay, k, (1, 3))
    heads = delta.state_heads(k, v, beta, log_decay)
    checks.heads(q.shape[1], heads, k=k.shape[1], v=v.shape[1], beta=beta.shape[1], **checks.decay_heads(log_decay))
    checks.keep(keep, k)
    checks.shape("state", state, (k.shape[0], heads, k.shape[3], v.shape[3]))
    checks.check(chunk >= 1, f"chunk must be at least 1, not {chunk}")


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
    *,
    dynamic: bool = False,
) -> delta.Outputs:
    _check(q, k, v, beta, log_decay, keep, state, chunk)
    return delta.chunked(q, k, v, beta, log_decay, keep, state, scale, chunk, dynamic=dynamic)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
) -> delta.Outputs:
    _check(q, k, v, beta, log_decay, keep, state, chunk)
    shape = (k.shape[0], delta.state_heads(k, v, beta, log_decay), k.shape[3], v.shape[3])
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(shape, dtype=layout.wide(q.dtype))


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
) -> Cost:
    """As the additive rule, and per key of a state: what it overwrites, and its chunk's triangular inverse."""
    (batch, heads, length, features), values = q.shape, v.shape[3]
    states, size = delta.state_heads(k, v, beta, log_decay), min(chunk, delta.LARGEST_CHUNK, length)
    per_query = 2 * features * values + 2 * size * (features + values)
    per_key = 4 * features * values + 2 * size * (features + values) + 4 * size * size * (size - 1).bit_length()
    flops = batch * length * (heads * per_query + states * per_key)
    kept = batch * states * features * values * layout.wide(q.dtype).itemsize
    read = tensor_bytes(q, k, v, beta, log_decay, keep, state)
    return Cost(flops, read, batch * heads * length * values * q.element_size() + kept)


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? keep, Tensor? state,"
    " float scale, int chunk) -> (Tensor, Tensor)"
)
_setup, _backward = backward_of(
    "delta_attention",
    _SCHEMA,
    _reference,
    _cost,
    {"cuda": "rewriter.kernels.linear_attention.launch:delta_attention_backward"},
)
delta_attention: OpOverload = KernelSpec(
    name="delta_attention",
    schema=_SCHEMA,
    reference=_reference,
    implementations={"cuda": "rewriter.kernels.linear_attention.launch:delta_attention"},
    decomposition=partial(_reference, dynamic=True),
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=batched_by(lambda: delta_attention, frozenset({0, 1, 2, 3, 5, 6}), decay=4),
    cost=_cost,
    autocast=("q", "k", "v"),
    recurrence=Recurrence(("state",), (1,)),
).register()
