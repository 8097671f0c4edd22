# SPDX-License-Identifier: Apache-2.0
"""Landmark feature maps from calibration data, in closed form but for the k-means that places the landmarks.

    c_i    weighted k-means of the queries, each weighted by (its attention's share beyond the window)²
    o_i    log of the mean of exp(scale · c_i·k) over the keys: features have mean 1
    κ_i    Σ_j softmax_j(scale · c_i·k_j) k_j, the mean key that c_i attends to

Query heads that share a key head share its landmarks, so that they share its state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 15  # of k-means


@dataclass(frozen=True)
class Landmarks:
    """Landmarks of one key head.

    Attributes:
        at: [m, D] places c in query space.
        offset: [m] o.
        gradient: [m, D] scale · κ.
        scale: of the scores.
    """

    at: Tensor
    offset: Tensor
    gradient: Tensor
    scale: float

    def key_parameters(self) -> dict[str, Tensor]:
        """Of `maps.MAPS["landmark"].key`, for this head."""
        return {"key_weight": self.scale * self.at.T, "key_bias": -self.offset}

    def query_parameters(self, sharpness: float) -> dict[str, Tensor]:
        """Of `maps.MAPS["landmark"].query` with τ = ``sharpness``, for one query head of this key head."""
        factor = sharpness * self.scale**2  # −τ/2 · s² ‖q − c‖² but for the term that all landmarks share
        return {
            "choice_weight": factor * self.at.T,
            "choice_bias": -factor / 2 * self.at.square().sum(-1),
            "gain_weight": self.gradient.T,
            "gain_bias": self.offset - (self.gradient * self.at).sum(-1),
        }


def place(
    queries: Tensor, weights: Tensor, keys: Tensor, count: int, scale: float, generator: torch.Generator
) -> Landmarks:
    """Landmarks for queries ``[n, D]`` that matter by ``weights [n]`` > 0, over keys ``[j, D]``; at most n of them."""
    at = _k_means(queries, weights, min(count, len(queries)), generator)
    scores = scale * keys @ at.T
    offset = scores.logsumexp(0) - math.log(len(keys))
    attended = torch.softmax(scores, 0).T @ keys
    return Landmarks(at, offset, scale * attended, scale)


def _k_means(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Weighted Lloyd iterations from points drawn by weight; an empty cluster keeps its place."""
    first = torch.multinomial(weights.double().cpu(), count, replacement=False, generator=generator)
    centres = points[first.to(points.device)].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        total = points.new_zeros(count).index_add_(0, nearest, weights)
        summed = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        centres = torch.where(total[:, None] > 0, summed / total[:, None].clamp_min(1e-30), centres)
    return centres
