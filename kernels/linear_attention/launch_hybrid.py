# SPDX-License-Identifier: Apache-2.0
"""`hybrid_attention` on a GPU: the states before every chunk's windows, then one sweep over each chunk's window.

Without a past and without sinks keys and values are read where they are; otherwise past and new tokens are joined first,
as the reference does. Features are multiplied in bfloat16 where q is bfloat16, else in float32. The
gradient is in `launch_hybrid_backward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, Unsupported, launch, precision
from rewriter.kernels.linear_attention import hybrid_kernels, kernels
from rewriter.kernels.linear_attention.launch_common import (
    SMALLEST,
    block,
    dense,
    keep_arguments,
    only,
    operands,
    pointer,
)
from rewriter.kernels.linear_attention.sequence import (
    Inputs,
    Past,
    Sequence,
    Setting,
    nothing,
    sequence_of,
    state_heads,
)

WIDEST_HEAD = 128
CHUNK, CHUNK_FLOAT32 = 64, 32
WITH_STATE = 21  # the position of the argument
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Keys:
    """Keys as the kernels read them: ``offset`` rows of the past, then the new ones."""

    k: Tensor
    v: Tensor
    mapped: Tensor | None
    keep: Tensor | None
    rank: Tensor | None
    offset: int
    whole: Sequence | None


def forward(*arguments: Any) -> Outputs:
    """`hybrid_attention`: arguments and results are those of the reference.

    Raises:
        Unsupported: float64, empty tensors, or heads wider than 128.
    """
    call = prepared(*arguments)
    x, keys = call.x, call.keys
    states, zs, last, last_z = call.states()
    out = x.q.new_empty((*x.q.shape[:3], x.v.shape[3]))
    call.outputs(states, zs, out)
    if not arguments[WITH_STATE] or keys.whole is None:
        after = nothing(x, call.past)
        return out, after.k, after.v, after.mapped, after.keep, after.seen, after.state, after.normaliser
    return out, *_left_behind(x, keys.whole, call.past), last, last_z


def prepared(*arguments: Any) -> Call:
    """Check and prepare the operator's arguments; see `forward`."""
    x, caches, options = Inputs(*arguments[:9]), arguments[9:16], arguments[16:]
    past = None if caches[0] is None else Past(*caches)
    setting, with_state, chunk = Setting(*options[:5]), options[5], options[6]
    if x.q.shape[3] > WIDEST_HEAD:
        raise Unsupported(f"heads of {x.q.shape[3]}: wider ones than {WIDEST_HEAD} run the reference")
    q, k, _ = operands(x.q, x.k, x.v)
    if x.q_map is not None and x.k_map is not None:
        operands(x.q_map, x.k_map)
    keys = _keys(x, k, past, setting, with_state)
    size = block(min(chunk, x.q.shape[2]), CHUNK if q.dtype is not torch.float32 else CHUNK_FLOAT32)
    return Call(x, q, keys, past, setting, size)


def _keys(x: Inputs, k: Tensor, past: Past | None, setting: Setting, with_state: bool) -> Keys:
    if past is None and not setting.sinks and not with_state:
        rank = None
        if setting.counts_ranks:
            keep = x.keep if x.keep is not None else torch.ones_like(x.k[:, 0, :, 0], dtype=torch.bool)
            rank = (keep.cumsum(-1) - 1).int()
        return Keys(k, dense(x.v), x.k_map, x.keep, rank, 0, None)
    whole = sequence_of(x, past, setting, fixed=True)
    mapped = None if x.k_map is None else whole.mapped
    rank = whole.rank.int() if setting.counts_ranks else None
    return Keys(whole.k.to(k.dtype), whole.v, mapped, whole.keep, rank, setting.reach, whole)


