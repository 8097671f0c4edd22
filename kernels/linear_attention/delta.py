# SPDX-License-Identifier: Apache-2.0
"""The delta rule and the gated delta rule: a state that overwrites instead of adding up.

    S' = e^{g_t} S_{t−1},    S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ,    o_t = scale · q_tᵀ S_t

β_t in [0, 1] is how much of what the state holds under k_t is replaced by v_t: 0 changes nothing, 1 with ‖k_t‖ = 1
stores v_t exactly. The transition I − β k kᵀ has the eigenvalues 1 and 1 − β ‖k‖², so keys of unit norm
(`feature_maps.unit_norm`) keep it stable. DeltaNet (arXiv 2406.06484); with decay g Gated DeltaNet (2412.06464).

    chunked     with b the running sum of g in a chunk and D_ij = e^{b_i − b_j} for j ≤ i (WY form):
                T = (I + tril(diag(β)(K Kᵀ ⊙ D), −1))⁻¹ diag(β),   U = T V − T (K ⊙ e^b) S    (what is written)
                o = (Q ⊙ e^b) S + (Q Kᵀ ⊙ D) U,   S ← e^{b_C} S + (K ⊙ e^{b_C − b})ᵀ U
    parallel    the same with the sequence as one chunk
    recurrent   the definition, one step at a time

Padding writes nothing and does not decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.kernels.linear_attention import layout

Outputs = tuple[Tensor, Tensor]

# The triangular inverse costs C³ per chunk: larger chunks cost more than they save.
LARGEST_CHUNK = 64

# With a symbolic length chunks are composed pairwise, this many times: up to 1024 chunks.
DOUBLINGS = 10


@dataclass(frozen=True)
class _Operands:
    """The operator's inputs, wide, padding removed, grouped by state (see `layout`)."""

    q: Tensor  # [B, Hs, group, T, F], scaled
    k: Tensor  # [B, Hs, 1, T, F]
    v: Tensor  # [B, Hs, 1, T, Dv]
    beta: Tensor  # [B, Hs, 1, T, 1]
    decay: Tensor  # [B, Hs, 1, T, 1]
    memory: Tensor  # [B, Hs, 1, F, Dv]


