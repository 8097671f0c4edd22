# SPDX-License-Identifier: Apache-2.0
"""The CPU's code for ``linear_attention`` and ``hybrid_attention``, two uses of `attention.cpp`, and `features.cpp`.

Inputs in float32, bfloat16 and float16, computed in float32. What it does not do runs the reference: float64, both
directions, a decay per feature, windows by blocks (``"terrace"``) and sinks. Gradients are those of the reference
(`transforms`). A head of states is one thread's work: more threads than heads of queries have nothing to do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.linear_attention import additive, additive_op, features_op, hybrid_op, layout
from rewriter.kernels.linear_attention.feature_maps import LARGEST
from rewriter.kernels.linear_attention.sequence import features, nothing, state_heads, tokens_seen
from rewriter.kernels.native import FLAGS, library, threads

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {kind: number for number, kind in enumerate(features_op.KINDS)}
_GRAIN = 1 << 20  # multiplications that take longer than waking a thread
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", _POINTER),
        *((name, _INT) for name in ("heads", "batch", "head", "row", "width", "type")),
    )


def _rows(name: str, x: Tensor) -> _Rows:
    """``[B, h, T, width]``, dense in its last dimension."""
    if x.dtype not in _TYPES:
        raise Unsupported(f"the CPU kernels of linear attention compute in float32; {name} is {x.dtype}")
    return _Rows(x.data_ptr(), x.shape[1], *x.stride()[:3], x.shape[3], _TYPES[x.dtype])


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Rows) for name in ("q", "k", "v", "q_map", "k_map", "past_k", "past_v", "past_map")),
        *((name, _POINTER) for name in ("keep", "past_keep", "gate", "map_scale", "decay")),
        *((name, _INT) for name in ("decay_batch", "decay_head", "decay_row")),
        *((name, _POINTER) for name in ("state", "normaliser", "out", "state_out", "normaliser_out")),
        *((name, _POINTER) for name in ("k_left", "v_left", "map_left", "keep_left")),
        *((name, _INT) for name in ("batch", "heads", "states", "length", "before", "window")),
        *((name, _INT) for name in ("absolute", "normalise", "threads")),
        *((name, _FLOAT) for name in ("scale", "map_factor")),
    )


class _Features(ctypes.Structure):
    _fields_ = (
        ("x", _Rows),
        *((name, _POINTER) for name in ("weight", "bias", "gain_weight", "gain_bias", "out")),
        *((name, _INT) for name in ("batch", "length", "columns", "kind", "threads")),
        *((name, _FLOAT) for name in ("scale", "largest")),
    )


class _Arguments:
    """A `_Call`, and the tensors it points to."""

    def __init__(self, work: int, **numbers: float) -> None:
        self.call = _Call(threads=threads(work, _GRAIN), **numbers)
        self.tensors: list[Tensor] = []

    def rows(self, **inputs: Tensor | None) -> None:
        """``[B, h, T, width]`` in any of the three dtypes."""
        for name, x in inputs.items():
            if x is not None:
                x = x if x.stride(3) == 1 else x.contiguous()
                self.tensors.append(x)
                setattr(self.call, name, _rows(name, x))

    def dense(self, dtype: torch.dtype = torch.float32, **tensors: Tensor | None) -> None:
        """Contiguous in ``dtype``."""
        for name, x in tensors.items():
            if x is not None:
                x = x.to(dtype).contiguous()
                self.tensors.append(x)
                setattr(self.call, name, x.data_ptr())

    def decays(self, decay: Tensor | None) -> None:
        """``[B, Hs, positions]`` float32."""
        if decay is not None:
            self.tensors.append(decay)
            self.call.decay = decay.data_ptr()
            self.call.decay_batch, self.call.decay_head, self.call.decay_row = decay.stride()

    def run(self) -> None:
        _function("attention.cpp", "windowed_linear_attention")(ctypes.byref(self.call))


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
    additive_op._check_additive(*arguments)
    q, k, v, log_decay, keep, state, normaliser, scale, causal, normalise, _ = arguments
    if not causal:
        raise Unsupported("both directions are two products of matrices: the reference")
    if log_decay is not None and log_decay.dim() == 4:
        raise Unsupported("decays per feature")
    (batch, heads, length, _), states = q.shape, additive.state_heads(k, v, log_decay)
    given = _Arguments(
        _work(q, v, q, 0),
        batch=batch,
        heads=heads,
        states=states,
        length=length,
        normalise=normalise == "sum",
        scale=1,
        map_factor=scale,
    )
    given.rows(q_map=q, k_map=k, v=v)
    given.dense(state=state, normaliser=normaliser)
    given.dense(torch.bool, keep=keep)
    if log_decay is not None:
        # [B, Hs, 1, T, 1]
        given.decays(layout.decays(log_decay, keep, k.new_empty(k.shape, dtype=torch.float32), states)[:, :, 0, :, 0])
    return _results(given, q, v, k.shape[3])


def hybrid_attention(*arguments: Any) -> hybrid_op.Outputs:
    """`hybrid.chunked`, blocks of its own size.

    Raises:
        Unsupported: see above.
        ValueError: as the operator.
    """
    x, past, setting, with_state, _ = hybrid_op._parts(*arguments)
    if setting.sinks or setting.block != "sliding":
        raise Unsupported("sinks and windows by blocks")
    (batch, heads, length, _), states = x.q.shape, state_heads(x.k, x.v, x.k_map, x.log_decay)
    given = _Arguments(
        _work(x.q, x.v, x.q_map, setting.window),
        batch=batch,
        heads=heads,
        states=states,
        length=length,
        before=0 if past is None else setting.reach,
        window=setting.window,
        absolute=setting.anchor == "none",
        normalise=True,
        scale=setting.scale,
        map_factor=1,
    )
    given.rows(q=x.q, k=x.k, v=x.v, q_map=x.q_map, k_map=x.k_map)
    given.dense(gate=x.gate, map_scale=x.map_scale)
    given.dense(torch.bool, keep=x.keep)
    if past is not None:
        given.rows(past_k=past.k, past_v=past.v, past_map=past.mapped if x.q_map is not None else None)
        given.dense(torch.bool, past_keep=past.keep)
        if x.q_map is not None:
            given.dense(state=past.state, normaliser=past.normaliser)
    if x.log_decay is not None:
        decay = x.log_decay.float().clamp(min=layout.LOWEST_LOG_DECAY).repeat_interleave(states // len(x.log_decay))
        given.decays(decay[None, :, None].expand(batch, -1, given.call.before + length))
    if not with_state:
        out, *_ = _results(given, x.q, x.v, features(x).shape[3])
        empty = nothing(x, past)
        return out, empty.k, empty.v, empty.mapped, empty.keep, empty.seen, empty.state, empty.normaliser
    left = [_made((batch, t.shape[1], setting.reach, t.shape[3]), t.dtype) for t in (x.k, x.v, features(x))]
    left.append(_made((batch, setting.reach), torch.bool))
    given.call.k_left, given.call.v_left, given.call.map_left, given.call.keep_left = (t.data_ptr() for t in left)
    out, state, normaliser = _results(given, x.q, x.v, features(x).shape[3])
    return out, left[0], left[1], left[2], left[3], tokens_seen(x, past), state, normaliser


def _work(q: Tensor, v: Tensor, q_map: Tensor | None, window: int) -> int:
    """Multiplications, about: what decides how many threads are worth waking."""
    features = 0 if q_map is None else q_map.shape[3]
    return q.shape[0] * q.shape[1] * q.shape[2] * (2 * features * v.shape[3] + window * (q.shape[3] + v.shape[3]))


def _results(given: _Arguments, q: Tensor, v: Tensor, features: int) -> additive.Outputs:
    """Run the kernel."""
    call = given.call
    out = _made((call.batch, call.heads, call.length, v.shape[3]))
    state = _made((call.batch, call.states, features, v.shape[3]))
    normaliser = _made((call.batch, call.states, features))
    call.out, call.state_out, call.normaliser_out = out.data_ptr(), state.data_ptr(), normaliser.data_ptr()
    given.run()
    return out.to(q.dtype), state, normaliser


def attention_features(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gain_weight: Tensor | None,
    gain_bias: Tensor | None,
    kind: str,
    scale: float,
) -> Tensor:
    """`features_op`'s maps, each token in one pass.

    Raises:
        Unsupported: float64.
        ValueError: as the operator.
    """
    features_op.check_features(x, weight, bias, gain_weight, gain_bias, kind, scale)
    x = x if x.stride(3) == 1 else x.contiguous()
    parameters = [None if p is None else p.float().contiguous() for p in (weight, bias, gain_weight, gain_bias)]
    out = _made((*x.shape[:3], features_op.feature_count(x, weight, kind)))
    columns = 0 if weight is None else weight.shape[2]
    pointers = (None if p is None else p.data_ptr() for p in (*parameters, out))
    workers = threads(out.numel() * (x.shape[3] if columns else 8), _GRAIN)
    sizes = (x.shape[0], x.shape[2], columns, _KINDS[kind], workers)
    call = _Features(_rows("x", x), *pointers, *sizes, scale, LARGEST)
    _function("features.cpp", "attention_features")(ctypes.byref(call))
    return out
