# SPDX-License-Identifier: Apache-2.0
"""nll_loss(log_softmax(x), t)  =  cross_entropy(x, t)          −log_softmax(x)[..., t]  =  cross_entropy(x, t, "none")

The gather form raises for a target outside the classes; so does the operator, except for its `ignore_index`, −100,
which no target of a program that runs can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter.editing import Editor
from rewriter.matcher import Match
from rewriter.passes.canonical.base import ToOperator, as_dtype, aten, dtype_of
from rewriter.views import CROSS_ENTROPY, View

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_IGNORED = -100  # the operator's default


class CanonicalCrossEntropy(ToOperator):
    """The loss as one operator, reduced as it was."""

    name: ClassVar[str] = "canonical.cross_entropy"
    role: ClassVar[str] = "cross_entropy"
    view: ClassVar[View] = CROSS_ENTROPY

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        logits = match["logits"] if match["dtype"] is None else as_dtype(edit, match["logits"], match["dtype"])
        gathered = match["spelling"] == "gather"
        new = _gathered(edit, match, logits) if gathered else _loss(edit, match, logits, match["target"])
        return {match.root: new}


def _gathered(edit: Editor, match: Match, logits: Node) -> Node:
    """Classes along the last dimension: the operator wants one row per target."""
    target = match["target"]
    rank = len(logits.meta["val"].shape)
    # In 16 bits the operator sums in 16 bits, and `mean` and `sum` do not: they stay what they are.
    apart = match["reduction"] if dtype_of(logits) in (torch.float16, torch.bfloat16) else "none"
    reduction = "none" if apart != "none" else match["reduction"]
    rows = edit.call(aten.flatten.using_ints, logits, 0, -2) if rank > 2 else logits
    flat = edit.call(aten.flatten.using_ints, target) if rank > 2 else target
    loss = _loss(edit, match, rows, flat, reduction)
    if apart != "none":
        return edit.call(aten.mean.default if apart == "mean" else aten.sum.default, loss)
    return edit.call(aten.reshape_as.default, loss, target) if rank > 2 and reduction == "none" else loss


def _loss(edit: Editor, match: Match, logits: Node, target: Node, reduction: str | None = None) -> Node:
    ignored = _IGNORED if match["ignore_index"] is None else match["ignore_index"]
    how = _REDUCTIONS[reduction or match["reduction"]]
    return edit.call(aten.cross_entropy_loss.default, logits, target, match["weight"], how, ignored)
