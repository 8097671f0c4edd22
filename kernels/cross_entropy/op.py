# SPDX-License-Identifier: Apache-2.0
"""The cross entropy of a dense head; importing this module registers its operators with torch."""

from __future__ import annotations

from rewriter.kernels.cross_entropy.position_op import linear_cross_entropy, linear_cross_entropy_backward
from rewriter.kernels.cross_entropy.reduced_op import linear_cross_entropy_reduced, linear_cross_entropy_sum

__all__ = [
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_reduced",
    "linear_cross_entropy_sum",
]
