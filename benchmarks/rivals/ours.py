# SPDX-License-Identifier: Apache-2.0
"""This engine. Facts start empty in every run: nothing is carried over from building the graph or from a run before."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

import rewriter
from rewriter.matcher import find
from rewriter.operators import sigmoid
from rewriter.pattern import Operator, Pattern, Var, pattern
from rewriter.rewriting import rewrite
from rivals.workload import ABSENT, graph_module, inputs

aten = torch.ops.aten
x, y = Var("x"), Var("y")
SWISH = pattern("x·σ(x) + y", x * sigmoid(x) + y)


@rewriter.rule(SWISH, contract=rewriter.EXACT)
def swish(edit: Any, x: Any, y: Any) -> Any:
    """x·σ(x) + y = silu(x) + y"""
    return edit.call(aten.add.Tensor, edit.call(aten.silu.default, x), y)


def absent(op: str) -> Pattern:
    """op(x)·x + y"""
    operator = Operator(op, (getattr(aten, op).default,), ("x",))
    return pattern(op, x * operator(x) + y)


DEAD = [absent(op) for op in ABSENT]  # defined and compiled once per process, like the patterns of every other side


class Ours:
    name = "rewriter"

    def prepare(self, nodes: int) -> None:
        self.module: GraphModule = graph_module(nodes)
        self.program = rewriter.Program.from_graph_module(self.module, inputs())

    def match(self, dead: int) -> int:
        facts = rewriter.facts.Facts(self.program.graph_module)
        return sum(len(find(facts, one)) for one in [SWISH, *DEAD[:dead]])

    def rewrite(self) -> int:
        return len(rewrite(self.program, [swish]))

    def run(self) -> Any:
        return self.program.run(*inputs())[0].numpy()
