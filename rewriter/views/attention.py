# SPDX-License-Identifier: Apache-2.0
"""The Attention view: softmax(scale · q kᵀ + mask) v, as one operator or written out.

    sdpa     scaled_dot_product_attention(q, k, v, ...)
    eager    matmul, scale, mask, (cast), softmax, (cast), (dropout), matmul; the scale may stand on q, k or the scores

Captures:
    q, k, v      nodes [..., heads, length, head dim] as the products read them
    k_base, v_base, groups   where k and v repeat key/value heads for grouped queries: the tensors before the
                 repetition and how often each head is repeated; else k, v and 1
    mask         node or None; added to the scores, to which it broadcasts (sdpa: may be boolean, True = keep)
    scale        float (None where it is 1/sqrt of a head dim that is not fixed)
    is_causal    bool
    dropout_p    float; 0.0 where nothing is dropped
    softmax_dtype   dtype the softmax is computed in where that is said, else None
    spelling     ``"sdpa"`` or ``"eager"``
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from rewriter.facts import Facts, same_shape, same_size
from rewriter.matcher import Match, Miss, explain, find, match_at
from rewriter.operators import (
    ALIAS,
    CONTIGUOUS,
    NOOP_CAST,
    NOOP_SHAPE,
    cast,
    dropout,
    expand,
    repeat_interleave,
    reshape,
    sdpa,
    softmax,
    swap_last,
    unsqueeze,
)
from rewriter.pattern import Anything, Call, Const, Expression, Optional, Var, optionally, pattern
from rewriter.predicates import Predicate, floating, number
from rewriter.views.base import View, with_captures

_THROUGH = (NOOP_CAST, CONTIGUOUS, NOOP_SHAPE, ALIAS)


def _widens(facts: Facts, node: Node) -> bool:
    """The node's floating dtype holds its operand's values at least as precisely."""
    before, after = facts.dtype(node.all_input_nodes[0]), facts.dtype(node)
    if before is None or after is None or not (before.is_floating_point and after.is_floating_point):
        return False
    return torch.finfo(after).eps <= torch.finfo(before).eps and torch.finfo(after).max >= torch.finfo(before).max


def _one_dtype(facts: Facts, captures: Mapping[str, Any]) -> bool:
    return len({facts.dtype(captures[name]) for name in ("q", "k", "v", "output")}) == 1


def _mask_fits(facts: Facts, captures: Mapping[str, Any]) -> bool:
    if captures["mask"] is None:
        return True
    return same_shape(facts.shape(captures["masked"]), facts.shape(captures["product"]))


def _scaled(value: Expression, name: str) -> Expression:
    """value · c, value / c, or value"""
    times, over = Const(f"{name}_times", number), Const(f"{name}_over", number)
    return value * times | value / over | value


def _written_out() -> tuple[Call, Call]:
    """The output of the written-out form, and its softmax."""
    widening = Predicate("a dtype at least as precise", _widens)
    # A boolean mask would be added as 0 and 1 here, while sdpa reads it as "keep".
    q, k, v, mask = Var("q"), Var("k"), Var("v"), Var("mask", floating)
    key = swap_last(_scaled(k, "k")) | swap_last(k) * Const("kt_times", number)
    scores = _scaled((_scaled(q, "q") @ key).named("product"), "scores")
    masked = (scores + mask).named("masked") | scores
    wide = optionally(lambda s: cast(s).where(widening), masked)
    probabilities = softmax(wide, -1, Const("softmax_dtype")).where(widening)
    narrow = optionally(cast, probabilities)
    dropped = optionally(lambda p: dropout(p, Const("p"), Const("train")), narrow)
    return (dropped @ v).named("output"), probabilities


_output, _softmax = _written_out()
EAGER = pattern(
    "attention",
    _output,
    where=(
        Predicate("q, k, v and the result of one dtype", _one_dtype),
        Predicate("a mask that broadcasts to the scores", _mask_fits),
    ),
    transparent=_THROUGH,
    anchor=_softmax,
)
SDPA = pattern(
    "attention",
    sdpa(
        Var("q"), Var("k"), Var("v"), Optional(Var("mask")), Const("dropout_p"), Const("is_causal"), Const("scale"),
        Const("enable_gqa"),
    ),
)  # fmt: skip

# [b, kv, s, d] -> [b, kv, 1, s, d] -> [b, kv, groups, s, d] -> [b, kv·groups, s, d]
_widened = expand(unsqueeze(Var("base"), 2).named("single"), Anything()).named("repeated")
REPEAT = pattern(
    "repeat of key/value heads",
    reshape(_widened, Anything()) | repeat_interleave(Var("base"), Const("groups"), 1),
    transparent=_THROUGH,
)


def _find(facts: Facts) -> list[Match]:
    matches = [_eager_terms(facts, m) for m in find(facts, EAGER)] + [_sdpa_terms(facts, m) for m in find(facts, SDPA)]
    return sorted(matches, key=lambda match: facts.position(match.root))


def _explain(facts: Facts) -> list[Miss]:
    misses = [miss for part in (EAGER, SDPA) for miss in explain(facts, part) if miss.node is not None]
    return sorted(misses, key=lambda miss: -miss.depth)


def _eager_terms(facts: Facts, match: Match) -> Match:
    captured = match.captures
    scale = 1.0
    for place in ("q", "k", "scores", "kt"):
        times, over = captured.get(f"{place}_times"), captured.get(f"{place}_over")
        scale *= (1.0 if times is None else times) / (1.0 if over is None else over)
    return with_captures(
        match,
        _grouped(facts, captured)
        | {
            "scale": scale,
            "is_causal": False,
            "dropout_p": float(captured["p"]) if captured["train"] else 0.0,
            "softmax_dtype": captured["softmax_dtype"],
            "spelling": "eager",
        },
    )


def _sdpa_terms(facts: Facts, match: Match) -> Match:
    captured = match.captures
    terms = _grouped(facts, captured)
    q_shape, k_shape = facts.shape(captured["q"]), facts.shape(captured["k"])
    scale = captured["scale"]
    if scale is None and q_shape is not None and isinstance(q_shape[-1], int):
        scale = 1.0 / math.sqrt(q_shape[-1])
    if captured["enable_gqa"] and q_shape is not None and k_shape is not None:
        heads, shared = q_shape[-3], k_shape[-3]
        terms["groups"] = heads // shared if isinstance(heads, int) and isinstance(shared, int) else None
    return with_captures(
        match,
        terms
        | {
            "scale": scale,
            "is_causal": captured["is_causal"],
            "dropout_p": float(captured["dropout_p"]),
            "softmax_dtype": None,
            "spelling": "sdpa",
        },
    )


def _grouped(facts: Facts, captured: Mapping[str, Any]) -> dict[str, Any]:
    """q, k, v, mask, and k and v before a repetition of heads that both of them have."""
    k, v = captured["k"], captured["v"]
    (k_base, k_groups), (v_base, v_groups) = repeated(facts, k), repeated(facts, v)
    if k_groups != v_groups:
        k_base, v_base, k_groups = k, v, 1
    common = {"q": captured["q"], "k": k, "v": v, "mask": captured["mask"]}
    return common | {"k_base": k_base, "v_base": v_base, "groups": k_groups}


def repeated(facts: Facts, node: Node) -> tuple[Node, int]:
    """(base, groups) if the node repeats every head of `base` [b, heads, s, d] `groups` times in a row; else itself
    and 1."""
    match = match_at(facts, REPEAT, node)
    if match is None:
        return node, 1
    base, groups = match["base"], match["groups"]
    before, after = facts.shape(base), facts.shape(node)
    if before is None or after is None or len(before) != 4 or len(after) != 4:
        return node, 1
    if groups is None:
        between = facts.shape(match["repeated"])
        groups = between[2] if between is not None and len(between) == 5 else None
    kept = same_size(before[0], after[0]) and same_size(before[2], after[2]) and same_size(before[3], after[3])
    whole = isinstance(groups, int) and same_size(before[1] * groups, after[1])
    return (base, groups) if kept and whole else (node, 1)


ATTENTION = View("attention", _find, _explain)
