# SPDX-License-Identifier: Apache-2.0
"""W₂ (W₁ x + b₁) + b₂  =  (W₂ W₁) x + (W₂ b₁ + b₂)     where that has fewer weights and nothing else reads the middle"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.passes.fold import linears
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule, Site
from rewriter.views import LINEAR
from rewriter.views.base import miss_at
from rewriter.views.linear import features

aten = torch.ops.aten


class FoldLinears(Rule):
    """The product of the weights is computed in float64 and rounded once. A low-rank pair has more after than before."""

    name: ClassVar[str] = "fold.linear"
    role: ClassVar[str] = "linear_linear"
    contract: ClassVar[Contract] = EXACT
    parametric: ClassVar[bool] = True

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        found = LINEAR.find(facts)
        by_input: dict[Node, list[Match]] = {}
        for linear in found:
            by_input.setdefault(linear["x"], []).append(linear)
        matches: list[Match] = []
        misses: list[Miss] = []
        taken: set[Node] = set()  # of three linears in a row, two fold now and the third in the next round
        for first in found:
            fed = linears.single_path(facts, first.root, by_input)
            if isinstance(fed, str) or first.root in taken:
                continue
            if (reason := _grows(facts, first, fed.linear)) is not None:
                misses.append(miss_at(facts, self.name, fed.linear.root, reason, depth=2))
                continue
            taken.add(fed.linear.root)
            matches.append(_match(first, fed))
        return matches, misses

    def refusal(self, program: Program, match: Match) -> str | None:
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        prefix = self.prefix(match)
        new = [f"{prefix}.{role}" if prefix else role for role in self.roles(match, {})]
        return linears.unfit(program, self.replaced_tensors(match), new)

    def prefix(self, match: Match) -> str:
        return linears.owner(match["second"]["weight"])

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        return (*linears.names_of(match["second"]), *linears.names_of(match["first"]))

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        given = linears.described(match["second"])
        biased = given["bias"] is not None or match["first"]["bias"] is not None
        return linears.folded_roles(given["weight"], given["bias"], biased)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        return {which: linears.described(site.match[which]) for which in ("first", "second")}

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        (w1, b1), (w2, b2) = (linears.in_double(read, choice[which]) for which in ("first", "second"))
        bias = b2 if b1 is None else w2 @ b1 if b2 is None else w2 @ b1 + b2
        return linears.rounded(w2 @ w1, bias, read(choice["second"]["weight"]), self.roles(site.match, choice))

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        weight, *bias = (parameters[role] for role in self.roles(match, choice))
        width = int(weight.meta["val"].shape[1])
        x = linears.repeat(edit, match["between"], edit.resolve(match["x"]), width)
        return {match.root: edit.call(aten.linear.default, x, weight, *bias)}


def _grows(facts: Facts, first: Match, second: Match) -> str | None:
    """Why one linear would be no smaller than two; multiply-adds per row are as many as weights."""
    (inner, middle), (_, outer) = features(facts, first), features(facts, second)
    before, after = middle * (inner + outer), inner * outer
    if after < before:
        return None
    return f"one matrix would have {after} weights, the two of rank {middle} have {before}"


def _match(first: Match, fed: linears.Fed) -> Match:
    second = fed.linear
    captures = {"first": first, "second": second, "between": fed.between, "x": first["x"]}
    nodes = tuple(sorted({*first.nodes, *fed.between, *second.nodes}))
    return Match(
        "linear_linear",
        second.root,
        MappingProxyType(captures),
        nodes,
        (second.root,),
        casts=first.casts | second.casts,
        shared=first.shared | second.shared,
    )
