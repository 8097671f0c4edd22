# SPDX-License-Identifier: Apache-2.0
"""Inductor's `PatternMatcherPass`, with each of its three ways to say what replaces a match."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import (
    CallFunction,
    KeywordArg,
    Match,
    PatternMatcherPass,
    fwd_only,
    register_graph_pattern,
    register_replacement,
)

from rivals.workload import ABSENT, graph_module, inputs

aten = torch.ops.aten


def searched(op: str) -> CallFunction:
    """x·op(x) + y"""
    inner = CallFunction(getattr(aten, op).default, KeywordArg("x"))
    return CallFunction(aten.add.Tensor, CallFunction(aten.mul.Tensor, KeywordArg("x"), inner), KeywordArg("y"))


def before(x: Tensor, y: Tensor) -> Tensor:
    return aten.add.Tensor(aten.mul.Tensor(x, aten.sigmoid.default(x)), y)


def after(x: Tensor, y: Tensor) -> Tensor:
    return aten.add.Tensor(aten.silu.default(x), y)


class Inductor:
    """The leanest way: the handler edits the graph by hand and gives the new nodes no metadata."""

    name = "Inductor"

    def prepare(self, nodes: int) -> None:
        self.module = graph_module(nodes)
        self.found: list[Match] = []
        self.searching = {dead: self.search(dead) for dead in (0, len(ABSENT))}
        self.replacing = PatternMatcherPass()
        self.register()

    def search(self, dead: int) -> PatternMatcherPass:
        """The pattern and ``dead`` others, matched and never replaced."""

        def note(match: Match) -> bool:
            self.found.append(match)
            return False

        made = PatternMatcherPass()
        for op in ("sigmoid", *ABSENT[:dead]):
            register_graph_pattern(searched(op), extra_check=note, pass_dict=made)(lambda match, **_: None)
        return made

    def register(self) -> None:
        def handler(match: Match, x: Any, y: Any) -> None:
            graph, root = match.graph, match.output_node()
            new = graph.call_function(aten.add.Tensor, (graph.call_function(aten.silu.default, (x,)), y))
            root.replace_all_uses_with(new)
            match.erase_nodes()

        register_graph_pattern(searched("sigmoid"), pass_dict=self.replacing)(handler)

    def match(self, dead: int) -> int:
        self.found.clear()
        self.searching[dead].apply(self.module)
        return len(self.found)

    def rewrite(self) -> int:
        count: int = self.replacing.apply(self.module)
        self.module.recompile()
        return count

    def run(self) -> Any:
        return self.module(*inputs())[0].numpy()


class InductorExample(Inductor):
    """A handler that lets Inductor trace the replacement, which gives it metadata."""

    name = "Inductor, replace_by_example"

    def register(self) -> None:
        def handler(match: Match, x: Any, y: Any) -> None:
            match.replace_by_example(after, [x, y])

        register_graph_pattern(searched("sigmoid"), pass_dict=self.replacing)(handler)


class InductorReplacement(Inductor):
    """Pattern and replacement as functions, both traced by Inductor."""

    name = "Inductor, register_replacement"

    def register(self) -> None:
        register_replacement(before, after, list(inputs()[:2]), fwd_only, self.replacing)
