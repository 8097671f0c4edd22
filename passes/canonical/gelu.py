# SPDX-License-Identifier: Apache-2.0
"""x/2 · (1 + erf(x/√2))  =  gelu(x)          x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³)))  =  gelu(x, "tanh")"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.fx import Node

from rewriter.editing import Editor
from rewriter.matcher import Match
from rewriter.passes.canonical.base import ToOperator, aten
from rewriter.program import Program
from rewriter.views import GELU, View

# A constant off by δ (relative) moves x·Φ(x) by at most 1.3 |x| δ, and an EXACT rule may move it by 1e-10.
CLOSEST = 1e-11


class CanonicalGELU(ToOperator):
    """Written out in 16 bits it rounds after every step; the operator rounds once."""

    name: ClassVar[str] = "canonical.gelu"
    role: ClassVar[str] = "gelu"
    view: ClassVar[View] = GELU

    def objection(self, program: Program, match: Match) -> str | None:
        if match["deviation"] > CLOSEST:
            off = f"{match['deviation']:.1e}"
            return f"a constant of the formula is off by {off}, the operator has the exact one: not the same function"
        return None

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return {match.root: edit.call(aten.gelu.default, match["x"], approximate=match["approximate"])}
