# SPDX-License-Identifier: Apache-2.0
"""torch.fx: `SubgraphMatcher` for matching, `replace_pattern` for rewriting."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher
from torch.fx.subgraph_rewriter import replace_pattern

from rivals.workload import ABSENT, graph_module, inputs

aten = torch.ops.aten


def searched(op: str) -> Graph:
    """x·op(x) + y"""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    inner = graph.call_function(getattr(aten, op).default, (x,))
    graph.output(graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (x, inner)), y)))
    return graph


def replacement() -> Graph:
    """silu(x) + y"""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(aten.add.Tensor, (graph.call_function(aten.silu.default, (x,)), y)))
    return graph


class TorchFx:
    name = "torch.fx"

    def prepare(self, nodes: int) -> None:
        self.module = graph_module(nodes)
        self.matchers = [SubgraphMatcher(searched(op)) for op in ("sigmoid", *ABSENT)]

    def match(self, dead: int) -> int:
        return sum(len(matcher.match(self.module.graph)) for matcher in self.matchers[: 1 + dead])

    def rewrite(self) -> int:
        return len(replace_pattern(self.module, searched("sigmoid"), replacement()))

    def run(self) -> Any:
        return self.module(*inputs())[0].numpy()
