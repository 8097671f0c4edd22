# SPDX-License-Identifier: Apache-2.0
"""The device implementations of linear attention, and the calls whose kernels CI compiles for every target."""

from __future__ import annotations

from rewriter.kernels.linear_attention.launch_additive import SHIPPED as ADDITIVE
from rewriter.kernels.linear_attention.launch_additive import forward as linear_attention
from rewriter.kernels.linear_attention.launch_additive_backward import SHIPPED as ADDITIVE_BACKWARD
from rewriter.kernels.linear_attention.launch_additive_backward import backward as linear_attention_backward
from rewriter.kernels.linear_attention.launch_delta import SHIPPED as DELTA
from rewriter.kernels.linear_attention.launch_delta import forward as delta_attention
from rewriter.kernels.linear_attention.launch_delta_backward import SHIPPED as DELTA_BACKWARD
from rewriter.kernels.linear_attention.launch_delta_backward import backward as delta_attention_backward
from rewriter.kernels.linear_attention.launch_features import SHIPPED as FEATURES
from rewriter.kernels.linear_attention.launch_features import backward as attention_features_backward
from rewriter.kernels.linear_attention.launch_features import forward as attention_features
from rewriter.kernels.linear_attention.launch_hybrid import SHIPPED as HYBRID
from rewriter.kernels.linear_attention.launch_hybrid import forward as hybrid_attention
from rewriter.kernels.linear_attention.launch_hybrid_backward import SHIPPED as HYBRID_BACKWARD
from rewriter.kernels.linear_attention.launch_hybrid_backward import backward as hybrid_attention_backward

__all__ = [
    "SHIPPED",
    "attention_features",
    "attention_features_backward",
    "delta_attention",
    "delta_attention_backward",
    "hybrid_attention",
    "hybrid_attention_backward",
    "linear_attention",
    "linear_attention_backward",
]

SHIPPED = (*ADDITIVE, *ADDITIVE_BACKWARD, *DELTA, *DELTA_BACKWARD, *HYBRID, *HYBRID_BACKWARD, *FEATURES)
