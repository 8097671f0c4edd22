# SPDX-License-Identifier: Apache-2.0
"""The operator ``rewriter::linear_attention``; the rule and its forms are in `additive`.

Autocast leaves its arguments alone: features are exponentials, whose range float16 has not.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.linear_attention import additive, checks, layout
from rewriter.kernels.linear_attention.transforms import backward_of, batched_by
from rewriter.kernels.spec import Cost, KernelSpec, Recurrence, tensor_bytes

NORMALISE = ("sum", "none")


def _check_additive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    normaliser: Tensor | None,
    scale: float,
    causal: bool,
    normalise: str,
    chunk: int,
) -> None:
    checks.activations(q=q, k=k, v=v)
    checks.same("k", k.shape[0], "batch", q.shape[0])
    checks.same("k", k.shape[3], "features", q.shape[3])
    checks.shape("v", v, (k.shape[0], v.shape[1], k.shape[2], v.shape[3]))
    checks.check(causal or log_decay is None, "log_decay needs causal=True: both directions have no first token")
    checks.decay(log_decay, k, (1, 3, 4))
    heads = additive.state_heads(k, v, log_decay)
    checks.heads(q.shape[1], heads, k=k.shape[1], v=v.shape[1], **checks.decay_heads(log_decay))
    if causal:
        checks.same("k", k.shape[2], "length", q.shape[2])
    checks.keep(keep, k)
    checks.together("state and normaliser", state, normaliser)
    checks.shape("state", state, (k.shape[0], heads, k.shape[3], v.shape[3]))
    checks.shape("normaliser", normaliser, (k.shape[0], heads, k.shape[3]))
    checks.check(normalise in NORMALISE, f"normalise must be one of {', '.join(NORMALISE)}, not {normalise!r}")
    checks.check(chunk >= 1, f"chunk must be at least 1, not {chunk}")


def _additive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    normaliser: Tensor | None,
    scale: float,
    causal: bool,
    normalise: str,
    chunk: int,
    *,
    dynamic: bool = False,
) -> additive.Outputs:
    _check_additive(q, k, v, log_decay, keep, state, normaliser, scale, causal, normalise, chunk)
    return additive.chunked(
        q, k, v, log_decay, keep, state, normaliser, scale, causal, normalise, chunk, dynamic=dynamic
    )


def _additive_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    normaliser: Tensor | None,
    scale: float,
    causal: bool,
    normalise: str,
    chunk: int,
) -> additive.Outputs:
    _check_additive(q, k, v, log_decay, keep, state, normaliser, scale, causal, normalise, chunk)
    shape = (k.shape[0], additive.state_heads(k, v, log_decay), k.shape[3])
    dtype = layout.wide(q.dtype)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty((*shape, v.shape[3]), dtype=dtype), q.new_empty(shape, dtype=dtype)


def _additive_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    normaliser: Tensor | None,
    scale: float,
    causal: bool,
    normalise: str,
    chunk: int,
) -> Cost:
    """Per query 2·F·(Dv + 1) to read the state and the pairs of its chunk, per key as much to update the state."""
    (batch, heads, length, features), values = q.shape, v.shape[3] + 1
    states = additive.state_heads(k, v, log_decay)
    flops = 2 * batch * features * values * (heads * length + states * k.shape[2])
    if causal:
        flops += 2 * batch * heads * length * min(chunk, length) * (features + values)
    kept = batch * states * features * values * layout.wide(q.dtype).itemsize
    read = tensor_bytes(q, k, v, log_decay, keep, state, normaliser)
    return Cost(flops, read, batch * heads * length * v.shape[3] * q.element_size() + kept)


_ADDITIVE_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? keep, Tensor? state, Tensor? normaliser,"
    " float scale, bool causal, str normalise, int chunk) -> (Tensor, Tensor, Tensor)"
)
_setup, _backward = backward_of(
    "linear_attention",
    _ADDITIVE_SCHEMA,
    _additive,
    _additive_cost,
    {"cuda": "rewriter.kernels.linear_attention.launch:linear_attention_backward"},
)
linear_attention: OpOverload = KernelSpec(
    name="linear_attention",
    schema=_ADDITIVE_SCHEMA,
    reference=_additive,
    implementations={
        "cpu": "rewriter.kernels.linear_attention.native:linear_attention",
        "cuda": "rewriter.kernels.linear_attention.launch:linear_attention",
    },
    decomposition=partial(_additive, dynamic=True),
    fake=_additive_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=batched_by(lambda: linear_attention, frozenset({0, 1, 2, 4, 5, 6}), decay=3),
    cost=_additive_cost,
    recurrence=Recurrence(("state", "normaliser"), (1, 2)),
).register()
