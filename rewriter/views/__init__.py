# SPDX-License-Identifier: Apache-2.0
"""Views: model parts recognised under every spelling, so that rules need not know how a model was written.

Each view finds its matches in a program and explains where it nearly matched:

    linear      x Wᵀ + b           captures x, weight, bias, transposed
    embedding   W[ids]             captures weight, ids, padding_idx
    attention   softmax(q kᵀ) v    captures q, k, v, mask, scale, ... (see `rewriter.views.attention`)
    qkv         linears of one input that feed one attention
    head        the vocabulary-sized last linear, tied or not
    rms_norm, layer_norm    one operator or written out, as are
    softmax, log_softmax, cross_entropy, gelu
    glu         act(gate) · up of two linears, or of the halves of one
    rotary      x · cos + rotate(x) · sin
    pointwise   a convolution with kernel 1: a linear over channels
    router      the linear that chooses among the experts of a mixture
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rewriter.views.attention import ATTENTION
from rewriter.views.base import View
from rewriter.views.cross_entropy import CROSS_ENTROPY
from rewriter.views.embedding import EMBEDDING
from rewriter.views.gelu import GELU
from rewriter.views.glu import GLU
from rewriter.views.head import HEAD
from rewriter.views.layer_norm import LAYER_NORM
from rewriter.views.linear import LINEAR
from rewriter.views.pointwise import POINTWISE
from rewriter.views.qkv import QKV
from rewriter.views.rms_norm import RMS_NORM
from rewriter.views.rotary import ROTARY
from rewriter.views.router import ROUTER
from rewriter.views.softmax import LOG_SOFTMAX, SOFTMAX

__all__ = [
    "ATTENTION", "CROSS_ENTROPY", "EMBEDDING", "GELU", "GLU", "HEAD", "LAYER_NORM", "LINEAR", "LOG_SOFTMAX", "POINTWISE",
    "QKV", "RMS_NORM", "ROTARY", "ROUTER", "SOFTMAX", "VIEWS", "View",
]  # fmt: skip

_ALL = (
    LINEAR, EMBEDDING, ATTENTION, QKV, HEAD, RMS_NORM, LAYER_NORM, SOFTMAX, LOG_SOFTMAX, CROSS_ENTROPY, GELU, GLU,
    ROTARY, POINTWISE, ROUTER,
)  # fmt: skip
VIEWS: Mapping[str, View] = MappingProxyType({view.name: view for view in _ALL})
