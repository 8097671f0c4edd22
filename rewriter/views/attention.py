# SPDX-License-Identifier: Apache-2.0
"""The Attention view: softmax(scale · q kᵀ + bias + mask) v, as one operator or written out.

    sdpa     scaled_dot_product_attention(q, k, v, ...)
    eager    matmul or baddbmm, scale, (soft-cap), bias, mask, (cast), softmax, (cast), (dropout), matmul;
             the scale may stand on q, on k, on the scores, or on several of them

Captures:
    q, k, v      nodes [..., heads, length, head dim] as the products read them
    k_base, v_base, groups   where k and v have fewer heads than q (grouped or multi-query): the tensors before the
                 repetition and how often each head is repeated; else k, v and 1
    mask         node or None; what is added to the scores last, or what decides where they are filled
    mask_form    ``"added"``, ``"keep"`` (boolean, True = seen), ``"drop"`` (boolean, True = filled), or None
    fill         float: what a dropped score becomes; None where the mask is added or the operator's own
    bias         node or None: what is added to the scores before a mask (position bias), or what baddbmm adds (ALiBi)
    bias_scale   float: the bias is multiplied by it
    softcap      float or None: the scaled scores s become c · tanh(s / c)
    scale        float (None where it is 1/sqrt of a head dim that is not fixed)
    blended      bool: the bias is added by baddbmm, so that it has the dimensions of the products
    split        node or None: where the products work on [batch · heads, ...], the node that views the scores as
                 [batch, heads, ...], which the mask broadcasts to
    is_causal    bool
    dropout_p    float; 0.0 where nothing is dropped
    softmax_dtype   dtype the softmax is computed in where that is said, else None
    spelling     ``"sdpa"`` or ``"eager"``

What the mask lets through is the matter of `rewriter.masks`.
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
    baddbmm,
    cast,
    dropout,
    expand,
    masked_fill,
    repeat_interleave,
    reshape,
    sdpa,
    softmax,
    swap_last,
    tanh,
    unsqueeze,
    where,
)
from rewriter.pattern import Anything, Call, Const, Expression, Optional, Var, optionally, pattern
from rewriter.predicates import Predicate, floating, number
from rewriter.views.base import View, with_captures

aten = torch.ops.aten

_THROUGH = (NOOP_CAST, CONTIGUOUS, NOOP_SHAPE, ALIAS)
_SUM, _JOIN = "sum_", "joined_"  # names of nodes that only conditions look at


# -------------------------------------------------------------------------------------------------- conditions


def _widens(facts: Facts, node: Node) -> bool:
    """The node's floating dtype holds its operand's values at least as precisely."""
    before, after = facts.dtype(node.all_input_nodes[0]), facts.dtype(node)
    if before is None or after is None or not (before.is_floating_point and after.is_floating_point):
        return False
    return torch.finfo(after).eps <= torch.finfo(before).eps and torch.finfo(after).max >= torch.finfo(before).max


def _reshapes(facts: Facts, node: Node) -> bool:
    return not same_shape(facts.shape(node.all_input_nodes[0]), facts.shape(node))


def _is_number(facts: Facts, value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def constant_number(facts: Facts, node: Node) -> float | None:
    """The number a tensor without dimensions always is: one made from a literal, or a constant of the model's code."""
    if facts.shape(node) != ():
        return None
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        value = facts.arguments(node)["fill_value" if node.target is aten.full.default else "s"]
        return float(value) if _is_number(facts, value) else None
    tensor = facts.tensor(node)
    known = tensor is not None and not tensor.requires_grad and tensor.device.type != "meta"
    return float(tensor.item()) if known and tensor is not None else None


def _one_dtype(facts: Facts, captures: Mapping[str, Any]) -> bool:
    return len({facts.dtype(captures[name]) for name in ("q", "k", "v", "output")}) == 1


def _terms_fit(facts: Facts, captures: Mapping[str, Any]) -> bool:
    """Bias and mask broadcast to the scores, not the scores to them."""
    scores = facts.shape(captures["split"] or captures["product"] or captures["blended"])
    sums = [node for name, node in captures.items() if name.startswith(_SUM) and node is not None]
    return all(same_shape(facts.shape(node), scores) for node in sums)


def _split_is_undone(facts: Facts, captures: Mapping[str, Any]) -> bool:
    """[batch · heads, q, k] is viewed as [batch, heads, q, k] and back, or not at all."""
    split = captures["split"]
    joins = [node for name, node in captures.items() if name.startswith(_JOIN) and node is not None]
    if split is None or len(joins) != 1:
        return split is None and not joins
    (joined,) = joins
    product, scores = facts.shape(captures["product"] or captures["blended"]) or (), facts.shape(split) or ()
    kept = len(product) == 3 and len(scores) == 4 and same_shape(product[-2:], scores[-2:])
    return kept and same_shape(facts.shape(joined), product)


