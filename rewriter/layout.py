# SPDX-License-Identifier: Apache-2.0
"""Building blocks of everything people read: tables, text that breaks where names break, repeated layers as ranges.

Cells are always :class:`rich.text.Text`: shapes like ``f32[2, 3]`` would otherwise be taken for markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

KEEP = "\N{NO-BREAK SPACE}"  # in Flowing: a space that is no place to break, printed as a plain one


def human_bytes(count: int) -> str:
    """1234567 -> "1.23 MB" (decimal units)."""
    if abs(count) < 1000:
        return f"{count} B"
    value, units = count / 1000, ["kB", "MB", "GB"]
    while abs(value) >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.2f} {units[0]}"


def change(before: float, after: float) -> str:
    """Relative change in percent."""
    return f"{100 * (after / before - 1):+.1f} %" if before else "–"


class Flowing:
    """Text that breaks after one of the characters ``after``; continuation lines hang by ``indent`` columns.

    A module path breaks at its dots, a call at its spaces and dots; only a single word wider than the column is cut.
    """

    def __init__(self, text: str, after: str = ".", indent: int = 2, style: str = "") -> None:
        self.text, self.indent, self.style = text, indent, style
        self._pieces = re.findall(f"[^{re.escape(after)}]*[{re.escape(after)}]|[^{re.escape(after)}]+$", text)

    def lines(self, width: int) -> list[str]:
        """The text in lines of at most ``width`` columns."""
        done: list[str] = []
        current = ""
        for piece in self._pieces:
            if current.strip() and cell_len(current) + cell_len(piece.rstrip()) > width:
                done.append(current.rstrip())
                current = " " * self.indent
            current += piece
            while cell_len(current.rstrip()) > width > self.indent:
                done.append(current[:width])
                current = " " * self.indent + current[width:]
        return [line.replace(KEEP, " ") for line in (*done, current.rstrip())]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(self.lines(options.max_width)), style=self.style, no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max((cell_len(p.rstrip()) for p in self._pieces), default=0) + self.indent
        full = max(1, cell_len(self.text))
        return Measurement(min(widest, full), full).with_maximum(options.max_width)


def table(*columns: str, right: Iterable[str] = (), widths: Sequence[int | None] = ()) -> Table:
    """The one table style of the package; ``right`` names right-aligned columns, which never wrap."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numeric = set(right)
    for i, column in enumerate(columns):
        is_number = column in numeric
        made.add_column(
            Text(column),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
            min_width=widths[i] if i < len(widths) else None,
        )
    return made


def add(rows: Table, *cells: RenderableType) -> None:
    """A row whose plain strings are taken literally."""
    rows.add_row(*(Text(c) if isinstance(c, str) else c for c in cells))


def heading(*parts: str) -> Flowing:
    """A bold line over what follows: ``parts`` joined by dots in the middle."""
    return Flowing(" · ".join(p for p in parts if p), after=" ", style="bold")


def counted(count: int, noun: str) -> str:
    """``1 site``, ``4 sites``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def spans(paths: Iterable[str]) -> list[tuple[str, int]]:
    """Module paths that differ in their numbers only, as one range each, with how many there are.

    ``h.0.attn, h.1.attn, h.0.mlp`` -> ``("h.{0…1}.attn", 2), ("h.0.mlp", 1)``.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for path in paths:
        parts = path.split(".")
        groups.setdefault(tuple("#" if p.isdigit() else p for p in parts), []).append(parts)
    found = []
    for template, members in groups.items():
        merged = [_range({int(m[i]) for m in members}) if part == "#" else part for i, part in enumerate(template)]
        found.append((".".join(merged), len(members)))
    return found


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    if low == high:
        return str(low)
    if len(numbers) == high - low + 1:
        return f"{{{low}…{high}}}"
    shown = ",".join(map(str, sorted(numbers)[:4])) + (",…" if len(numbers) > 4 else "")
    return f"{{{shown}}}"


def times(count: int) -> str:
    """``×4``; nothing for one."""
    return f"×{count}" if count > 1 else ""


def duration(seconds: float) -> str:
    """Three digits and the unit they are read best in."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
