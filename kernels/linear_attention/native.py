# SPDX-License-Identifier: Apache-2.0
"""The CPU's code for ``linear_attention`` and ``hybrid_attention``, two uses of `attention.cpp`, and `features.cpp`.

Inputs in float32, bfloat16 and float16, computed in float32. What it does not do runs the reference: float64, both
directions, a decay per feature, windows by blocks (``"terrace"``) and sinks. Gradients are those of the reference
(`transforms`). A head of states is one thread's work: more threads than heads of queries have nothing to do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.linear_attention import additive, additive_op, features_op, hybrid_op, layout
from rewriter.kernels.linear_attention.feature_maps import LARGEST
from rewriter.kernels.linear_attention.native_call import (
    FLOAT,
    INT,
    POINTER,
    Prepared,
    Rows,
    Signature,
    described,
    signature,
)
from rewriter.kernels.linear_attention.sequence import features, nothing, state_heads
from rewriter.kernels.native import FLAGS, library, threads

_KINDS = {kind: number for number, kind in enumerate(features_op.KINDS)}
_GRAIN = 1 << 20  # multiplications that take longer than waking a thread
_KEPT = 1024  # signatures whose calls stay prepared


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ("q", "k", "v", "q_map", "k_map", "past_k", "past_v", "past_map")),
        *((name, POINTER) for name in ("keep", "past_keep", "gate", "map_scale", "decay")),
        *((name, INT) for name in ("decay_batch", "decay_head", "decay_row")),
        *((name, POINTER) for name in ("state", "normaliser", "out", "state_out", "normaliser_out")),
        *((name, POINTER) for name in ("k_left", "v_left", "map_left", "keep_left")),
        *((name, INT) for name in ("batch", "heads", "states", "length", "before", "window")),
        *((name, INT) for name in ("absolute", "normalise", "threads")),
        *((name, FLOAT) for name in ("scale", "map_factor")),
    )


class _Features(ctypes.Structure):
    _fields_ = (
        ("x", Rows),
        *((name, POINTER) for name in ("weight", "bias", "gain_weight", "gain_bias", "out")),
        *((name, INT) for name in ("batch", "length", "columns", "kind", "threads")),
        *((name, FLOAT) for name in ("scale", "largest")),
    )


def _made(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A result before it is computed."""
    return torch.empty(shape, dtype=dtype)


@cache
def _function(source: str, name: str) -> Any:
    """A function of one pointer."""
    path = Path(__file__).with_name(source)
    return getattr(library(path, {}, {name: (ctypes.c_void_p,)}, (*FLAGS, "-fopenmp")), name)


def linear_attention(*arguments: Any) -> additive.Outputs:
    """`additive.chunked`, blocks of its own size.

    Raises:
        Unsupported: see above.
        ValueError: as the operator.
    """
    call, work = _additive(signature(arguments))
    out, state, normaliser = _attended(call, work, arguments)
    return out.to(arguments[0].dtype), state, normaliser


@lru_cache(maxsize=_KEPT)
def _additive(known: Signature) -> tuple[Prepared, int]:
    """The call for arguments like these, and its multiplications."""
    arguments = described(known)
    additive_op._check_additive(*arguments)
    q, k, v, log_decay, _, _, _, scale, causal, normalise, _ = arguments
    if not causal:
        raise Unsupported("both directions are two products of matrices: the reference")
    if log_decay is not None and log_decay.dim() == 4:
        raise Unsupported("decays per feature")
    (batch, heads, length, _), states = q.shape, additive.state_heads(k, v, log_decay)
    call = Prepared(
        _Call,
        arguments,
        batch=batch,
        heads=heads,
        states=states,
        length=length,
        normalise=normalise == "sum",
        scale=1,
        map_factor=scale,
    )
    call.rows(q_map=0, k_map=1, v=2)
    call.dense(state=5, normaliser=6)
    call.dense(torch.bool, keep=4)
    if log_decay is not None:

        def decay(given: Sequence[Any]) -> Tensor:
            per_step = layout.decays(given[3], given[4], given[1].new_empty(k.shape, dtype=torch.float32), states)
            return per_step[:, :, 0, :, 0].contiguous()  # of [B, Hs, 1, T, 1]

        _decays(call, decay, states, length)
    _results(call, (batch, heads, length, v.shape[3]), states, k.shape[3])
    return call.ready(), _work(q, v, q, 0)


def hybrid_attention(*arguments: Any) -> hybrid_op.Outputs:
    """`hybrid.chunked`, blocks of its own size.

    Raises:
        Unsupported: see above.
        ValueError: as the operator.
    """
    call, work, with_state = _hybrid(signature(arguments))
    out, state, normaliser, *left = _attended(call, work, arguments)
    out = out.to(arguments[0].dtype)
    if with_state:
        return out, left[0], left[1], left[2], left[3], _seen(arguments), state, normaliser
    empty = nothing(hybrid_op.Inputs(*arguments[:9]), None)
    return out, empty.k, empty.v, empty.mapped, empty.keep, _seen(arguments), empty.state, empty.normaliser


