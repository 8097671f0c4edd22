# SPDX-License-Identifier: Apache-2.0
"""The CPU's code for ``linear_attention`` and ``hybrid_attention``, two uses of `attention.cpp`, and `features.cpp`.

Inputs in float32, bfloat16 and float16, computed in float32. What it does not do runs the reference: float64, both
directions, a decay per feature, windows by blocks (``"terrace"``) and sinks. Gradients are those of the reference
(`transforms`). A head of states is one thread's work: more threads than heads of queries have nothing to do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.linear_attention import additive, additive_op, features_op, hybrid_op, layout
from rewriter.kernels.linear_attention.feature_maps import LARGEST
from rewriter.kernels.linear_attention.sequence import Inputs, Past, Setting, features, nothing, state_heads
from rewriter.kernels.native import FLAGS, library

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {kind: number for number, kind in enumerate(features_op.KINDS)}
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

    def __init__(self, **numbers: float) -> None:
        self.call = _Call(threads=torch.get_num_threads(), **numbers)
        self.tensors: list[Tensor] = []

    def rows(self, **inputs: Tensor | None) -> None:
        """``[B, h, T, width]`` in any of the three dtypes."""
        for name, x in inputs.items():
            if x is None:
                continue
            x = x if x.stride(3) == 1 else x.contiguous()
            self.tensors.append(x)
            setattr(self.call, name, _rows(name, x))

    def dense(self, dtype: torch.dtype = torch.float32, **inputs: Tensor | None) -> None:
        """Contiguous in ``dtype``."""
        for name, x in inputs.items():
            if x is None:
                continue
            x = x.to(dtype).contiguous()
            self.tensors.append(x)
            setattr(self.call, name, x.data_ptr())

    def decays(self, decay: Tensor | None) -> None:
        """``[B, Hs, positions]`` float32."""
        if decay is None:
            return
        self.tensors.append(decay)
        self.call.decay = decay.data_ptr()
        self.call.decay_batch, self.call.decay_head, self.call.decay_row = decay.stride()

    def run(self) -> None:
        _function("attention.cpp", "windowed_linear_attention")(ctypes.byref(self.call))


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
        batch=batch, heads=heads, states=states, length=length, normalise=normalise == "sum", scale=1, map_factor=scale
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
    out, state, normaliser = _results(given, x.q, x.v, features(x).shape[3])
    if not with_state:
        empty = nothing(x, past)
        return out, empty.k, empty.v, empty.mapped, empty.keep, empty.seen, empty.state, empty.normaliser
    return (out, *_caches(x, past, setting), state, normaliser)


def _results(given: _Arguments, q: Tensor, v: Tensor, features: int) -> additive.Outputs:
    """Run the kernel."""
    call = given.call
    out = torch.empty((call.batch, call.heads, call.length, v.shape[3]))
    state = torch.empty((call.batch, call.states, features, v.shape[3]))
    normaliser = torch.empty((call.batch, call.states, features))
    call.out, call.state_out, call.normaliser_out = out.data_ptr(), state.data_ptr(), normaliser.data_ptr()
    given.run()
    return out.to(q.dtype), state, normaliser


def _caches(x: Inputs, past: Past | None, setting: Setting) -> Iterable[Tensor]:
    """The last positions of keys, values, features and padding, and the number of tokens."""
    length = x.k.shape[2]
    new = min(length, setting.reach)
    keep = None if x.keep is None else x.keep[:, length - new :]

    def joined(recent: Tensor, old: Tensor | None, dim: int) -> Tensor:
        missing = setting.reach - new
        if not missing:
            return layout.fresh(recent)
        shape = list(recent.shape)
        shape[dim] = missing
        return torch.cat([recent.new_zeros(shape) if old is None else old.narrow(dim, -missing, missing), recent], dim)

    for rows, old in ((x.k, past and past.k), (x.v, past and past.v), (features(x), past and past.mapped)):
        yield joined(layout.only(keep, rows[:, :, length - new :]), old, 2)
    yield joined(x.k.new_ones((len(x.k), new), dtype=torch.bool) if keep is None else keep, past and past.keep, 1)
    seen = x.k.new_full((len(x.k),), length, dtype=torch.int64) if x.keep is None else x.keep.sum(-1)
    yield seen if past is None else past.seen + seen


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
    out = torch.empty((*x.shape[:3], features_op.feature_count(x, weight, kind)))
    columns = 0 if weight is None else weight.shape[2]
    pointers = (None if p is None else p.data_ptr() for p in (*parameters, out))
    sizes = (x.shape[0], x.shape[2], columns, _KINDS[kind], torch.get_num_threads())
    call = _Features(_rows("x", x), *pointers, *sizes, scale, LARGEST)
    _function("features.cpp", "attention_features")(ctypes.byref(call))
    return out
