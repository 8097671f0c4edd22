# SPDX-License-Identifier: Apache-2.0
"""The Rotary view: y = x · cos + rotate(x) · sin, pairs of features rotated by the angle of their position.

    half          pairs (i, i + d/2):    rotate([a, b]) = [-b, a], a and b the halves of the features
    interleaved   pairs (2i, 2i + 1):    rotate turns every (a, b) into (-b, a)

Written with rotate(x) as above, or part by part: [a · cos - b · sin, b · cos + a · sin].

Captures: `x` node [..., d], the features that are rotated; `cos`, `sin` nodes, broadcasting to x, or to one half of it
where `spelling` is ``"parts"`` (else ``"rotated"``); `layout` ``"half"`` or ``"interleaved"``; `features` d, or None
where it is not fixed; `partial`: whether x is a slice of features of which the rest is not rotated. The root is the
node whose value is y.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from rewriter.facts import Facts, same_shape
from rewriter.matcher import Match, Miss, explain, find
from rewriter.operators import ALIAS, CONTIGUOUS, NOOP_CAST, NOOP_SHAPE, cat, flatten, neg, reshape, stack
from rewriter.pattern import Anything, Expression, Pattern, Var, pattern
from rewriter.predicates import Predicate
from rewriter.views.base import View, with_captures

aten = torch.ops.aten

_THROUGH = (NOOP_CAST, CONTIGUOUS, NOOP_SHAPE, ALIAS)
_NEAR = 3  # nodes that must fit before a negation is worth explaining: neg, cat and mul


# ------------------------------------------------------------------------------------- parts of the features


@dataclass(frozen=True)
class _Part:
    """Features start, start + step, ... of `whole` [..., d]; `nodes` compute them."""

    whole: Node
    start: int
    step: int
    nodes: tuple[Node, ...]


def _part(facts: Facts, node: Node) -> _Part | None:
    """The half of the features a node is: a slice, a chunk, every second one, or one of pairs."""
    node = _behind(facts, node)
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None:
        return None
    if node.target is operator.getitem:
        return _piece(facts, node, source)
    width = _width(facts, source)
    arguments = facts.arguments(node)
    if node.target is aten.slice.Tensor and width and _is_last(facts, source, arguments["dim"]):
        start, end = (_within(arguments[name], width) for name in ("start", "end"))
        step = arguments["step"]
        expected = (0, width // 2, width // 2) if step == 1 else (0, 1, width)
        halves = (start, end) in ((0, width // 2), (width // 2, width)) if step == 1 else (step, end) == (2, width)
        return _Part(_behind(facts, source), start, step, (node,)) if halves and start in expected else None
    if node.target is aten.select.int and width == 2 and _is_last(facts, source, arguments["dim"]):
        return _of_pairs(facts, source, arguments["index"] % 2, (node,))
    return None


def _piece(facts: Facts, node: Node, pieces: Node) -> _Part | None:
    """One result of a chunk or split into halves, or of pairs unbound."""
    index = node.args[1]
    if not pieces.all_input_nodes or not isinstance(index, int):
        return None
    source = pieces.all_input_nodes[0]
    width = _width(facts, source)
    values = pieces.meta.get("val")
    count = len(values) if isinstance(values, (list, tuple)) else 0
    if count != 2 or not width or not _is_last(facts, source, facts.arguments(pieces).get("dim", 0)):
        return None
    if pieces.target is aten.unbind.int:
        return _of_pairs(facts, source, index, (pieces, node))
    if _width(facts, node) != width // 2:
        return None
    return _Part(_behind(facts, source), index * (width // 2), 1, (pieces, node))


def _of_pairs(facts: Facts, pairs: Node, index: int, nodes: tuple[Node, ...]) -> _Part | None:
    """Every second feature, where `pairs` is [..., d] viewed as [..., d/2, 2]."""
    whole = pairs.all_input_nodes[0] if pairs.target in reshape.targets or pairs.target is aten.unflatten.int else None
    if whole is None or _width(facts, pairs) != 2 or not same_shape(_lead(facts, whole), _lead(facts, pairs)[:-1]):
        return None
    return _Part(_behind(facts, whole), index, 2, (pairs, *nodes))


def _behind(facts: Facts, node: Node) -> Node:
    """The value behind nodes that keep it as it is."""
    while any(node.target in kind.targets and kind.test(facts, node) for kind in _THROUGH):
        node = node.all_input_nodes[0]
    return node


def _lead(facts: Facts, node: Node) -> tuple[Any, ...]:
    return (facts.shape(node) or ())[:-1]


def _width(facts: Facts, node: Node) -> int:
    """The fixed number of features, or 0."""
    shape = facts.shape(node)
    return shape[-1] if shape and isinstance(shape[-1], int) else 0


def _is_last(facts: Facts, node: Node, dim: int) -> bool:
    rank = len(facts.shape(node) or ())
    return rank > 0 and dim % rank == rank - 1


def _within(bound: Any, width: int) -> int:
    """A bound of a slice as an index from 0 to width; -1 where it is not a number."""
    if bound is None:
        return 0
    return min(bound + width if bound < 0 else bound, width) if isinstance(bound, int) else -1


# -------------------------------------------------------------------------------------------------- patterns


def _halves_of(facts: Facts, captures: Mapping[str, Any], step: int) -> tuple[_Part, _Part] | None:
    """The first and the second part of one value: its halves (step 1) or its even and odd features (step 2)."""
    first, second = (_part(facts, captures[name]) for name in ("first", "second"))
    if first is None or second is None or first.whole is not second.whole or {first.step, second.step} != {step}:
        return None
    ordered = first.start == 0 and second.start == (1 if step == 2 else _width(facts, second.whole) // 2)
    return (first, second) if ordered else None


def _rotates(step: int) -> Predicate:
    def test(facts: Facts, captures: Mapping[str, Any]) -> bool:
        halves = _halves_of(facts, captures, step)
        x = captures.get("x")
        return halves is not None and (x is None or halves[0].whole is _behind(facts, x))

    return Predicate("the two halves of x" if step == 1 else "the even and odd features of x", test)


def _forms(layout: str, together: Any, step: int) -> tuple[Pattern, Pattern]:
    """The two spellings of one layout; `together` joins two parts."""
    x, cos, sin, first, second = (Var(name) for name in ("x", "cos", "sin", "first", "second"))
    negated = neg(second)
    rotated = x * cos + together(negated, first) * sin
    upper = first * cos - second * sin
    parts: Expression = together(upper, second * cos + first * sin)
    condition = _rotates(step)
    return (
        pattern(f"rotary, {layout}", rotated, where=condition, transparent=_THROUGH, anchor=negated),
        pattern(f"rotary, {layout}", parts, where=condition, transparent=_THROUGH, anchor=upper),
    )


def _concatenated(a: Expression, b: Expression) -> Expression:
    return cat([a, b], -1)


def _paired(a: Expression, b: Expression) -> Expression:
    pairs = stack([a, b], -1)
    return flatten(pairs, Anything(), Anything()) | reshape(pairs, Anything())


_HALF = _forms("half", _concatenated, 1)
_PAIRS = _forms("interleaved", _paired, 2)


# -------------------------------------------------------------------------------------------------- the view


def _find(facts: Facts) -> list[Match]:
    found = []
    for step, forms in ((1, _HALF), (2, _PAIRS)):
        for spelling, form in zip(("rotated", "parts"), forms, strict=True):
            found += [_terms(facts, match, step, spelling) for match in find(facts, form)]
    kept = [match for match in found if same_shape(facts.shape(match.root), facts.shape(match["x"]))]
    return sorted(kept, key=lambda match: facts.position(match.root))


def _explain(facts: Facts) -> list[Miss]:
    covered = {node for match in _find(facts) for node in match.nodes}
    misses = [miss for form in (_HALF[0], _PAIRS[0]) for miss in explain(facts, form)]
    nearest: dict[Node, Miss] = {}
    for miss in sorted(misses, key=lambda miss: -miss.depth):
        if miss.node is not None and miss.node not in covered and miss.depth >= _NEAR:
            nearest.setdefault(miss.node, replace(miss, rule="rotary"))
    return list(nearest.values())


def _terms(facts: Facts, match: Match, step: int, spelling: str) -> Match:
    """The match in the view's terms, with the nodes that take the parts of x."""
    halves = _halves_of(facts, match.captures, step)
    if halves is None:  # the pattern's condition has seen them
        raise AssertionError(f"{match} has no halves")
    x = match.captures.get("x") or halves[0].whole
    taken = {node for half in halves for node in half.nodes}
    captures = {
        "x": x,
        "cos": match["cos"],
        "sin": match["sin"],
        "layout": "half" if step == 1 else "interleaved",
        "spelling": spelling,
        "features": _width(facts, x) or None,
        "partial": _is_slice(facts, x),
    }
    found = with_captures(match, captures, "rotary")
    # Parts may be read elsewhere, too; they then stay.
    return replace(found, nodes=tuple(sorted(taken.union(found.nodes))), shared=found.shared | taken)


def _is_slice(facts: Facts, x: Node) -> bool:
    """Whether x is a part of more features."""
    node = _behind(facts, x)
    if node.target is operator.getitem and node.all_input_nodes:
        node = node.all_input_nodes[0]
    names = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.narrow.default)
    if node.target not in names:
        return False
    whole = _width(facts, node.all_input_nodes[0])
    return whole > _width(facts, x) > 0 and same_shape(_lead(facts, node.all_input_nodes[0]), _lead(facts, x))


ROTARY = View("rotary", _find, _explain)
