# SPDX-License-Identifier: Apache-2.0
"""What the folds share: linears that read a value and nothing else does, their tensors in float64, and new names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter.editing import Editor
from rewriter.facts import Facts, same_size
from rewriter.matcher import Match
from rewriter.operators import ALIAS, CONTIGUOUS, NOOP_CAST, reshape
from rewriter.program import Program
from rewriter.schemas import describe
from rewriter.views import LINEAR

aten = torch.ops.aten
Read = Callable[[str], Tensor]

_FOLDED = re.compile(r"(.*)_folded(\d*)")
_SHAPES = frozenset({*reshape.targets, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default})
_ROWS = frozenset({aten.slice.Tensor, aten.select.int})
_SWAPS = frozenset({aten.transpose.int, aten.permute.default})


@dataclass(frozen=True)
class Fed:
    """A linear that reads a value, perhaps through nodes that only rearrange or choose rows of it."""

    linear: Match
    between: tuple[Node, ...] = ()


def linears_by_input(facts: Facts) -> dict[Node, list[Match]]:
    """Node -> the linears that read it."""
    found: dict[Node, list[Match]] = {}
    for match in LINEAR.find(facts):
        found.setdefault(match["x"], []).append(match)
    return found


def fed_by(facts: Facts, value: Node, linears: Mapping[Node, Sequence[Match]]) -> list[Fed] | str:
    """The linears a value goes to; or, where it also goes elsewhere, where."""
    found: list[Fed] = []
    pending: list[tuple[Node, tuple[Node, ...]]] = [(value, ())]
    while pending:
        node, between = pending.pop(0)
        for user in facts.users(node):
            linear = next((m for m in linears.get(node, ()) if user in m.nodes), None)
            if linear is not None:
                found.append(Fed(linear, between))
            elif user.op == "output":
                return f"{describe(node)} is also returned"
            elif works_on_rows(facts, user, node):
                pending.append((user, (*between, user)))
            else:
                return f"{describe(node)} is also read by {describe(user)}, which is no linear"
    return found or f"nothing reads {describe(value)}"


def works_on_rows(facts: Facts, node: Node, value: Node) -> bool:
    """Whether a node only rearranges or chooses rows (all dimensions but the last) of the value it reads first."""
    if node.op != "call_function" or next(iter(node.all_input_nodes), None) is not value:
        return False
    target: Any = node.target
    if any(target in kind.targets and kind.test(facts, node) for kind in (NOOP_CAST, ALIAS, CONTIGUOUS)):
        return True
    before, after = facts.shape(value), facts.shape(node)
    if not before or not after or not same_size(before[-1], after[-1]) or facts.dtype(node) != facts.dtype(value):
        return False
    arguments = facts.arguments(node)
    last = len(before) - 1
    if target in _SHAPES:
        return _keeps_last(arguments, before, after)
    if target in _ROWS:
        return bool(arguments["dim"] % len(before) != last)
    if target is aten.transpose.int:
        return last not in (arguments["dim0"] % len(before), arguments["dim1"] % len(before))
    return target is aten.permute.default and arguments["dims"][-1] % len(before) == last


def _keeps_last(arguments: Mapping[str, Any], before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Equal last sizes of equally many elements: each row stays a row. A size of 1 says nothing about what moved."""
    return isinstance(before[-1], int) and before[-1] > 1 and isinstance(after[-1], int)


def repeat(edit: Editor, between: Sequence[Node], value: Node, width: int | None = None) -> Node:
    """The same rearrangement of another value, whose rows have ``width`` elements where that differs."""
    for node in between:
        target: Any = node.target
        rest = list(node.args[1:])
        if width is not None and target in reshape.targets:
            rest[0] = [*rest[0][:-1], width]  # type: ignore[index, misc]
        value = edit.call(target, value, *rest, **node.kwargs)
    return value


# --------------------------------------------------------------------------------------------------- tensors


def described(linear: Match) -> dict[str, Any]:
    """A linear's tensors as JSON, for a plan."""
    bias = linear["bias"]
    return {
        "weight": str(linear["weight"].target),
        "bias": None if bias is None else str(bias.target),
        "transposed": bool(linear["transposed"]),
    }


def names_of(linear: Match) -> tuple[str, ...]:
    return tuple(str(n.target) for n in (linear["weight"], linear["bias"]) if n is not None)


def in_double(read: Read, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a described linear, in float64."""
    weight = read(given["weight"]).detach().double()
    bias = None if given["bias"] is None else read(given["bias"]).detach().double()
    return (weight.t() if given["transposed"] else weight), bias


def rounded(weight: Tensor, bias: Tensor | None, like: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """New parameters by role, rounded once to the dtype of ``like`` and trained if it is."""
    values = [weight] if bias is None else [weight, bias]
    return {
        role: nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
        for role, value in zip(names, values, strict=True)
    }


def owner(weight: Node) -> str:
    """Path of the module a parameter belongs to."""
    return str(weight.target).rpartition(".")[0]


def folded_roles(weight: str, bias: str | None, biased: bool) -> tuple[str, ...]:
    """Roles of the new tensors of a linear: ``weight_folded``, ``bias_folded``; folded again ``weight_folded2``.

    A name of its own each time, so that undoing one fold finds what it replaced.
    """
    return (_next(weight.rpartition(".")[2]), *([_next((bias or "bias").rpartition(".")[2])] if biased else []))


def _next(leaf: str) -> str:
    found = _FOLDED.fullmatch(leaf)
    return f"{leaf}_folded" if found is None else f"{found[1]}_folded{int(found[2] or 1) + 1}"


def unfit(program: Program, names: Sequence[str], new: Sequence[str], statistics: Sequence[str] = ()) -> str | None:
    """Why tensors cannot be merged into one: some frozen, two the same, or names that are taken.

    ``statistics`` are those of the names that nobody trains, whatever becomes of the others.
    """
    if len(set(names)) < len(names):
        return "two of the tensors are one"
    # What the graph says of them, not the tensors: when a plan is replayed, those it replaces are gone already.
    nodes = program.parameter_nodes()
    values = {name: nodes[name].meta["val"] for name in names}
    if len({value.requires_grad for name, value in values.items() if name not in statistics}) > 1:
        return "some of the tensors are frozen and some are trained"
    if not all(value.is_floating_point() for value in values.values()):
        return "a tensor is not floating"
    taken = [name for name in new if name in nodes]
    return f"the model already has a parameter {taken[0]}" if taken else None


def single_path(facts: Facts, value: Node, linears: Mapping[Node, Sequence[Match]]) -> Fed | str:
    """The one linear that reads a value; or why there is not exactly one."""
    fed = fed_by(facts, value, linears)
    if isinstance(fed, str):
        return fed
    return fed[0] if len(fed) == 1 else f"{describe(value)} is read by {len(fed)} linears"


def parameters_among(facts: Facts, nodes: Sequence[Node | None]) -> Iterator[Node]:
    """Those of the nodes that read tensors of the model."""
    for node in nodes:
        if node is not None and facts.is_parameter(node):
            yield node
