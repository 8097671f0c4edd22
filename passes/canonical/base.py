# SPDX-License-Identifier: Apache-2.0
"""What the rules of this pass share: a view, of which they take what is not yet its own operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.views import View

aten = torch.ops.aten


class ToOperator(Rule):
    """Matches of `view` under any other spelling than its operator, which `role` names."""

    contract: ClassVar[Contract] = EXACT
    view: ClassVar[View]

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return self.matches(program), [miss for miss in self.view.explain(program) if miss.node is not None]

    def matches(self, program: Program) -> Sequence[Match]:
        return [match for match in self.view.find(program) if match["spelling"] != self.role]

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return str(reason) if reason is not None else self.objection(program, match)

    def objection(self, program: Program, match: Match) -> str | None:
        """Why this operator would not be the same function here, or None."""
        return None


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's value; every node of a program has one."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def as_dtype(edit: Editor, node: Node, dtype: torch.dtype) -> Node:
    """The node's value in a dtype; itself where it has it."""
    return node if dtype_of(node) == dtype else edit.call(aten.to.dtype, node, dtype)
