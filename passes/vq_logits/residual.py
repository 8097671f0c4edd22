# SPDX-License-Identifier: Apache-2.0
"""Residual codebooks: a row is a sum of one code from each of S stages, ŵ_i = Σ_s C_s[a_s(i)] (additive quantisation).

Stages are clustered in sequence first, each on what the stages before it left. Then all of them are fitted jointly, in the
basis where the mean S of all tokens' forms is Euclidean:

    codes:     a beam search over stages for each row (Babenko and Lempitsky 2014, "Additive quantization"), kept only
               where it is better than the codes the row has;
    codebooks: stage by stage the weighted mean of what the other stages leave, its exact least-squares minimiser;

so the error falls with every round. Whole rows in S·K shared parts are a coarse code: at equal bytes a product codebook
is much better for a language model's head (docs/vq_logits.md has the numbers). What it offers is the work: S·K products
with the hidden state instead of V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.vq_logits.codec import pack_codes
from rewriter.passes.vq_logits.heads import ResidualHead
from rewriter.passes.vq_logits.kmeans import kmeans
from rewriter.passes.vq_logits.metric import HeadMetric, head_metric, round_to_half

BEAM = 8
SWEEPS = 4
# Scores are formed for this many (row in the beam, code) pairs at a time: 16 MiB in float32.
CHUNK = 1 << 22


@torch.no_grad()
def fit_residual(
    weight: Tensor,
    *,
    stages: int = 2,
    codes: int,
    counts: Tensor | None = None,
    second_moment: Tensor | None = None,
    hidden: Tensor | None = None,
    metric: str = "auto",
    head_bias: Tensor | None = None,
    sweeps: int = SWEEPS,
    generator: torch.Generator,
) -> ResidualHead:
    """Residual codebooks of a dense head.

    Args:
        weight: the dense head ``[V, d]``, finite and floating.
        stages: S ≥ 1; codes: K ≤ V codes in each stage.
        counts, second_moment, hidden, metric: see `metric.head_metric`.
        head_bias: the dense head's bias ``[V]``, kept as it is.
        sweeps: joint rounds after the stages were clustered in sequence.
        generator: the only source of randomness.

    Raises:
        PlanError: no stage, more codes than tokens, or an unknown metric.
    """
    if stages < 1:
        raise PlanError(f"vq_logits: stages={stages} of a residual codebook: give at least one")
    if not 1 <= codes <= weight.shape[0]:
        raise PlanError(f"{codes} codes for a head of {weight.shape[0]} tokens: give at least one and at most as many")
    form = head_metric(metric, weight, head_bias=head_bias, counts=counts, second_moment=second_moment, hidden=hidden)
    fit = ResidualFit(weight, form)
    fit.start(stages, codes, generator)
    for _ in range(sweeps):
        fit.sweep()
    books = round_to_half(fit.rows(fit.books), weight.dtype)
    fit.books = fit.points_of(books)
    fit.encode()
    bias = None if head_bias is None else head_bias.clone()
    return ResidualHead(books.to(weight.dtype), pack_codes(fit.codes, codes), bias)


class ResidualFit:
    """State of the descent: points ``[V, d]`` in the metric's basis, books ``[S, K, d]``, codes int64 ``[V, S]``."""

    def __init__(self, weight: Tensor, form: HeadMetric) -> None:
        shared = form.total
        self.root = None if shared is None else torch.linalg.cholesky(shared)  # S = L Lᵀ: ‖eL‖² = e S eᵀ
        self.points = self.points_of(weight.float())
        self.a = form.weight.clamp_min(1e-6)

    def points_of(self, rows: Tensor) -> Tensor:
        return rows if self.root is None else rows @ self.root

    def rows(self, points: Tensor) -> Tensor:
        if self.root is None:
            return points
        return torch.linalg.solve_triangular(self.root, points, upper=False, left=False).contiguous()

    def start(self, stages: int, codes: int, generator: torch.Generator) -> None:
        """k-means of each stage on what the stages before it left."""
        left, books, chosen = self.points, [], []
        for _ in range(stages):
            found = kmeans(left, codes, weights=self.a, generator=generator)
            books.append(found.centroids[0])
            chosen.append(found.code[0])
            left = left - books[-1][chosen[-1]]
        self.books, self.codes = torch.stack(books), torch.stack(chosen, dim=1)

    def error(self) -> Tensor:
        """Squared distance of each point from the sum of its codes, ``[V]``."""
        return self._distance(self.codes)

    def cost(self) -> float:
        """Σ_i a_i ‖x_i − x̂_i‖² / Σ_i a_i."""
        return float((self.a * self.error()).sum() / self.a.sum())

    def sweep(self) -> None:
        """One joint round: codes given the books, then each book given the others."""
        self.encode()
        left = self.points - self._decoded(self.codes)
        for s in range(self.books.shape[0]):
            code = self.codes[:, s]
            wanted = left + self.books[s][code]
            mass = torch.zeros_like(self.books[s, :, 0]).index_add_(0, code, self.a)
            total = torch.zeros_like(self.books[s]).index_add_(0, code, wanted * self.a[:, None])
            used = (mass > 0).unsqueeze(-1)
            self.books[s] = torch.where(used, total / mass.clamp_min(1e-30).unsqueeze(-1), self.books[s])
            left = wanted - self.books[s][code]

    def encode(self) -> None:
        """Codes by beam search; a row keeps the ones it has where the beam finds none better."""
        k = self.books.shape[1]
        step = max(1, CHUNK // (BEAM * k))
        found = torch.cat([self._beam(part) for part in self.points.split(step)])
        better = self._distance(found) < self.error()
        self.codes = torch.where(better.unsqueeze(-1), found, self.codes)

    def _beam(self, points: Tensor) -> Tensor:
        """The best sum of codes that a beam of `BEAM` partial sums finds for each point; int64 ``[n, S]``."""
        n = points.shape[0]
        left, chosen = points.unsqueeze(1), points.new_empty((n, 1, 0), dtype=torch.int64)
        for book in self.books:
            k, width = book.shape[0], left.shape[1]
            # ‖l − c‖² = ‖l‖² + ‖c‖² − 2 l·c for every partial sum l of the beam and every code c.
            score = torch.baddbmm(
                (left.square().sum(-1, keepdim=True) + book.square().sum(-1)),
                left,
                book.t().expand(n, -1, -1),
                alpha=-2,
            )
            best = score.flatten(1).topk(min(BEAM, width * k), dim=1, largest=False).indices
            parent, code = best // k, best % k
            left = left.gather(1, parent.unsqueeze(-1).expand(-1, -1, left.shape[-1])) - book[code]
            chosen = chosen.gather(1, parent.unsqueeze(-1).expand(-1, -1, chosen.shape[-1]))
            chosen = torch.cat([chosen, code.unsqueeze(-1)], dim=-1)
        return chosen[:, 0]

    def _decoded(self, codes: Tensor) -> Tensor:
        total = self.books[0][codes[:, 0]]
        for s in range(1, self.books.shape[0]):
            total = total + self.books[s][codes[:, s]]
        return total

    def _distance(self, codes: Tensor) -> Tensor:
        return (self.points - self._decoded(codes)).square().sum(-1)
