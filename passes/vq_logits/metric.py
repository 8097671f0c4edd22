# SPDX-License-Identifier: Apache-2.0
"""What an error of a head costs: the quadratic model of KL(dense ‖ rewritten) that the fits minimise.

For a small error e_i of row i of the head, δ_i = e_i·h, and the dense head's probabilities p_i(h),

    KL ≈ ½ E_h[Σ_i p_i δ_i² − (Σ_i p_i δ_i)²] ≤ ½ E_h[Σ_i p_i(1 − p_i) δ_i²] + coupling between tokens.

Dropping the coupling leaves one quadratic form per token: e_iᵀ H_i e_i with H_i = E[p_i(1 − p_i) hhᵀ]. V matrices of
d × d are too many to keep, so H_i is modelled by its weight, its mean and a covariance shared by all tokens:

    H_i ≈ a_i (S + μ_iμ_iᵀ),   a_i = E[p_i(1 − p_i)],   μ_i = E[p_i(1 − p_i) h] / a_i,
    S = (E[Σ_i p_i(1 − p_i) hhᵀ] − Σ_i a_i μ_iμ_iᵀ) / Σ_i a_i,

which has the right total Σ_i H_i and the right mean error of every token. Without a sample of hidden states, a_i comes
from token counts, S is E[hhᵀ], and the means are left out. Without any statistics S is taken from the head itself: a
trained model's hidden states lie along the rows they have to be told apart by, so E[hhᵀ] is like the rows' covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.errors import PlanError

METRICS = ("auto", "plain", "whitened", "kl")
# Softmax rows are formed for this many logits at a time: 64 MiB in float32.
CHUNK = 1 << 24
# Added to the diagonal of S as a fraction of its mean: keeps directions alive that the sample did not visit.
RIDGE = 1e-3


@dataclass(frozen=True)
class HeadMetric:
    """Weight a ``[V]`` (mean 1), shared form S ``[d, d]`` (None: identity), token means μ ``[V, d]`` (None: zero).

    ``probability`` is how likely each token is on average, ``[V]`` (sum 1), or None where nothing is known.
    """

    weight: Tensor
    shared: Tensor | None = None
    mean: Tensor | None = None
    probability: Tensor | None = None

    @property
    def total(self) -> Tensor | None:
        """S + Σ_i a_i μ_iμ_iᵀ / Σ_i a_i ``[d, d]``, the mean of all tokens' forms: for fits that know one form only."""
        if self.shared is None or self.mean is None:
            return self.shared
        return self.shared + (self.mean * self.weight[:, None]).t() @ self.mean / self.weight.sum()


def head_metric(
    metric: str,
    weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    counts: Tensor | None = None,
    second_moment: Tensor | None = None,
    hidden: Tensor | None = None,
) -> HeadMetric:
    """The quadratic model that ``metric`` names, from what is known of the head's inputs.

    Args:
        metric: ``"plain"`` (every entry alike), ``"whitened"`` (S = E[hhᵀ], every token alike), ``"kl"`` (the form
            above), ``"auto"``: the best of these that the statistics allow; without any, S is the rows' covariance.
        weight: the dense head ``[V, d]``; head_bias ``[V]``.
        counts: unigram counts ``[V]``; second_moment: E[hhᵀ] ``[d, d]``; hidden: a sample of hidden states ``[n, d]``,
            which replaces the other two.

    Raises:
        PlanError: an unknown metric, one that needs statistics which were not given, or statistics with NaN or inf.
    """
    if metric not in METRICS:
        raise PlanError(f"unknown metric {metric!r} of vq_logits: one of {', '.join(METRICS)}")
    for name, statistic in (("hidden", hidden), ("second_moment", second_moment), ("counts", counts)):
        if statistic is not None and not bool(statistic.isfinite().all()):
            raise PlanError(f"the head's calibration ({name}) holds NaN or infinite values; calibrate on clean inputs")
    if metric == "auto":
        metric = "whitened" if hidden is None and counts is None else "kl"
        if hidden is None and counts is None and second_moment is None:
            second_moment = _row_covariance(weight.float())
    if hidden is not None:
        return _from_hidden(metric, weight, head_bias, hidden)
    probability = None if counts is None else _unigram(counts, weight.shape[0]).to(weight.device)
    uniform = torch.ones(weight.shape[0], device=weight.device)
    if metric == "plain":
        return HeadMetric(uniform, probability=probability)
    shared = None if second_moment is None else _regular(second_moment.float(), second_moment.float())
    if metric == "whitened":
        if shared is None:
            raise PlanError("metric='whitened' needs calibration (hidden states or their second moment); use 'plain'")
        return HeadMetric(uniform, shared, probability=probability)
    if probability is None:
        raise PlanError("metric='kl' needs calibration (hidden states or token counts); use 'plain' or 'whitened'")
    a = probability * (1 - probability)
    return HeadMetric(a / a.mean(), shared, probability=probability)


