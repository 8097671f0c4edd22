# SPDX-License-Identifier: Apache-2.0
"""x Wqᵀ + bq, x Wkᵀ + bk, x Wvᵀ + bv  =  split(x [Wq; Wk; Wv]ᵀ + [bq; bk; bv])"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.rules import EXACT, Address, Contract, Rule, Site, module_path
from rewriter.views import LINEAR, QKV
from rewriter.views.qkv import joined

aten = torch.ops.aten
_ROLES = ("q", "k", "v")


class FuseQKV(Rule):
    """One read of x, one product; the parts are views of its result."""

    name: ClassVar[str] = "fuse.qkv"
    role: ClassVar[str] = "qkv"
    contract: ClassVar[Contract] = EXACT
    parametric: ClassVar[bool] = True

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return QKV.find(program), [m for m in QKV.explain(program) if m.node is not None]

    def recall(self, program: Program, address: Address, choice: Mapping[str, Any]) -> Sequence[Match]:
        """The linears by their weights: written in another dtype, the attention they feed may be none a view knows."""
        roles = [r for r in _ROLES if r in address.path.rpartition(".")[2].removesuffix("_proj")]
        role_of = dict(zip(choice["weights"], roles, strict=True))
        by_input: dict[Node, dict[str, Match]] = {}
        for linear in LINEAR.find(program):
            if (name := str(linear["weight"].target)) in role_of:
                by_input.setdefault(linear["x"], {})[role_of[name]] = linear
        return [joined(members, None) for members in by_input.values() if len(members) == len(roles)]

    def refusal(self, program: Program, match: Match) -> str | None:
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        names = self.replaced_tensors(match)
        nodes = {
            str(n.target): n for linear in _linears(match) for n in (linear["weight"], linear["bias"]) if n is not None
        }
        inside = {n for linear in _linears(match) for n in linear.nodes}
        if len(set(names)) < len(names):
            return "two of q, k and v read the same weight"
        values = [nodes[n].meta["val"] for n in names]
        if len({v.requires_grad for v in values}) > 1:
            return "some of the weights are frozen and some are trained"
        if len({v.dtype for v in values}) > 1:
            return "the weights have different dtypes"
        if f"{self.prefix(match)}.weight" in program.parameter_nodes():
            return f"the model already has a parameter {self.prefix(match)}.weight"
        outside = [n for n in names if any(u not in inside and not _is_linear_weight(u) for u in nodes[n].users)]
        return f"{outside[0]} is also read outside q, k and v" if outside else None

    def replaced_nodes(self, match: Match) -> tuple[Node, ...]:
        return tuple(linear.root for linear in _linears(match))

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        linears = _linears(match)
        biases = [str(linear["bias"].target) for linear in linears if linear["bias"] is not None]
        return (*[str(linear["weight"].target) for linear in linears], *biases)

    def prefix(self, match: Match) -> str:
        parent = module_path(_linears(match)[0].root).rpartition(".")[0]
        name = "".join(r for r in _ROLES if match[f"{r}_linear"] is not None) + "_proj"
        return f"{parent}.{name}" if parent else name

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return ("weight", "bias") if _linears(match)[0]["bias"] is not None else ("weight",)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        names = self.replaced_tensors(site.match)
        count = len(_linears(site.match))
        dim = 1 if _linears(site.match)[0]["transposed"] else 0
        rows = [int(linear["weight"].meta["val"].shape[dim]) for linear in _linears(site.match)]
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
        return {linear.root: edit.call(operator.getitem, parts, i) for i, linear in enumerate(_linears(match))}

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


def _linears(match: Match) -> list[Match]:
    return [match[f"{role}_linear"] for role in _ROLES if match[f"{role}_linear"] is not None]


def _is_linear_weight(user: Node) -> bool:
    """Another call of the same shared layer, which is part of the same site."""
    return user.target in (aten.linear.default, aten.addmm.default)
