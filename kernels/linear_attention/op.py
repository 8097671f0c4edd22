# SPDX-License-Identifier: Apache-2.0
"""The operators of linear attention. Importing this module registers them with torch.

    linear_attention    additive rule: with or without normaliser, fixed decay or gates, causal or bidirectional
    delta_attention     delta rule and gated delta rule
    hybrid_attention    softmax over a window and sinks, linear attention over the rest
    attention_features  feature maps of queries and keys, in one pass

The first three take and return their state, so that a prompt, a further piece of text and a single token are the same call.
"""

from rewriter.kernels.linear_attention.additive_op import linear_attention
from rewriter.kernels.linear_attention.delta_op import delta_attention
from rewriter.kernels.linear_attention.features_op import attention_features
from rewriter.kernels.linear_attention.hybrid_op import hybrid_attention

__all__ = ["attention_features", "delta_attention", "hybrid_attention", "linear_attention"]
