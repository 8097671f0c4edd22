# SPDX-License-Identifier: Apache-2.0
"""A product codebook behind a projection of the hidden state: a learned rotation (r = d), or low rank (r < d).

In the metric E[hhᵀ] ≈ S = L Lᵀ the head is W L, and any Q with orthonormal columns turns it without loss (r = d):

    h·w_i = (P h)·y_i,    P = Qᵀ L⁻¹ [r, d],    y_i = Qᵀ Lᵀ w_i.

Low rank: Q spans the leading right singular vectors of A^{¼} W L (A the token weights, damped: see the code).
Inside that space (the whole one for r = d) it is a rotation. It starts as the eigenbasis, its directions dealt out to the
groups so that their products of variances agree (what codebooks of equal size want), then codes and Q are fitted in turn,
Q by Procrustes: argmax_Q tr(Qᵀ (W L)ᵀ A Ŷ) (optimized product quantization, Ge et al. 2013, in this metric).

P is rounded to half precision first; rows are then those that fit *that* P best, y_i = (P S Pᵀ)⁻¹ P S w_i, and their codes
are found by the same descent as without projection, for the form (P S Pᵀ, P μ_i). P takes 2·r·d bytes of the file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.passes.vq_logits.heads import ProjectedHead
from rewriter.passes.vq_logits.kmeans import assign, kmeans
from rewriter.passes.vq_logits.metric import HeadMetric, head_metric, round_to_half
from rewriter.passes.vq_logits.product import ProductFit, check_product_options

# Rounds of codes and rotation in turn, and Lloyd iterations of the codebooks in each.
ROUNDS = 8
LLOYD = 2


@torch.no_grad()
def fit_projected(
    weight: Tensor,
    *,
    rank: int,
    dims: int = 4,
    codes: int = 256,
    counts: Tensor | None = None,
    second_moment: Tensor | None = None,
    hidden: Tensor | None = None,
    metric: str = "auto",
    head_bias: Tensor | None = None,
    sweeps: int = 6,
    generator: torch.Generator,
) -> ProjectedHead:
    """Product codebook of a dense head behind a projection to ``rank`` dimensions; the width itself: a rotation.

    Args:
        rank: r, from ``dims`` to d.
        weight, dims, codes, counts, second_moment, hidden, metric, head_bias, sweeps, generator: as `fit_product`'s.

    Raises:
        PlanError: as `fit_product`, and for a rank that is smaller than a group or larger than the width.
    """
    check_product_options(weight, dims, codes)
    width = weight.shape[1]
    if not min(dims, width) <= rank <= width:
        raise PlanError(
            f"vq_logits: rank={rank} for groups of {dims} and a head of width {width}: give {dims} to {width}"
        )
    form = head_metric(metric, weight, head_bias=head_bias, counts=counts, second_moment=second_moment, hidden=hidden)
    identity = torch.eye(width, device=weight.device)
    root = torch.linalg.cholesky(identity if form.total is None else form.total)
    turned = weight.float() @ root
    # What the projection drops is no small error: with its full weight a the quadratic model would let rare tokens' rows
    # go, which then become likely. The square root keeps them in sight (embedded model, rank 128: KL 0.231 instead of 0.222).
    basis = _leading(turned, form.weight.sqrt(), rank)
    basis = basis @ _rotation(turned @ basis, form.weight, dims, codes, generator)
    projection = torch.linalg.solve_triangular(root, basis.t(), upper=False, left=False)
    projection = round_to_half(projection.contiguous(), weight.dtype)
    through = projection @ (identity if form.shared is None else form.shared)
    inner = through @ projection.t()
    rows = torch.linalg.solve(inner, through @ weight.float().t()).t().contiguous()
    mean = None if form.mean is None else form.mean @ projection.t()
    fit = ProductFit(rows, dims, HeadMetric(form.weight, inner, mean, form.probability))
    fit.start(codes, generator)
    fit.descend(sweeps)
    coded = fit.head(weight.dtype, head_bias)
    return ProjectedHead(projection.to(weight.dtype), coded.codebook, coded.codes, coded.bias)


def _leading(turned: Tensor, a: Tensor, rank: int) -> Tensor:
    """Eigenvectors of Σ_i a_i x_i x_iᵀ, largest eigenvalue first, as columns ``[d, r]``."""
    return torch.linalg.eigh((turned * a[:, None]).t() @ turned).eigenvectors.flip(-1)[:, :rank]


def _dealt(variance: Tensor, dims: int) -> list[int]:
    """Order of the columns (of falling variance ``[r]``) that balances groups of ``dims``: to the least product so far.

    Eigenvalue allocation of Ge et al. 2013; the product is a sum of logarithms. A ragged last group takes what is left.
    """
    d = variance.shape[0]
    # Relative to the smallest, so that every log is at least 0 and a group with more members has the larger product.
    weight = (variance.clamp_min(1e-12 * float(variance.max())) / variance.min().clamp_min(1e-30)).clamp_min(1.0).log()
    members: list[list[int]] = [[] for _ in range(-(-d // dims))]
    room = [min(dims, d - g * dims) for g in range(len(members))]
    for column in range(d):  # by falling variance
        open_groups = [g for g in range(len(members)) if len(members[g]) < room[g]]
        taker = min(open_groups, key=lambda g: (sum(float(weight[c]) for c in members[g]), g))
        members[taker].append(column)
    return [column for group in members for column in group]


def _rotation(points: Tensor, a: Tensor, dims: int, codes: int, generator: torch.Generator) -> Tensor:
    """Q ``[r, r]``: codes of X Q and Q itself in turn, each the minimiser of Σ_i a_i ‖Qᵀ x_i − ŷ_i‖² given the other.

    ``points``: X ``[V, r]``, columns uncorrelated and of falling variance.
    """
    d = points.shape[1]
    groups = -(-d // dims)
    order = _dealt((points.square() * a[:, None]).sum(0), dims)
    basis = torch.eye(d, device=points.device)[:, order]

    def grouped(q: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(points @ q, (0, groups * dims - d))
        return padded.view(-1, groups, dims).transpose(0, 1).contiguous()

    books = kmeans(grouped(basis), codes, weights=a, generator=generator, iterations=4).centroids
    for _ in range(ROUNDS):
        parts = grouped(basis)
        for _ in range(LLOYD):
            code, _ = assign(parts, books)
            books = _means(parts, a, code, books)
        code, _ = assign(parts, books)
        decoded = books.gather(1, code.unsqueeze(-1).expand(-1, -1, dims)).transpose(0, 1).reshape(-1, groups * dims)
        left, _, right = torch.linalg.svd((points * a[:, None]).t() @ decoded[:, :d])
        basis = left @ right
    return basis


def _means(points: Tensor, a: Tensor, code: Tensor, books: Tensor) -> Tensor:
    """Weighted means of the points of each code, per group; a code without points stays where it is."""
    groups, k, w = books.shape
    flat = (code + k * torch.arange(groups, device=code.device).unsqueeze(-1)).reshape(-1)
    mass = books.new_zeros(groups * k).index_add_(0, flat, a.repeat(groups))
    total = books.new_zeros((groups * k, w)).index_add_(0, flat, (points * a[:, None]).reshape(-1, w))
    means = total / mass.clamp_min(1e-30).unsqueeze(-1)
    return torch.where((mass > 0).unsqueeze(-1), means, books.reshape(-1, w)).view(groups, k, w)
