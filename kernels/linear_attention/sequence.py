# SPDX-License-Identifier: Apache-2.0
"""What goes through hybrid attention: its inputs, the caches of constant size, and the sequence made of both.

A cache holds the sinks (the first s real tokens) and the last ``reach`` positions; keys that leave the window are
added to the state and forgotten. Slots not yet filled are marked as padding, so that shapes never change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.linear_attention import layout


@dataclass(frozen=True)
class Setting:
    """The options of the operator."""

    scale: float
    window: int
    block: str
    sinks: int
    anchor: str

    @property
    def reach(self) -> int:
        """How many keys before its own a query may see through the window: the length of the cache."""
        return (2 * self.window if self.block == "terrace" else self.window) - 1

    @property
    def counts_ranks(self) -> bool:
        """Whether the window depends on a token's number, and not on distances alone."""
        return self.sinks > 0 or self.block == "terrace"


@dataclass(frozen=True)
class Inputs:
    """The tensors of the operator, as its schema has them."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, hk, T, D]
    v: Tensor  # [B, hv, T, Dv]
    q_map: Tensor | None  # [B, H, T, F]
    k_map: Tensor | None  # [B, hm, T, F]
    gate: Tensor  # [H], γ
    map_scale: Tensor | None  # [H], m
    log_decay: Tensor | None  # [hd], λ
    keep: Tensor | None  # [B, T]


@dataclass(frozen=True)
class Past:
    """What a sequence leaves behind: constant size, whatever its length.

    Slots are the sinks, then the last ``reach`` positions, the newest last; ``keep`` is False where none is there yet.
    """

    k: Tensor  # [B, hk, slots, D]
    v: Tensor  # [B, hv, slots, Dv]
    mapped: Tensor  # [B, hm, slots, F]
    keep: Tensor  # [B, slots]
    seen: Tensor  # [B] int64: real tokens so far
    state: Tensor  # [B, Hs, F, Dv]: keys that have left the window
    normaliser: Tensor  # [B, Hs, F]


def state_heads(k: Tensor, v: Tensor, k_map: Tensor | None, log_decay: Tensor | None) -> int:
    """Number of states: the largest number of heads among keys, values, key features and decays."""
    others = (1 if k_map is None else k_map.shape[1], 1 if log_decay is None else log_decay.shape[0])
    return max(k.shape[1], v.shape[1], *others)


@dataclass(frozen=True)
class Sequence:
    """Window slots of the past, then the new tokens, ``R + T`` positions; and the sinks. Padding holds zeros."""

    k: Tensor  # [B, hk, R + T, D]
    v: Tensor  # [B, hv, R + T, Dv]
    mapped: Tensor  # [B, hm, R + T, F]
    keep: Tensor  # [B, R + T]
    rank: Tensor  # [B, R + T]: the number of the token among the real ones
    sink_k: Tensor  # [B, hk, s, D]
    sink_v: Tensor  # [B, hv, s, Dv]
    sink_mapped: Tensor  # [B, hm, s, F]
    sink_keep: Tensor  # [B, s]


def sequence_of(x: Inputs, past: Past | None, setting: Setting, fixed: bool) -> Sequence:
    """Join past and new tokens.

    Args:
        fixed: keep all slots even at the start of a sequence, where a short one needs only as many as it is long.
    """
    batch, length = x.k.shape[0], x.k.shape[2]
    reach = setting.reach if fixed else min(setting.reach, max(length - 1, 0))
    keep = x.keep if x.keep is not None else torch.ones_like(x.k[:, 0, :, 0], dtype=torch.bool)
    seen = keep.new_zeros(batch, dtype=torch.int64) if past is None else past.seen
    rank = seen.unsqueeze(-1) + keep.cumsum(-1) - 1
    if past is None:
        ring_keep, sink_keep = keep.new_zeros((batch, reach)), keep.new_zeros((batch, setting.sinks))
    else:
        sink_keep, ring_keep = past.keep[:, : setting.sinks], past.keep[:, setting.sinks :]
    ring_rank = seen.unsqueeze(-1) - ring_keep.flip(-1).cumsum(-1).flip(-1)
    number = torch.arange(setting.sinks, device=keep.device)
    becomes = (rank.unsqueeze(-2) == number[:, None]) & keep.unsqueeze(-2)  # [B, s, T]

    def joined(new: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
        new = layout.only(x.keep, new)
        sink = becomes.unsqueeze(1).to(new.dtype) @ new
        if old is None:
            return F.pad(new, (0, 0, reach, 0)), sink
        return torch.cat([old[:, :, setting.sinks :], new], dim=2), old[:, :, : setting.sinks] + sink

    k, sink_k = joined(x.k, None if past is None else past.k)
    v, sink_v = joined(x.v, None if past is None else past.v)
    mapped, sink_mapped = joined(features(x), None if past is None else past.mapped)
    keep, rank = torch.cat([ring_keep, keep], dim=-1), torch.cat([ring_rank, rank], dim=-1)
    return Sequence(k, v, mapped, keep, rank, sink_k, sink_v, sink_mapped, sink_keep | becomes.any(-1))


def features(x: Inputs) -> Tensor:
    """The features of the keys; without feature maps of width 0."""
    return x.k[..., :0] if x.k_map is None else x.k_map


def remote(whole: Sequence, setting: Setting, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features and [v, 1] as the state takes them up: ``[B, Hs, 1, R + T, ·]``; sinks and padding add nothing."""
    mapped = whole.mapped.to(dtype)
    if setting.sinks:
        mapped = layout.only(whole.keep & (whole.rank >= setting.sinks), mapped)
    ones = whole.keep.to(dtype)[:, None, :, None].expand(-1, whole.v.shape[1], -1, -1)
    return layout.spread(mapped, heads), layout.spread(torch.cat([whole.v.to(dtype), ones], dim=-1), heads)


