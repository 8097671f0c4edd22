# SPDX-License-Identifier: Apache-2.0
"""Decays of the linear state, as logarithms per step: g in S_t = e^{g_t} S_{t−1} + k_t v_tᵀ.

Sources disagree about the slopes, and about which head forgets fastest. With H heads, h counted from 0:

    lightning       g_h = −2^(−8 (h + 1) / H)                  Lightning Attention's code; ALiBi (arXiv 2108.12409)
    lightning_fla   g_h = −(8 h / H)(1 − l / L), layer l of L  flash-linear-attention; head 0 never forgets
    retnet          g_h = log(1 − 2^(−5 − h))                  RetNet (2307.08621)
    gate            g_t = log σ(x_t) / 16                      GLA (2312.06635), per feature
                                                               x = k: Liger (2503.01496), no new parameters
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.linear_attention.layout import wide

GATE_TEMPERATURE = 16.0


def lightning(heads: int) -> Tensor:
    """−2^(−8 (h + 1) / H), ``[heads]`` float64."""
    return -torch.exp2(-8.0 * (_index(heads) + 1) / heads)


def lightning_fla(heads: int, layer: int, layers: int) -> Tensor:
    """−(8 h / H)(1 − l / L), ``[heads]`` float64. Layers are counted from 0.

    Raises:
        ValueError: the layer is not one of ``layers``.
    """
    if not 0 <= layer < layers:
        raise ValueError(f"layer {layer} is not one of {layers} layers, counted from 0")
    return -(8.0 * _index(heads) / heads) * (1.0 - layer / layers)


def retnet(heads: int) -> Tensor:
    """log(1 − 2^(−5 − h)), ``[heads]`` float64."""
    return torch.log1p(-torch.exp2(-5.0 - _index(heads)))


def gate(x: Tensor) -> Tensor:
    """log σ(x) / 16 in at least float32: 0 is never reached, so every feature forgets a little."""
    return F.logsigmoid(x.to(wide(x.dtype))) / GATE_TEMPERATURE


def _index(heads: int) -> Tensor:
    if heads < 1:
        raise ValueError(f"heads must be at least 1, not {heads}")
    return torch.arange(heads, dtype=torch.float64)
