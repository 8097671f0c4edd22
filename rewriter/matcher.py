# SPDX-License-Identifier: Apache-2.0
"""Finds where a pattern matches, and says why it does not where it nearly does.

A pattern is solved goal by goal, from its root operator down through the operands; where there is a choice (operand
order, alternatives, nodes to look through) the choices are tried in the order the pattern writes them, and undone when
they lead nowhere. Roots come from the graph's operator index in graph order, so the result is deterministic and an
absent operator costs nothing. At most one match is reported per root; matches of different roots may overlap.

Most roots are decided by the pattern's compiled form (:mod:`rewriter.compiled`); the search (:mod:`rewriter.solver`)
is asked where that is not sure, and traced to explain a miss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import MappingProxyType
from typing import Any

from torch import fx
from torch.fx import Node

from rewriter.expressions import Call, walk
from rewriter.facts import Carrier, Facts, facts_of
from rewriter.looking import readers
from rewriter.matches import Match, Miss
from rewriter.pattern import Pattern, Route
from rewriter.schemas import base_name, describe
from rewriter.solver import Failure, Solver, Trace

__all__ = ["Match", "Miss", "Target", "explain", "explain_at", "find", "match_at", "within"]

Target = Facts | fx.GraphModule | Carrier


def find(program: Target, pattern: Pattern) -> list[Match]:
    """Every match, one per root at most, in graph order of the roots."""
    facts = facts_of(program)
    compiled = pattern.compiled
    matches = []
    for root in _candidates(facts, pattern):
        match = compiled(facts, root)
        if isinstance(match, str):  # UNSURE
            match = _solved(facts, pattern, root)
        if match is not None:
            matches.append(match)
    return matches


def match_at(program: Target, pattern: Pattern, root: Node) -> Match | None:
    """The match whose root is this node, if there is one."""
    facts = facts_of(program)
    match = pattern.compiled(facts, root)
    return _solved(facts, pattern, root) if isinstance(match, str) else match


def explain(program: Target, pattern: Pattern, site: str | None = None) -> list[Miss]:
    """Why the pattern does not match where its anchor operator occurs: nearest misses first.

    Args:
        program: what was searched.
        pattern: what was looked for.
        site: only places at or below this module path.

    Returns:
        One miss per occurrence of the anchor outside all matches; one miss without a node if there is none at all.
    """
    facts = facts_of(program)
    covered = {node for match in find(facts, pattern) for node in match.nodes}
    places = [node for node in _nodes_calling(facts, pattern.anchor_targets) if within(facts, node, site)]
    if not places:
        wanted = " or ".join(dict.fromkeys(base_name(target) for target in pattern.anchor_targets))
        reason = f"there is no {wanted} {'in the program' if site is None else 'at this site'}"
        return [Miss(pattern.name, site or "", "", reason)]
    misses = [explain_at(facts, pattern, place) for place in places if place not in covered]
    return sorted((miss for miss in misses if miss is not None), key=lambda miss: -miss.depth)


def explain_at(facts: Facts, pattern: Pattern, anchor: Node) -> Miss | None:
    """The best partial match around one occurrence of the anchor; None if it does match."""
    best: Failure | None = None
    for root in _above(facts, pattern, pattern.anchor_routes, (anchor,)):
        trace = Trace()
        if Solver(facts, pattern, trace).solve(root):
            return None
        failure = trace.furthest
        if failure is not None and (best is None or failure.progress > best.progress):
            best = failure
    if best is None:
        best = _failure_below(facts, pattern, anchor)
    return _miss(facts, pattern, anchor, best)


def within(facts: Facts, node: Node, site: str | None) -> bool:
    """Whether a node belongs to a module path or below it; no path means everywhere."""
    if not site:
        return True
    return any(path == site or path.startswith(site + ".") for path in facts.paths(node))


# Climbing from one occurrence of an operator costs about as much as trying this many roots.
_CLIMB = 4


def _candidates(facts: Facts, pattern: Pattern) -> list[Node]:
    """Nodes that may be the root of a match, in graph order.

    A match contains each required operator: where one is absent there is none, and where one is much rarer than the
    root's, the roots above its occurrences are all there are.
    """
    rarest, occurrences = None, facts.count(pattern.root_targets)
    for call in pattern.required:
        number = facts.count(call.operator.targets)
        if not number:
            return []
        if number * _CLIMB < occurrences:
            rarest, occurrences = call, number
    if rarest is None:
        return _nodes_calling(facts, pattern.root_targets)
    return _above(facts, pattern, pattern.routes_from(rarest), facts.calls(rarest.operator.targets))


def _nodes_calling(facts: Facts, targets: Collection[Any]) -> list[Node]:
    """Nodes that call one of the operators, in graph order."""
    return sorted(facts.calls(targets))


def _solved(facts: Facts, pattern: Pattern, root: Node) -> Match | None:
    """The match at a root by search."""
    solver = Solver(facts, pattern)
    if not solver.solve(root):
        return None
    return Match(
        name=pattern.name,
        root=root,
        captures=MappingProxyType({name: solver.captures.get(name) for name in pattern.names}),
        nodes=tuple(sorted(solver.nodes)),
        outputs=tuple(solver.outputs),
        casts=frozenset(solver.casts),
        shared=frozenset(solver.shared),
        location=pattern.location,
    )


def _above(facts: Facts, pattern: Pattern, routes: tuple[Route, ...], anchors: Iterable[Node]) -> list[Node]:
    """Nodes that could be the root of a match with one of these anchors: up the pattern's routes."""
    roots: dict[Node, None] = {}
    for _, steps in routes:
        level = dict.fromkeys(anchors)
        for targets in steps:
            users = (user for node in level for user in readers(facts, pattern.transparent, node))
            level = dict.fromkeys(user for user in users if user.target in targets)
        roots.update(level)
    return sorted(roots)


