# SPDX-License-Identifier: Apache-2.0
"""What follows logits in a graph: losses, softmaxes and the largest logits, and the nodes that only move rows before them.

A loss seldom reads logits as they come: they are cast, cut, flattened. Whatever keeps each position's logits together
can be done to the hidden states instead, since  f(h Cᵀ) = f(h) Cᵀ  for every f that moves rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.facts import Facts, same_shape
from rewriter.operators import cast
from rewriter.schemas import base_name, describe
from rewriter.views import CROSS_ENTROPY, LOG_SOFTMAX, SOFTMAX

aten = torch.ops.aten

_KEEPS = frozenset({"contiguous", "clone", "alias"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view"})
_ALONG_ROWS = frozenset({"slice", "select", "squeeze"})  # with a dimension of their own
LARGEST = frozenset({aten.argmax.default, aten.topk.default, aten.max.dim})


@dataclass(frozen=True)
class Follower:
    """One place where logits become something else.

    Attributes:
        kind: ``cross_entropy``, ``log_softmax``, ``softmax``, or ``largest`` (argmax, max, topk).
        roots: the nodes whose values a replacement takes over.
        nodes: the nodes it consists of, the way to it left out.
        way: nodes from the logits to it, which move rows or cast, in order.
        captures: those of the view; of ``largest``: ``k``, ``keepdim``, and ``target`` (the operator).
    """

    kind: str
    roots: tuple[Node, ...]
    nodes: tuple[Node, ...]
    way: tuple[Node, ...]
    captures: Mapping[str, Any]


Reason = tuple[Node, str]


def followers(facts: Facts, logits: Node, hidden: torch.dtype) -> tuple[list[Follower], list[Reason]]:
    """Everything that follows ``logits``, computed from hidden states of dtype ``hidden``; and what cannot, with reasons."""
    ways = _ways(facts, logits, hidden)
    found: list[Follower] = []
    reasons: list[Reason] = []
    for candidate in _candidates(facts, ways):
        if isinstance(candidate, Follower):
            reason = _obstacle(facts, candidate, hidden)
            if reason is None:
                found.append(candidate)
            else:
                reasons.append((candidate.roots[-1], reason))
        else:
            reasons.append(candidate)
    return found, reasons


def needed(facts: Facts, logits: Node, found: list[Follower]) -> Node | None:
    """A node that reads the logits, or a value on the way, and is none of the followers; None if there is none."""
    inside = {node for one in found for node in (*one.way, *one.nodes)}
    for value in (logits, *(node for one in found for node in one.way)):
        for user in facts.users(value):
            if user not in inside:
                return user
    return None


def is_soft(target: Node) -> bool:
    """Whether a loss's target is probabilities."""
    floating: bool = target.meta["val"].is_floating_point()
    return floating


def _ways(facts: Facts, logits: Node, hidden: torch.dtype) -> dict[Node, tuple[Node, ...]]:
    """Every node that holds rows of the logits -> how they came there."""
    ways: dict[Node, tuple[Node, ...]] = {logits: ()}
    pending = [logits]
    while pending:
        value = pending.pop(0)
        for user in facts.users(value):
            if user not in ways and _moves_rows(facts, user, value, hidden):
                ways[user] = (*ways[value], user)
                pending.append(user)
    return ways


def _moves_rows(facts: Facts, node: Node, value: Node, hidden: torch.dtype) -> bool:
    before, after = facts.shape(value), facts.shape(node)
    if node.op != "call_function" or before is None or after is None or len(before) == 0:
        return False
    if node.target in cast.targets:
        read = cast.read(facts, node) if cast.read is not None else "not a cast"
        return not isinstance(read, str) and _keeps_values(facts.dtype(value), facts.dtype(node), hidden)
    name, arguments, last = base_name(node.target), facts.arguments(node), len(before) - 1
    if not after or not same_shape(before[-1:], after[-1:]):
        return False
    if name in _KEEPS:
        return arguments.get("memory_format") in (None, torch.contiguous_format, torch.preserve_format)
    if name in _RESHAPES:
        return True
    if name == "flatten":
        return bool(arguments["end_dim"] % len(before) < last)
    if name == "unsqueeze":
        return bool(arguments["dim"] % (last + 2) <= last)
    return name in _ALONG_ROWS and isinstance(arguments.get("dim"), int) and arguments["dim"] % len(before) < last


