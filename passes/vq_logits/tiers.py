# SPDX-License-Identifier: Apache-2.0
"""Tiers: frequent tokens keep codes of their own, the rest share codes found by k-means (VQ-Logits, arXiv 2505.10202).

Tokens of one code get the same h·C_j at every position, so only the bias can tell them apart. For fixed clusters
and counts N the maximum-likelihood bias inside a cluster is b_i = log N_i, up to a constant per cluster; that constant
decides the cluster's total mass, which is set to what the dense head gives it when its rows are equal:

    b_i = log(N_i / Σ_{k∈j} N_k) + log Σ_{k∈j} exp β_k        (β the dense head's bias, 0 if none: log n_j)

so a singleton's bias is β_i exactly. With a sample of hidden states the dense head's mean probabilities take the place
of N, and the cluster constants are scaled until mean cluster probabilities agree too. What no bias can give back is the
floor: H(token | cluster) nats per token, a lower bound on the loss itself, whatever the codebook.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.vq_logits.codec import pack_codes, unpack_codes
from rewriter.kernels.vq_logits.reference import code_log_mass
from rewriter.passes.vq_logits.heads import TiersHead as TiersHead
from rewriter.passes.vq_logits.kmeans import assign, kmeans
from rewriter.passes.vq_logits.metric import HeadMetric, head_metric, round_to_half

# Code probabilities are formed for this many (position, code) pairs at a time.
CHUNK = 1 << 23
MASS_STEPS = 10


@torch.no_grad()
def fit_tiers(
    weight: Tensor,
    *,
    codes: int,
    singletons: Literal["auto"] | int = "auto",
    counts: Tensor | None = None,
    second_moment: Tensor | None = None,
    hidden: Tensor | None = None,
    metric: str = "auto",
    bias: bool = True,
    head_bias: Tensor | None = None,
    generator: torch.Generator,
) -> TiersHead:
    """Tiers of a dense head.

    Args:
        weight: the dense head ``[V, d]``, finite and floating.
        codes: K ≤ V. With K = V the head is the dense one, bit for bit (with the dense head's bias).
        singletons: how many tokens keep their own row: the most frequent ones, without counts the ones k-means fits
            worst. ``"auto"`` takes the number with the lowest expected floor, a quarter of the codes without counts.
        counts: unigram counts ``[V]``; a sample of hidden states replaces them.
        second_moment, hidden, metric: see `metric.head_metric`.
        bias: per-token biases; without them every token of a cluster is equally likely.
        head_bias: the dense head's bias ``[V]``; it becomes part of the token biases.
        generator: the only source of randomness.

    Returns:
        Rows of the codebook are in the weight's dtype and, unless K = V, fp16-representable.

    Raises:
        PlanError: more codes than tokens, a number of singletons that does not fit the codes, or an unknown metric.
    """
    v = weight.shape[0]
    if not 1 <= codes <= v:
        raise PlanError(f"{codes} codes for a head of {v} tokens: give at least one, and at most one per token")
    if codes == v:
        everyone = torch.arange(v, device=weight.device)
        return TiersHead(weight.detach().clone(), pack_codes(everyone, v), _copy(head_bias), v)
    form = head_metric(metric, weight, head_bias=head_bias, counts=counts, second_moment=second_moment, hidden=hidden)
    single = _singletons(singletons, codes, v, form.probability, bias)
    if not bias:
        form = dataclasses.replace(form, shared=form.total)  # nothing else makes up for an error in a token's mean
    points = _whitened(weight.float(), form)
    order = _by_importance(points, codes, single, form, generator)
    index, codebook = _cluster(weight.float(), points, order, codes, single, form, generator, weight.dtype)
    token_bias = _copy(head_bias)
    if bias:
        token_bias = _token_bias(index, codebook.float(), form.probability, head_bias, hidden).to(weight.dtype)
    return TiersHead(codebook, pack_codes(index, codes), token_bias, single)


def floor(counts: Tensor, code_of: Tensor, *, bias: bool = True) -> float:
    """The lowest loss, in nats per token, that any codebook can reach with this clustering; exp of it: perplexity.

    A model that always knows the right cluster still has to guess inside it, where context does not reach.
    With biases H(token | cluster) = −Σ_i p_i log(p_i / P_{M(i)}); without them Σ_i p_i log n_{M(i)}.

    Args:
        counts: how often each token occurs in the text that the floor is for, ``[V]``.
        code_of: uint8 ``[V, nbytes]``.
    """
    index = unpack_codes(code_of)
    p = counts.double() / counts.double().sum()
    per_code = torch.zeros(int(index.max()) + 1, dtype=p.dtype, device=p.device)
    if not bias:
        sizes = per_code.index_add(0, index, torch.ones_like(p))
        return float((p * sizes[index].log()).sum())
    mass = per_code.index_add(0, index, p)
    return float((torch.special.entr(p)).sum() - torch.special.entr(mass).sum())


def best_singletons(probability: Tensor, codes: int, *, bias: bool = True) -> int:
    """The number m < K of singletons with the lowest floor expected of clusters that ignore frequency.

    Each of the V − m others shares its code with s = (V − m)/(K − m) − 1 random ones of them, of mean probability p̄:
    floor(m) ≈ Σ_tail p log(1 + s p̄ / p) with biases, Σ_tail p log(1 + s) without. The best of 65 values of m.

    Args:
        probability: of each token on average, positive, ``[V]``.
    """
    p = probability.double().sort(descending=True).values
    best, lowest = 0, torch.inf
    for m in sorted({(codes - 1) * step // 64 for step in range(65)}):
        tail = p[m:]
        sharing = tail.numel() / (codes - m) - 1
        ratio = sharing * tail.mean() / tail if bias else torch.full_like(tail, sharing)
        expected = float((tail * ratio.log1p()).sum())
        if expected < lowest:
            best, lowest = m, expected
    return best


def _singletons(asked: Literal["auto"] | int, codes: int, v: int, probability: Tensor | None, bias: bool) -> int:
    if asked == "auto":
        return codes // 4 if probability is None else best_singletons(probability, codes, bias=bias)
    if not 0 <= asked < codes:
        raise PlanError(f"{asked} singletons of {codes} codes: the other {v - asked} tokens need at least one code")
    return asked


def _whitened(rows: Tensor, form: HeadMetric) -> Tensor:
    """Rows in the basis where the shared form is Euclidean: ‖eL‖² = e S eᵀ with S = L Lᵀ."""
    return rows if form.shared is None else rows @ torch.linalg.cholesky(form.shared)


def _by_importance(points: Tensor, codes: int, single: int, form: HeadMetric, generator: torch.Generator) -> Tensor:
    """Token ids, singletons first: by probability, or else by how badly k-means without singletons fits them."""
    if single == 0:
        return torch.arange(points.shape[0], device=points.device)
    if form.probability is not None:
        return form.probability.argsort(descending=True, stable=True)
    trial = kmeans(points, codes - single, weights=form.weight, generator=generator, iterations=8)
    _, distance = assign(points.unsqueeze(0), trial.centroids)
    return (form.weight * distance[0]).argsort(descending=True, stable=True)


def _cluster(
    rows: Tensor,
    points: Tensor,
    order: Tensor,
    codes: int,
    single: int,
    form: HeadMetric,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Code of each token and the codebook: the first ``single`` tokens of ``order`` alone, the others by k-means."""
    alone, rest = order[:single], order[single:]
    tail = points[rest]
    found = kmeans(tail, codes - single, weights=form.weight[rest], generator=generator)
    code = found.code[0]
    # The mean of the rows themselves: the same minimiser as in the whitened basis, without inverting it.
    a = form.weight[rest].clamp_min(1e-6)
    mass = torch.zeros(codes - single, device=rows.device).index_add_(0, code, a)
    total = rows.new_zeros((codes - single, rows.shape[1]))
    for part in torch.arange(rest.numel(), device=rows.device).split(1 << 14):
        total.index_add_(0, code[part], rows[rest[part]] * a[part, None])
    codebook = round_to_half(torch.cat([rows[alone], total / mass.clamp_min(1e-30).unsqueeze(-1)]), dtype)
    # Rounding moved the centroids a little: each token takes the nearest one again.
    code, _ = assign(tail.unsqueeze(0), _whitened(codebook[single:], form).unsqueeze(0))
    index = torch.empty_like(order)
    index[alone] = torch.arange(single, device=rows.device)
    index[rest] = code[0] + single
    return index, codebook.to(dtype)


def _token_bias(
    index: Tensor, codebook: Tensor, probability: Tensor | None, head_bias: Tensor | None, hidden: Tensor | None
) -> Tensor:
    """b_i = log(share of i in its cluster) + B_j, float32 ``[V]``."""
    codes = codebook.shape[0]
    beta = torch.zeros(index.shape, device=index.device) if head_bias is None else head_bias.float()
    share = beta if probability is None else probability.clamp_min(1e-12).log()
    within = share - _log_mass(index, share, codes)[index]
    mass = _log_mass(index, beta, codes)
    if hidden is not None and probability is not None:
        mass = _matched_mass(codebook, mass, _log_mass(index, share, codes), hidden.float())
    return within + mass[index]


def _matched_mass(codebook: Tensor, mass: Tensor, wanted: Tensor, hidden: Tensor) -> Tensor:
    """B with E_h[softmax(hCᵀ + B)] = the dense head's mean cluster probabilities, by iterative scaling from ``mass``.

    Each step B_j += log(wanted_j / E_h[p_j]) lowers KL(dense ‖ this head) on the sample (Darroch and Ratcliff 1972).
    """
    used = wanted.isfinite()
    for _ in range(MASS_STEPS):
        found = torch.zeros_like(mass)
        for h in hidden.split(max(1, CHUNK // codebook.shape[0])):
            found += torch.addmm(mass, h, codebook.t()).softmax(-1).sum(0)
        step = wanted - (found / hidden.shape[0]).clamp_min(1e-12).log()
        mass = torch.where(used, mass + step, mass)
    return mass


def _log_mass(index: Tensor, log_values: Tensor, codes: int) -> Tensor:
    """log Σ_{M(i)=j} exp v_i, ``[K]``; -inf for unused codes."""
    return code_log_mass(pack_codes(index, codes), log_values, codes, torch.float32)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
