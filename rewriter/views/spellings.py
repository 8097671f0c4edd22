# SPDX-License-Identifier: Apache-2.0
"""What the views of written-out formulas share: constants as people type them, and casts around a formula."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch.fx import Node

from rewriter.facts import Facts
from rewriter.matcher import Match
from rewriter.operators import cast
from rewriter.predicates import Predicate

# Two numbers that agree to this relative error are one constant of a formula: float32 literals (0.79788456 for
# √(2/π)) and decimal ones. Whether a rule may take one for the other is for the rule to say.
LITERAL = 1e-6


def near(value: float) -> Predicate:
    """A number within a relative error of `LITERAL` of ``value``."""

    def test(facts: Facts, found: Any) -> bool:
        return isinstance(found, (int, float)) and not isinstance(found, bool) and _deviation(found, value) <= LITERAL

    return Predicate(f"{value:.10g}", test)


def deviation(captures: Mapping[str, Any], constants: Mapping[str, float]) -> float:
    """The largest relative error of the constants a match captured; 0 where it captured none."""
    found = ((captures.get(name), value) for name, value in constants.items())
    return max((_deviation(number, value) for number, value in found if number is not None), default=0.0)


def _deviation(found: float, value: float) -> float:
    return abs(found / value - 1.0)


def largest(matches: Iterable[Match], facts: Facts) -> list[Match]:
    """Those whose root lies in no other match, in graph order; of two with one root, the earlier in the list."""
    candidates = list(matches)
    kept: dict[Node, Match] = {}
    for match in candidates:
        inside = any(match.root in other.nodes and match.root is not other.root for other in candidates)
        if not inside:
            kept.setdefault(match.root, match)
    return sorted(kept.values(), key=lambda match: facts.position(match.root))


def last_dim(facts: Facts, captures: Mapping[str, Any], name: str) -> bool:
    """Whether a captured vector, where there is one, holds one value per entry of the last dimension of `x`."""
    vector, x = captures.get(name), facts.shape(captures["x"])
    if vector is None:
        return True
    shape = facts.shape(vector)
    return bool(x) and shape is not None and len(shape) == 1 and x is not None and shape[0] == x[-1]


def with_trailing_cast(facts: Facts, match: Match) -> Match:
    """The match including the cast back to the dtype of its `x`, where that is all the result is used for.

    A cast that changes nothing stays outside: it may be the first node of another formula.
    """
    users = facts.users(match.root)
    if len(users) != 1 or users[0].target not in cast.targets:
        return match
    (user,) = users
    read = cast.operands_of(facts, user, {"x": None, "dtype": None})
    if isinstance(read, str) or read["x"] is not match.root:
        return match
    changes = read["dtype"] != facts.dtype(match.root)
    if not changes or read["dtype"] != facts.dtype(match["x"]):
        return match
    return replace(
        match, root=user, nodes=(*match.nodes, user), outputs=(user,), casts=match.casts | {user}
    )


def declaring(match: Match, *names: str) -> Match:
    """The match, with the change of dtype at these captured nodes declared: a product of two dtypes has the wider."""
    nodes = {match.captures.get(name) for name in names}
    return replace(match, casts=match.casts | {node for node in nodes if isinstance(node, Node)})