def _one_term_each(facts: Facts, captures: Mapping[str, Any]) -> bool:
    """What baddbmm adds is scaled and capped with the scores, and takes the place of another bias."""
    return captures["blend"] is None or (captures["bias"] is None and captures["cap"] is captures["cap_inverse"])


def _caps_fit(facts: Facts, captures: Mapping[str, Any]) -> bool:
    inverse, cap = captures["cap_inverse"], captures["cap"]
    return inverse is None or math.isclose(inverse * cap, 1.0, rel_tol=1e-6)


# -------------------------------------------------------------------------------------------------- patterns


def _scaled(value: Expression, name: str) -> Expression:
    """value · c, value / c, or value"""
    times, over = Const(f"{name}_times", number), Const(f"{name}_over", number)
    return value * times | value / over | value


def _filled(scores: Expression) -> Expression:
    """scores where the mask says so, else one number: a literal or a tensor of no dimensions"""
    constant = Predicate("a constant number", lambda facts, node: constant_number(facts, node) is not None)
    literal, tensor = Const("fill", Predicate("a number", _is_number)), Var("fill_tensor", constant)
    keep, drop = Var("keep"), Var("drop")
    calls = [
        call
        for value in (literal, tensor)
        for call in (masked_fill(scores, drop, value), where(drop, value, scores), where(keep, scores, value))
    ]
    first, *others = (call.named(f"{_SUM}fill_{i}") for i, call in enumerate(calls))
    options: Expression = first
    for call in others:
        options = options | call
    return options


def _written_out() -> tuple[Call, Call]:
    """The output of the written-out form, and its softmax."""
    widening = Predicate("a dtype at least as precise", _widens)
    changing = Predicate("another shape", _reshapes)
    # A boolean mask would be added as 0 and 1 here, while sdpa reads it as "keep".
    q, k, v, mask, bias = Var("q"), Var("k"), Var("v"), Var("mask", floating), Var("bias", floating)
    query = _scaled(q, "q")
    key = swap_last(_scaled(k, "k")) | swap_last(k) * Const("kt_times", number)
    product = (query @ key).named("product")
    blended = baddbmm(Var("blend"), query, key, Const("beta", number), Const("alpha", number)).named("blended")
    scores = _scaled(product | blended, "scores")
    cap = Const("cap", number)
    capped = tanh(scores / cap) * cap | tanh(scores * Const("cap_inverse", number)) * cap | scores
    split = optionally(lambda s: reshape(s, Anything()).where(changing).named("split"), capped)
    biased = (split + bias).named(f"{_SUM}bias")
    both, one = (biased + mask).named(f"{_SUM}both"), (split + mask).named(f"{_SUM}mask")
    masked = _filled(biased | split) | both | one | split

    def joined(value: Expression, when: str) -> Expression:
        return optionally(lambda s: reshape(s, Anything()).where(changing).named(_JOIN + when), value)

    wide = optionally(lambda s: cast(s).where(widening), joined(masked, "before"))
    probabilities = softmax(wide, -1, Const("softmax_dtype")).where(widening)
    narrow = optionally(cast, probabilities)
    dropped = optionally(lambda p: dropout(p, Const("p"), Const("train")), narrow)
    return (joined(dropped, "after") @ v).named("output"), probabilities


