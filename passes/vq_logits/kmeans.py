# SPDX-License-Identifier: Apache-2.0
"""Weighted k-means over many independent groups at once, in bounded memory.

Minimises Σ_i a_i ‖x_i − c_{m(i)}‖² in each group by Lloyd's iteration. Seeds are drawn in rounds in proportion to
a_i·D²_i, the weighted squared distance to the nearest seed so far (k-means||, Bahmani et al. 2012, with exactly K seeds
kept), on a sample of the points; a code that loses all its points is put on the point fitted worst.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.errors import PlanError

# Distances are formed for this many (point, code) pairs at a time: 4 MiB in float32, which stays in a core's cache.
CHUNK = 1 << 20
SAMPLE_PER_CODE = 16
ROUNDS = 32


@dataclass(frozen=True)
class Clusters:
    """Centroids ``[G, K, w]``, the code of each point int64 ``[G, N]``, and the inertia Σ a·distance² ``[G]``."""

    centroids: Tensor
    code: Tensor
    inertia: Tensor


def kmeans(
    points: Tensor,
    codes: int,
    *,
    weights: Tensor | None = None,
    generator: torch.Generator,
    iterations: int = 25,
    tolerance: float = 1e-3,
) -> Clusters:
    """Cluster each group of ``points`` ``[G, N, w]`` (or ``[N, w]``: one group) into ``codes`` clusters.

    Args:
        points: float32 or float64; extra memory is the sample of the seeding plus a few copies of the centroids.
        weights: a_i ≥ 0, ``[N]``, the same in every group; uniform if None.
        generator: the only source of randomness; the global one is neither read nor advanced.
        iterations: at most this many Lloyd iterations.
        tolerance: stop when an iteration lowers the total inertia by less than this fraction.

    Raises:
        PlanError: more codes than points, or no codes.
    """
    points = points if points.dim() == 3 else points.unsqueeze(0)
    n = points.shape[1]
    if not 1 <= codes <= n:
        raise PlanError(f"{codes} codes for {n} points: a codebook needs at least one and at most as many as points")
    a = points.new_ones(n) if weights is None else weights.to(points)
    # Weights only matter up to a factor, and a point of weight zero still has to go somewhere.
    a = (a / a.mean().clamp_min(torch.finfo(a.dtype).tiny)).clamp_min(1e-6)
    centroids = _seeds(points, a, codes, generator)
    best = torch.inf
    for _ in range(iterations):
        code, distance = assign(points, centroids)
        inertia = (a * distance).sum(-1)
        total = float(inertia.sum())
        if total >= best * (1 - tolerance):
            break
        best = total
        centroids = _reseeded(points, a, code, distance, *_means(points, a, code, centroids))
    code, distance = assign(points, centroids)
    return Clusters(centroids, code, (a * distance).sum(-1))


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each point, by ‖x − c‖² = ‖x‖² − 2(x·c − ½‖c‖²): code and squared distance ``[G, N]``."""
    groups, n, _ = points.shape
    half = centroids.square().sum(-1).div(2)
    code = torch.empty((groups, n), dtype=torch.int64, device=points.device)
    score = points.new_empty((groups, n))
    step = max(1, CHUNK // centroids.shape[1])
    for g in range(groups):
        for start in range(0, n, step):
            rows = slice(start, start + step)
            closeness = torch.addmm(half[g], points[g, rows], centroids[g].t(), beta=-1)
            code[g, rows] = argmax(closeness)
            score[g, rows] = closeness.amax(-1)
    distance = torch.linalg.vector_norm(points, dim=-1).square_().sub_(score, alpha=2).clamp_min_(0)
    return code, distance


def argmax(scores: Tensor) -> Tensor:
    """Column of the largest entry of each row, int64. On CPU by numpy, whose argmax is vectorised (8 times faster)."""
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    return torch.from_numpy(scores.numpy().argmax(-1))


def _means(points: Tensor, a: Tensor, code: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of each cluster (the old centroid where it is empty) and the cluster's weight ``[G, K]``."""
    groups, k, w = centroids.shape
    means, mass = torch.empty_like(centroids), centroids.new_zeros((groups, k))
    step = max(1, CHUNK // w)
    for g in range(groups):
        mass[g].index_add_(0, code[g], a)
        total = centroids.new_zeros((k, w))
        for start in range(0, points.shape[1], step):
            rows = slice(start, start + step)
            total.index_add_(0, code[g, rows], points[g, rows] * a[rows, None])
        means[g] = torch.where(mass[g, :, None] > 0, total / mass[g, :, None].clamp_min(1e-12), centroids[g])
    return means, mass


def _reseeded(points: Tensor, a: Tensor, code: Tensor, distance: Tensor, means: Tensor, mass: Tensor) -> Tensor:
    """Put each empty code of a group on another one of the points fitted worst (largest a·distance²)."""
    for g in (mass == 0).any(-1).nonzero().flatten().tolist():
        empty = (mass[g] == 0).nonzero().flatten()
        worst = (a * distance[g]).topk(empty.numel()).indices
        means[g, empty] = points[g, worst]
    return means


def _seeds(points: Tensor, a: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """First centroids ``[G, K, w]``: points of a weighted sample, drawn in rounds in proportion to a·D²."""
    n = points.shape[1]
    # Any sample that leaves enough to choose from will do; its own draw already follows the weights.
    size = min(n, max(SAMPLE_PER_CODE * codes, 4096))
    sampled = _draw(a.unsqueeze(0), size, generator)[0]
    sample = points[:, sampled]
    importance = a[sampled] if size == n else torch.ones_like(a[sampled])
    chosen = _draw(importance.expand(points.shape[0], -1), 1, generator)
    seeds = _rows(sample, chosen)
    _, nearest = assign(sample, seeds)
    while seeds.shape[1] < codes:
        count = min(max(1, codes // ROUNDS), codes - seeds.shape[1])
        new = _rows(sample, _draw(importance * nearest, count, generator))
        seeds = torch.cat([seeds, new], dim=1)
        nearest = torch.minimum(nearest, assign(sample, new)[1])
    return seeds


def _rows(points: Tensor, index: Tensor) -> Tensor:
    return points.gather(1, index.unsqueeze(-1).expand(-1, -1, points.shape[-1]))


def _draw(probability: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different columns per row of ``[G, N]``, in proportion to the (unnormalised) probability.

    The race of exponential clocks: the first ``count`` arrivals of rates p are a weighted draw without replacement
    (Efraimidis and Spirakis 2006). Columns of rate zero come last, so fewer than ``count`` positive rates are no error.
    """
    clock = torch.empty(probability.shape, dtype=torch.float64, device=generator.device)
    clock.exponential_(generator=generator)
    return (probability / clock.to(probability)).topk(count, dim=-1).indices
