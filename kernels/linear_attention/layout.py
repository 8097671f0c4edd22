# SPDX-License-Identifier: Apache-2.0
"""Heads, dtypes and padding of the linear-attention operators, and how a sequence is cut into blocks.

Layout is that of torch's ``scaled_dot_product_attention``: ``[batch B, heads H, time T, features]``. Keys, values and
decays may have fewer heads than queries (GQA): ``Hs``, the largest of their counts, is the number of states kept, and
inside this package tensors are ``[B, Hs, group, T, features]``, the queries of one state side by side in ``group``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A smaller decay per step is taken for this one. e^-60 is nothing beside 1 in every dtype, and sums of finite
# exponents stay finite, so that a gate of exactly zero (log decay -inf) gives neither NaN nor a NaN gradient.
LOWEST_LOG_DECAY = -60.0


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and states: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def fresh(x: Tensor) -> Tensor:
    """A contiguous copy: results of an operator may share memory neither with each other nor with its inputs."""
    return x.clone(memory_format=torch.contiguous_format)


def spread(x: Tensor, heads: int) -> Tensor:
    """``[B, h, ...]`` -> ``[B, heads, 1, ...]``, each of the h heads repeated."""
    return (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)).unsqueeze(2)


def grouped(q: Tensor, heads: int) -> Tensor:
    """``[B, H, ...]`` -> ``[B, heads, H / heads, ...]``."""
    return q.unflatten(1, (heads, q.shape[1] // heads))


def only(keep: Tensor | None, x: Tensor) -> Tensor:
    """x ``[B, h, T, ...]`` with zeros where ``keep [B, T]`` is False.

    Chosen, not multiplied: what padding holds may be NaN.
    """
    if keep is None:
        return x
    return torch.where(keep.reshape(keep.shape[0], 1, keep.shape[1], *(1,) * (x.dim() - 3)), x, 0.0)


def decays(log_decay: Tensor, keep: Tensor | None, like: Tensor, heads: int) -> Tensor:
    """Log decays per step as ``[B, heads, 1, T, 1 or F]``; padding does not decay.

    Args:
        log_decay: ``[h]`` fixed, ``[B, h, T]`` per step, ``[B, h, T, F]`` per step and feature.
        like: a tensor ``[B, h, T, ...]`` with the batch, the length and the dtype of the result.
    """
    log_decay = log_decay.to(like.dtype).clamp(min=LOWEST_LOG_DECAY)
    if log_decay.dim() == 1:
        log_decay = log_decay[None, :, None].expand(like.shape[0], -1, like.shape[2])
    if log_decay.dim() == 3:
        log_decay = log_decay.unsqueeze(-1)
    return spread(only(keep, log_decay), heads)


def block_count(length: int, size: int, dynamic: bool) -> int:
    """Blocks of ``size`` that cover ``length``.

    With a symbolic length there are always at least two (the last ones empty): torch would take a single one for a
    constant.
    """
    return length // size + 2 if dynamic else -(-length // size)


def cut(x: Tensor, count: int, size: int) -> Tensor:
    """``[..., T, F]`` -> ``[..., count, size, F]``; zeros after the end."""
    missing = count * size - x.shape[-2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(-2, (count, size))


def join(x: Tensor, length: int) -> Tensor:
    """The inverse of :func:`cut`: ``[..., count, size, F]`` -> ``[..., length, F]``."""
    return x.flatten(-3, -2)[..., :length, :]


def lower(size: int, like: Tensor, gap: int = 0) -> Tensor:
    """The causal mask ``[size, size]``: True where the column is at least ``gap`` before the row."""
    position = torch.arange(size, device=like.device)
    return position[:, None] - position >= gap


def identity(size: int, like: Tensor) -> Tensor:
    """I ``[size, size]`` in the dtype of ``like``."""
    position = torch.arange(size, device=like.device)
    return (position[:, None] == position).to(like.dtype)


def pairwise(running: Tensor, seen: Tensor) -> Tensor:
    """e^(b_i − b_j) where ``seen`` ``[T, T]``, else 0, for running sums b ``[..., T, F]`` -> ``[..., T, T, F]``.

    The difference is formed first: e^(−b_j) alone overflows.
    """
    exponent = running.unsqueeze(-2) - running.unsqueeze(-3)
    return exponent.masked_fill(~seen.unsqueeze(-1), -torch.inf).exp()


def starts(first: Tensor, updates: Tensor, log_total: Tensor | None, dynamic: bool) -> Tensor:
    """States at the block boundaries of S_{n+1} = e^{B_n} S_n + U_n.

    Args:
        first: S_0 ``[..., F, Dv]``.
        updates: U_n ``[..., N, F, Dv]``.
        log_total: B_n ``[..., N, 1 or F, 1]``, or None for no decay.
        dynamic: N is symbolic: the recurrence is written as one matrix over pairs of blocks instead of a loop.

    Returns:
        ``[..., N + 1, F, Dv]``, S_0 to S_N.
    """
    if log_total is None:
        return torch.cat([first.unsqueeze(-3), updates], dim=-3).cumsum(-3)
    if dynamic:
        return _starts_by_pairs(first, updates, log_total)
    states = [first]
    for n in range(updates.shape[-3]):
        states.append(states[-1] * log_total[..., n, :, :].exp() + updates[..., n, :, :])
    return torch.stack(states, dim=-3)


def _starts_by_pairs(first: Tensor, updates: Tensor, log_total: Tensor) -> Tensor:
    """S_n = Σ_{m ≤ n} e^{B_m + … + B_{n−1}} U_{m−1}, with U_{−1} = S_0."""
    terms = torch.cat([first.unsqueeze(-3), updates], dim=-3)  # [..., N + 1, F, Dv]
    running = log_total.cumsum(-3)
    running = torch.cat([torch.zeros_like(running[..., :1, :, :]), running], dim=-3).movedim(-3, -1)
    exponent = running.transpose(-1, -2) - running  # [..., 1 or F, N + 1, N + 1]
    weight = exponent.masked_fill(~lower(exponent.shape[-1], exponent), -torch.inf).exp()
    return (weight @ terms.transpose(-3, -2)).transpose(-3, -2)
