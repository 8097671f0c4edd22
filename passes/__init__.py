# SPDX-License-Identifier: Apache-2.0
"""The families of rewrites. ``rewriter.passes.available()`` lists them with contract and options."""

from __future__ import annotations

from rewriter.passes.after_head import AfterHead
from rewriter.passes.canonical import Canonical
from rewriter.passes.fold import Fold
from rewriter.passes.fuse import Fuse
from rewriter.passes.linear_attention import LinearAttention
from rewriter.passes.puma import Puma
from rewriter.passes.shift_add import ShiftAdd
from rewriter.passes.shift_add.additive import ShiftAttention
from rewriter.passes.shift_add.experts import ShiftExperts
from rewriter.passes.simplify import Simplify
from rewriter.passes.tversky import Tversky
from rewriter.passes.vq_logits import VQLogits
from rewriter.registry import known as available
from rewriter.rules import Pass

__all__ = [
    "AfterHead",
    "Canonical",
    "Fold",
    "Fuse",
    "LinearAttention",
    "Pass",
    "Puma",
    "ShiftAdd",
    "ShiftAttention",
    "ShiftExperts",
    "Simplify",
    "Tversky",
    "VQLogits",
    "available",
]