@lru_cache(maxsize=_KEPT)
def _hybrid(known: Signature) -> tuple[Prepared, int, bool]:
    """The call for arguments like these, its multiplications, and whether states are asked for."""
    arguments = described(known)
    x, past, setting, with_state, _ = hybrid_op._parts(*arguments)
    if setting.sinks or setting.block != "sliding":
        raise Unsupported("sinks and windows by blocks")
    (batch, heads, length, _), states = x.q.shape, state_heads(x.k, x.v, x.k_map, x.log_decay)
    before = 0 if past is None else setting.reach
    call = Prepared(
        _Call,
        arguments,
        batch=batch,
        heads=heads,
        states=states,
        length=length,
        before=before,
        window=setting.window,
        absolute=setting.anchor == "none",
        normalise=True,
        scale=setting.scale,
        map_factor=1,
    )
    call.rows(q=0, k=1, v=2, q_map=3, k_map=4)
    call.dense(gate=5, map_scale=6)
    call.dense(torch.bool, keep=8)
    if past is not None:
        # Caches come in the dtype of what is new: an earlier call under autocast may have left another.
        call.rows(x.k.dtype, past_k=9)
        call.rows(x.v.dtype, past_v=10)
        call.dense(torch.bool, past_keep=12)
        if x.q_map is not None:
            call.rows(features(x).dtype, past_map=11)
            call.dense(state=14, normaliser=15)
    if x.log_decay is not None:

        def decay(given: Sequence[Any]) -> Tensor:
            per_head = given[7].float().clamp(min=layout.LOWEST_LOG_DECAY).repeat_interleave(states // len(given[7]))
            return per_head[None, :, None].expand(batch, -1, before + length).contiguous()

        _decays(call, decay, states, before + length)
    _results(call, (batch, heads, length, x.v.shape[3]), states, features(x).shape[3])
    if with_state:
        for name, t in (("k_left", x.k), ("v_left", x.v), ("map_left", features(x))):
            call.result(name, (batch, t.shape[1], setting.reach, t.shape[3]), t.dtype)
        call.result("keep_left", (batch, setting.reach), torch.bool)
    return call.ready(), _work(x.q, x.v, x.q_map, setting.window), with_state


def _seen(arguments: Sequence[Any]) -> Tensor:
    """Real tokens so far, ``[B]`` int64, of the arguments of ``hybrid_attention``."""
    k, keep, before = arguments[1], arguments[8], arguments[13]
    new = k.shape[2] if keep is None else keep.sum(-1)
    if before is not None:
        seen: Tensor = before + new
        return seen
    return new if keep is not None else k.new_full((k.shape[0],), new, dtype=torch.int64)


def _decays(call: Prepared, function: Any, states: int, positions: int) -> None:
    """Log decays ``[B, Hs, positions]`` float32, made by a function of the arguments."""
    call.computed("decay", function)
    call.filled.decay_batch, call.filled.decay_head, call.filled.decay_row = states * positions, positions, 1


def _results(call: Prepared, out: Sequence[int], states: int, count: int) -> None:
    """The output ``[B, H, T, Dv]``, the state ``[B, Hs, F, Dv]`` and its normaliser."""
    call.result("out", out)
    call.result("state_out", (out[0], states, count, out[3]))
    call.result("normaliser_out", (out[0], states, count))


def _work(q: Tensor, v: Tensor, q_map: Tensor | None, window: int) -> int:
    """Multiplications, about: what decides how many threads are worth waking."""
    count = 0 if q_map is None else q_map.shape[3]
    return q.shape[0] * q.shape[1] * q.shape[2] * (2 * count * v.shape[3] + window * (q.shape[3] + v.shape[3]))


def _attended(call: Prepared, work: int, arguments: Sequence[Any]) -> list[Tensor]:
    """Run the kernel."""
    function = _function("attention.cpp", "windowed_linear_attention")
    return call.run(function, arguments, threads(work, _GRAIN), _made)


def attention_features(*arguments: Any) -> Tensor:
    """`features_op`'s maps, each token in one pass.

    Raises:
        Unsupported: float64.
        ValueError: as the operator.
    """
    call, work = _mapped(signature(arguments))
    return call.run(_function("features.cpp", "attention_features"), arguments, threads(work, _GRAIN), _made)[0]


@lru_cache(maxsize=_KEPT)
def _mapped(known: Signature) -> tuple[Prepared, int]:
    """The call for arguments like these, and its multiplications."""
    arguments = described(known)
    features_op.check_features(*arguments)
    x, weight, *_, kind, scale = arguments
    columns = 0 if weight is None else weight.shape[2]
    call = Prepared(
        _Features,
        arguments,
        batch=x.shape[0],
        length=x.shape[2],
        columns=columns,
        kind=_KINDS[kind],
        scale=scale,
        largest=LARGEST,
    )
    call.rows(x=0)
    call.dense(weight=1, bias=2, gain_weight=3, gain_bias=4)
    out = (*x.shape[:3], features_op.feature_count(x, weight, kind))
    call.result("out", out)
    return call.ready(), torch.Size(out).numel() * (x.shape[3] if columns else 8)