def state_heads(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> int:
    """Number of states: the largest number of heads among keys, values, betas and decays."""
    decay_heads = 1 if log_decay is None else log_decay.shape[0 if log_decay.dim() == 1 else 1]
    return max(k.shape[1], v.shape[1], beta.shape[1], decay_heads)


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> Outputs:
    """The sequence as one chunk: quadratic in T."""
    x = _operands(q, k, v, beta, log_decay, keep, state, scale)
    out, memory = _sweep(x.q, x.k, x.v, x.beta, x.decay, x.memory)
    return _results(out, memory, q)


def chunked(
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
) -> Outputs:
    """Within chunks all pairs, between chunks the state: linear in T. What the operator runs.

    Args:
        chunk: positions per chunk; at most 64 are used.
        dynamic: T is symbolic (tracing): no Python loop over chunks; up to 1024 chunks.
    """
    x = _operands(q, k, v, beta, log_decay, keep, state, scale)
    length, size = q.shape[2], min(chunk, LARGEST_CHUNK)
    if dynamic:
        return _results(*_all_chunks(x, length, size), q)
    memory, outputs = x.memory, [x.q.new_empty((*x.q.shape[:3], 0, v.shape[3]))]
    for begin in range(0, length, size):
        here = slice(begin, begin + size)
        q_here, k_here, v_here, beta, decay = (part[..., here, :] for part in (x.q, x.k, x.v, x.beta, x.decay))
        out, memory = _sweep(q_here, k_here, v_here, beta, decay, memory)
        outputs.append(out)
    return _results(torch.cat(outputs, dim=-2), memory, q)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> Outputs:
    """The definition, one step at a time, O(1) memory."""
    x = _operands(q, k, v, beta, log_decay, keep, state, scale)
    memory, outputs = x.memory, []
    for t in range(k.shape[2]):
        now = slice(t, t + 1)
        key = x.k[..., now, :]
        memory = memory * x.decay[..., now, :].exp()
        memory = memory + key.mT @ (x.beta[..., now, :] * (x.v[..., now, :] - key @ memory))
        outputs.append(x.q[..., now, :] @ memory)
    return _results(torch.cat(outputs, dim=-2), memory, q)


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> _Operands:
    dtype, heads = layout.wide(q.dtype), state_heads(k, v, beta, log_decay)
    keys, values, rate = (layout.only(keep, x.to(dtype)) for x in (k, v, beta))
    if log_decay is None:
        log_decay = keys.new_zeros(1)
    memory = keys.new_zeros((k.shape[0], heads, k.shape[3], v.shape[3])) if state is None else state.to(dtype)
    return _Operands(
        layout.grouped(q.to(dtype) * scale, heads),
        layout.spread(keys, heads),
        layout.spread(values, heads),
        layout.spread(rate.unsqueeze(-1), heads),
        layout.decays(log_decay, keep, keys, heads),
        memory.unsqueeze(2),
    )


def _pairs(k: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk: running sums b ``[..., C, 1]``, D ``[..., C, C]``, (I + tril(diag(β)(K Kᵀ ⊙ D), −1))⁻¹."""
    running = decay.cumsum(-2)
    pairs = layout.pairwise(running, layout.lower(k.shape[-2], k)).squeeze(-1)
    earlier = layout.lower(k.shape[-2], k, gap=1)
    return running, pairs, unit_lower_inverse((beta * (k @ k.mT) * pairs).masked_fill(~earlier, 0.0))


def _sweep(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk: its outputs ``[..., C, Dv]`` and the state after it."""
    running, pairs, inverse = _pairs(k, beta, decay)
    written = inverse @ (beta * (v - (k * running.exp()) @ memory))
    out = (q * running.exp()) @ memory + ((q @ k.mT) * pairs) @ written
    total = running[..., -1:, :]
    return out, memory * total.exp() + (k * (total - running).exp()).mT @ written


def _all_chunks(x: _Operands, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Outputs and last state with all chunks side by side, for a symbolic number of them."""
    count = layout.block_count(length, size, dynamic=True)
    parts = (x.q, x.k, x.v, x.beta, x.decay)
    q, k, v, beta, decay = (layout.cut(part, count, size) for part in parts)
    running, pairs, inverse = _pairs(k, beta, decay)
    total = running[..., -1:, :]
    late = (k * (total - running).exp()).mT
    new, old = inverse @ (beta * v), inverse @ (beta * k * running.exp())  # what is written: new − old S
    kept = total.exp() * layout.identity(k.shape[-1], k)
    transition, update = _composed(kept - late @ old, late @ new)
    first = x.memory.unsqueeze(-3)
    states = torch.cat([first, transition @ first + update], dim=-3)
    before = states[..., :-1, :, :]
    out = (q * running.exp()) @ before + ((q @ k.mT) * pairs) @ (new - old @ before)
    return layout.join(out, length), states[..., -1, :, :]


def _composed(transition: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The maps S ↦ A S + U of chunks ``[..., N, F, ·]`` -> those of all chunks up to and with n, by doubling."""
    count = update.shape[-3]
    torch._check(count <= 2**DOUBLINGS, lambda: f"delta rule: longer than {2**DOUBLINGS} chunks; raise chunk")
    index = torch.arange(count, device=update.device)
    for level in range(DOUBLINGS):
        reach = index >= 2**level
        earlier = (index - 2**level).clamp(min=0)
        reached = reach[:, None, None]
        update = update + torch.where(reached, transition @ update.index_select(-3, earlier), 0.0)
        transition = torch.where(reached, transition @ transition.index_select(-3, earlier), transition)
    return transition, update


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + A)⁻¹ for strictly lower triangular A ``[..., n, n]``, by doubling the size of inverted diagonal blocks.

    With X the inverse of the diagonal blocks of size s and M the blocks below them in pairs,
    [[L₁, 0], [M, L₂]]⁻¹ = X − X M X: as stable as forward substitution, in log₂ n steps of matrix products.
    """
    size = strict.shape[-1]
    block = torch.arange(size, device=strict.device)
    inverse = layout.identity(size, strict) - _below_in_pairs(strict, block)  # of blocks of two
    while size > 2:
        block, size = block // 2, -(-size // 2)
        inverse = inverse - inverse @ _below_in_pairs(strict, block) @ inverse
    return inverse


def _below_in_pairs(strict: Tensor, block: Tensor) -> Tensor:
    """What an odd block has to do with the even one before it; zeros elsewhere."""
    pair = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block[None, :])
    return torch.where(pair, strict, 0.0)


def _results(out: Tensor, memory: Tensor, q: Tensor) -> Outputs:
    return out.flatten(1, 2).to(q.dtype).contiguous(), layout.fresh(memory.squeeze(2))
