# SPDX-License-Identifier: Apache-2.0
"""Attention by additions (ShiftAddViT, You et al. 2023), in plain aten.

    b(x)_d = 1[x_d > mean_d x]                        a binary code per token and head
    a_n    = ½ v_n + 1/π · Σ_m (b(q_n)·b(k_m)) v_m    = ½ v + 1/π · b(q) (b(k)ᵀ v): both products add where a bit is set
    y_n    = gain · a_n / ‖a_n‖ + Σ_t conv_t v_{n + t − ⌊taps/2⌋}

The published code compares with the mean over the whole batch tensor, so that the result of one input depends on the
others beside it. Here the threshold is the mean over the head dim of each token and head; normalising x first, as the
published code does, then changes no bit. `gain` per head is ours: without it every token of a head leaves with norm 1.

Codes have no derivative; their gradient is that of clamp(x / ‖x‖, 0, 1) (straight through, as published).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RESIDUAL = 0.5
ANGLE = 1 / math.pi


def check(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None) -> None:
    """q, k ``[B, H, T, D]``, v ``[B, H, T, Dv]``, keep bool ``[B, T]``, gain ``[H]``, conv ``[H, taps]``, taps odd."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        torch._check(x.dim() == 4, lambda name=name, x=x: f"{name} must be [B, H, T, D], not {tuple(x.shape)}")
        torch._check(x.is_floating_point(), lambda name=name, x=x: f"{name} must be floating, not {x.dtype}")
    torch._check(q.shape == k.shape, lambda: f"q {tuple(q.shape)} and k {tuple(k.shape)} must have one shape")
    torch._check(v.shape[:3] == q.shape[:3], lambda: f"v {tuple(v.shape)} does not fit q {tuple(q.shape)}")
    if keep is not None:
        torch._check(keep.dtype is torch.bool, lambda: f"keep must be bool, not {keep.dtype}")
        torch._check(
            keep.dim() == 2 and keep.shape[0] == q.shape[0] and keep.shape[1] == q.shape[2],
            lambda: f"keep must be [{q.shape[0]}, {q.shape[2]}], not {tuple(keep.shape)}",
        )
    if gain is not None:
        torch._check(gain.shape == q.shape[1:2], lambda: f"gain must be [{q.shape[1]}], not {tuple(gain.shape)}")
    if conv is not None:
        torch._check(
            conv.dim() == 2 and conv.shape[0] == q.shape[1] and conv.shape[1] % 2 == 1,
            lambda: f"conv must be [{q.shape[1]}, an odd number of taps], not {tuple(conv.shape)}",
        )


def additive_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None
) -> Tensor:
    """``[B, H, T, Dv]`` in q's dtype; see the top of this file. Tokens with ``keep`` False are seen by nobody."""
    check(q, k, v, keep, gain, conv)
    wide = torch.promote_types(q.dtype, torch.float32)
    values, q_bits, k_bits = _seen(v.to(wide), keep), binary_codes(q.to(wide)), _seen(binary_codes(k.to(wide)), keep)
    result = F.normalize(_sums(q_bits, k_bits, values), dim=-1)
    if gain is not None:
        result = result * _per_head(gain, wide)
    if conv is not None:
        result = result + along_tokens(values, conv.to(wide))
    return result.to(q.dtype)


def binary_codes(x: Tensor) -> Tensor:
    """1 where x ``[..., D]`` is above its mean over D, else 0; the gradient is that of clamp(x / ‖x‖, 0, 1)."""
    bits = (x > x.mean(dim=-1, keepdim=True)).to(x.dtype)
    soft = F.normalize(x, dim=-1).clamp(0, 1)
    return bits + (soft - soft.detach())  # the bracket is zero, exactly


