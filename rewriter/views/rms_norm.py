# SPDX-License-Identifier: Apache-2.0
"""The RMSNorm view: y = x / √(mean(x²) + ε) · w over the last dimension, as one operator or written out.

Captures:
    x            node [..., features]
    weight       node [features] or None
    eps          float
    unit_offset  bool; the factor is 1 + w instead of w
    dtype        dtype the mean is computed in; None for the operator, which chooses its own
    work         dtype of the last product; None for the operator
    spelling     ``"rms_norm"`` or ``"written"``

The root is the value of y, the cast back to the dtype of x included. ``x / max(‖x‖, ε) · √features`` is another
function of ε and is not RMSNorm; a LayerNorm, which is the RMSNorm of x − μ, belongs to that view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss, explain, find
from rewriter.operators import ALIAS, NOOP_CAST, cast, mean, power, rms_norm, rsqrt, sqrt, square
from rewriter.pattern import Const, Optional, Var, optionally, pattern
from rewriter.predicates import Predicate, floating, has_rank, number
from rewriter.views.base import View, with_captures
from rewriter.views.layer_norm import LAYER_NORM
from rewriter.views.spellings import declaring, largest, last_dim, with_trailing_cast

_x, _w = Var("x", floating), Var("weight", (floating, has_rank(1)))
_wide = cast(_x).shared() | _x
# Constants first: a near miss then names the constant, and not what would have come after it.
_mean = mean(dim=-1, keepdim=True, x=_wide * _wide | power(y=2, x=_wide) | square(_wide)).named("mean")
_moment = _mean + Const("eps", number) | _mean
_inverse, _root = rsqrt(_moment), sqrt(_moment)
_normed = (_wide * (_inverse | power(y=-0.5, x=_moment))).named("times") | (_wide / _root).named("over")
_narrow = optionally(cast, _normed)
_factor = cast(_w).shared() | _w
_scale = (_factor + 1).named("offset").shared() | _factor

_fits = Predicate("a weight of one value per feature", lambda facts, captures: last_dim(facts, captures, "weight"))

WEIGHTED = pattern(
    "rms_norm",
    (_narrow * _scale).named("product"),
    where=(_fits,),
    transparent=(NOOP_CAST, ALIAS),
)
# Near misses are told from the inverse root, where it is multiplied by, or from the root, where it divides.
BARE = pattern("rms_norm", _normed, transparent=(NOOP_CAST, ALIAS), anchor=_inverse)
DIVIDED = pattern("rms_norm", _normed, transparent=(NOOP_CAST, ALIAS), anchor=_root)
OPERATOR = pattern("rms_norm", rms_norm(Var("x"), Const("shape"), Optional(Var("weight")), Const("eps")))


def _find(facts: Facts) -> list[Match]:
    weighted = find(facts, WEIGHTED)
    bare = find(facts, BARE)
    layers = {node for match in LAYER_NORM.find(facts) for node in match.nodes} if weighted or bare else set()
    written = [_written(facts, m) for m in largest((*weighted, *bare), facts) if m.root not in layers]
    single = [_operator(facts, match) for match in find(facts, OPERATOR) if len(match["shape"]) == 1]
    return sorted((*written, *single), key=lambda match: facts.position(match.root))


def _explain(facts: Facts) -> list[Miss]:
    covered = {node for match in (*_find(facts), *LAYER_NORM.find(facts)) for node in match.nodes}
    misses = [miss for one in (BARE, DIVIDED) for miss in explain(facts, one)]
    return sorted((m for m in misses if m.node is not None and m.node not in covered), key=lambda miss: -miss.depth)


def _written(facts: Facts, match: Match) -> Match:
    full = with_trailing_cast(facts, declaring(match, "times", "over", "product", "offset"))
    captured: Mapping[str, Any] = match.captures
    eps = captured["eps"]
    return with_captures(
        full,
        {
            "x": captured["x"],
            "weight": captured.get("weight"),
            "eps": 0.0 if eps is None else float(eps),
            "unit_offset": captured.get("offset") is not None,
            "dtype": facts.dtype(captured["mean"]),
            "work": facts.dtype(match.root),
            "spelling": "written",
        },
    )


def _operator(facts: Facts, match: Match) -> Match:
    eps = match["eps"]
    captures = {"x": match["x"], "weight": match["weight"], "eps": _default_eps(facts, match) if eps is None else eps}
    return with_captures(
        match, captures | {"unit_offset": False, "dtype": None, "work": None, "spelling": "rms_norm"}
    )


def _default_eps(facts: Facts, match: Match) -> float:
    """What the operator adds where it is given nothing: the ε of the dtype it computes in."""
    return torch.finfo(torch.float64 if facts.dtype(match["x"]) == torch.float64 else torch.float32).eps


RMS_NORM = View("rms_norm", _find, _explain)
