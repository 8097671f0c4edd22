# SPDX-License-Identifier: Apache-2.0
"""The LayerNorm view: y = (x − μ) / √(σ² + ε) · w + b over the last dimension, as one operator or written out.

    μ = mean(x),   σ² = mean((x − μ)²), or the variance operator without Bessel's correction

Captures:
    x         node [..., features]
    weight    node [features] or None
    bias      node [features] or None
    eps       float
    dtype     dtype the variance is computed in; None for the operator, which chooses its own
    work      dtype of the result before it is cast back; None for the operator
    spelling  ``"layer_norm"`` or ``"written"``

The root is the value of y, the cast back to the dtype of x included. With ε outside the root, or with the unbiased
variance, it is another function, and no LayerNorm.
"""

from __future__ import annotations

from typing import Any

import torch

from rewriter.expressions import Operator
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss, explain, find
from rewriter.operators import ALIAS, NOOP_CAST, cast, layer_norm, mean, power, rsqrt, sqrt, square
from rewriter.pattern import Alternatives, Anything, Call, Const, Optional, Var, optionally, pattern
from rewriter.predicates import Predicate, floating, has_rank, number
from rewriter.views.base import View, with_captures
from rewriter.views.spellings import declaring, largest, last_dim, with_trailing_cast

aten = torch.ops.aten

# The mean of squared distances from the mean: divided by n, not by n − 1.
variance = Operator("variance", (aten.var.dim,), ("x", "dim", "unbiased", "keepdim"))
corrected_variance = Operator("variance", (aten.var.correction,), ("x", "dim", "correction", "keepdim"))

_x = Var("x", floating)
_w, _b = Var("weight", (floating, has_rank(1))), Var("bias", (floating, has_rank(1)))
_wide = cast(_x).shared() | _x

# Constants first: a near miss then names the constant, and not what would have come after it.
def _centre() -> Call:
    return _wide - mean(dim=-1, keepdim=True, x=_wide)


def _squared(value: Call) -> Alternatives:
    return value * value | power(y=2, x=value) | square(value)


_centred = _centre()
_squares = _squared(_centred) | _squared(_centre())  # the second for code that computes x − μ once more
_variance = (
    mean(dim=-1, keepdim=True, x=_squares).named("moment")
    | variance(dim=-1, unbiased=False, keepdim=True, x=_wide).named("biased")
    | corrected_variance(dim=-1, correction=0, keepdim=True, x=_wide).named("uncorrected")
)
_moment = _variance + Const("eps", number) | _variance
_inverse, _root = rsqrt(_moment), sqrt(_moment)
_normed = (_centred * (_inverse | power(y=-0.5, x=_moment))).named("times") | (_centred / _root).named("over")
_narrow = optionally(cast, _normed)
_scaled = (_narrow * (cast(_w).shared() | _w)).named("product") | _narrow
_affine = (_scaled + (cast(_b).shared() | _b)).named("sum")

_fits = Predicate(
    "a weight and bias of one value per feature",
    lambda facts, captures: last_dim(facts, captures, "weight") and last_dim(facts, captures, "bias"),
)

_THROUGH = (NOOP_CAST, ALIAS)
BIASED = pattern("layer_norm", _affine, where=(_fits,), transparent=_THROUGH)
WEIGHTED = pattern(
    "layer_norm",
    (_narrow * (cast(_w).shared() | _w)).named("product"),
    where=(_fits,),
    transparent=_THROUGH,
)
# Near misses are told from the inverse root, where it is multiplied by, or from the root, where it divides.
BARE = pattern("layer_norm", _normed, transparent=_THROUGH, anchor=_inverse)
DIVIDED = pattern("layer_norm", _normed, transparent=_THROUGH, anchor=_root)
OPERATOR = pattern(
    "layer_norm",
    layer_norm(
        Var("x"), Const("shape"), Optional(Var("weight")), Optional(Var("bias")), Const("eps"), Anything()
    ),
)  # fmt: skip


def _find(facts: Facts) -> list[Match]:
    found = (*find(facts, BIASED), *find(facts, WEIGHTED), *find(facts, BARE))
    written = [_written(facts, match) for match in largest(found, facts)]
    single = [_operator(match) for match in find(facts, OPERATOR) if len(match["shape"]) == 1]
    return sorted((*written, *single), key=lambda match: facts.position(match.root))


def _explain(facts: Facts) -> list[Miss]:
    covered = {node for match in _find(facts) for node in match.nodes}
    misses = [miss for one in (BARE, DIVIDED) for miss in explain(facts, one)]
    return sorted((m for m in misses if m.node is not None and m.node not in covered), key=lambda miss: -miss.depth)


def _written(facts: Facts, match: Match) -> Match:
    full = with_trailing_cast(facts, declaring(match, "times", "over", "product", "sum"))
    captured: dict[str, Any] = dict(match.captures)
    eps = captured["eps"]
    spread = next(captured[name] for name in ("moment", "biased", "uncorrected") if captured[name] is not None)
    return with_captures(
        full,
        {
            "x": captured["x"],
            "weight": captured.get("weight"),
            "bias": captured.get("bias"),
            "eps": 0.0 if eps is None else float(eps),
            "dtype": facts.dtype(spread),
            "work": facts.dtype(match.root),
            "spelling": "written",
        },
    )


def _operator(match: Match) -> Match:
    captures = {name: match[name] for name in ("x", "weight", "bias", "eps")}
    return with_captures(match, captures | {"dtype": None, "work": None, "spelling": "layer_norm"})


LAYER_NORM = View("layer_norm", _find, _explain)