def _keeps_values(before: torch.dtype | None, after: torch.dtype | None, hidden: torch.dtype) -> bool:
    """A cast that loses nothing, to no more than what losses of such hidden states are computed in."""
    if before is None or after is None or not after.is_floating_point:
        return False
    return torch.promote_types(before, after) == after and _within(after, hidden)


def _within(dtype: torch.dtype | None, hidden: torch.dtype) -> bool:
    """Whether results of this dtype can be had from float32, or the hidden states' own dtype if that is wider."""
    wide = torch.promote_types(hidden, torch.float32)
    return dtype is not None and torch.promote_types(dtype, wide) == wide


def _candidates(facts: Facts, ways: Mapping[Node, tuple[Node, ...]]) -> Iterator[Follower | Reason]:
    inside: set[Node] = set()
    for match in CROSS_ENTROPY.find(facts):
        value, way = match["logits"], ways.get(match["logits"])
        if way is None and _moves_classes(facts, value):
            before = value.all_input_nodes[0]
            way = (*ways[before], value) if before in ways else None
        if way is not None:
            inside |= set(match.nodes)
            nodes = tuple(node for node in match.nodes if node not in way)
            yield Follower("cross_entropy", (match.root,), nodes, way, match.captures)
    for view, kind in ((LOG_SOFTMAX, "log_softmax"), (SOFTMAX, "softmax")):
        for match in view.find(facts):
            way = ways.get(match["x"])
            if way is not None and inside.isdisjoint(match.nodes):
                inside |= set(match.nodes)
                yield Follower(kind, (match.root,), match.nodes, way, match.captures)
    for value, way in ways.items():
        for user in facts.users(value):
            if user.target in LARGEST:
                yield _largest(facts, user, way)
            elif user.op != "output" and user not in inside and user not in ways:
                yield user, f"{describe(user)} needs all logits"


def _moves_classes(facts: Facts, node: Node) -> bool:
    """[B, T, V] → [B, V, T], as the loss operators want it."""
    if node.op != "call_function" or len(facts.shape(node) or ()) != 3:
        return False
    arguments = facts.arguments(node)
    if node.target is aten.transpose.int:
        return {arguments["dim0"] % 3, arguments["dim1"] % 3} == {1, 2}
    return node.target is aten.permute.default and [d % 3 for d in arguments["dims"]] == [0, 2, 1]


def _largest(facts: Facts, node: Node, way: tuple[Node, ...]) -> Follower | Reason:
    arguments, rank = facts.arguments(node), len(facts.shape(node.all_input_nodes[0]) or ())
    dim, k = arguments["dim"], arguments.get("k", 1)
    if not isinstance(dim, int) or dim % rank != rank - 1:
        return node, f"{describe(node)} is not taken over the vocabulary"
    if not isinstance(k, int) or k < 1 or arguments.get("largest", True) is False:
        return node, f"{describe(node)} does not ask for a known number of the largest logits"
    captures = {"k": k, "keepdim": arguments.get("keepdim", True), "target": node.target}
    if node.target is aten.argmax.default:
        return Follower("largest", (node,), (node,), way, captures)
    parts = facts.users(node)
    if not parts or any(user.target is not operator.getitem for user in parts):
        return node, f"{describe(node)} is not taken apart"
    return Follower("largest", tuple(sorted(parts)), (node, *sorted(parts)), way, captures)


def _obstacle(facts: Facts, one: Follower, hidden: torch.dtype) -> str | None:
    root = one.roots[-1]
    for node in one.roots:
        dtype = facts.dtype(node)
        if dtype is not None and dtype.is_floating_point and not _within(dtype, hidden):
            return f"{describe(node)} is computed in {dtype}, more than the hidden states have"
    value = one.way[-1] if one.way else None
    if one.kind in ("softmax", "log_softmax"):
        rank = len(facts.shape(root) or ())
        return None if one.captures["dim"] % rank == rank - 1 else f"{describe(root)} is not taken over the vocabulary"
    if one.kind != "cross_entropy":
        return None
    moved = value is not None and _moves_classes(facts, value)
    rank = len(facts.shape(one.captures["logits"]) or ())
    if one.captures["class_dim"] != (1 if moved else rank - 1):
        return f"{describe(root)} takes another dimension for the vocabulary"
    if one.captures["reduction"] == "none":
        rows = facts.shape(one.captures["logits"]) or ()
        rows = (rows[0], *rows[2:]) if moved else rows[:-1]
        if not same_shape(rows, facts.shape(root)):
            return f"{describe(root)} is not known to have a loss for each row of the logits"
    return None
