# SPDX-License-Identifier: Apache-2.0
"""W (a ∘ u + c) + b  =  (W diag(a)) u + (W c + b):  an affine map of features goes into the linears that read it

a and c come from a norm, whose bare form u stays. Each linear is a site of its own, since it becomes parameters of its
own; the affine form goes with the last of them. Only where linears are all that reads the norm: a residual connection
that starts behind it needs the affine values.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from rewriter.views.base import miss_at

aten = torch.ops.aten


@dataclass(frozen=True)
class Source:
    """A value a ∘ u + c.

    Attributes:
        root: the node whose value it is; nodes: all it consists of.
        u: what the bare form is computed from.
        tensors: role -> parameter or buffer that a and c are made of.
        settings: numbers they are made of, for the plan.
        casts: nodes at which a view knows of a change of dtype.
        shifts: whether there is a c.
    """

    root: Node
    nodes: tuple[Node, ...]
    u: Node
    tensors: Mapping[str, Node]
    settings: Mapping[str, Any] = field(default_factory=dict)
    casts: frozenset[Node] = frozenset()
    shifts: bool = False


class FoldIntoNext(Rule):
    """Subclasses say which values are affine, what a and c are, and how u is computed."""

    contract: ClassVar[Contract] = EXACT
    parametric: ClassVar[bool] = True

    @abstractmethod
    def sources(self, facts: Facts) -> Sequence[Source | Miss]:
        """The affine values of a program, and what nearly is one."""

    @abstractmethod
    def coefficients(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """(a, c) of [features] each, in float64, from the source's tensors in float64; c is None where it is zero."""

    @abstractmethod
    def bare(self, edit: Editor, match: Match) -> Node:
        """u as a node."""

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        matches: list[Match] = []
        misses: list[Miss] = []
        sources = self.sources(facts)
        by_input = linears.linears_by_input(facts) if sources else {}
        for source in sources:
            if isinstance(source, Miss):
                misses.append(source)
                continue
            fed = linears.fed_by(facts, source.root, by_input)
            if isinstance(fed, str):
                misses.append(miss_at(facts, self.name, source.root, fed, depth=len(source.nodes)))
            else:
                matches += [_match(facts, self.role, source, one) for one in fed]
        return sorted(matches, key=lambda match: facts.position(match.root)), misses

    def refusal(self, program: Program, match: Match) -> str | None:
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        prefix = self.prefix(match)
        new = [f"{prefix}.{role}" if prefix else role for role in self.roles(match, {})]
        tensors = _tensors(match)
        statistics = [tensors[role] for role in ("mean", "var") if role in tensors]
        return linears.unfit(program, self.replaced_tensors(match), new, statistics)

    def prefix(self, match: Match) -> str:
        return linears.owner(match["linear"]["weight"])

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        return (*linears.names_of(match["linear"]), *_tensors(match).values())

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        given = linears.described(match["linear"])
        return linears.folded_roles(given["weight"], given["bias"], given["bias"] is not None or match["shifts"])

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        match = site.match
        return {
            "linear": linears.described(match["linear"]),
            "source": _tensors(match),
            "settings": dict(match["settings"]),
        }

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weight, bias = linears.in_double(read, choice["linear"])
        tensors = {role: read(name).detach().double() for role, name in choice["source"].items()}
        a, c = self.coefficients(tensors, choice["settings"])
        if c is not None:
            bias = weight @ c if bias is None else weight @ c + bias
        like = read(choice["linear"]["weight"])
        return linears.rounded(weight * a, bias, like, self.roles(site.match, choice))

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        x = linears.repeat(edit, match["between"], self.bare(edit, match))
        weight, *bias = (parameters[role] for role in self.roles(match, choice))
        return {match.root: edit.call(aten.linear.default, x, weight, *bias)}


def once(edit: Editor, match: Match, target: Any, x: Node, *rest: Any) -> Node:
    """A call before the match's root; the one an earlier site made, where there is one."""
    x = edit.resolve(x)
    for user in x.users:
        if user.target is target and user.args == (x, *rest) and not user.kwargs and user < match.root:
            return user
    return edit.call(target, x, *rest)


def in_dtype(edit: Editor, match: Match, x: Node, dtype: torch.dtype | None) -> Node:
    """The value cast to a dtype, where it has another."""
    x = edit.resolve(x)
    return x if dtype in (None, x.meta["val"].dtype) else once(edit, match, aten.to.dtype, x, dtype)


def _match(facts: Facts, name: str, source: Source, fed: linears.Fed) -> Match:
    linear = fed.linear
    nodes = tuple(sorted({*source.nodes, *fed.between, *linear.nodes}))
    captures = {
        "u": source.u,
        "linear": linear,
        "between": fed.between,
        "result": source.root,
        "settings": source.settings,
        "shifts": source.shifts,
        **{f"tensor {role}": node for role, node in source.tensors.items()},
    }
    # Only the linear is replaced. What leads to several linears is read outside the site of each, and stays for them.
    inside = set(nodes)
    read = (n for n in (*source.nodes, *fed.between) if any(user not in inside for user in facts.users(n)))
    casts = source.casts | linear.casts
    return Match(name, linear.root, MappingProxyType(captures), nodes, (linear.root, *read), casts, linear.shared)


def _tensors(match: Match) -> dict[str, str]:
    """Role -> name of the source's tensors."""
    prefix = "tensor "
    return {k.removeprefix(prefix): str(n.target) for k, n in match.captures.items() if k.startswith(prefix)}