def memory_of(past: Past | None, keys: Tensor, values: Tensor) -> Tensor:
    """The state before the sequence, ``[B, Hs, 1, F, Dv + 1]``."""
    if past is None:
        return keys.new_zeros((*keys.shape[:3], keys.shape[-1], values.shape[-1]))
    return torch.cat([past.state, past.normaliser.unsqueeze(-1)], dim=-1).to(keys.dtype).unsqueeze(2)


def decay_of(x: Inputs, heads: int, like: Tensor) -> Tensor | None:
    """λ as ``[1, Hs, 1, 1, 1]``."""
    if x.log_decay is None:
        return None
    decay = x.log_decay.to(like.dtype).clamp(min=layout.LOWEST_LOG_DECAY)
    return layout.spread(decay.reshape(1, -1, 1, 1), heads)


def left_behind(x: Inputs, whole: Sequence, past: Past | None, setting: Setting) -> Past:
    """What the next call needs."""
    length = x.k.shape[2]
    memory = _final_state(x, whole, past, setting)
    return Past(
        torch.cat([whole.sink_k, whole.k[:, :, length:]], dim=2),
        torch.cat([whole.sink_v, whole.v[:, :, length:]], dim=2),
        torch.cat([whole.sink_mapped, whole.mapped[:, :, length:]], dim=2),
        torch.cat([whole.sink_keep, whole.keep[:, length:]], dim=1),
        tokens_seen(x, past),
        layout.fresh(memory[..., :-1]),
        layout.fresh(memory[..., -1]),
    )


def nothing(x: Inputs, past: Past | None) -> Past:
    """Empty caches, for callers that do not go on."""
    batch, heads = x.k.shape[0], state_heads(x.k, x.v, x.k_map, x.log_decay)
    state = x.q.new_empty((batch, heads, 0, x.v.shape[3]), dtype=layout.wide(x.q.dtype))
    k, v, mapped = (t.new_empty((batch, t.shape[1], 0, t.shape[3])) for t in (x.k, x.v, features(x)))
    keep = x.k.new_empty((batch, 0), dtype=torch.bool)
    return Past(k, v, mapped, keep, tokens_seen(x, past), state, state.new_empty((batch, heads, 0)))


def _final_state(x: Inputs, whole: Sequence, past: Past | None, setting: Setting) -> Tensor:
    """``[B, Hs, F, Dv + 1]`` over all keys that have left the window."""
    length, heads = x.k.shape[2], state_heads(x.k, x.v, x.k_map, x.log_decay)
    keys, values = remote(whole, setting, heads, layout.wide(x.q.dtype))
    memory, taken, decay = memory_of(past, keys, values), keys[..., :length, :], decay_of(x, heads, keys)
    if decay is not None:
        position = torch.arange(length, device=keys.device)[:, None]
        memory = memory * (decay * length).exp()
        taken = taken * (decay * (length - 1 - position)).exp()
    return (memory + taken.mT @ values[..., :length, :]).squeeze(2)


def tokens_seen(x: Inputs, past: Past | None) -> Tensor:
    """Real tokens so far, ``[B]`` int64."""
    batch, length = x.k.shape[0], x.k.shape[2]
    new = x.k.new_full((batch,), length, dtype=torch.int64) if x.keep is None else x.keep.sum(-1)
    return new if past is None else past.seen + new
