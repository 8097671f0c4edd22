# SPDX-License-Identifier: Apache-2.0
"""What `rewriter kernels` shows: the code that runs at each site, why, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from rewriter.codegen.implementations import Implementation
from rewriter.layout import add, counted, heading, spans, table


def listing(found: Sequence[Implementation], target: str) -> RenderableType:
    """One row per group of sites that run the same; then why some run their reference."""
    if not found:
        return Text(f"no operator of rewriter in this program; nothing to lower for {target}")
    measured = target == "cpu"
    columns = ("site", "operator", "runs", "bound", "by", *(("measured", "of roofline") if measured else ()))
    rows = table(*columns, right=("bound", "measured", "of roofline"))
    for members in _alike(found):
        first = members[0]
        runs = Text(f"{first.chosen}\n{first.source}", "yellow" if first.chosen == "reference" else "green")
        cells: list[RenderableType] = [_sites(members), first.operator, runs, duration(first.bound), first.bound_by]
        if measured:
            times = [one.seconds or 0.0 for one in members]
            share = sum(one.bound for one in members) / sum(times) if sum(times) else 0.0
            cells += [duration(sum(times) / len(times)), f"{share:.0%}"]
        add(rows, *cells)
    parts: list[RenderableType] = [heading(target, counted(len(found), "site")), rows]
    if any(one.kernels for one in found):
        parts.append(_resources(found))
    reasons = dict.fromkeys((one.operator, one.why) for one in found if one.why)
    parts += [Text(f"{operator} runs its reference: {why}", "yellow") for operator, why in reasons]
    return Group(*parts)


def _alike(found: Sequence[Implementation]) -> list[list[Implementation]]:
    """Sites that do the same work by the same code."""
    groups: dict[tuple[object, ...], list[Implementation]] = {}
    for one in found:
        kind = (one.operator, one.chosen, one.source, f"{one.bound:.2g}", one.kernels)
        groups.setdefault(kind, []).append(one)
    return list(groups.values())


def _resources(found: Sequence[Implementation]) -> RenderableType:
    rows = table("kernel", "registers", "spills", "shared memory", right=("registers", "spills", "shared memory"))
    for kernel in dict.fromkeys(kernel for one in found for kernel in one.kernels):
        add(rows, kernel.name, str(kernel.registers), str(kernel.spills), f"{kernel.shared} B")
    return rows


def _sites(members: Sequence[Implementation]) -> str:
    names = (one.site or "root" for one in members)
    return "\n".join(f"{path} ({times} ×)" if times > 1 else path for path, times in spans(names))


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
