# SPDX-License-Identifier: Apache-2.0
"""Linear attention with the additive rule, in three forms that differ by rounding only.

    S_t = e^{g_t} S_{t−1} + k_t v_tᵀ,    z_t = e^{g_t} z_{t−1} + k_t,    o_t = scale · q_tᵀ S_t  (/ scale · q_tᵀ z_t)

    parallel    o = (Q Kᵀ ⊙ D) V,  D_ij = e^{b_i − b_j} for j ≤ i,  b = running sum of g
    chunked     per chunk  o = (Q ⊙ e^b) S + (Q Kᵀ ⊙ D) V,   S ← e^{b_C} S + (K ⊙ e^{b_C − b})ᵀ V
    recurrent   the definition, one step at a time

Without decays g this is Katharopoulos et al. (arXiv 2006.16236); a decay per head gives RetNet (2307.08621) and
Lightning Attention (2401.04658), a gate per feature GLA (2312.06635), whose chunked form this follows. Queries and
keys come already mapped (`rewriter.kernels.linear_attention.feature_maps`).

The normaliser z is carried as one more column of the state: values become [v, 1]. A row whose sum of weights is 0
(all keys are padding, or no feature of the query is on) is 0. Padding contributes nothing and does not decay, so that
results are those of the sequence without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.linear_attention import layout

Outputs = tuple[Tensor, Tensor, Tensor]

# Chunks of a gate per feature compare all pairs of a chunk feature by feature: [size, size, F] numbers.
PAIRWISE_CHUNK = 16


@dataclass(frozen=True)
class _Operands:
    """The operator's inputs, wide, padding removed, grouped by state (see `layout`)."""

    q: Tensor  # [B, Hs, group, T, F], scaled
    k: Tensor  # [B, Hs, 1, T, F]
    v: Tensor  # [B, Hs, 1, T, Dv + 1], the last column 1
    decay: Tensor | None  # [B, Hs, 1, T, 1 or F]
    memory: Tensor  # [B, Hs, 1, F, Dv + 1]

    @property
    def by_feature(self) -> bool:
        """Whether each feature of a step has a decay of its own."""
        return self.decay is not None and self.decay.shape[-1] > 1


def state_heads(k: Tensor, v: Tensor, log_decay: Tensor | None) -> int:
    """Number of states: the largest number of heads among keys, values and decays."""
    decay_heads = 1 if log_decay is None else log_decay.shape[0 if log_decay.dim() == 1 else 1]
    return max(k.shape[1], v.shape[1], decay_heads)


def parallel(
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
) -> Outputs:
    """All pairs at once: the shortest form, quadratic in T (times F with a gate per feature)."""
    x = _operands(q, k, v, log_decay, keep, state, normaliser, scale)
    if not causal:
        return _bidirectional(x, q, normalise)
    seen = layout.lower(q.shape[2], q)
    if x.decay is None:
        scores, early, late = (x.q @ x.k.mT).masked_fill(~seen, 0.0), x.q, x.k
        memory = x.memory
    else:
        running = x.decay.cumsum(-2)
        scores = _scores(x.q, x.k, running, seen)
        early, late = x.q * running.exp(), x.k * (running[..., -1:, :] - running).exp()
        memory = x.memory * running[..., -1:, :].mT.exp()
    return _results(early @ x.memory + scores @ x.v, memory + late.mT @ x.v, q, normalise)


def chunked(
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
) -> Outputs:
    """Within chunks all pairs, between chunks the state: linear in T. What the operator runs.

    Args:
        chunk: positions per chunk; at most 16 are used with a gate per feature.
        dynamic: T is symbolic (tracing): no Python loop over chunks, see `layout.starts`.
    """
    x = _operands(q, k, v, log_decay, keep, state, normaliser, scale)
    if not causal:
        return _bidirectional(x, q, normalise)
    length = q.shape[2]
    size = min(chunk, PAIRWISE_CHUNK) if x.by_feature else chunk
    count = layout.block_count(length, size, dynamic)
    queries, keys, values = (layout.cut(part, count, size) for part in (x.q, x.k, x.v))
    seen = layout.lower(size, q)
    if x.decay is None:
        scores, total = (queries @ keys.mT).masked_fill(~seen, 0.0), None
    else:
        running = layout.cut(x.decay, count, size).cumsum(-2)
        scores = _scores(queries, keys, running, seen)
        total = running[..., -1:, :].mT
        queries, keys = queries * running.exp(), keys * (running[..., -1:, :] - running).exp()
    states = layout.starts(x.memory, keys.mT @ values, total, dynamic)
    out = queries @ states[..., :-1, :, :] + scores @ values
    return _results(layout.join(out, length), states[..., -1, :, :], q, normalise)


def recurrent(
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
) -> Outputs:
    """The definition: one outer product per step, O(1) memory."""
    x = _operands(q, k, v, log_decay, keep, state, normaliser, scale)
    memory, outputs = x.memory, []
    for t in range(k.shape[2]):
        if x.decay is not None:
            memory = memory * x.decay[..., t, :].exp().unsqueeze(-1)
        memory = memory + x.k[..., t, :].unsqueeze(-1) * x.v[..., t, :].unsqueeze(-2)
        if causal:
            outputs.append(x.q[..., t : t + 1, :] @ memory)
    out = torch.cat(outputs, dim=-2) if causal else x.q @ memory
    return _results(out, memory, q, normalise)


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    normaliser: Tensor | None,
    scale: float,
) -> _Operands:
    dtype, heads = layout.wide(q.dtype), state_heads(k, v, log_decay)
    keys, values = layout.only(keep, k.to(dtype)), layout.only(keep, F.pad(v.to(dtype), (0, 1), value=1.0))
    if state is None or normaliser is None:
        memory = keys.new_zeros((k.shape[0], heads, k.shape[3], v.shape[3] + 1))
    else:
        memory = torch.cat([state, normaliser.unsqueeze(-1)], dim=-1).to(dtype)
    return _Operands(
        layout.grouped(q.to(dtype) * scale, heads),
        layout.spread(keys, heads),
        layout.spread(values, heads),
        None if log_decay is None else layout.decays(log_decay, keep, keys, heads),
        memory.unsqueeze(2),
    )


def _scores(q: Tensor, k: Tensor, running: Tensor, seen: Tensor) -> Tensor:
    """Σ_d q_id k_jd e^{b_id − b_jd} for the pairs ``seen``, ``[..., T, T]``."""
    weight = layout.pairwise(running, seen)
    if running.shape[-1] == 1:
        return (q @ k.mT) * weight.squeeze(-1)
    return torch.einsum("...id,...jd,...ijd->...ij", q, k, weight)


def _bidirectional(x: _Operands, q: Tensor, normalise: str) -> Outputs:
    """Every query sees every key: S = Σ_j k_j v_jᵀ."""
    memory = x.memory + x.k.mT @ x.v
    return _results(x.q @ memory, memory, q, normalise)


def _results(raw: Tensor, memory: Tensor, q: Tensor, normalise: str) -> Outputs:
    """raw ``[B, Hs, group, T, Dv + 1]``, its last column the sums of weights -> the operator's outputs."""
    out = raw[..., :-1]
    if normalise == "sum":
        weight = raw[..., -1:]
        out = out / torch.where(weight == 0, 1.0, weight)
    memory = memory.squeeze(2)
    return out.flatten(1, 2).to(q.dtype).contiguous(), layout.fresh(memory[..., :-1]), layout.fresh(memory[..., -1])