def along_tokens(v: Tensor, conv: Tensor) -> Tensor:
    """v ``[B, H, T, Dv]``, conv ``[H, taps]``: each head's filter along its tokens, zeros beyond both ends."""
    batch, heads, tokens, dim = v.shape
    columns = v.permute(0, 3, 1, 2).reshape(batch * dim, heads, tokens)
    mixed = F.conv1d(columns, conv.unsqueeze(1), padding=conv.shape[1] // 2, groups=heads)
    return mixed.reshape(batch, dim, heads, tokens).permute(0, 2, 3, 1)


def _sums(q_bits: Tensor, k_bits: Tensor, v: Tensor) -> Tensor:
    return RESIDUAL * v + ANGLE * (q_bits @ (k_bits.transpose(-1, -2) @ v))


def _seen(x: Tensor, keep: Tensor | None) -> Tensor:
    """Zero where a token is padding."""
    return x if keep is None else x * keep[:, None, :, None].to(x.dtype)


def _per_head(gain: Tensor, dtype: torch.dtype) -> Tensor:
    return gain.to(dtype)[:, None, None]


# -- gradient ----------------------------------------------------------------------------------------------------


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    gain: Tensor | None,
    conv: Tensor | None,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """∂L of every input. With n = a/‖a‖ and g = gain · ∂y:

    ∂a = (g − n⟨n, g⟩) / ‖a‖,   ∂b(q) = 1/π · ∂a (b(k)ᵀv)ᵀ,   ∂b(k) = 1/π · v (b(q)ᵀ∂a)ᵀ,
    ∂v = ½ ∂a + 1/π · b(k) (b(q)ᵀ∂a) + convᵀ ∂y
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grad = grad.to(wide)
    values, q_bits, k_bits = _seen(v.to(wide), keep), binary_codes(q.to(wide)), _seen(binary_codes(k.to(wide)), keep)
    summed = _sums(q_bits, k_bits, values)
    length = summed.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # as F.normalize
    unit = summed / length
    to_unit = grad if gain is None else grad * _per_head(gain, wide)
    to_sum = (to_unit - unit * (unit * to_unit).sum(-1, keepdim=True)) / length
    mixed = ANGLE * (q_bits.transpose(-1, -2) @ to_sum)  # [B, H, D, Dv]
    to_v = RESIDUAL * to_sum + k_bits @ mixed
    to_conv = None
    if conv is not None:
        to_v = to_v + along_tokens(grad, conv.to(wide).flip(-1))
        to_conv = _filter_gradient(grad, values, conv.shape[1]).to(conv.dtype) if needs[5] else None
    to_q_bits = ANGLE * (to_sum @ (values.transpose(-1, -2) @ k_bits))
    to_k_bits = _seen(values @ mixed.transpose(-1, -2), keep)
    return (
        _through(q.to(wide), to_q_bits).to(q.dtype) if needs[0] else None,
        _through(k.to(wide), to_k_bits).to(k.dtype) if needs[1] else None,
        _seen(to_v, keep).to(v.dtype) if needs[2] else None,
        None,
        None if gain is None or not needs[4] else (grad * unit).sum((0, 2, 3)).to(gain.dtype),
        to_conv,
    )


def _through(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of clamp(x / ‖x‖, 0, 1), which stands in for that of the code."""
    length = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit = x / length
    open_ = grad * (unit >= 0).to(x.dtype)  # a unit vector has no entry above 1; clamp passes at the bounds
    return (open_ - unit * (unit * open_).sum(-1, keepdim=True)) / length


def _filter_gradient(grad: Tensor, v: Tensor, taps: int) -> Tensor:
    """∂conv[h, t] = Σ ∂y[n] · v[n + t − ⌊taps/2⌋]."""
    padded = F.pad(v, (0, 0, taps // 2, taps // 2))
    tokens = v.shape[2]
    return torch.stack([(grad * padded[:, :, t : t + tokens]).sum((0, 2, 3)) for t in range(taps)], dim=-1)


def all_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gradients` of q, k, v, gain and conv, the last two empty where there are none; contiguous."""
    found = gradients(grad, q, k, v, keep, gain, conv, needs=[True] * 6)
    to_q, to_k, to_v, _, to_gain, to_conv = (q.new_empty(0) if x is None else x.contiguous() for x in found)
    return to_q, to_k, to_v, to_gain, to_conv
