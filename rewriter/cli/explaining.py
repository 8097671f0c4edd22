# SPDX-License-Identifier: Apache-2.0
"""What `rewriter explain` shows: where a view, rule or pass applies, and why it does not where it nearly does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rewriter import finding
from rewriter.cli.loading import parse_passes
from rewriter.errors import PlanError
from rewriter.layout import Flowing, add, counted, heading, spans
from rewriter.matcher import Miss, within
from rewriter.program import Program
from rewriter.registry import known, nearest
from rewriter.rules import Pass, Rule
from rewriter.views import VIEWS, View

_LABELS = ("step", "expected", "found", "source")


def subject(name: str) -> View | Rule | Pass:
    """What ``--rule`` names: a view (``attention``), a pass with options (``shift_add:bits=3``) or one rule of a pass
    (``fuse.qkv``).

    Raises:
        PlanError: none of them; names the nearest.
    """
    if name in VIEWS:
        return VIEWS[name]
    if name.partition(":")[0] in known():
        return parse_passes(name)[0]
    rules = {rule.name: rule for cls in known().values() for rule in cls().rules()}
    if name in rules:
        return rules[name]
    names = [*VIEWS, *known(), *rules]
    raise PlanError(f"--rule {name!r} is no view, pass or rule{nearest(name, names)}; known: {', '.join(names)}")


def site_path(program: Program, site: str) -> str:
    """The module path that ``site`` names; its last parts are enough where they name one module.

    Raises:
        PlanError: no module of the graph, or several; names them.
    """
    facts = program.facts
    paths = dict.fromkeys(
        ".".join(parts[: i + 1])
        for node in program.graph.nodes
        for path in facts.paths(node)
        for parts in [path.split(".")]
        for i in range(len(parts))
    )
    if site in paths:
        return site
    ending = [path for path in paths if path.endswith("." + site)]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise PlanError(f"--site {site!r} may be {', '.join(ending[:5])}{', …' if len(ending) > 5 else ''}")
    raise PlanError(f"no node belongs to {site!r}{nearest(site, [p for p in paths if p])}")


def explanation(
    program: Program, name: str, of: View | Rule | Pass, site: str | None, limit: int
) -> tuple[RenderableType, dict[str, Any]]:
    """Where ``of`` applies at or below the module path ``site``, and its misses, nearest first; also as data."""
    matches = [m for m in finding.find(program, of) if within(program.facts, m.root, site)]
    misses = finding.explain(program, of, site)
    groups: dict[tuple[str, str, str, str], list[Miss]] = {}
    for miss in misses:
        groups.setdefault((miss.rule, miss.step, miss.reason, miss.expected), []).append(miss)
    where = f"at {site}" if site else ""
    parts: list[RenderableType] = [
        heading(f"{name} {where}".strip(), counted(len(matches), "match").replace("matchs", "matches"), _missed(misses))
    ]
    if matches:
        parts += [Text(), _paths([m.path or "<root>" for m in matches], "applies to ")]
    for alike in list(groups.values())[:limit]:
        parts += [Text(), *_shown(alike)]
    if len(groups) > limit:
        hidden = counted(len(groups) - limit, "more reason")
        parts += [Text(), Flowing(f"and {hidden}; --limit {len(groups)} shows all", after=" ", style="dim")]
    data = {
        "rule": name,
        "site": site,
        "matches": [{"site": m.path, "root": m.root.name} for m in matches],
        "misses": [_data(miss) for miss in misses],
    }
    return Group(*parts), data


def _missed(misses: Sequence[Miss]) -> str:
    near = sum(miss.node is not None for miss in misses)  # the others say that there is nothing of the kind
    return "1 near miss" if near == 1 else f"{near or 'no'} near misses"


def _paths(paths: Sequence[str], lead: str) -> Flowing:
    shown = [span for span, _ in spans(dict.fromkeys(paths))]
    return Flowing(lead + ", ".join(shown), after=" .{", indent=len(lead))


def _shown(alike: Sequence[Miss]) -> list[RenderableType]:
    """One miss in full, and the other places of which the same is true."""
    first = alike[0]
    parts: list[RenderableType] = [
        Flowing(f"{first.rule} does not apply at {first.site or '<root>'}: {first.reason}", after=" .", style="yellow")
    ]
    rows = Table.grid(padding=(0, 2))
    for label in _LABELS:
        if value := getattr(first, label):
            add(rows, f"  {label}", Flowing(value, after=" /"))
    if rows.row_count:
        parts.append(rows)
    if others := [miss.site or "<root>" for miss in alike[1:]]:
        parts.append(_paths(others, f"  the same {counted(len(others), 'time')} at "))
    return parts


def _data(miss: Miss) -> dict[str, Any]:
    return {
        name: getattr(miss, name) for name in ("rule", "site", "step", "reason", "expected", "found", "source", "depth")
    }
