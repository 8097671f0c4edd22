# SPDX-License-Identifier: Apache-2.0
"""softmax(x)  ≈  e / Σ e,    e = (1 + d/32)³² where d ≥ −14, else 0,    d = x − max x

(1 + d/32)³² never exceeds exp d and is within 0.0086 of it for all d ≤ 0 (worst at d = −1.98); it takes five squarings. The
power is taken of d clamped to −14, so that masked positions (−∞) are 0 with gradient 0. The maximum counts as a constant:
softmax does not depend on it, and the gradient through it would be error alone.

That is a bound on exponentials beside the largest of their row. Small ones lose nearly all of their value, and where
many of them hold most of a row's mass, the largest takes it over: for one value above n − 1 equal ones the error of its
probability reaches 0.04 (n = 16), 0.08 (64), 0.14 (256), 0.21 (1024).

Where softmax is NaN (a row without a finite maximum, or holding NaN) so is this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.fx import Node

from rewriter.editing import Editor
from rewriter.matcher import Match
from rewriter.passes.puma.base import Approximation, as_dtype, aten, widened
from rewriter.program import Program
from rewriter.rules import BOUNDED, Contract
from rewriter.views import SOFTMAX, View

EXP_ERROR = 0.0086
SQUARINGS = 5  # 2⁵ = 32
LOWEST = -14.0


class PumaSoftmax(Approximation):
    """Five squarings in the exponential's place; the division stays."""

    name: ClassVar[str] = "puma.softmax"
    role: ClassVar[str] = "softmax"
    contract: ClassVar[Contract] = BOUNDED("absolute error of an exponential, the row's largest being 1", EXP_ERROR)
    view: ClassVar[View] = SOFTMAX

    def refusal(self, program: Program, match: Match) -> str | None:
        if not match["stable"]:
            return "no maximum is subtracted: where exponentials overflow it is not the softmax this approximates"
        return super().refusal(program, match)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        x, dim = widened(edit, match["x"], match["dtype"]), match["dim"]
        largest = edit.call(aten.detach.default, edit.call(aten.amax.default, x, [dim], True))
        below = edit.call(aten.sub.Tensor, x, largest)
        kept = edit.call(aten.ge.Scalar, below, LOWEST)
        safe = edit.call(aten.where.ScalarOther, kept, below, LOWEST)
        power = edit.call(aten.add.Tensor, edit.call(aten.mul.Tensor, safe, 2.0**-SQUARINGS), 1.0)
        for _ in range(SQUARINGS):
            power = edit.call(aten.mul.Tensor, power, power)
        weights = edit.call(aten.where.ScalarOther, kept, power, 0.0)
        new = edit.call(aten.div.Tensor, weights, edit.call(aten.sum.dim_IntList, weights, [dim], True))
        return {match.root: as_dtype(edit, new, match.root.meta["val"].dtype)}
