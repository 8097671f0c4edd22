# SPDX-License-Identifier: Apache-2.0
"""What `rewriter kernels` shows: the code that runs at each site, why, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from rewriter.codegen.implementations import Implementation
from rewriter.layout import Flowing, add, counted, duration, heading, table
from rewriter.rendering import code_kind, code_of, code_reasons, code_sites


def listing(found: Sequence[Implementation], target: str) -> RenderableType:
    """One row per group of sites that run the same; then their kernels; then why it is no other code.

    "bound" is the least time of the roofline, "by" memory or compute; "share" is the bound over the time beside it.
    """
    if not found:
        return Text(f"no operator of rewriter in this program; nothing to lower for {target}")
    timed = "measured" if target == "cpu" else "predicted"
    numbers = ("bound", timed, "share")
    rows = table("sites", "runs", "bound", "by", *numbers[1:], right=numbers)
    for members in _alike(found):
        first = members[0]
        spent = [one.seconds for one in members if one.seconds]
        share = sum(one.bound for one in members) / sum(spent) if spent else None
        add(
            rows,
            Group(*code_sites([one.runs for one in members]), *code_of(first.runs)),
            code_kind(first.runs),
            duration(first.bound),
            first.bound_by,
            duration(sum(spent) / len(spent)) if spent else "–",
            "–" if share is None else "< 1%" if share < 0.005 else f"{share:.0%}",
        )
    parts: list[RenderableType] = [heading(target, counted(len(found), "site")), rows]
    if any(one.kernels for one in found):
        parts.append(_resources(found))
    return Group(*parts, *code_reasons(one.runs for one in found))


def _alike(found: Sequence[Implementation]) -> list[list[Implementation]]:
    """Sites that do the same work by the same code."""
    groups: dict[tuple[object, ...], list[Implementation]] = {}
    for one in found:
        kind = (one.runs.operator, one.runs.code, one.runs.source, one.runs.fused, f"{one.bound:.2g}", one.kernels)
        groups.setdefault(kind, []).append(one)
    return list(groups.values())


def _resources(found: Sequence[Implementation]) -> RenderableType:
    numbers = ("programs", "registers", "spills", "shared")
    rows = table("kernel", *numbers, "configuration", right=numbers)
    for kernel in dict.fromkeys(kernel for one in found for kernel in one.kernels):
        sizes = (str(kernel.programs), str(kernel.registers), str(kernel.spills), f"{kernel.shared} B")
        add(rows, Flowing(kernel.name, after="_"), *sizes, Flowing(kernel.configuration, after=" "))
    return rows
