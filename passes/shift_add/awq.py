# SPDX-License-Identifier: Apache-2.0
"""Inputs of large activations get finer weights: x Wᵀ = (x / s) (W diag s)ᵀ, and W diag s is what is rounded.

    s_j = (E[x_j²])^(a/2), rounded to a power of two;  a of a grid in [0, 1] with the least output error

The scale cannot go into a group's scale, which all its columns share, so x is multiplied by 1/s when the model runs: one
more parameter ``[in]`` and one multiplication per activation, both counted. As powers of two they change exponents
only, so the multiplication is exact in every floating dtype, and in the spirit of the family a shift.

a = 0 leaves everything as it is and is always tried, so the error never grows.

Lin et al., "AWQ", 2023 (which takes E|x_j| for the activations' size; the root mean square is what is at hand here).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.passes.shift_add import modes
from rewriter.passes.shift_add.groups import WIDE
from rewriter.passes.shift_add.modes import Mode

POWERS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
OCTAVES = 8  # s lies in [2^-8, 2^8]: neither x / s nor W diag s comes near the ends of fp16


def input_scale(weight: Tensor, mode: Mode, moment: Tensor, *, group: int = 128) -> Tensor:
    """1/s ``[in]`` float64, powers of two: what x is multiplied with; the weight to store is ``weight / (1/s)``.

    Args:
        weight: ``[out, in]``, floating and finite.
        mode: how the weight will be spelled.
        moment: E[x xᵀ] ``[in, in]``.
        group: weights along ``in`` that share scales.
    """
    wide, form = weight.detach().to(WIDE), moment.to(WIDE)
    best, least = torch.ones(weight.shape[1], dtype=WIDE, device=weight.device), float("inf")
    tried: set[tuple[float, ...]] = set()
    for power in POWERS:
        inverse = _inverse(form.diagonal(), power)
        key = tuple(inverse.tolist())
        if key in tried:
            continue
        tried.add(key)
        stored = modes.fit((wide / inverse).to(weight.dtype), mode, group=group)
        error = stored.decode(WIDE) * inverse - wide
        cost = float(((error @ form) * error).sum())
        if cost < least:
            best, least = inverse, cost
    return best


def _inverse(energy: Tensor, power: float) -> Tensor:
    """1/s for one exponent a, centred so that the largest and the smallest lie equally far from 1."""
    octave = energy.clamp_min(torch.finfo(WIDE).tiny).log2() * (power / 2)
    used = octave[energy > 0]
    if len(used) == 0:
        return torch.ones_like(energy)
    centred = octave - (used.max() + used.min()) / 2
    return torch.exp2(-centred.round().clamp(-OCTAVES, OCTAVES))
