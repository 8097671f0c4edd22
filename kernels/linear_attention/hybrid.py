# SPDX-License-Identifier: Apache-2.0
"""Softmax over a window, linear attention over what lies before it, one common normaliser.

    o_n = (γ Σ_{j ∈ W_n} e^{s_nj − c_n} v_j + a_n Σ_{j ∉ W_n} ℓ_nj v_j) / (the same without v)
    s_nj = scale · q_n·k_j,    ℓ_nj = m · e^{λ(n − j)} φ_q(q_n)·φ_k(k_j),    c_n = max over W_n of s_nj

W_n, the keys of query n that stay softmax, all at or before n:

    sliding    n − w < j ≤ n                               (LoLCATs' sliding window)
    terrace    own block of w positions and the previous   (LoLCATs' block form: w + 1 to 2 w keys)
    sinks      besides, the first s keys                   (StreamingLLM, arXiv 2309.17453)

a_n says what the linear terms are measured against:

    anchor "max"     a_n = 1         relative to the row's largest exponential, as in LoLCATs (arXiv 2410.10254)
    anchor "none"    a_n = e^{−c_n}  absolute: ℓ stands for e^{s} itself; here c_n only keeps the exponentials in range
                                     and is the larger of the maximum and the log of the linear mass

No key outside the window ⇒ exactly softmax, whatever γ. Without feature maps there are no linear terms: window
softmax alone. Blocks and sinks are counted over real tokens, so that left padding changes nothing. Padding between
tokens takes room in the window: a sliding one counts it, and a terrace ends after 2 w positions, all a cache holds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.linear_attention import layout
from rewriter.kernels.linear_attention.sequence import (
    Inputs,
    Past,
    Sequence,
    Setting,
    decay_of,
    left_behind,
    memory_of,
    nothing,
    remote,
    sequence_of,
    state_heads,
)

# e^{−c_n} stays finite where there is no linear term for it to scale.
LARGEST_EXPONENT = 80.0


def parallel(x: Inputs, setting: Setting) -> Tensor:
    """The definition over all pairs of a sequence, quadratic in T: the outputs ``[B, H, T, Dv]``."""
    (batch, heads, length, _), dtype = x.q.shape, layout.wide(x.q.dtype)

    def by_head(value: Tensor) -> Tensor:
        return value.to(dtype).repeat_interleave(heads // value.shape[0], 0).reshape(-1, 1, 1)

    def every_head(value: Tensor) -> Tensor:
        return layout.only(x.keep, value.to(dtype)).repeat_interleave(heads // value.shape[1], 1)

    keep = x.q.new_ones((batch, length), dtype=torch.bool) if x.keep is None else x.keep
    rank, position = keep.cumsum(-1) - 1, torch.arange(length, device=x.q.device)
    distance = position[:, None] - position
    near = distance < setting.window
    if setting.block == "terrace":
        blocks = rank.div(setting.window, rounding_mode="floor")
        near = (blocks.unsqueeze(-2) >= blocks.unsqueeze(-1) - 1) & (distance <= setting.reach)
    near = near | (rank < setting.sinks).unsqueeze(-2)
    visible = (distance >= 0) & keep.unsqueeze(-2)
    soft = (visible & near).unsqueeze(1)
    scores = (x.q.to(dtype) @ every_head(x.k).mT * setting.scale).masked_fill(~soft, -torch.inf)
    top, linear = scores.amax(-1, keepdim=True), torch.zeros_like(scores)
    if x.q_map is not None and x.k_map is not None:
        linear = x.q_map.to(dtype) @ every_head(x.k_map).mT
        if x.map_scale is not None:
            linear = linear * by_head(x.map_scale)
        if x.log_decay is not None:
            linear = linear * (by_head(x.log_decay) * distance.clamp(min=0)).exp()
        linear = linear.masked_fill(~(visible & ~near).unsqueeze(1), 0.0)
    top, anchor = _anchored(top, linear.sum(-1, keepdim=True), setting)
    weight = by_head(x.gate) * (scores - top).exp() + anchor * linear
    return _ratio(weight @ F.pad(every_head(x.v), (0, 1), value=1.0)).to(x.q.dtype)


def chunked(
    x: Inputs, past: Past | None, setting: Setting, with_state: bool, chunk: int, *, dynamic: bool = False
) -> tuple[Tensor, Past]:
    """Blocks of queries against the keys their windows reach, and the state before: linear in T. The operator.

    Args:
        past: from an earlier call, or None at the start of a sequence.
        with_state: return what the next call needs; otherwise the caches returned are empty.
        chunk: queries per block; at least the window's reach is used.
        dynamic: T is symbolic (tracing): no Python loop over blocks, see `layout.starts`.
    """
    whole = sequence_of(x, past, setting, fixed=dynamic or with_state or past is not None)
    out = _attend(x, whole, past, setting, chunk, dynamic)
    return out, left_behind(x, whole, past, setting) if with_state else nothing(x, past)


def recurrent(x: Inputs, past: Past | None, setting: Setting) -> tuple[Tensor, Past]:
    """One token at a time through caches of constant size."""
    outputs = []
    for t in range(x.q.shape[2]):
        now = slice(t, t + 1)
        step = dataclasses.replace(
            x,
            q=x.q[:, :, now],
            k=x.k[:, :, now],
            v=x.v[:, :, now],
            q_map=None if x.q_map is None else x.q_map[:, :, now],
            k_map=None if x.k_map is None else x.k_map[:, :, now],
            keep=None if x.keep is None else x.keep[:, now],
        )
        out, past = chunked(step, past, setting, True, 1)
        outputs.append(out)
    if past is None:
        raise ValueError("a sequence without tokens leaves nothing behind")
    return torch.cat(outputs, dim=2), past


@dataclass(frozen=True)
class _Blocks:
    """N blocks of C queries; each sees C + R positions, its own and the R before."""

    count: int
    size: int
    reach: int
    length: int

    def windows(self, x: Tensor) -> Tensor:
        """``[..., R + T, F]`` -> ``[..., N, C + R, F]``; after the end the last position again, which masks hide."""
        position = self._index(x).clamp(max=self.reach + self.length - 1)
        flat = x.index_select(-2, position.flatten())
        return flat.unflatten(-2, (self.count, self.size + self.reach))

    def taken_up(self, x: Tensor) -> Tensor:
        """``[..., R + T, F]`` -> ``[..., N, C, F]``: what each block adds to the state of the next."""
        return layout.cut(x[..., : self.length, :], self.count, self.size)

    def distance(self, like: Tensor) -> Tensor:
        """Query position minus key position, ``[C, C + R]``."""
        row = torch.arange(self.size, device=like.device)
        column = torch.arange(self.size + self.reach, device=like.device)
        return row[:, None] + self.reach - column

    def masks(self, whole: Sequence, setting: Setting) -> tuple[Tensor, Tensor]:
        """Where the softmax and where the linear terms are, both ``[B, 1, 1, N, C, C + R]``."""
        distance = self.distance(whole.keep)
        inside = self._index(whole.keep) < self.reach + self.length
        keep = self._of_keys(whole.keep.unsqueeze(-1)) & inside[:, None, :]
        visible = (distance >= 0) & keep
        near = distance < setting.window
        if setting.counts_ranks:
            rank = self._of_keys(whole.rank.unsqueeze(-1))
            visible = visible & (rank >= setting.sinks)
            if setting.block == "terrace":
                own = self._of_queries(whole.rank.unsqueeze(-1))
                before = own.div(setting.window, rounding_mode="floor") - 1
                near = (rank.div(setting.window, rounding_mode="floor") >= before) & (distance <= setting.reach)
        return (visible & near)[:, None, None], (visible & ~near)[:, None, None]

    def sink_mask(self, whole: Sequence, setting: Setting) -> Tensor:
        """``[B, 1, 1, N, C, s]``: sinks that exist and are not after the query."""
        number = torch.arange(setting.sinks, device=whole.keep.device)
        visible = (self._of_queries(whole.rank.unsqueeze(-1)) >= number) & whole.sink_keep[:, None, None, :]
        return visible[:, None, None]

    def _of_keys(self, x: Tensor) -> Tensor:
        """``[B, R + T, 1]`` -> ``[B, N, 1, C + R]``."""
        return self.windows(x).mT

    def _of_queries(self, x: Tensor) -> Tensor:
        """``[B, R + T, 1]`` -> ``[B, N, C, 1]``."""
        return self.windows(x)[..., self.reach :, :]

    def _index(self, like: Tensor) -> Tensor:
        """Positions ``[N, C + R]`` of the windows, also after the end."""
        block = torch.arange(self.count, device=like.device)[:, None] * self.size
        return block + torch.arange(self.size + self.reach, device=like.device)


def _attend(x: Inputs, whole: Sequence, past: Past | None, setting: Setting, chunk: int, dynamic: bool) -> Tensor:
    """The outputs, ``[B, H, T, Dv]`` in q's dtype."""
    dtype, heads = layout.wide(x.q.dtype), state_heads(x.k, x.v, x.k_map, x.log_decay)
    length, total = x.q.shape[2], whole.k.shape[2]
    reach = total - length if not dynamic else setting.reach
    size = max(chunk, reach + 1) if dynamic else min(max(chunk, reach + 1), max(length, 1))
    count = layout.block_count(length, size, dynamic)
    blocks = _Blocks(count, size, reach, length)

    q = layout.cut(layout.grouped(x.q.to(dtype) * setting.scale, heads), count, size)
    near_k = blocks.windows(layout.spread(whole.k.to(dtype), heads))
    values = layout.spread(F.pad(whole.v.to(dtype), (0, 1), value=1.0), heads)
    soft, linear = blocks.masks(whole, setting)

    scores = (q @ near_k.mT).masked_fill(~soft, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    if setting.sinks:
        sink_scores = q @ layout.spread(whole.sink_k.to(dtype), heads).unsqueeze(-3).mT
        sink_scores = sink_scores.masked_fill(~blocks.sink_mask(whole, setting), -torch.inf)
        top = torch.maximum(top, sink_scores.amax(-1, keepdim=True))
    local = before = mass = scores.new_zeros(())
    if x.q_map is not None:
        local, before = _linear(x, x.q_map, blocks, remote(whole, setting, heads, dtype), linear, past, heads, dynamic)
        mass = local.sum(-1, keepdim=True) + before[..., -1:]
    top, anchor = _anchored(top, mass, setting)
    gate = layout.grouped(x.gate.to(dtype).reshape(1, -1, 1, 1, 1), heads)
    raw = (gate * (scores - top).exp() + anchor * local) @ blocks.windows(values) + anchor * before
    if setting.sinks:
        sink_v = layout.spread(F.pad(whole.sink_v.to(dtype), (0, 1), value=1.0), heads).unsqueeze(-3)
        raw = raw + (gate * (sink_scores - top).exp()) @ sink_v
    return layout.join(_ratio(raw), length).flatten(1, 2).to(x.q.dtype).contiguous()


def _linear(
    x: Inputs,
    q_map: Tensor,
    blocks: _Blocks,
    gone: tuple[Tensor, Tensor],
    mask: Tensor,
    past: Past | None,
    heads: int,
    dynamic: bool,
) -> tuple[Tensor, Tensor]:
    """Linear weights of the keys at hand ``[..., N, C, C + R]`` and the state's part ``[..., N, C, Dv + 1]``."""
    keys, values = gone
    q = layout.grouped(q_map.to(keys.dtype), heads)
    if x.map_scale is not None:
        q = q * layout.grouped(x.map_scale.to(keys.dtype).reshape(1, -1, 1, 1), heads)
    q = layout.cut(q, blocks.count, blocks.size)
    scores = q @ blocks.windows(keys).mT
    taken_k, taken_v = blocks.taken_up(keys), blocks.taken_up(values)
    total, decay = None, decay_of(x, heads, keys)
    if decay is not None:
        decay = decay.unsqueeze(-3)  # [1, Hs, 1, 1, 1, 1]
        scores = scores * (decay * blocks.distance(q).clamp(min=0)).exp()
        own = torch.arange(blocks.size, device=q.device)[:, None]
        q = q * (decay * (own + blocks.reach + 1)).exp()
        taken_k = taken_k * (decay * (blocks.size - 1 - own)).exp()
        total = (decay * blocks.size).expand(-1, -1, -1, blocks.count, -1, -1)
    states = layout.starts(memory_of(past, keys, values), taken_k.mT @ taken_v, total, dynamic)
    return scores.masked_fill(~mask, 0.0), q @ states[..., :-1, :, :]


def _anchored(top: Tensor, mass: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """c_n from the maxima of the softmax part and the linear masses, both ``[..., 1]``, and the factor a_n."""
    if setting.anchor == "max":
        return torch.where(top == -torch.inf, 0.0, top), torch.ones_like(top)
    # Only a common factor of the two sums: their ratio does not depend on it, so it carries no gradient.
    top = torch.maximum(top.detach(), mass.detach().clamp(min=0.0).log())
    top = torch.where(top == -torch.inf, 0.0, top)
    return top, (-top).clamp(max=LARGEST_EXPONENT).exp()


def _ratio(raw: Tensor) -> Tensor:
    """Weighted sum over sum of weights, the last column; 0 for a query without keys."""
    total = raw[..., -1:]
    return raw[..., :-1] / torch.where(total == 0, 1.0, total)
