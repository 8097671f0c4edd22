# SPDX-License-Identifier: Apache-2.0
"""BatchNorm in evaluation is an affine map of channels, s ∘ x + t with s = γ/√(σ² + ε) and t = β − μ s:

    s ∘ (W x + b) + t  =  (diag(s) W) x + (s ∘ b + t)               into the linear or convolution before it
    W (s ∘ x + t) + b  =  (W diag(s)) x + (W t + b)                 into the linears after it
    W (BN(x) + η x) + b  =  (W diag(s + η)) x + (W t + b)           PRepBN, re-parameterised (SLAB, arXiv 2405.11582)

In training its statistics are those of the batch, and it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from rewriter.operators import add, mul, swap_last
from rewriter.passes.fold import linears
from rewriter.passes.fold.into_next import FoldIntoNext, Source
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule, Site
from rewriter.schemas import describe
from rewriter.views import LINEAR
from rewriter.views.base import miss_at

aten = torch.ops.aten
_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding,
)  # fmt: skip
_TENSORS = {"weight": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var"}


class FoldBatchNormBack(Rule):
    """Into what computes its input. One result per output channel, so padding and groups do not matter."""

    name: ClassVar[str] = "fold.batch_norm"
    role: ClassVar[str] = "batch_norm"
    contract: ClassVar[Contract] = EXACT
    parametric: ClassVar[bool] = True

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        norms, misses = _norms(facts, self.name)
        before = {match.root: match for match in LINEAR.find(facts)} if norms else {}
        matches: list[Match] = []
        for norm in norms:
            result = _behind(facts, norm, before)
            if isinstance(result, Match):
                matches.append(result)
            else:
                misses.append(miss_at(facts, self.name, norm, result))
        return matches, misses

    def refusal(self, program: Program, match: Match) -> str | None:
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        prefix = self.prefix(match)
        new = [f"{prefix}.{role}" if prefix else role for role in self.roles(match, {})]
        tensors = _names(match)
        return linears.unfit(program, self.replaced_tensors(match), new, [tensors["mean"], tensors["var"]])

    def prefix(self, match: Match) -> str:
        return linears.owner(match["weight"])

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        return (*linears.names_of(match), *_names(match).values())

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        given = linears.described(match)
        return linears.folded_roles(given["weight"], given["bias"], True)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        return {"linear": linears.described(site.match), "norm": _names(site.match), "eps": site.match["eps"]}

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weight, bias = linears.in_double(read, choice["linear"])
        s, t = _affine({role: read(name).detach().double() for role, name in choice["norm"].items()}, choice["eps"])
        shift = t if bias is None else s * bias + t
        scaled = weight * s.view(-1, *[1] * (weight.dim() - 1))
        return linears.rounded(scaled, shift, read(choice["linear"]["weight"]), self.roles(site.match, choice))

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        weight, bias = (parameters[role] for role in self.roles(match, choice))
        new = edit.call(match["operator"], match["x"], weight, bias, *match["options"])
        return {match.root: linears.repeat(edit, match["between"], new)}


class FoldBatchNorm(FoldIntoNext):
    """Into the linears that read it."""

    name: ClassVar[str] = "fold.batch_norm_next"
    role: ClassVar[str] = "batch_norm_next"

    def sources(self, facts: Facts) -> Sequence[Source | Miss]:
        norms, misses = _norms(facts, self.name)
        return [*(s for n in norms for s in _channels_last(facts, n, n, {}, {}, (n,))), *misses]

    def coefficients(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        return _affine(tensors, settings["eps"])

    def bare(self, edit: Editor, match: Match) -> Node:
        return edit.resolve(match["u"])


class FoldRepNorm(FoldBatchNorm):
    """PRepBN at inference: the sum of a BatchNorm and a multiple η of its input, into the linears that read it."""

    name: ClassVar[str] = "fold.rep_norm"
    role: ClassVar[str] = "rep_norm"

    def sources(self, facts: Facts) -> Sequence[Source | Miss]:
        norms, misses = _norms(facts, self.name)
        return [*(s for norm in norms for s in _sums(facts, norm)), *misses]

    def coefficients(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        s, t = _affine(tensors, settings["eps"])
        return s + (tensors["eta"] if "eta" in tensors else settings["eta"]), t


def _affine(tensors: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """s = γ/√(σ² + ε),  t = β − μ s"""
    s = (tensors["var"] + eps).rsqrt()
    if "weight" in tensors:
        s = tensors["weight"] * s
    t = -tensors["mean"] * s
    return s, (tensors["shift"] + t if "shift" in tensors else t)


def _norms(facts: Facts, rule: str) -> tuple[list[Node], list[Miss]]:
    """BatchNorms in evaluation with tensors of the model, and the others."""
    found: list[Node] = []
    misses: list[Miss] = []
    for node in facts.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        arguments = facts.arguments(node)
        given = [arguments[name] for name in _TENSORS.values() if arguments[name] is not None]
        if arguments["training"] or arguments["running_mean"] is None:
            misses.append(miss_at(facts, rule, node, "it uses the statistics of the batch (training mode)"))
        elif len(list(linears.parameters_among(facts, given))) < len(given):
            misses.append(miss_at(facts, rule, node, "one of its tensors is computed"))
        else:
            found.append(node)
    return found, misses


def _tensors(facts: Facts, norm: Node) -> dict[str, Node]:
    """Role -> tensor of a BatchNorm, those it has."""
    arguments = facts.arguments(norm)
    return {role: arguments[name] for role, name in _TENSORS.items() if arguments[name] is not None}


def _names(match: Match) -> dict[str, str]:
    return {role: str(match[f"norm {role}"].target) for role in _TENSORS if match[f"norm {role}"] is not None}


# ------------------------------------------------------------------------------------------------- what is before it


def _behind(facts: Facts, norm: Node, before: Mapping[Node, Match]) -> Match | str:
    """The linear or convolution whose result nothing but the norm reads; or why there is none."""
    value: Node = facts.arguments(norm)["input"]
    between: tuple[Node, ...] = ()
    if (turned := _turned(facts, value)) is not None:  # [rows, features, length] of a linear's [rows, length, features]
        value, between = turned, (value,)
    elif value in before and len(facts.shape(value) or ()) != 2:
        return f"the channels of {describe(value)} are not its last dimension"
    for node in (value, *between):
        if len(facts.users(node)) != 1:
            return f"{describe(node)} is also read elsewhere"
    arguments = facts.arguments(value) if value.op == "call_function" else {}
    captures: dict[str, Any] = {"between": between, "eps": facts.arguments(norm)["eps"]}
    if value in before:
        linear = before[value]
        nodes, casts = linear.nodes, linear.casts
        captures |= {**linear.captures, "operator": aten.linear.default, "options": ()}
    elif value.target in _CONVOLUTIONS and not between:
        given = [arguments["weight"], arguments["bias"]]
        if len(list(linears.parameters_among(facts, given))) < sum(n is not None for n in given):
            return f"a tensor of {describe(value)} is computed"
        nodes, casts = (value,), frozenset[Node]()
        options = tuple(v for k, v in arguments.items() if k not in ("input", "weight", "bias"))
        captures |= {"x": arguments["input"], "weight": given[0], "bias": given[1], "transposed": False}
        captures |= {"operator": value.target, "options": options}
    else:
        return f"its input, {describe(value)}, is no linear or convolution"
    tensors = _tensors(facts, norm)
    captures |= {f"norm {role}": tensors.get(role) for role in _TENSORS}
    return Match(
        "batch_norm", norm, MappingProxyType(captures), (*nodes, *between, norm), (norm,), casts=casts | {norm}
    )


def _turned(facts: Facts, value: Node) -> Node | None:
    """x where the value is xᵀ, the last two of three dimensions exchanged."""
    if value.op != "call_function" or value.target not in swap_last.targets or len(facts.shape(value) or ()) != 3:
        return None
    assert swap_last.read is not None  # noqa: S101 - it is one of those that are read
    read = swap_last.read(facts, value)
    return None if isinstance(read, str) else read["x"]


# ------------------------------------------------------------------------------------------------- what is after it


def _channels_last(
    facts: Facts,
    norm: Node,
    root: Node,
    tensors: Mapping[str, Node],
    settings: Mapping[str, Any],
    nodes: tuple[Node, ...],
) -> Iterator[Source]:
    """The channel-wise value as an affine map of the last dimension: of two dimensions, or turned before and after."""
    value = facts.arguments(norm)["input"]
    if len(facts.shape(root) or ()) != 2:
        turned, users = _turned(facts, value), facts.users(root)
        if turned is None or len(users) != 1 or _turned(facts, users[0]) is not root:
            return
        value, root, nodes = turned, users[0], (value, *nodes, users[0])
    made_of = _tensors(facts, norm) | dict(tensors)
    numbers = {"eps": facts.arguments(norm)["eps"], **settings}
    yield Source(root, tuple(sorted(nodes)), value, made_of, numbers, frozenset(nodes), shifts=True)


def _sums(facts: Facts, norm: Node) -> Iterator[Source]:
    """BN(x) + η x with η a number or a parameter of one element or one per channel."""
    x, users = facts.arguments(norm)["input"], facts.users(norm)
    if len(users) != 1 or users[0].target not in add.targets or facts.arguments(users[0]).get("alpha", 1) != 1:
        return
    total = users[0]
    other = next((n for n in total.all_input_nodes if n is not norm), None)
    if other is x:
        yield from _channels_last(facts, norm, total, {}, {"eta": 1.0}, (norm, total))
        return
    if other is None or other.target not in mul.targets or facts.users(other) != (total,):
        return
    given = facts.arguments(other)
    factors = [a for a in (given["self"], given["other"]) if a is not x]
    if len(factors) != 1:
        return
    eta, nodes = factors[0], (norm, other, total)
    if isinstance(eta, (int, float)) and not isinstance(eta, bool):
        yield from _channels_last(facts, norm, total, {}, {"eta": float(eta)}, nodes)
    elif facts.is_parameter(eta) and tuple(facts.shape(eta) or ()) in ((), (1,)):
        yield from _channels_last(facts, norm, total, {"eta": eta}, {}, nodes)
