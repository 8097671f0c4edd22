# SPDX-License-Identifier: Apache-2.0
"""The operators of what follows a head; importing this file registers all of them with torch."""

from __future__ import annotations

from rewriter.kernels.after_head.linear import linear_logsumexp, linear_topk
from rewriter.kernels.after_head.tiers import (
    vq_tiers_cross_entropy,
    vq_tiers_log_softmax,
    vq_tiers_soft_cross_entropy,
    vq_tiers_softmax,
    vq_tiers_topk,
)

__all__ = [
    "linear_logsumexp", "linear_topk", "vq_tiers_cross_entropy", "vq_tiers_log_softmax", "vq_tiers_soft_cross_entropy",
    "vq_tiers_softmax", "vq_tiers_topk",
]  # fmt: skip
