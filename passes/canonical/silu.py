# SPDX-License-Identifier: Apache-2.0
"""x · σ(x)  =  silu(x)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.matcher import Match, Miss, find
from rewriter.operators import ALIAS, NOOP_CAST, sigmoid
from rewriter.passes.canonical.base import aten
from rewriter.pattern import Var, pattern
from rewriter.predicates import floating
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule

_x = Var("x", floating)
WRITTEN = pattern("silu", _x * sigmoid(_x), transparent=(NOOP_CAST, ALIAS))


class CanonicalSiLU(Rule):
    """x · σ(x) of one x; x · σ(1.702 x) and a gate σ(x) on another value are left as they are."""

    name: ClassVar[str] = "canonical.silu"
    role: ClassVar[str] = "silu"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return find(program, WRITTEN), ()

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return {match.root: edit.call(aten.silu.default, match["x"])}
