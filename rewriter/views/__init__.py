# SPDX-License-Identifier: Apache-2.0
"""Views: model parts recognised under every spelling, so that rules need not know how a model was written.

Each view finds its matches in a program and explains where it nearly matched:

    linear      x Wᵀ + b           captures x, weight, bias, transposed
    embedding   W[ids]             captures weight, ids, padding_idx
    attention   softmax(q kᵀ) v    captures q, k, v, mask, scale, ... (see `rewriter.views.attention`)
    qkv         linears of one input that feed one attention
    head        the vocabulary-sized last linear, tied or not
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rewriter.views.attention import ATTENTION
from rewriter.views.base import View
from rewriter.views.embedding import EMBEDDING
from rewriter.views.head import HEAD
from rewriter.views.linear import LINEAR
from rewriter.views.qkv import QKV

__all__ = ["ATTENTION", "EMBEDDING", "HEAD", "LINEAR", "QKV", "VIEWS", "View"]

VIEWS: Mapping[str, View] = MappingProxyType({view.name: view for view in (LINEAR, EMBEDDING, ATTENTION, QKV, HEAD)})
