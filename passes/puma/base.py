# SPDX-License-Identifier: Apache-2.0
"""What both rules share: every match of a view, computed in float32 at least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.rules import Rule
from rewriter.views import View

aten = torch.ops.aten


class Approximation(Rule):
    """All matches of `view`, under any spelling."""

    view: ClassVar[View]

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return self.view.find(program), [miss for miss in self.view.explain(program) if miss.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)


def widened(edit: Editor, x: Node, dtype: torch.dtype | None = None) -> Node:
    """x in ``dtype`` or its own, in float32 at least: 16 bits would round by more than the bound."""
    wanted = torch.promote_types(dtype or x.meta["val"].dtype, torch.float32)
    return as_dtype(edit, x, wanted)


def as_dtype(edit: Editor, x: Node, dtype: torch.dtype) -> Node:
    return x if x.meta["val"].dtype == dtype else edit.call(aten.to.dtype, x, dtype)
