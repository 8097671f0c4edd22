# SPDX-License-Identifier: Apache-2.0
"""The user's ``select``: which module path goes to which pass, and which is left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rewriter import registry
from rewriter.errors import LegalityError, PlanError
from rewriter.matcher import Miss
from rewriter.rules import Site

if TYPE_CHECKING:
    from rewriter.planner import PlannedSite

Selection = Mapping[str, str | None]


class Selector:
    """The user's ``select``: exact names beat regular expressions, the first expression wins, None protects."""

    def __init__(self, select: Selection, passes: Sequence[str]) -> None:
        for pattern, target in select.items():
            if target is not None and target not in passes:
                raise PlanError(
                    f"select[{pattern!r}] names pass {target!r}, which is not among passes={list(passes)}{registry.nearest(target, passes)}"
                )
        self.exact = {k: v for k, v in select.items() if not k.startswith("re:")}
        try:
            self.patterns = [(re.compile(k[3:]), v) for k, v in select.items() if k.startswith("re:")]
        except re.error as error:
            raise PlanError(f"select: {error.pattern!r} is not a regular expression: {error}") from error

    def _entry(self, site: Site) -> tuple[str, str | None] | None:
        paths = dict.fromkeys((*site.paths, site.address.path))
        for path in paths:
            if path in self.exact:
                return path, self.exact[path]
        for pattern, target in self.patterns:
            for path in paths:
                if pattern.fullmatch(path):
                    return f"re:{pattern.pattern}", target
        return None

    def forbids(self, pass_name: str, site: Site) -> str | None:
        entry = self._entry(site)
        if entry is None or entry[1] == pass_name:
            return None
        key, target = entry
        return f"protected by select[{key!r}]" if target is None else f"given to {target} by select[{key!r}]"

    def names(self, pass_name: str, site: Site) -> bool:
        entry = self._entry(site)
        return entry is not None and entry[1] == pass_name

    def check(self, sites: Sequence[PlannedSite], misses: Sequence[Miss]) -> None:
        """Every exact entry with a pass must have been met."""
        for path, target in self.exact.items():
            if target is None or any(s.pass_name == target and path in (*s.paths, s.address.path) for s in sites):
                continue
            reasons = [m for m in misses if m.site == path]
            if reasons:
                raise LegalityError(
                    f"select asks for {target} at {path!r}, which is refused: " + "; ".join(map(str, reasons[:3]))
                )
            known = sorted({p for s in sites for p in s.paths} | {m.site for m in misses if m.site})
            raise PlanError(
                f"select asks for {target} at {path!r}, but nothing there matches{registry.nearest(path, known)}"
            )
