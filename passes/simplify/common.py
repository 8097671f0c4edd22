# SPDX-License-Identifier: Apache-2.0
"""a = f(x), b = f(x)  ⟹  b is a: one computation for equal calls of a pure operator on equal contents"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.passes.simplify.pure import is_pure
from rewriter.passes.simplify.sites import sharing_shows, site
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule

# Operators whose result's size or value depends on data get symbols of their own at every call.
_OWN_SYMBOLS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class ShareCommon(Rule):
    """Each repeated call becomes the first one of its kind. Calls are equal if their operands are, also by this rule."""

    name: ClassVar[str] = "simplify.common"
    role: ClassVar[str] = "common"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        first: dict[Hashable, Node] = {}
        same: dict[Node, Node] = {}  # repeated call -> the first one
        for node in facts.graph.nodes:
            if (key := _key(facts, node, same)) is not None and (earlier := first.setdefault(key, node)) is not node:
                same[node] = earlier
        return [site(self.role, (node,), {"same": earlier}, casts=(node,)) for node, earlier in same.items()], ()

    def refusal(self, program: Program, match: Match) -> str | None:
        facts, node, earlier = program.facts, match.root, match["same"]
        if (reason := legality.refusal(facts, match)) is not None:
            return str(reason)
        if facts.shape(node) is None or facts.aliased(node):
            return None  # a number, or a view of what the earlier one is a view of
        return sharing_shows(facts, node, earlier)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return {match.root: match["same"]}


def _key(facts: Facts, node: Node, same: Mapping[Node, Node]) -> Hashable | None:
    """Equal for two nodes if they compute the same; None for a node that must be left alone."""
    if not is_pure(facts, node) or facts.is_random(node):
        return None
    if isinstance(node.target, OpOverload) and any(tag in node.target.tags for tag in _OWN_SYMBOLS):
        return None
    switches = len(facts.mode_switches_between(next(iter(facts.graph.nodes)), node))
    arguments = _frozen(facts, facts.arguments(node), same, node)
    return None if arguments is None else (node.target, switches, arguments)


def _frozen(facts: Facts, value: Any, same: Mapping[Node, Node], reader: Node) -> Hashable | None:
    """An argument as a key: nodes by what stands for them and how often it was written; None if it cannot be one."""
    if isinstance(value, Node):
        return same.get(value, value), facts.epoch(value, reader)
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, (list, tuple)):
        items = tuple(_frozen(facts, item, same, reader) for item in value)
        return None if None in items else ("sequence", *items)
    if isinstance(value, slice):
        return _frozen(facts, ("slice", value.start, value.stop, value.step), same, reader)
    try:
        hash(value)
    except TypeError:
        return None
    return type(value), repr(value)  # 1, 1.0 and True are different arguments, and so are 0.0 and -0.0
