# SPDX-License-Identifier: Apache-2.0
"""x W₁ᵀ + b₁, x W₂ᵀ + b₂, …  =  split(x [W₁; W₂; …]ᵀ + [b₁; b₂; …])     what q/k/v and gate/up have in common"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.matcher import Match
from rewriter.program import Program
from rewriter.rules import EXACT, Address, Contract, Rule, Site, module_path
from rewriter.views import LINEAR

aten = torch.ops.aten


class MergeLinears(Rule):
    """One read of x, one product; the parts are views of its result. Subclasses say which linears."""

    contract: ClassVar[Contract] = EXACT
    parametric: ClassVar[bool] = True
    members: ClassVar[tuple[str, ...]]  # how captures and the new module call the linears

    @abstractmethod
    def regroup(self, linears: Mapping[str, Match]) -> Match:
        """Linears of one input, by member, as a match of this rule."""

    @abstractmethod
    def members_at(self, path: str) -> Sequence[str]:
        """The members of a site at this path."""

    def linears(self, match: Match) -> dict[str, Match]:
        """The linears of a match by member."""
        found = {name: match[f"{name}_linear"] for name in self.members}
        return {name: linear for name, linear in found.items() if linear is not None}

    def recall(self, program: Program, address: Address, choice: Mapping[str, Any]) -> Sequence[Match]:
        """The linears by their weights: in another dtype what they feed may be written as no view knows it."""
        names = self.members_at(address.path)
        member_of = dict(zip(choice["weights"], names, strict=True))
        by_input: dict[Node, dict[str, Match]] = {}
        for linear in LINEAR.find(program):
            if (weight := str(linear["weight"].target)) in member_of:
                by_input.setdefault(linear["x"], {})[member_of[weight]] = linear
        return [self.regroup(found) for found in by_input.values() if len(found) == len(names)]

    def refusal(self, program: Program, match: Match) -> str | None:
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        linears = list(self.linears(match).values())
        *others, last = self.members
        together = f"{', '.join(others)} and {last}"
        names = self.replaced_tensors(match)
        nodes = {str(n.target): n for linear in linears for n in (linear["weight"], linear["bias"]) if n is not None}
        inside = {n for linear in linears for n in linear.nodes}
        if len(set(names)) < len(names):
            return f"two of {together} read the same weight"
        values = [nodes[n].meta["val"] for n in names]
        if len({v.requires_grad for v in values}) > 1:
            return "some of the weights are frozen and some are trained"
        if len({v.dtype for v in values}) > 1:
            return "the weights have different dtypes"
        if f"{self.prefix(match)}.weight" in program.parameter_nodes():
            return f"the model already has a parameter {self.prefix(match)}.weight"
        outside = [n for n in names if any(u not in inside and not _is_linear_weight(u) for u in nodes[n].users)]
        return f"{outside[0]} is also read outside {together}" if outside else None

    def replaced_nodes(self, match: Match) -> tuple[Node, ...]:
        return tuple(linear.root for linear in self.linears(match).values())

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        linears = self.linears(match).values()
        biases = [str(linear["bias"].target) for linear in linears if linear["bias"] is not None]
        return (*[str(linear["weight"].target) for linear in linears], *biases)

    def prefix(self, match: Match) -> str:
        linears = self.linears(match)
        parent = module_path(next(iter(linears.values())).root).rpartition(".")[0]
        name = self.module_name(list(linears))
        return f"{parent}.{name}" if parent else name

    @abstractmethod
    def module_name(self, members: Sequence[str]) -> str:
        """Name of the merged module in the one its parts are in."""

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        first = next(iter(self.linears(match).values()))
        return ("weight", "bias") if first["bias"] is not None else ("weight",)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        names = self.replaced_tensors(site.match)
        linears = list(self.linears(site.match).values())
        dim = 1 if linears[0]["transposed"] else 0
        rows = [int(linear["weight"].meta["val"].shape[dim]) for linear in linears]
        count = len(linears)
        return {"rows": rows, "weights": list(names[:count]), "biases": list(names[count:]), "transposed": dim == 1}

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weights = [read(n) for n in choice["weights"]]
        made = {"weight": torch.cat([w.t() for w in weights] if choice["transposed"] else weights)}
        if choice["biases"]:
            made["bias"] = torch.cat([read(n) for n in choice["biases"]])
        return {role: nn.Parameter(t.detach(), requires_grad=weights[0].requires_grad) for role, t in made.items()}

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        merged = edit.call(aten.linear.default, match["x"], parameters["weight"], parameters.get("bias"))
        parts = edit.call(aten.split_with_sizes.default, merged, choice["rows"], -1)
        return {root: edit.call(operator.getitem, parts, i) for i, root in enumerate(self.replaced_nodes(match))}

    def restore(
        self, part: Callable[[int, int], Any], replaced: Sequence[str], choice: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        parts: dict[str, Any] = {}
        start = 0
        for name, rows in zip(replaced, choice["rows"], strict=False):
            value = part(start, start + rows)
            is_matrix = isinstance(value, Tensor) and value.dim() == 2
            parts[name] = value.t() if is_matrix and choice["transposed"] else value
            start += rows
        return parts


def _is_linear_weight(user: Node) -> bool:
    """Another call of the same shared layer, which is part of the same site."""
    return user.target in (aten.linear.default, aten.addmm.default)
