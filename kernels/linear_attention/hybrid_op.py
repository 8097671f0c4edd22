# SPDX-License-Identifier: Apache-2.0
"""The operator ``rewriter::hybrid_attention``; its meaning and its forms are in `hybrid`.

Caches come together or not at all, and so do the feature maps. Without ``with_state`` the caches returned are empty.
Autocast casts q, k and v; features keep their dtype: they are exponentials, whose range float16 has not.
"""

from __future__ import annotations

from dataclasses import astuple, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.linear_attention import checks, hybrid, layout
from rewriter.kernels.linear_attention.sequence import Inputs, Past, Setting, state_heads
from rewriter.kernels.linear_attention.transforms import backward_of, batched_by
from rewriter.kernels.spec import Cost, KernelSpec, Recurrence, tensor_bytes

BLOCKS = ("sliding", "terrace")
ANCHORS = ("max", "none")
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_TENSORS, _CACHES = len(fields(Inputs)), len(fields(Past))


def _parts(*arguments: Any) -> tuple[Inputs, Past | None, Setting, bool, int]:
    """The operator's arguments in groups, refused where they contradict each other (ValueError)."""
    x = Inputs(*arguments[:_TENSORS])
    caches = arguments[_TENSORS : _TENSORS + _CACHES]
    scale, window, block, sinks, anchor, with_state, chunk = arguments[_TENSORS + _CACHES :]
    setting = Setting(scale, window, block, sinks, anchor)
    checks.check(block in BLOCKS, f"block must be one of {', '.join(BLOCKS)}, not {block!r}")
    checks.check(anchor in ANCHORS, f"anchor must be one of {', '.join(ANCHORS)}, not {anchor!r}")
    checks.check(window >= 1, f"window must be at least 1, not {window}")
    checks.check(sinks >= 0, f"sinks must not be negative, not {sinks}")
    checks.check(chunk >= 1, f"chunk must be at least 1, not {chunk}")
    _check_inputs(x)
    checks.together("past_k, past_v, past_map, past_keep, seen, state and normaliser", *caches)
    past = None if caches[0] is None else Past(*caches)
    if past is not None:
        _check_past(past, x, setting)
    return x, past, setting, with_state, chunk


def _check_inputs(x: Inputs) -> None:
    (batch, heads, length, width), maps = x.q.shape if x.q.dim() == 4 else (0, 0, 0, 0), {}
    checks.activations(q=x.q, k=x.k, v=x.v)
    checks.shape("k", x.k, (batch, x.k.shape[1], length, width))
    checks.shape("v", x.v, (batch, x.v.shape[1], length, x.v.shape[3]))
    checks.together("q_map and k_map", x.q_map, x.k_map)
    if x.q_map is not None and x.k_map is not None:
        checks.activations(q_map=x.q_map, k_map=x.k_map)
        checks.shape("q_map", x.q_map, (batch, heads, length, x.q_map.shape[3]))
        checks.shape("k_map", x.k_map, (batch, x.k_map.shape[1], length, x.q_map.shape[3]))
        maps = {"k_map": x.k_map.shape[1]}
    else:
        checks.check(x.map_scale is None and x.log_decay is None, "map_scale and log_decay need q_map and k_map")
    checks.per_head("gate", x.gate, heads)
    checks.per_head("map_scale", x.map_scale, heads)
    checks.decay(x.log_decay, x.k, (1,))
    counts = {"k": x.k.shape[1], "v": x.v.shape[1], **maps, **checks.decay_heads(x.log_decay)}
    checks.heads(heads, state_heads(x.k, x.v, x.k_map, x.log_decay), **counts)
    checks.keep(x.keep, x.k)


def _check_past(past: Past, x: Inputs, setting: Setting) -> None:
    batch, slots = x.k.shape[0], setting.sinks + setting.reach
    (map_heads, features) = (x.k.shape[1], 0) if x.k_map is None else (x.k_map.shape[1], x.k_map.shape[3])
    states = state_heads(x.k, x.v, x.k_map, x.log_decay)
    checks.shape("past_k", past.k, (batch, x.k.shape[1], slots, x.k.shape[3]))
    checks.shape("past_v", past.v, (batch, x.v.shape[1], slots, x.v.shape[3]))
    checks.shape("past_map", past.mapped, (batch, map_heads, slots, features))
    checks.shape("past_keep", past.keep, (batch, slots))
    checks.check(past.keep.dtype is torch.bool, f"past_keep must be bool, not {past.keep.dtype}")
    checks.shape("seen", past.seen, (batch,))
    checks.check(past.seen.dtype is torch.int64, f"seen must be int64, not {past.seen.dtype}")
    checks.shape("state", past.state, (batch, states, features, x.v.shape[3]))
    checks.shape("normaliser", past.normaliser, (batch, states, features))


