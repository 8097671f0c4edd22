# SPDX-License-Identifier: Apache-2.0
"""exp(x − m) / Σ exp(x − m)  =  softmax(x)          x − logsumexp(x)  =  (x − m) − log Σ exp(x − m)  =  log_softmax(x)

with m = max x. Both functions are the same for every m, so its gradient is zero, detached or not.

Without m, exp(x) / Σ exp(x) is 0/0 where all of x is small and ∞/∞ where some of it is large (float32: beyond ±88), and
log softmax(x) is −∞ where a probability underflows; the operators return the value. That is what one wants, but not
the same function: these are taken only where the pass is told to stabilise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.fx import Node

from rewriter.editing import Editor
from rewriter.matcher import Match
from rewriter.passes.canonical.base import ToOperator, aten
from rewriter.program import Program
from rewriter.views import LOG_SOFTMAX, SOFTMAX, View


class _Softmax(ToOperator):
    operator: ClassVar[Any]

    def __init__(self, stabilise: bool = False) -> None:
        self.stabilise = stabilise

    def objection(self, program: Program, match: Match) -> str | None:
        if match["stable"] or self.stabilise:
            return None
        return "as written it overflows or underflows where the operator does not; stabilise=True takes it all the same"

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return {match.root: edit.call(self.operator, match["x"], match["dim"], match["dtype"])}


class CanonicalSoftmax(_Softmax):
    """exp(x − max x) / Σ exp(x − max x) → ``softmax``"""

    name: ClassVar[str] = "canonical.softmax"
    role: ClassVar[str] = "softmax"
    view: ClassVar[View] = SOFTMAX
    operator: ClassVar[Any] = aten.softmax.int


class CanonicalLogSoftmax(_Softmax):
    """x − logsumexp(x) → ``log_softmax``"""

    name: ClassVar[str] = "canonical.log_softmax"
    role: ClassVar[str] = "log_softmax"
    view: ClassVar[View] = LOG_SOFTMAX
    operator: ClassVar[Any] = aten.log_softmax.int
