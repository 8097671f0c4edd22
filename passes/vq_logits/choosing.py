# SPDX-License-Identifier: Apache-2.0
"""`structure="auto"`: the smallest codebook head whose measured KL stays under a limit.

Candidates are product codebooks of 8 to 2 dimensions per group, each alone and with some exact rows beside it (the
other structures lose to these at every size measured: docs/vq_logits.md). The sample of hidden states is cut in two.
Three quarters fit a candidate; on the rest its KL(dense ‖ rewritten) is computed exactly. A binary search over the sizes
finds the smallest under the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.vq_logits.codec import MAX_GROUP_CODES, code_bytes
from rewriter.narrow import stored_bytes
from rewriter.passes.vq_logits.exact import fit_exact
from rewriter.passes.vq_logits.heads import CodebookHead
from rewriter.passes.vq_logits.product import DIMS, fit_product

DEFAULT_DIMS = 4
# Logits are formed for this many (position, token) pairs at a time: 32 MiB in float32, twice.
CHUNK = 1 << 23


@dataclass(frozen=True)
class Candidate:
    """One size that was tried: dimensions and codes per group, stored bytes, KL in nats a token (None: unmeasured)."""

    dims: int
    codes: int
    bytes: int
    kl: float | None
    exact_rows: int = 0


@dataclass(frozen=True)
class Choice:
    """The head taken, its figures, and those of every candidate tried, in order; ``kept``: KL ≤ max_kl was reached.

    Without calibration nothing is measured: ``chosen.kl`` is None and ``kept`` is False.
    """

    head: CodebookHead
    chosen: Candidate
    tried: tuple[Candidate, ...]
    kept: bool


@torch.no_grad()
def choose(
    weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    hidden: Tensor | None = None,
    second_moment: Tensor | None = None,
    counts: Tensor | None = None,
    max_kl: float = 0.05,
    metric: str = "auto",
    exact_rows: Sequence[int] = (0,),
    generator: torch.Generator,
) -> Choice:
    """The smallest product head, with or without exact rows, under ``max_kl`` nats per token; the closest one where none is.

    Args:
        weight: the dense head ``[V, d]``; head_bias ``[V]``.
        hidden: a sample of hidden states ``[n, d]``, n ≥ 2; without it: 256 codes per 4 dimensions, unmeasured.
        second_moment, counts, metric: see `metric.head_metric`.
        exact_rows: numbers of exact rows to try beside each codebook; without a sample only the first.
        generator: the only source of randomness.

    Raises:
        PlanError: no codebook head of this shape is smaller than the dense one, or max_kl is not positive.
    """
    if not max_kl > 0:
        raise PlanError(f"max_kl={max_kl} of vq_logits must be a positive number of nats per token")
    codes = min(MAX_GROUP_CODES, weight.shape[0])
    limit = dense_bytes(weight, head_bias)
    start = generator.get_state()

    def fit(dims: int, rows: int, sample: Tensor | None) -> CodebookHead:
        own = torch.Generator().set_state(start)  # each candidate is fitted as if it were the only one
        known: dict[str, Any] = {
            "counts": counts,
            "second_moment": second_moment,
            "hidden": sample,
            "head_bias": head_bias,
        }
        if rows == 0:
            return fit_product(weight, dims=dims, codes=codes, metric=metric, generator=own, **known)
        return fit_exact(weight, rows=rows, dims=dims, codes=codes, metric=metric, generator=own, **known)

    if hidden is None:
        head = fit(DEFAULT_DIMS, exact_rows[0], None)
        only = Candidate(DEFAULT_DIMS, codes, head.bytes, None, exact_rows[0])
        if only.bytes >= limit:
            raise _no_gain(weight, only)
        return Choice(head, only, (only,), False)
    fitting, judging = split_sample(hidden)
    sizes = sorted((_expected_bytes(weight, w, codes, m), w, m) for w in DIMS for m in exact_rows)
    affordable = [size for size in sizes if size[0] < limit]
    if not affordable:
        raise _no_gain(weight, Candidate(sizes[0][1], codes, sizes[0][0], None))
    found: dict[int, tuple[CodebookHead, Candidate, float]] = {}
    # KL falls as heads grow: a binary search finds the first one under the limit with the fewest fits.
    low, high = 0, len(affordable)
    while low < high:
        middle = (low + high) // 2
        _, dims, rows = affordable[middle]
        head = fit(dims, rows, fitting)
        kl = head_kl(weight, head_bias, head, judging)
        found[middle] = head, Candidate(dims, codes, head.bytes, kl, rows), kl
        low, high = (low, middle) if kl <= max_kl else (middle + 1, high)
    kept = low < len(affordable)
    best = found[low] if kept else min(found.values(), key=lambda f: f[2])
    return Choice(best[0], best[1], tuple(found[i][1] for i in sorted(found)), kept)


@torch.no_grad()
def head_kl(weight: Tensor, head_bias: Tensor | None, head: CodebookHead, hidden: Tensor) -> float:
    """Mean of KL(softmax of the dense head ‖ softmax of the codebook head) over hidden states ``[n, d]``, in nats.

    Computed over the whole vocabulary in float32 (float64 for a float64 head), summed in float64.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    dense, bias = weight.to(dtype), None if head_bias is None else head_bias.to(dtype)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for h in hidden.to(dtype).split(max(1, CHUNK // weight.shape[0])):
        p = F.linear(h, dense, bias).log_softmax(-1)
        q = head.logits(h).log_softmax(-1)
        total += F.kl_div(q, p, log_target=True, reduction="none").sum(-1).double().sum()
    return float(total / hidden.shape[0])


def dense_bytes(weight: Tensor, head_bias: Tensor | None) -> int:
    """Bytes of the dense head in the stored file."""
    return stored_bytes(weight) + (0 if head_bias is None else stored_bytes(head_bias))


def split_sample(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The first three quarters to fit, the last to judge: neighbours are alike, so the cut is not interleaved.

    Raises:
        PlanError: fewer than 2 hidden states.
    """
    n = hidden.shape[0]
    if n < 2:
        raise PlanError("vq_logits needs at least 2 hidden states to choose a size; give more calibration data")
    cut = n - max(1, n // 4)
    return hidden[:cut], hidden[cut:]


def _expected_bytes(weight: Tensor, dims: int, codes: int, rows: int) -> int:
    """Codes, an fp16 codebook and fp16 rows; what orders the candidates before they are fitted."""
    v, d = weight.shape
    groups = -(-d // dims)
    return groups * (v + 2 * codes * dims) + rows * (2 * d + code_bytes(v))


def _no_gain(weight: Tensor, smallest: Candidate) -> PlanError:
    return PlanError(
        f"no codebook head is smaller than the dense one of {weight.shape[0]} tokens and width {weight.shape[1]}: "
        f"{smallest.dims} dimensions per group already take {smallest.bytes} bytes; leave this head as it is"
    )