def _unigram(counts: Tensor, tokens: int) -> Tensor:
    """Unigram probabilities ``[V]`` with half a count added to every token (Krichevsky and Trofimov 1981)."""
    if counts.numel() > tokens:
        raise PlanError(f"counts of {counts.numel()} tokens for a head of {tokens}: another tokenizer's?")
    padded = F.pad(counts.float(), (0, tokens - counts.numel())) + 0.5
    return padded / padded.sum()


def _from_hidden(metric: str, weight: Tensor, head_bias: Tensor | None, hidden: Tensor) -> HeadMetric:
    """The statistics of the dense head itself on a sample of its inputs."""
    wide, sample = weight.float(), hidden.float()
    bias = None if head_bias is None else head_bias.float()
    v, d = wide.shape
    probability, a = wide.new_zeros(v), wide.new_zeros(v)
    moment, total = wide.new_zeros((v, d)), wide.new_zeros((d, d))
    for h in sample.split(max(1, CHUNK // v)):
        p = F.linear(h, wide, bias).softmax(-1)
        probability += p.sum(0)
        uncertain = p.addcmul_(p, p, value=-1)
        a += uncertain.sum(0)
        moment.addmm_(uncertain.t(), h)
        total.addmm_(h.t() * uncertain.sum(-1), h)
    probability = probability / probability.sum()
    uniform = torch.ones_like(a)
    if metric == "plain":
        return HeadMetric(uniform, probability=probability)
    if metric == "whitened":
        moment = sample.t() @ sample / sample.shape[0]
        return HeadMetric(uniform, _regular(moment, moment), probability=probability)
    # A token the sample never makes likely still has a mean: that of the whole sample, weighted a little.
    prior = 1e-3 * a.mean()
    centre = moment.sum(0) / a.sum()
    mean = (moment + prior * centre) / (a + prior).unsqueeze(-1)
    shared = (total - (mean * a.unsqueeze(-1)).t() @ mean) / a.sum()
    return HeadMetric((a + prior) / (a + prior).mean(), _regular(shared, total / a.sum()), mean, probability)


def _row_covariance(rows: Tensor) -> Tensor:
    """Covariance of the head's rows, with a tenth of its mean diagonal added: a guess must not be too sure."""
    centred = rows - rows.mean(0)
    form = centred.t() @ centred / rows.shape[0]
    return form + 0.1 * form.diagonal().mean() * torch.eye(form.shape[0], device=form.device)


def _regular(form: Tensor, whole: Tensor) -> Tensor:
    """Symmetric, and positive definite by a little of its own scale and of that of the form it is a part of.

    A difference of float32 sums can be indefinite by more than that; then the ridge grows until it is not.
    """
    identity = torch.eye(form.shape[0], device=form.device)
    ridge = RIDGE * form.diagonal().mean().clamp_min(0) + 1e-5 * whole.diagonal().mean()
    if not ridge > 0:
        return identity
    symmetric = (form + form.t()) / 2
    while int(torch.linalg.cholesky_ex(symmetric + ridge * identity).info):
        ridge = 10 * ridge
    return symmetric + ridge * identity


def round_to_half(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A codebook as it is stored: float32 values that survive fp16 and ``dtype``, where fp16's range allows it."""
    rounded = values.half().to(dtype).float()
    exact = values.to(dtype).float()
    fits = bool(rounded.isfinite().all()) and float((rounded - exact).norm()) <= 2.0**-9 * float(exact.norm())
    return rounded if fits else exact