def _reference(*arguments: Any, dynamic: bool = False) -> Outputs:
    x, past, setting, with_state, chunk = _parts(*arguments)
    out, after = hybrid.chunked(x, past, setting, with_state, chunk, dynamic=dynamic)
    return out, after.k, after.v, after.mapped, after.keep, after.seen, after.state, after.normaliser


def _fake(*arguments: Any) -> Outputs:
    x, _, setting, with_state, _ = _parts(*arguments)
    batch, states = x.k.shape[0], state_heads(x.k, x.v, x.k_map, x.log_decay)
    slots = setting.sinks + setting.reach if with_state else 0
    features = 0 if x.k_map is None else x.k_map.shape[3]
    mapped = x.k if x.k_map is None else x.k_map
    kept = (batch, states, features if with_state else 0)
    dtype = layout.wide(x.q.dtype)
    return (
        x.q.new_empty((*x.q.shape[:3], x.v.shape[3])),
        x.k.new_empty((batch, x.k.shape[1], slots, x.k.shape[3])),
        x.v.new_empty((batch, x.v.shape[1], slots, x.v.shape[3])),
        mapped.new_empty((batch, mapped.shape[1], slots, features)),
        x.k.new_empty((batch, slots), dtype=torch.bool),
        x.k.new_empty((batch,), dtype=torch.int64),
        x.q.new_empty((*kept, x.v.shape[3]), dtype=dtype),
        x.q.new_empty(kept, dtype=dtype),
    )


def _cost(*arguments: Any) -> Cost:
    """Per query its window and chunk in both parts and the state once; per key of a state one update."""
    x, past, setting, with_state, chunk = _parts(*arguments)
    (batch, heads, length, width), values = x.q.shape, x.v.shape[3] + 1
    states, features = state_heads(x.k, x.v, x.k_map, x.log_decay), 0 if x.q_map is None else x.q_map.shape[3]
    before = setting.reach if past is not None else min(setting.reach, max(length - 1, 0))
    columns = min(max(chunk, before + 1), length) + before + setting.sinks
    per_query = 2 * columns * (width + features + values) + 2 * features * values
    flops = batch * length * (heads * per_query + states * 2 * features * values)
    read = tensor_bytes(*astuple(x)) + (0 if past is None else tensor_bytes(*astuple(past)))
    written = batch * heads * length * (values - 1) * x.q.element_size()
    if with_state:
        slots = setting.sinks + setting.reach
        per_slot = tensor_bytes(x.k, x.v, x.k_map) // max(length, 1) + batch
        written += slots * per_slot + batch * states * features * values * layout.wide(x.q.dtype).itemsize
    return Cost(flops, read, written)


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? q_map, Tensor? k_map, Tensor gate, Tensor? map_scale, Tensor? log_decay,"
    " Tensor? keep, Tensor? past_k, Tensor? past_v, Tensor? past_map, Tensor? past_keep, Tensor? seen, Tensor? state,"
    " Tensor? normaliser, float scale, int window, str block, int sinks, str anchor, bool with_state, int chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_setup, _backward = backward_of(
    "hybrid_attention",
    _SCHEMA,
    _reference,
    _cost,
    {"cuda": "rewriter.kernels.linear_attention.launch:hybrid_attention_backward"},
)
hybrid_attention: OpOverload = KernelSpec(
    name="hybrid_attention",
    schema=_SCHEMA,
    reference=_reference,
    implementations={
        "cpu": "rewriter.kernels.linear_attention.native:hybrid_attention",
        "cuda": "rewriter.kernels.linear_attention.launch:hybrid_attention",
    },
    decomposition=partial(_reference, dynamic=True),
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=batched_by(lambda: hybrid_attention, frozenset({0, 1, 2, 3, 4, *range(8, 16)}), decay=7),
    cost=_cost,
    autocast=("q", "k", "v"),
    recurrence=Recurrence(
        ("past_k", "past_v", "past_map", "past_keep", "seen", "state", "normaliser"),
        (1, 2, 3, 4, 5, 6, 7),
        switch="with_state",
    ),
).register()