def _left_behind(x: Inputs, whole: Sequence, past: Past | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The caches after the call but for the state."""
    batch, length = x.k.shape[0], x.k.shape[2]
    new = x.k.new_full((batch,), length, dtype=torch.int64) if x.keep is None else x.keep.sum(-1)
    return (
        torch.cat([whole.sink_k, whole.k[:, :, length:]], dim=2),
        torch.cat([whole.sink_v, whole.v[:, :, length:]], dim=2),
        torch.cat([whole.sink_mapped, whole.mapped[:, :, length:]], dim=2),
        torch.cat([whole.sink_keep, whole.keep[:, length:]], dim=1),
        new if past is None else past.seen + new,
    )


@dataclass(frozen=True)
class Call:
    x: Inputs
    q: Tensor
    keys: Keys
    past: Past | None
    setting: Setting
    size: int

    @property
    def heads(self) -> int:
        return state_heads(self.x.k, self.x.v, self.x.k_map, self.x.log_decay)

    @property
    def chunks(self) -> int:
        return int(triton.cdiv(self.q.shape[2], self.size))

    @property
    def narrow(self) -> bool:
        """Whether features are multiplied as bfloat16."""
        return self.q.dtype is torch.bfloat16

    def decay(self) -> Tensor | None:
        return None if self.x.log_decay is None else self.x.log_decay.float().contiguous()

    def states(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States and normalisers before every chunk's windows, and after the last key that has left the window."""
        (batch, _, length, _), values = self.q.shape, self.x.v.shape[3]
        count = 0 if self.keys.mapped is None else self.keys.mapped.shape[3]
        shape = (batch, self.heads, self.chunks, count)
        states = self.q.new_empty((*shape, values), dtype=torch.bfloat16 if self.narrow else torch.float32)
        zs = self.q.new_empty(shape, dtype=torch.float32)
        last = self.q.new_empty((batch, self.heads, count, values), dtype=torch.float32)
        last_z = self.q.new_empty((batch, self.heads, count), dtype=torch.float32)
        if not count or self.keys.mapped is None:
            return states, zs, last, last_z
        mapped, keep = dense(self.keys.mapped), self.keys.keep
        if self.setting.sinks and self.keys.rank is not None and keep is not None:
            keep = keep & (self.keys.rank >= self.setting.sinks)
        decay = self.decay()
        start = self.keys.offset - self.setting.reach
        arguments = {
            **pointer("k", mapped), **pointer("v", dense(self.keys.v)), **keep_arguments(keep),
            "g_ptr": decay, "g_b": 0, "g_h": 1, "g_t": 0, "g_share": 1 if decay is None else self.heads // len(decay),
            "first_ptr": None if self.past is None else self.past.state.contiguous(),
            "first_z_ptr": None if self.past is None else self.past.normaliser.contiguous(),
            "states_ptr": states, "zs_ptr": zs, "last_ptr": last, "last_z_ptr": last_z,
            "heads": self.heads, "start": start, "length": start + length, "chunks": self.chunks,
            "features": count, "values": values,
            "k_share": self.heads // mapped.shape[1], "v_share": self.heads // self.x.v.shape[1],
        }  # fmt: skip
        constants = {"DECAY": 0 if decay is None else 3, "STORE": True, "BF16": self.narrow, "BT": self.size}
        sizes = {"BF": block(count, 64 if self.narrow else 32), "BV": block(values, 64 if self.narrow else 32)}
        launch(
            kernels.states_kernel,
            lambda c: (batch * self.heads, triton.cdiv(count, c["BF"]), triton.cdiv(values, c["BV"])),
            arguments,
            {**constants, "PRECISION": precision(torch.bfloat16 if self.narrow else torch.float32)},
            [Config(sizes)],
        )
        return states, zs, last, last_z

    def outputs(self, states: Tensor, zs: Tensor, out: Tensor, **numbers: Tensor | None) -> None:
        """Outputs from the states before the windows; ``numbers`` of each query, for the gradient, where given."""
        constants = {
            "MAPS": states.shape[3] > 0, "TERRACE": self.setting.block == "terrace", "SINKS": self.setting.sinks > 0,
            "ABSOLUTE": self.setting.anchor == "none", "BT": self.size, "BD": block(self.q.shape[3], WIDEST_HEAD),
            "PRECISION": precision(self.q.dtype),
        }  # fmt: skip
        none = dict.fromkeys(("top_ptr", "total_ptr", "best_ptr"))
        rows, values = self.q.shape[0] * self.q.shape[1], self.x.v.shape[3]
        launch(
            hybrid_kernels.hybrid_kernel,
            lambda c: (rows, self.chunks, triton.cdiv(values, c["BV"])),
            {**only(self.arguments, hybrid_kernels.hybrid_kernel), **none, **numbers,
             "states_ptr": states, "zs_ptr": zs, "out_ptr": out},
            constants,
            [self._config(states.shape[3], values)],
        )  # fmt: skip

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Of the kernels that read queries and keys, by name."""
        x, keys, setting = self.x, self.keys, self.setting
        (batch, query_heads, length, width), values = self.q.shape, x.v.shape[3]
        return {
            **pointer("q", self.q), **pointer("k", keys.k), **pointer("v", dense(keys.v)), **self._mapped(),
            **self._sinks(), **keep_arguments(keys.keep),
            "rank_ptr": keys.rank, "rank_b": 0 if keys.rank is None else keys.rank.stride(0),
            "gate_ptr": x.gate.contiguous(), "batches": batch,
            "heads": self.heads, "group": query_heads // self.heads, "length": length, "offset": keys.offset,
            "reach": setting.reach, "window": setting.window, "sinks": setting.sinks, "chunks": self.chunks,
            "width": width, "features": 0 if keys.mapped is None else keys.mapped.shape[3], "values": values,
            "scale": setting.scale,
            "k_share": self.heads // keys.k.shape[1], "v_share": self.heads // keys.v.shape[1],
        }  # fmt: skip

    def _mapped(self) -> dict[str, Any]:
        """Features and what belongs to them; without any, pointers that are not followed."""
        x, mapped, decay = self.x, self.keys.mapped, self.decay()
        if x.q_map is None or mapped is None:
            return {
                **pointer("q_map", self.q), **pointer("k_map", self.q), "map_share": 1,
                "map_scale_ptr": None, "decay_ptr": None, "decay_share": 1,
            }  # fmt: skip
        return {
            **pointer("q_map", dense(x.q_map)), **pointer("k_map", dense(mapped)),
            "map_share": self.heads // mapped.shape[1],
            "map_scale_ptr": None if x.map_scale is None else x.map_scale.contiguous(),
            "decay_ptr": decay, "decay_share": 1 if decay is None else self.heads // len(decay),
        }  # fmt: skip

    def _sinks(self) -> dict[str, Any]:
        """The first keys, which every query sees; without any, pointers that are not followed."""
        whole = self.keys.whole
        if not self.setting.sinks or whole is None:
            none = {"sink_keep_ptr": None, "sink_keep_b": 0}
            return {**pointer("sink_k", self.q), **pointer("sink_v", self.q), **none}
        keep = {"sink_keep_ptr": whole.sink_keep, "sink_keep_b": whole.sink_keep.stride(0)}
        return {**pointer("sink_k", dense(whole.sink_k)), **pointer("sink_v", dense(whole.sink_v)), **keep}

    def _config(self, features: int, values: int) -> Config:
        """Two running sums and two kinds of scores leave little room; where ranks and sinks come on top, less."""
        wide = self.q.dtype is torch.float32
        crowded = wide or (self.setting.block == "terrace" and self.setting.sinks > 0)
        few = self.size == SMALLEST and not wide  # a step of decoding
        sizes = {
            "BK": 32 if few or (crowded and not wide) else 16,
            "BF": block(features, 32 if wide else 64),
            "BV": block(values, 32 if crowded else 64),
        }
        return Config(sizes, num_warps=4 if few else 8, num_stages=1 if crowded else 2)


def example(
    dtype: torch.dtype, length: int = 4096, past: bool = False, kind: str = "sliding", sinks: int = 0
) -> tuple[Any, ...]:
    """A call of a model with 32 heads of 64 and 8 of keys, window 64 and 128 features, on the meta device."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    wide = torch.float32
    tensors = (
        empty(2, 32, length, 64), empty(2, 8, length, 64), empty(2, 8, length, 64),
        empty(2, 32, length, 128, of=wide), empty(2, 8, length, 128, of=wide), empty(32, of=wide), empty(32, of=wide),
        None, empty(2, length, of=torch.bool),
    )  # fmt: skip
    slots = sinks + (127 if kind == "terrace" else 63)
    caches: tuple[Any, ...] = (None,) * 7
    if past:
        caches = (
            empty(2, 8, slots, 64), empty(2, 8, slots, 64), empty(2, 8, slots, 128, of=wide),
            empty(2, slots, of=torch.bool), empty(2, of=torch.int64), empty(2, 8, 128, 64, of=wide),
            empty(2, 8, 128, of=wide),
        )  # fmt: skip
    return *tensors, *caches, 0.125, 64, kind, sinks, "max", past, 128


SHIPPED = (
    Shipped("hybrid_attention bf16", forward, partial(example, torch.bfloat16)),
    Shipped("hybrid_attention fp32", forward, partial(example, torch.float32), matrix="none"),
    Shipped("hybrid_attention terrace sinks bf16", forward, partial(example, torch.bfloat16, kind="terrace", sinks=4)),
    Shipped("hybrid_attention step bf16", forward, partial(example, torch.bfloat16, 1, True), matrix="mma"),
)