def _failure_below(facts: Facts, pattern: Pattern, anchor: Node) -> Failure:
    """Why an anchor above which there is no root is none: it does not fit itself, or nothing reads it."""
    trace = Trace()
    solver = Solver(facts, pattern, trace)
    if not solver.solve_part(pattern.anchor, anchor) and trace.furthest is not None:
        return trace.furthest
    node, wanted = _stuck(facts, pattern, anchor)
    users = ", ".join(describe(user) for user in facts.users(node)) or "no user"
    reason = f"nothing consumes {describe(node)} as the pattern needs"
    expected = tuple(dict.fromkeys(base_name(target) for target in wanted))
    return Failure(len(solver.nodes), True, node, "above the anchor", reason, expected, users)


def _stuck(facts: Facts, pattern: Pattern, anchor: Node) -> tuple[Node, list[Any]]:
    """The value up to which operators fit on the way from an anchor to a root, and the operators that should read it."""
    furthest, node = 0, anchor
    wanted: dict[Any, None] = {}
    for _, steps in pattern.anchor_routes:
        level = [anchor]
        for height, targets in enumerate(steps):
            if height > furthest:
                furthest, node, wanted = height, level[0], {}
            if height == furthest and level[0] is node:
                wanted |= dict.fromkeys(targets)
            users = (user for value in level for user in readers(facts, pattern.transparent, value))
            level = list(dict.fromkeys(user for user in users if user.target in targets))
            if not level:
                break
    ordered = (t for e in walk(*pattern.outputs) if isinstance(e, Call) for t in e.operator.targets)
    return node, [target for target in dict.fromkeys(ordered) if target in wanted]


def _miss(facts: Facts, pattern: Pattern, anchor: Node, failure: Failure) -> Miss:
    node = failure.node or anchor
    return Miss(
        rule=pattern.name,
        site=facts.path(anchor),
        step=failure.step,
        reason=failure.reason,
        expected=" or ".join(dict.fromkeys(filter(None, failure.expected))),
        found=failure.found,
        source=next(filter(None, map(facts.source, filter(None, (node, failure.reader, anchor)))), ""),
        depth=failure.depth,
        node=node,
    )
