# SPDX-License-Identifier: Apache-2.0
"""gelu(x)  ≈  0 (x < −4)  |  F0(x) (x < −1.95)  |  F1(x) (x ≤ 3)  |  x

    F0 = −.5054 − .4223 x − .1181 x² − .0110 x³        F1 = .0085 + ½ x + .3603 x² − .0377 x⁴ + .0018 x⁶

within 0.02 of both GELUs: the largest error is 0.0199, at 3 from below. The polynomials are evaluated on x clamped to their
range, so that neither values nor gradients overflow where they are not chosen. NaN stays NaN; of −∞, whose GELU is NaN, it
makes 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch.fx import Node

from rewriter.editing import Editor
from rewriter.matcher import Match
from rewriter.passes.puma.base import Approximation, as_dtype, aten, widened
from rewriter.rules import BOUNDED, Contract
from rewriter.views import GELU, View

GELU_ERROR = 0.02
LEFT, MIDDLE, RIGHT = -4.0, -1.95, 3.0
F0 = (-0.5054031199708174, -0.42226581151983866, -0.11807612951181953, -0.011034134030615728)  # of 1, x, x², x³
F1 = (0.008526321541038084, 0.3603292692789629, -0.037688200365904236, 0.0018067462606141187)  # of 1, x², x⁴, x⁶
F1_LINEAR = 0.5


class PumaGELU(Approximation):
    """Three comparisons, two polynomials, both forms of GELU."""

    name: ClassVar[str] = "puma.gelu"
    role: ClassVar[str] = "gelu"
    contract: ClassVar[Contract] = BOUNDED("absolute error of a GELU", GELU_ERROR)
    view: ClassVar[View] = GELU

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        x = widened(edit, match["x"])
        inside = edit.call(aten.clamp.default, x, LEFT, RIGHT)
        square = edit.call(aten.mul.Tensor, inside, inside)
        left = _polynomial(edit, inside, F0)
        middle = edit.call(
            aten.add.Tensor, _polynomial(edit, square, F1), edit.call(aten.mul.Tensor, inside, F1_LINEAR)
        )
        # NaN fails every comparison and so comes out of the innermost choice, the middle polynomial, as NaN.
        new = edit.call(aten.where.self, edit.call(aten.lt.Scalar, x, MIDDLE), left, middle)
        new = edit.call(aten.where.ScalarSelf, edit.call(aten.lt.Scalar, x, LEFT), 0.0, new)
        new = edit.call(aten.where.self, edit.call(aten.gt.Scalar, x, RIGHT), x, new)
        return {match.root: as_dtype(edit, new, match.root.meta["val"].dtype)}


def _polynomial(edit: Editor, x: Node, coefficients: Sequence[float]) -> Node:
    """Σ_i c_i xⁱ by Horner's rule."""
    *others, last = coefficients
    value = edit.call(aten.mul.Tensor, x, last)
    for position, coefficient in enumerate(reversed(others)):
        value = edit.call(aten.add.Tensor, value, coefficient)
        if position < len(others) - 1:
            value = edit.call(aten.mul.Tensor, value, x)
    return value
