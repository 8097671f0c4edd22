# SPDX-License-Identifier: Apache-2.0
"""Attention of linear cost, against softmax attention and, where it is installed, flash-linear-attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_work.work import Built, Call, Draw
from rewriter.kernels.linear_attention import op as attention
from rewriter.kernels.shift_attention import op as shift_attention


def _qkv(draw: Draw, length: int, dtype: torch.dtype, small: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads, width, n = (2, 16, min(length, 100)) if small else (16, 64, length)
    q, k, v = (draw.normal(1, heads, n, width, dtype=dtype) for _ in range(3))
    return q, k, v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _rivals(q: Tensor, k: Tensor, v: Tensor) -> tuple[Mapping[str, Call], Mapping[str, str]]:
    rivals, name = {"SDPA": Call(causal, (q, k, v))}, "flash-linear-attention"
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError as error:
        return rivals, {name: f"not installed: {error}"}
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return {**rivals, name: Call(lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0], turned)}, {}


def linear(draw: Draw, small: bool, length: int, dtype: torch.dtype) -> Built:
    q, k, v = _qkv(draw, length, dtype, small)
    arguments = (F.elu(q) + 1, F.elu(k) + 1, v, None, None, None, None, 1.0, True, "sum", 64)
    return Built(Call(attention.linear_attention, arguments), *_rivals(q, k, v))


def step(draw: Draw, small: bool, dtype: torch.dtype) -> Built:
    """One token of 16 sequences, with the state before it, against attention to 16384 cached tokens of each."""
    batch, heads, width, context = (2, 2, 16, 50) if small else (16, 16, 64, 16384)
    q, k, v = (draw.normal(batch, heads, 1, width, dtype=dtype) for _ in range(3))
    state, normaliser = draw.normal(batch, heads, width, width), draw.normal(batch, heads, width).abs() + 1
    arguments = (F.elu(q) + 1, F.elu(k) + 1, v, None, None, state, normaliser, 1.0, True, "sum", 64)
    cached = [draw.normal(batch, heads, context, width, dtype=dtype) for _ in range(2)]
    rival = Call(F.scaled_dot_product_attention, (q, *cached))
    return Built(Call(attention.linear_attention, arguments), {"SDPA": rival})


def hybrid(draw: Draw, small: bool, length: int, dtype: torch.dtype) -> Built:
    q, k, v = _qkv(draw, length, dtype, small)
    maps = [torch.cat([x.float().softmax(-1), (-x.float()).softmax(-1)], -1) for x in (q, k)]
    per_head = torch.ones(q.shape[1], device=draw.device)
    setting = (q.shape[-1] ** -0.5, 16 if small else 64, "sliding", 0, "max", False, 64)
    arguments = (q, k, v, *maps, per_head, per_head.clone(), *(None,) * 9, *setting)
    return Built(Call(attention.hybrid_attention, arguments), *_rivals(q, k, v))


def delta(draw: Draw, small: bool, length: int, dtype: torch.dtype) -> Built:
    q, k, v = _qkv(draw, length, dtype, small)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = draw.normal(*q.shape[:3]).sigmoid().to(dtype)
    return Built(Call(attention.delta_attention, (q, k, v, beta, None, None, None, 1.0, 64)), *_rivals(q, k, v))


def additive(draw: Draw, small: bool, length: int, dtype: torch.dtype) -> Built:
    q, k, v = _qkv(draw, length, dtype, small)
    gain, taps = draw.normal(q.shape[1], dtype=dtype), draw.normal(q.shape[1], 9, dtype=dtype)
    whole = Call(F.scaled_dot_product_attention, (q, k, v))
    return Built(Call(shift_attention.additive_attention, (q, k, v, None, gain, taps)), {"SDPA": whole})


def features(draw: Draw, small: bool, length: int, dtype: torch.dtype) -> Built:
    x, _, _ = _qkv(draw, length, dtype, small)
    heads, width = x.shape[1], x.shape[3]
    weight = draw.normal(heads, width, width) * width**-0.5

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        y = x.float() @ weight
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    arguments = (x, weight, None, None, None, "hedgehog", 1.0)
    return Built(Call(attention.attention_features, arguments), {"eager": Call(eager, (x, weight))})
