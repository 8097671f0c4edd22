# SPDX-License-Identifier: Apache-2.0
"""Finds where a pattern matches, and says why it does not where it nearly does.

A pattern is solved goal by goal, from its root operator down through the operands; where there is a choice (operand
order, alternatives, nodes to look through) the choices are tried in the order the pattern writes them, and undone when
they lead nowhere. Roots come from the graph's operator index in graph order, so the result is deterministic and an
absent operator costs nothing. At most one match is reported per root; matches of different roots may overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import fx
from torch.fx import Node

from rewriter.facts import Carrier, Facts, facts_of
from rewriter.pattern import Pattern
from rewriter.schemas import base_name, describe
from rewriter.solver import Failure, Solver, Trace


@dataclass(frozen=True)
class Match:
    """One place where a pattern or view holds.

    Attributes:
        name: of the pattern or view.
        root: the node whose value the match defines (the last one, of several).
        captures: name -> node, constant, tuple of nodes (variadic) or `Match` (groups); None for parts left out.
        nodes: every node the match consists of, in graph order, `root` included, captured inputs not.
        paths: the original module paths the nodes come from, the root's first.
        outputs: the nodes whose values the match defines; users outside may read these and no other.
        casts: nodes at which the pattern itself names a change of dtype.
        shared: nodes that may have users outside and then stay in the graph.
        location: ``file:line`` of the pattern.
    """

    name: str
    root: Node
    captures: Mapping[str, Any]
    nodes: tuple[Node, ...]
    paths: tuple[str, ...]
    outputs: tuple[Node, ...]
    casts: frozenset[Node] = frozenset()
    shared: frozenset[Node] = frozenset()
    location: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.root, self.nodes))

    def __getitem__(self, name: str) -> Any:
        """The capture of that name."""
        return self.captures[name]

    @property
    def path(self) -> str:
        """Module path of the root."""
        return self.paths[0]

    def __str__(self) -> str:
        return f"{self.name} at {self.path or '<root>'} ({self.root.name})"


@dataclass(frozen=True)
class Miss:
    """One place where a rule does not apply, and why.

    Attributes:
        rule: the pattern, view or rule.
        site: module path of the place.
        step: how far matching came, e.g. ``"matmul.x > softmax.x"``.
        reason: what is wrong, in one sentence.
        expected, found: what the step asked for and what is there instead.
        source: the user's line behind it.
        depth: number of nodes that did fit; larger is nearer to a match.
        node: the node at which it failed; None where the rule's operators do not occur at all.
    """

    rule: str
    site: str
    step: str
    reason: str
    expected: str = ""
    found: str = ""
    source: str = ""
    depth: int = 0
    node: Node | None = field(default=None, compare=False)

    def __str__(self) -> str:
        lines = [f"{self.rule} does not apply at {self.site or '<root>'}: {self.reason}"]
        if self.step:
            lines.append(f"  step      {self.step}")
        if self.expected:
            lines.append(f"  expected  {self.expected}")
        if self.found:
            lines.append(f"  found     {self.found}")
        if self.source:
            lines.append(f"  source    {self.source}")
        return "\n".join(lines)


Target = Facts | fx.GraphModule | Carrier


def find(program: Target, pattern: Pattern) -> list[Match]:
    """Every match, one per root at most, in graph order of the roots."""
    facts = facts_of(program)
    found = (match_at(facts, pattern, root) for root in _nodes_calling(facts, pattern.root_targets))
    return [match for match in found if match is not None]


def match_at(program: Target, pattern: Pattern, root: Node) -> Match | None:
    """The match whose root is this node, if there is one."""
    facts = facts_of(program)
    solver = Solver(facts, pattern)
    return _match(facts, pattern, solver, root) if solver.solve(root) else None


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
    for root in _roots_above(facts, pattern, anchor):
        trace = Trace()
        if Solver(facts, pattern, trace).solve(root):
            return None
        failure = trace.furthest
        if failure is not None and (best is None or failure.depth > best.depth):
            best = failure
    if best is None:
        best = _failure_below(facts, pattern, anchor)
    return _miss(facts, pattern, anchor, best)


def within(facts: Facts, node: Node, site: str | None) -> bool:
    """Whether a node belongs to a module path or below it; no path means everywhere."""
    if not site:
        return True
    return any(path == site or path.startswith(site + ".") for path in facts.paths(node))


def site_paths(facts: Facts, root: Node, nodes: tuple[Node, ...]) -> tuple[str, ...]:
    """The original module paths of a match, the root's first."""
    return tuple(dict.fromkeys(path for node in (root, *nodes) for path in facts.paths(node)))


def _nodes_calling(facts: Facts, targets: tuple[Any, ...]) -> list[Node]:
    """Nodes that call one of the operators, in graph order; from the graph's own index."""
    groups = [facts.graph.find_nodes(op="call_function", target=target) for target in targets]
    nodes = [node for group in groups for node in group]
    return nodes if sum(map(bool, groups)) <= 1 else sorted(nodes)


def _match(facts: Facts, pattern: Pattern, solver: Solver, root: Node) -> Match:
    nodes = tuple(sorted(solver.nodes))
    return Match(
        name=pattern.name,
        root=root,
        captures=MappingProxyType({name: solver.captures.get(name) for name in pattern.names}),
        nodes=nodes,
        paths=site_paths(facts, root, nodes),
        outputs=tuple(solver.outputs),
        casts=frozenset(solver.casts),
        shared=frozenset(solver.shared),
        location=pattern.location,
    )


def _roots_above(facts: Facts, pattern: Pattern, anchor: Node) -> list[Node]:
    """Nodes that could be the root of a match with this anchor: up the pattern's routes, through transparent nodes."""
    roots: dict[Node, None] = {}
    for _, steps in pattern.anchor_routes:
        level: dict[Node, None] = {anchor: None}
        for targets in steps:
            users = (user for node in level for user in _readers(facts, pattern, node))
            level = dict.fromkeys(user for user in users if user.target in targets)
        roots.update(level)
    return sorted(roots)


def _readers(facts: Facts, pattern: Pattern, node: Node) -> Iterator[Node]:
    """Users of a value, also through nodes the pattern looks through."""
    for user in facts.users(node):
        yield user
        if any(user.target in kind.targets and kind.test(facts, user) for kind in pattern.transparent):
            yield from _readers(facts, pattern, user)


def _failure_below(facts: Facts, pattern: Pattern, anchor: Node) -> Failure:
    """Why an anchor above which there is no root is none: it does not fit itself, or nothing reads it."""
    trace = Trace()
    solver = Solver(facts, pattern, trace)
    if not solver.solve_part(pattern.anchor, anchor) and trace.furthest is not None:
        return trace.furthest
    users = ", ".join(describe(user) for user in facts.users(anchor)) or "no user"
    wanted = tuple(dict.fromkeys(base_name(target) for target in pattern.root_targets))
    reason = "nothing consumes it as the pattern needs"
    return Failure(len(solver.nodes), True, anchor, "above the anchor", reason, wanted, users)


def _miss(facts: Facts, pattern: Pattern, anchor: Node, failure: Failure) -> Miss:
    node = failure.node or anchor
    return Miss(
        rule=pattern.name,
        site=facts.path(anchor),
        step=failure.step,
        reason=failure.reason,
        expected=" or ".join(dict.fromkeys(filter(None, failure.expected))),
        found=failure.found,
        source=facts.source(node) or facts.source(anchor),
        depth=failure.depth,
        node=node,
    )
