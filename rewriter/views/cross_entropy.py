# SPDX-License-Identifier: Apache-2.0
"""The CrossEntropy view: −log softmax(logits)[target], reduced or not, as one operator or written out.

    cross_entropy   cross_entropy_loss(logits, target, ...)
    nll             nll_loss(log_softmax(logits), target, ...)
    gather          −log_softmax(logits)[..., target], then mean, sum or nothing; the sign before or after them

Captures:
    logits           node; classes along dimension 1 of two or more (``class_dim`` says where)
    target           node of class indices (of probabilities, for the operator only)
    weight           node [classes] or None
    reduction        ``"none"``, ``"mean"`` or ``"sum"``
    ignore_index     int; None for the gather form, which ignores nothing
    label_smoothing  float
    class_dim        int, not negative
    dtype            dtype the log-softmax was told to compute in, else None
    spelling         ``"cross_entropy"``, ``"nll"`` or ``"gather"``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rewriter.expressions import Operator
from rewriter.facts import Facts, same_shape
from rewriter.matcher import Match, Miss, explain, find
from rewriter.operators import (
    ALIAS,
    NOOP_CAST,
    cross_entropy,
    gather,
    log_softmax,
    neg,
    nll_loss,
    select,
    squeeze,
    unsqueeze,
)
from rewriter.pattern import Const, Expression, Optional, Var, pattern
from rewriter.predicates import Predicate, floating
from rewriter.views.base import View, with_captures
from rewriter.views.spellings import largest

aten = torch.ops.aten
_THROUGH = (NOOP_CAST, ALIAS)
_REDUCTIONS = ("none", "mean", "sum")

mean_of_all = Operator("mean over everything", (aten.mean.default,), ("x",))
sum_of_all = Operator("sum over everything", (aten.sum.default,), ("x",))


def _negated(value: Expression) -> Expression:
    return neg(value) | value * -1


def _over_classes(facts: Facts, captures: Mapping[str, Any]) -> bool:
    shape = facts.shape(captures["logits"])
    return bool(shape) and shape is not None and captures["dim"] % len(shape) == _class_dim(len(shape))


def _class_dim(rank: int) -> int:
    """Where the loss operators look for classes."""
    return min(rank - 1, 1)


_classes = Predicate("a log-softmax over the classes", _over_classes)
_logits, _target, _weight = Var("logits", floating), Var("target"), Var("weight")
_reduction, _ignored = Const("reduction"), Const("ignore_index")

OPERATOR = pattern(
    "cross_entropy",
    cross_entropy(Var("logits"), _target, Optional(_weight), _reduction, _ignored, Const("label_smoothing")),
)
_log = log_softmax(_logits, Const("dim"), Const("dtype"))
NLL = pattern(
    "cross_entropy",
    nll_loss(_log, _target, Optional(_weight), _reduction, _ignored),
    where=(_classes,),
    transparent=_THROUGH,
)


def _one_per_row(facts: Facts, captures: Mapping[str, Any]) -> bool:
    logits = facts.shape(captures["logits"])
    return logits is not None and same_shape(facts.shape(captures["target"]), logits[:-1])


# −log p[..., target]
_every_row = Predicate("a target for every row of the logits", _one_per_row)
_log_last = log_softmax(_logits, -1, Const("dtype"))
_picked = gather(_log_last, -1, unsqueeze(_target, -1))
_one = squeeze(_picked, -1) | select(_picked, -1, 0)
_single = _negated(_one)
_mean = mean_of_all(_single) | _negated(mean_of_all(_one | _picked))
_sum = sum_of_all(_single) | _negated(sum_of_all(_one | _picked))
GATHERED = {
    "mean": pattern("cross_entropy", _mean, where=(_every_row,), transparent=_THROUGH, anchor=_picked),
    "sum": pattern("cross_entropy", _sum, where=(_every_row,), transparent=_THROUGH, anchor=_picked),
    "none": pattern("cross_entropy", _single, where=(_every_row,), transparent=_THROUGH, anchor=_picked),
}
# The same as one pattern, for the nearest miss over all of them.
ANY_GATHERED = pattern(
    "cross_entropy", _mean | _sum | _single, where=(_every_row,), transparent=_THROUGH, anchor=_picked
)


def _find(facts: Facts) -> list[Match]:
    single = [_operator(facts, match) for match in find(facts, OPERATOR)]
    nll = [_nll(facts, match) for match in find(facts, NLL)]
    gathered = [_gather(facts, m, reduction) for reduction, one in GATHERED.items() for m in find(facts, one)]
    return sorted((*single, *nll, *largest(gathered, facts)), key=lambda match: facts.position(match.root))


def _explain(facts: Facts) -> list[Miss]:
    covered = {node for match in _find(facts) for node in match.nodes}
    misses = [miss for one in (NLL, ANY_GATHERED) for miss in explain(facts, one)]
    return sorted((m for m in misses if m.node is not None and m.node not in covered), key=lambda miss: -miss.depth)


def _operator(facts: Facts, match: Match) -> Match:
    captures = dict(match.captures) | {"reduction": _REDUCTIONS[match["reduction"]]}
    rank = len(facts.shape(match["logits"]) or ())
    return with_captures(match, captures | {"class_dim": _class_dim(rank), "dtype": None, "spelling": "cross_entropy"})


def _nll(facts: Facts, match: Match) -> Match:
    captures = {name: match[name] for name in ("logits", "target", "weight", "ignore_index", "dtype")}
    rank = len(facts.shape(match["logits"]) or ())
    said = {"reduction": _REDUCTIONS[match["reduction"]], "label_smoothing": 0.0, "class_dim": _class_dim(rank)}
    return with_captures(match, captures | said | {"spelling": "nll"})


def _gather(facts: Facts, match: Match, reduction: str) -> Match:
    captures = {name: match[name] for name in ("logits", "target", "dtype")}
    rank = len(facts.shape(match["logits"]) or ())
    said = {"weight": None, "reduction": reduction, "ignore_index": None, "label_smoothing": 0.0}
    return with_captures(match, captures | said | {"class_dim": rank - 1, "spelling": "gather"})


CROSS_ENTROPY = View("cross_entropy", _find, _explain)
