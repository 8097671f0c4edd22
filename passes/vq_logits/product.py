# SPDX-License-Identifier: Apache-2.0
"""Product codebooks from a dense head: per group of w dimensions, 256 codes; every token picks one in each group.

The error e_i = w_i − ŵ_i of each row costs a_i e_iᵀ(S + μ_iμ_iᵀ)e_i (see `metric`). Groups can make up for one
another's errors, because S is far from diagonal; k-means in each group alone would waste that. So after it

1.  rows are rounded in sequence, last group first: with S = L Lᵀ the cost is Σ_g ‖e_g L_gg + Σ_{g'>g} e_g' L_g'g‖², and
    group g takes the code that makes its own term smallest given the groups before it (Babai's rounding, which is
    what GPTQ does to scalars, here with codebooks refitted at each group);

2.  groups are visited in turn. A visit minimises the cost exactly, first over the codes, then over the codebook:

        q_i = Σ_{g'≠g} S_gg' e_ig',  m_i = μ_i·e_i with ŵ_ig = 0
        code:      argmin_c  c·S_gg c + (c·μ_ig)² − 2 c·(S_gg w_ig + q_i + m_i μ_ig)
        codebook:  (Σ_i a_i (S_gg + μ_igμ_igᵀ)) c = Σ_i a_i (S_gg w_ig + q_i + m_i μ_ig)     over the tokens of code c

    so the cost falls with every visit. μμᵀ is stiff: one group can hardly move against it. It is therefore weighted
    0.1 at first, then 0.3, then fully, which ends in a better minimum than starting with its full weight.

A row added to the whole head would change no probability; it needs no care, since the codebooks can take up any such
row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.vq_logits.codec import MAX_GROUP_CODES
from rewriter.passes.vq_logits.heads import ProductHead as ProductHead
from rewriter.passes.vq_logits.kmeans import argmax, kmeans
from rewriter.passes.vq_logits.metric import HeadMetric, head_metric, round_to_half

DIMS = (2, 3, 4, 6, 8)
# Scores are formed for this many (token, code) pairs at a time: 4 MiB in float32, which stays in a core's cache.
CHUNK = 1 << 20
# Passes of rounding in sequence, and the weights of μμᵀ: during those, and in the first visits of every group.
PASSES = 3
FIRST_SHARES = (0.1, 0.3)


@torch.no_grad()
def fit_product(
    weight: Tensor,
    *,
    dims: int = 4,
    codes: int = 256,
    counts: Tensor | None = None,
    second_moment: Tensor | None = None,
    hidden: Tensor | None = None,
    metric: str = "auto",
    head_bias: Tensor | None = None,
    sweeps: int = 6,
    generator: torch.Generator,
) -> ProductHead:
    """Product codebook of a dense head.

    Args:
        weight: the dense head ``[V, d]``, finite and floating.
        dims: w, dimensions per group: 2, 3, 4, 6 or 8. A last group of less is zero-padded.
        codes: C ≤ 256 codes per group.
        counts, second_moment, hidden, metric: see `metric.head_metric`.
        head_bias: the dense head's bias ``[V]``, kept as it is.
        sweeps: visits of every group after rounding in sequence; 0 leaves each group to its own k-means.
        generator: the only source of randomness.

    Raises:
        PlanError: more codes than tokens, or dims, codes or metric that are not offered.
    """
    check_product_options(weight, dims, codes)
    form = head_metric(metric, weight, head_bias=head_bias, counts=counts, second_moment=second_moment, hidden=hidden)
    fit = ProductFit(weight, dims, form)
    fit.start(codes, generator)
    fit.descend(sweeps)
    return fit.head(weight.dtype, head_bias)


def check_product_options(weight: Tensor, dims: int, codes: int) -> None:
    """Raises PlanError: dims or codes that are not offered, or more codes than tokens."""
    if dims not in DIMS:
        raise PlanError(f"vq_logits groups {', '.join(map(str, DIMS))} dimensions, not {dims}")
    if not 1 <= codes <= MAX_GROUP_CODES:
        raise PlanError(f"a product codebook has 1 to {MAX_GROUP_CODES} codes per group, not {codes}")
    if codes > weight.shape[0]:
        raise PlanError(f"{codes} codes for a head of {weight.shape[0]} tokens: give at most as many codes as tokens")


class ProductFit:
    """State of a descent: rows, error, codes ``[V, G]`` and codebook ``[G, C, w]``, all of padded width G·w."""

    def __init__(self, weight: Tensor, dims: int, form: HeadMetric) -> None:
        self.dims = dims
        self.groups = -(-weight.shape[1] // dims)
        pad = self.groups * dims - weight.shape[1]
        self.rows = F.pad(weight.float(), (0, pad))
        self.a = form.weight
        shared = torch.eye(weight.shape[1], device=weight.device) if form.shared is None else form.shared
        # Padded dimensions: nothing to fit, but the forms must stay invertible.
        self.shared = torch.block_diag(shared, shared.diagonal().mean() * torch.eye(pad, device=weight.device))
        self.full_mean = None if form.mean is None else F.pad(form.mean, (0, pad))
        self.mean = self.full_mean

    def columns(self, group: int) -> slice:
        return slice(group * self.dims, (group + 1) * self.dims)

    def start(self, codes: int, generator: torch.Generator) -> None:
        """k-means in each group by itself, in the basis where the group's own cost is Euclidean."""
        g, w = self.groups, self.dims
        points = self.rows.view(-1, g, w).transpose(0, 1)
        own = torch.stack([self.shared[self.columns(i), self.columns(i)] for i in range(g)])
        if self.mean is not None:
            of_group = self.mean.view(-1, g, w).transpose(0, 1)
            own = own + (of_group * self.a[:, None]).transpose(1, 2) @ of_group / self.a.sum()
        root = torch.linalg.cholesky(own)
        found = kmeans(points @ root, codes, weights=self.a, generator=generator, iterations=10)
        self.codebook = found.centroids @ torch.linalg.inv(root)
        self.codes = found.code.t().contiguous()
        self.weigh_means(1.0)

    def descend(self, sweeps: int) -> None:
        """Round in sequence, then visit every group ``sweeps`` times; nothing at all with 0."""
        if sweeps > 0:
            self.weigh_means(FIRST_SHARES[0])
            for _ in range(PASSES):
                self.round_in_sequence()
        for share in (*FIRST_SHARES, *[1.0] * sweeps)[:sweeps]:
            self.weigh_means(share)
            self.sweep()

    def head(self, dtype: torch.dtype, bias: Tensor | None) -> ProductHead:
        """The head as it is stored: the codebook rounded to half precision, then the best codes of *that* one."""
        self.codebook = round_to_half(self.codebook, dtype)
        self.weigh_means(1.0)
        self.sweep(update=False)
        return ProductHead(self.codebook.to(dtype), self.codes.to(torch.uint8), None if bias is None else bias.clone())

    def decoded(self, group: int) -> Tensor:
        return self.codebook[group].index_select(0, self.codes[:, group])

    def weigh_means(self, share: float) -> None:
        """Count μμᵀ with weight ``share``; the error is formed anew, which also ends the drift of running sums."""
        self.mean = None if self.full_mean is None else self.full_mean * share**0.5
        self.error = self.rows - torch.cat([self.decoded(g) for g in range(self.groups)], dim=1)
        self.along_mean = self._along_mean()

    def _along_mean(self) -> Tensor:
        """m_i = μ_i·e_i, ``[V]``."""
        return torch.zeros_like(self.a) if self.mean is None else (self.error * self.mean).sum(-1)

    def cost_per_token(self) -> Tensor:
        """a_i e_iᵀ(S + μ_iμ_iᵀ)e_i, ``[V]``."""
        quadratic = ((self.error @ self.shared) * self.error).sum(-1)
        return self.a * (quadratic + self.along_mean.square())

    def cost(self) -> float:
        """Σ_i a_i e_iᵀ(S + μ_iμ_iᵀ)e_i / Σ_i a_i."""
        return float(self.cost_per_token().sum() / self.a.sum())

    def round_in_sequence(self) -> None:
        """Choose all codes anew, last group first, each given the errors of the groups after it."""
        total = self.shared
        if self.mean is not None:
            total = total + (self.mean * self.a[:, None]).t() @ self.mean / self.a.sum()
        root = torch.linalg.cholesky(total)
        for g in reversed(range(self.groups)):
            here = self.columns(g)
            corner = root[here, here]
            own = corner @ corner.t()
            pull = self.rows[:, here] @ own + (self.error[:, here.stop :] @ root[here.stop :, here]) @ corner.t()
            self.codes[:, g] = _nearest(self.codebook[g], own, pull, None)
            self.codebook[g] = self._codebook(g, own, pull, None)
            self.error[:, here] = self.rows[:, here] - self.decoded(g)
        self.along_mean = self._along_mean()

    def sweep(self, update: bool = True) -> None:
        """Visit every group once. E·S is formed for a block of groups at a time and kept right inside it."""
        per_block = max(1, 128 // self.dims)
        for first in range(0, self.groups, per_block):
            block = slice(first * self.dims, min(first + per_block, self.groups) * self.dims)
            through = self.error @ self.shared[:, block]
            for g in range(first, min(first + per_block, self.groups)):
                self._visit(g, through, block, update)

    def _visit(self, g: int, through: Tensor, block: slice, update: bool) -> None:
        here = self.columns(g)
        own = self.shared[here, here]
        mean = None if self.mean is None else self.mean[:, here].contiguous()
        old = self.decoded(g)
        pull = through[:, here.start - block.start : here.stop - block.start] + old @ own
        if mean is not None:
            pull = pull + (self.along_mean + (old * mean).sum(-1)).unsqueeze(-1) * mean
        self.codes[:, g] = _nearest(self.codebook[g], own, pull, mean)
        if update:
            self.codebook[g] = self._codebook(g, own, pull, mean)
        change = old - self.decoded(g)
        self.error[:, here] += change
        through.addmm_(change, self.shared[here, block])
        if mean is not None:
            self.along_mean += (change * mean).sum(-1)

    def _codebook(self, g: int, own: Tensor, pull: Tensor, mean: Tensor | None) -> Tensor:
        """Least squares per code; a ridge towards the old row keeps codes of few tokens (or none) where they are."""
        before = self.codebook[g]
        k, w = before.shape
        code = self.codes[:, g]
        mass = self.a.new_zeros(k).index_add_(0, code, self.a)
        form = mass[:, None, None] * own
        if mean is not None:
            outer = (mean.unsqueeze(2) * mean.unsqueeze(1)).flatten(1) * self.a[:, None]
            form = form + outer.new_zeros((k, w * w)).index_add_(0, code, outer).view(k, w, w)
        right = pull.new_zeros((k, w)).index_add_(0, code, pull * self.a[:, None])
        ridge = 1e-5 * own.diagonal().mean() * torch.eye(w, device=own.device)
        return torch.linalg.solve(form + ridge, right + before @ ridge)


def _nearest(codebook: Tensor, own: Tensor, pull: Tensor, mean: Tensor | None) -> Tensor:
    """argmin_c c·S_gg c + (c·μ)² − 2 c·pull for each token; int64 ``[V]``."""
    half = ((codebook @ own) * codebook).sum(-1) / 2
    parts = []
    for rows in torch.arange(pull.shape[0], device=pull.device).split(max(1, CHUNK // codebook.shape[0])):
        span = slice(int(rows[0]), int(rows[-1]) + 1)
        score = torch.addmm(half, pull[span], codebook.t(), beta=-1)
        if mean is not None:
            along = mean[span] @ codebook.t()
            score.addcmul_(along, along, value=-0.5)
        parts.append(argmax(score))
    return torch.cat(parts)
