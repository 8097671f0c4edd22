# SPDX-License-Identifier: Apache-2.0
"""The Softmax and LogSoftmax views, as one operator or written out, over one dimension.

    softmax      exp(x − m) / Σ exp(x − m)
    log_softmax  x − logsumexp(x)  =  (x − m) − log Σ exp(x − m)  =  log softmax(x)

where m is the maximum of x, taken by ``amax`` or ``max``, detached or not (its gradient is zero: both functions do not
change when m does), or where nothing is subtracted.

Captures:
    x         node
    dim       int, as written
    dtype     dtype the operator was told to compute in, else None
    stable    bool; False for a written form that overflows, or takes the log of what underflowed, where the operator
              does neither: no maximum is subtracted, or the logarithm is taken of a softmax
    spelling  ``"softmax"``, ``"log_softmax"`` or ``"written"``
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss, explain, find
from rewriter.operators import ALIAS, NOOP_CAST, exp, log, log_softmax, logsumexp, softmax, sub, total, unsqueeze
from rewriter.pattern import Alternatives, Const, Expression, Pattern, Var, pattern
from rewriter.predicates import Predicate, floating
from rewriter.views.base import View, with_captures

aten = torch.ops.aten
_THROUGH = (NOOP_CAST, ALIAS)


def _reduced_dim(captures: Mapping[str, Any]) -> int | None:
    """The one dimension that is summed over; None where there are several, or all of them."""
    dim = captures["dim"]
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    return dims[0] if len(dims) == 1 and isinstance(dims[0], int) else None


def _one_dim(facts: Facts, captures: Mapping[str, Any]) -> bool:
    """One dimension is reduced, and where it was dropped, it was put back in its place."""
    dim, place, shape = _reduced_dim(captures), captures.get("place"), facts.shape(captures["x"])
    if dim is None or shape is None or not shape:
        return False
    return place is None or (place - dim) % len(shape) == 0


def _kept(reduction: Callable[[bool], Expression]) -> Alternatives:
    """A reduction that keeps its dimension, by its own argument or by an unsqueeze."""
    kept, dropped = reduction(True), reduction(False)
    return kept | unsqueeze(dropped, Const("place"))


_x, _dim = Var("x", floating), Const("dim")
_fits = Predicate("one reduced dimension, kept in its place", _one_dim)
_exp = exp(_x)
_sum = _kept(lambda keep: total(_exp, _dim, keep))
_lse = _kept(lambda keep: logsumexp(_x, _dim, keep))
_late = unsqueeze(log(total(_exp, _dim, False)), Const("place"))  # log Σ, put in place only then

WRITTEN_SOFTMAX = pattern("softmax", _exp / _sum, where=(_fits,), transparent=_THROUGH, anchor=_exp)
WRITTEN_LSE = pattern("log_softmax", _x - _lse, where=(_fits,), transparent=_THROUGH, anchor=_lse.options[0])
WRITTEN_LOG = pattern("log_softmax", _x - (log(_sum) | _late), where=(_fits,), transparent=_THROUGH, anchor=_exp)
LOG_OF_SOFTMAX = pattern("log_softmax", log(softmax(_x, _dim, Const("dtype"))), transparent=_THROUGH)
SOFTMAX_OPERATOR = pattern("softmax", softmax(Var("x"), _dim, Const("dtype")))
LOG_OPERATOR = pattern("log_softmax", log_softmax(Var("x"), _dim, Const("dtype")))


def _find_softmax(facts: Facts) -> list[Match]:
    written = [_shifted(facts, match, stable=False) for match in find(facts, WRITTEN_SOFTMAX)]
    return _sorted(facts, written, _operators(facts, SOFTMAX_OPERATOR, "softmax"))


def _find_log_softmax(facts: Facts) -> list[Match]:
    written = [_shifted(facts, match, stable=True) for match in find(facts, WRITTEN_LSE)]
    written += [_shifted(facts, match, stable=False) for match in find(facts, WRITTEN_LOG)]
    logs = [
        with_captures(m, {**m.captures, "stable": False, "spelling": "written"}) for m in find(facts, LOG_OF_SOFTMAX)
    ]
    return _sorted(facts, written, logs, _operators(facts, LOG_OPERATOR, "log_softmax"))


def _operators(facts: Facts, one: Pattern, spelling: str) -> list[Match]:
    return [with_captures(m, {**m.captures, "stable": True, "spelling": spelling}) for m in find(facts, one)]


def _sorted(facts: Facts, *groups: list[Match]) -> list[Match]:
    return sorted((m for group in groups for m in group), key=lambda match: facts.position(match.root))


def _shifted(facts: Facts, match: Match, stable: bool) -> Match:
    """The written form in terms of the x before its maximum was subtracted, where it was."""
    dim = _reduced_dim(match.captures)
    x, nodes = match["x"], match.nodes
    before = _minus_maximum(facts, x, dim)
    if before is not None:
        stable = True
        together = tuple(sorted({*nodes, *before[1]}))
        if facts.escape(together, match.outputs, match.shared) is None:  # else x − m is needed elsewhere, and stays
            x, nodes = before[0], together
    captures = {"x": x, "dim": dim, "dtype": None, "stable": stable, "spelling": "written"}
    return with_captures(replace(match, nodes=nodes), captures)


def _minus_maximum(facts: Facts, node: Node, dim: int | None) -> tuple[Node, tuple[Node, ...]] | None:
    """(x, the nodes between) where the node is x minus its own maximum over `dim`."""
    if node.target not in sub.targets:
        return None
    operands = sub.operands_of(facts, node, {"x": None, "y": None})
    if isinstance(operands, str) or not all(isinstance(value, Node) for value in operands.values()):
        return None
    x, between, value = operands["x"], [node], operands["y"]
    while value.target in (aten.detach.default, aten.unsqueeze.default):
        if value.target is aten.unsqueeze.default and not _same_dim(facts, x, facts.arguments(value)["dim"], dim):
            return None
        between.append(value)
        value = value.all_input_nodes[0]
    if value.target is operator.getitem and value.args[1] == 0:
        between.append(value)
        value = value.args[0]
        if value.target is not aten.max.dim:
            return None
    elif value.target is not aten.amax.default:
        return None
    between.append(value)
    arguments = facts.arguments(value)
    dims = arguments["dim"] if isinstance(arguments["dim"], (list, tuple)) else [arguments["dim"]]
    kept = arguments["keepdim"] or any(n.target is aten.unsqueeze.default for n in between)
    fits = arguments["self"] is x and len(dims) == 1 and kept and _same_dim(facts, x, dims[0], dim)
    # The indices that `max` also returns are nobody's here; they are erased with it.
    indices = [user for user in value.users if user not in between and not user.users]
    return (x, (*between, *indices)) if fits else None


def _same_dim(facts: Facts, x: Node, one: Any, other: int | None) -> bool:
    rank = len(facts.shape(x) or ())
    return rank > 0 and isinstance(one, int) and other is not None and (one - other) % rank == 0


def _explained(*patterns: Pattern) -> Callable[[Facts], list[Miss]]:
    def explain_all(facts: Facts) -> list[Miss]:
        misses = [miss for one in patterns for miss in explain(facts, one) if miss.node is not None]
        return sorted(misses, key=lambda miss: -miss.depth)

    return explain_all


SOFTMAX = View("softmax", _find_softmax, _explained(WRITTEN_SOFTMAX))
LOG_SOFTMAX = View("log_softmax", _find_log_softmax, _explained(WRITTEN_LSE, WRITTEN_LOG, LOG_OF_SOFTMAX))