_output, _softmax = _written_out()
EAGER = pattern(
    "attention",
    _output,
    where=(
        Predicate("q, k, v and the result of one dtype", _one_dtype),
        Predicate("a mask that broadcasts to the scores", _terms_fit),
        Predicate("heads that are split off the batch and joined to it again", _split_is_undone),
        Predicate("one bias, outside the soft-cap", _one_term_each),
        Predicate("the same number inside and outside of tanh", _caps_fit),
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

# [b, kv, s, d] -> [b, kv, 1, s, d] -> [b, kv, groups, s, d] -> [b, kv·groups, s, d];  [b, 1, s, d] -> [b, h, s, d]
_widened = expand(unsqueeze(Var("base"), 2).named("single"), Anything()).named("repeated")
REPEAT = pattern(
    "repeat of key/value heads",
    reshape(_widened, Anything()) | repeat_interleave(Var("base"), Const("groups"), 1) | expand(Var("base"), Anything()),
    transparent=_THROUGH,
)


# -------------------------------------------------------------------------------------------------- the view


def _find(facts: Facts) -> list[Match]:
    matches = [_eager_terms(facts, m) for m in find(facts, EAGER)] + [_sdpa_terms(facts, m) for m in find(facts, SDPA)]
    return sorted(matches, key=lambda match: facts.position(match.root))


def _explain(facts: Facts) -> list[Miss]:
    misses = [miss for part in (EAGER, SDPA) for miss in explain(facts, part) if miss.node is not None]
    return sorted(misses, key=lambda miss: -miss.depth)


def _eager_terms(facts: Facts, match: Match) -> Match:
    captured = match.captures

    def factor(place: str) -> float:
        times, over = captured.get(f"{place}_times"), captured.get(f"{place}_over")
        return float((1.0 if times is None else times) / (1.0 if over is None else over))

    alpha = 1.0 if captured["alpha"] is None else captured["alpha"]
    beta = 0.0 if captured["blend"] is None else captured["beta"]
    bias = captured["blend"] if beta else captured["bias"]
    return with_captures(
        match,
        _grouped(facts, captured)
        | _mask_terms(facts, captured)
        | {
            "bias": bias,
            "blended": bool(beta),
            "bias_scale": float(beta) * factor("scores") if beta else 1.0,
            "softcap": None if captured["cap"] is None else float(captured["cap"]),
            "scale": factor("q") * factor("k") * factor("kt") * factor("scores") * alpha,
            "split": captured["split"],
            "is_causal": False,
            "dropout_p": float(captured["p"]) if captured["train"] else 0.0,
            "softmax_dtype": captured["softmax_dtype"],
            "spelling": "eager",
        },
    )


def _mask_terms(facts: Facts, captured: Mapping[str, Any]) -> dict[str, Any]:
    """The mask, and what it does to the scores."""
    filled = {"drop": captured["drop"], "keep": captured["keep"]}
    for form, mask in filled.items():
        if mask is not None:
            tensor = captured["fill_tensor"]
            fill = captured["fill"] if tensor is None else constant_number(facts, tensor)
            return {"mask": mask, "mask_form": form, "fill": None if fill is None else float(fill)}
    mask = captured["mask"]
    return {"mask": mask, "mask_form": None if mask is None else "added", "fill": None}


def _sdpa_terms(facts: Facts, match: Match) -> Match:
    captured = match.captures
    q_shape, mask = facts.shape(captured["q"]), captured["mask"]
    scale = captured["scale"]
    if scale is None and q_shape is not None and isinstance(q_shape[-1], int):
        scale = 1.0 / math.sqrt(q_shape[-1])
    form = None if mask is None else "keep" if facts.dtype(mask) == torch.bool else "added"
    return with_captures(
        match,
        _grouped(facts, captured)
        | {
            "mask": mask,
            "mask_form": form,
            "fill": None,
            "bias": None,
            "blended": False,
            "bias_scale": 1.0,
            "softcap": None,
            "scale": scale,
            "split": None,
            "is_causal": captured["is_causal"],
            "dropout_p": float(captured["dropout_p"]),
            "softmax_dtype": None,
            "spelling": "sdpa",
        },
    )


def _grouped(facts: Facts, captured: Mapping[str, Any]) -> dict[str, Any]:
    """q, k, v, and k and v before a repetition of heads that both of them have."""
    q, k, v = captured["q"], captured["k"], captured["v"]
    (k_base, times), (v_base, v_times) = repeated(facts, k), repeated(facts, v)
    if times != v_times:
        k_base, v_base, times = k, v, 1
    groups = _sharing(facts, q, k, v) if times == 1 else times
    return {"q": q, "k": k, "v": v, "k_base": k_base, "v_base": v_base, "groups": groups}


def _sharing(facts: Facts, q: Node, k: Node, v: Node) -> int | None:
    """How many heads of q share one of k and v that were not repeated: by broadcasting, or inside the operator."""
    shapes = [facts.shape(node) or () for node in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes):
        return 1
    heads, k_heads, v_heads = (shape[1] for shape in shapes)
    if not same_size(k_heads, v_heads):
        return None
    if isinstance(heads, int) and isinstance(k_heads, int):
        return heads // k_heads if k_heads and heads % k_heads == 0 else None
    return 1 if same_size(heads, k_heads) else None


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
        between = facts.shape(match["repeated"]) if match["repeated"] is not None else (0, 0, after[1], 0, 0)
        groups = between[2] if between is not None and len(between) == 5 else None
    kept = same_size(before[0], after[0]) and same_size(before[2], after[2]) and same_size(before[3], after[3])
    whole = isinstance(groups, int) and same_size(before[1] * groups, after[1])
    return (base, groups) if kept and whole else (node, 1)


ATTENTION = View("attention", _find, _explain)
