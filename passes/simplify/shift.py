# SPDX-License-Identifier: Apache-2.0
"""softmax(x + c) = softmax(x),  log_softmax(x + c) = log_softmax(x)   for c constant along the softmax's dimension

c may be a finite number, or the maximum or the logarithm of the sum of exponentials of x itself, which hand-written
softmaxes subtract for safety and the operator subtracts anyway. Any other c that is computed may be infinite, and
∞ − ∞ is no number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import Facts, same_shape, same_size
from rewriter.matcher import Match, Miss
from rewriter.operators import add, log_softmax, rsub, softmax, sub
from rewriter.passes.simplify.sites import calls, near, site
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.schemas import describe

aten = torch.ops.aten

_OWN_SHIFTS = (aten.amax.default, aten.logsumexp.default)
_LARGEST = 1e3  # beyond it the sum drops digits of x that the softmax would see


class DropShift(Rule):
    """What is added to all of a row alike goes away, gradients included: they are zero for c."""

    name: ClassVar[str] = "simplify.shift"
    role: ClassVar[str] = "shift"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        matches: list[Match] = []
        misses: list[Miss] = []
        for node in calls(facts, (*softmax.targets, *log_softmax.targets)):
            result = _shifted(facts, node)
            if isinstance(result, Match):
                matches.append(result)
            elif isinstance(result, str):
                misses.append(near(facts, self.name, node, "shift", result, "a finite number"))
        return matches, misses

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        arguments = [match["x"] if i == 0 else a for i, a in enumerate(match.root.args)]
        target: Any = match.root.target  # an operator
        return {match.root: edit.call(target, *arguments, **match.root.kwargs)}


def _shifted(facts: Facts, node: Node) -> Match | str | None:
    """The softmax of a shifted value; or why the shift must stay; or None if there is none."""
    arguments = facts.arguments(node)
    total, dim = arguments["self"], arguments["dim"]
    shape = facts.shape(total)
    if total.op != "call_function" or not shape:
        return None
    if total.target not in (*add.targets, *sub.targets, *rsub.targets):
        return None
    given = facts.arguments(total)
    one, other = given["self"], given["other"]
    along = dim % len(shape)
    candidates = [(one, other)] if total.target in sub.targets else [(one, other), (other, one)]
    if total.target in rsub.targets:  # c' - x would need softmax(-x)
        return None
    reason = None
    for x, shift in candidates:
        if not isinstance(x, Node) or not same_shape(facts.shape(x), shape) or facts.dtype(x) != facts.dtype(total):
            continue
        constant = _constant_along(facts, shift, shape, along)
        if not constant:
            continue
        reason = _refused(facts, x, shift, along, given.get("alpha", 1))
        if reason is None:
            nodes = (*_computing(facts, shift, total), total, node)
            return site("shift", nodes, {"x": x, "shift": shift}, casts=(node,))
    return reason


def _constant_along(facts: Facts, shift: Any, shape: Sequence[Any], along: int) -> bool:
    """Whether a summand has one value for all of a row."""
    if not isinstance(shift, Node):
        return isinstance(shift, (int, float)) and not isinstance(shift, bool)
    own = facts.shape(shift)
    if own is None:
        return False
    place = along - len(shape) + len(own)
    return place < 0 or (same_size(own[place], 1) and not same_size(shape[along], 1))


def _refused(facts: Facts, x: Node, shift: Any, along: int, alpha: Any) -> str | None:
    """Why the summand must stay, if it must."""
    if not isinstance(shift, Node):
        size = abs(shift * alpha) if isinstance(alpha, (int, float)) else math.inf
        if not math.isfinite(size):
            return f"the shift {shift!r} is not finite"
        return None if size <= _LARGEST else f"the shift {shift!r} is so large that the sum rounds x"
    if _own_shift(facts, x, shift, along):
        return None
    return f"{describe(shift)} is computed and may be infinite; the sum would then be no number"


def _own_shift(facts: Facts, x: Node, shift: Node, along: int) -> bool:
    """Whether the shift is the maximum or logsumexp of x along the dimension, which is infinite only where x is."""
    while shift.target is aten.detach.default:
        shift = shift.all_input_nodes[0]
    rank = len(facts.shape(x) or ())
    if shift.target is operator.getitem and shift.args[1] == 0:
        shift = shift.all_input_nodes[0]
        if shift.target is not aten.max.dim:
            return False
    elif shift.target not in _OWN_SHIFTS:
        return False
    arguments = facts.arguments(shift)
    dims = arguments["dim"]
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    return arguments["self"] is x and bool(arguments["keepdim"]) and [d % rank for d in dims] == [along]


def _computing(facts: Facts, shift: Any, total: Node) -> tuple[Node, ...]:
    """The nodes that compute a shift and nothing else, so that they go with it."""
    nodes: list[Node] = []
    reader = total
    while isinstance(shift, Node) and shift.op == "call_function" and facts.users(shift) == (reader,):
        if shift.target not in (*_OWN_SHIFTS, aten.max.dim, operator.getitem, aten.detach.default):
            break
        nodes.append(shift)
        reader, shift = shift, shift.all_input_nodes[0]
    return tuple(reversed(nodes))
