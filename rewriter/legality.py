# SPDX-License-Identifier: Apache-2.0
"""Whether a match may be replaced: a reason against it, or none.

A replacement stands where the root stands, so it reads its inputs later than the matched nodes did, and it computes
nothing but the outputs. It is sound if nobody can tell the difference:

    no value inside is needed outside            (escape)
    nothing read is written between read and root (mutation)
    no random numbers are drawn inside           (random)
    dtypes change only where the pattern says so (dtype), devices never (device)
    an output shares storage as it did before    (alias)
    all nodes lie in one graph under one mode    (region)

What a rule then builds is compared with what it replaces in :mod:`rewriter.replacing`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.schemas import describe
from rewriter.slices import Region


@dataclass(frozen=True)
class Reason:
    """Why a match must not be replaced.

    Attributes:
        kind: ``escape | mutation | random | dtype | device | alias | region``.
        message: one sentence.
        node: the node to blame.
        source: the user's line behind it.
    """

    kind: str
    message: str
    node: Node
    source: str

    def __str__(self) -> str:
        return f"{self.message} ({self.source})" if self.source else self.message


def refusal(facts: Facts, match: Match, *, besides: Collection[str] = ()) -> Reason | None:
    """The first reason against replacing the match; None if replacing it is sound.

    Cost: a few look-ups per matched node.

    Args:
        besides: kinds of reasons the rule answers for itself, as one that may stop drawing random numbers.
    """
    for check in _CHECKS:
        kind = check.__name__.lstrip("_")
        if kind in besides:
            continue
        for message, node in check(facts, match):
            return Reason(kind, message, node, facts.source(node))
    return None


def as_miss(match: Match, reason: Reason) -> Miss:
    """A refused match as the miss that reports show."""
    return Miss(
        rule=match.name,
        site=match.path,
        step=f"legality: {reason.kind}",
        reason=reason.message,
        found=describe(reason.node),
        source=reason.source,
        depth=len(match.nodes),
        node=reason.node,
    )


Finding = tuple[str, Node]


def _region(facts: Facts, match: Match) -> Iterator[Finding]:
    for node in match.nodes:
        if node.graph is not facts.graph:
            yield f"{describe(node)} lies inside a control-flow body, not in the main graph", node
            return
    for node in match.nodes:
        if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
            yield f"{describe(node)} runs a graph of its own", node
    for switch in facts.mode_switches_between(match.nodes[0], match.nodes[-1]):
        yield f"{describe(switch)} switches autocast or grad mode in between", switch


def _mutation(facts: Facts, match: Match) -> Iterator[Finding]:
    if not facts.any_writers():
        return
    last = match.nodes[-1]
    for node in match.nodes:
        if facts.written(node):
            yield f"{describe(node)} is an in-place operation", node
    for capture in _captured_nodes(match):
        if facts.is_parameter(capture):  # its values are used when the rewrite is planned
            writers = facts.writers(capture)
        elif capture in match.nodes or _read_by(match, capture):  # below
            continue
        else:
            writers = facts.writes_between(capture, capture, last)
        for writer in writers:
            yield f"{describe(capture)} is written by {describe(writer)}", writer
    first = match.nodes[0]
    for node in match.nodes:
        for value in (node, *node.all_input_nodes):
            early = facts.writes_between(value, first, node) if len(match.outputs) > 1 else []
            for writer in (*facts.writes_between(value, node, last), *early):
                yield f"{describe(value)} is written by {describe(writer)} within the match", writer


def _random(facts: Facts, match: Match) -> Iterator[Finding]:
    for node in match.nodes:
        if facts.is_random(node):
            yield f"{describe(node)} draws random numbers", node


def _dtype(facts: Facts, match: Match) -> Iterator[Finding]:
    for node in match.nodes:
        result = facts.dtype(node)
        if node in match.casts or result is None or not result.is_floating_point:
            continue
        if all(facts.dtype(operand) in (result, None) for operand in node.all_input_nodes):
            continue
        for operand in _promoting(facts, node):
            given = facts.dtype(operand)
            if given is not None and given.is_floating_point and given != result:
                change = f"from {_word(given)} to {_word(result)}"
                yield f"{describe(node)} changes {describe(operand)} {change}, which the pattern does not say", node


def _device(facts: Facts, match: Match) -> Iterator[Finding]:
    for node in match.nodes:
        device = facts.device(node)
        if device is None or all(facts.device(operand) in (device, None) for operand in node.all_input_nodes):
            continue
        for operand in _promoting(facts, node):
            if facts.device(operand) != device:
                yield f"{describe(node)} moves {describe(operand)} to {device}", node


def _alias(facts: Facts, match: Match) -> Iterator[Finding]:
    # Of the nodes inside, those stay that may be shared and are used outside.
    staying = [node for node in match.shared if any(user not in match.nodes for user in facts.users(node))]
    seen = {root for node in staying for root in facts.alias_roots(node)}
    for output in match.outputs:
        outside = [root for root in facts.alias_roots(output) if root not in match.nodes or root in seen]
        if outside and (facts.writers(output) or _is_returned(facts, output)):
            yield f"{describe(output)} shares storage with {describe(outside[0])}, and that can be seen", output
        elif len(match.outputs) > 1 and facts.writers(output):
            yield f"{describe(output)} is later written in place by {describe(facts.writers(output)[0])}", output


def _escape(facts: Facts, match: Match) -> Iterator[Finding]:
    escaped = facts.escape(match.nodes, match.outputs, match.shared)
    if escaped is not None:
        node, user = escaped
        how = "is returned as a program output" if user.op == "output" else f"is also used by {describe(user)}"
        yield f"{describe(node)} {how}", node


_CHECKS: tuple[Callable[[Facts, Match], Iterator[Finding]], ...] = (
    _region, _mutation, _random, _dtype, _device, _alias, _escape,
)  # fmt: skip


def _captured_nodes(match: Match) -> Iterator[Node]:
    """Nodes among the captures, those of grouped matches included."""
    pending: list[Any] = list(match.captures.values())
    while pending:
        value = pending.pop(0)
        if isinstance(value, Node):
            yield value
        elif isinstance(value, Match):
            pending.extend(value.captures.values())
        elif isinstance(value, Region):
            yield value.exit
        elif isinstance(value, (tuple, list)):
            pending.extend(value)


def _read_by(match: Match, value: Node) -> bool:
    return any(value in node.all_input_nodes for node in match.nodes)


def _promoting(facts: Facts, node: Node) -> list[Node]:
    """Tensor operands that take part in type promotion: those with dimensions, if there are any."""
    tensors = [operand for operand in node.all_input_nodes if facts.shape(operand) is not None]
    return [operand for operand in tensors if facts.shape(operand) != ()] or tensors


def _is_returned(facts: Facts, output: Node) -> bool:
    """Whether the value, or a view of it, leaves the program."""
    roots = facts.alias_roots(output)
    returned = facts.graph.output_node().all_input_nodes
    return any(value is output or (roots & facts.alias_roots(value)) for value in returned)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
