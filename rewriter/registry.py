# SPDX-License-Identifier: Apache-2.0
"""Passes by name. Families register themselves (entry: ``rewriter.passes``); the engine knows none of them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rewriter.errors import PlanError
from rewriter.rules import Pass

_PASSES: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known under its name."""
    _PASSES[cls.name] = cls
    return cls


def known() -> dict[str, type[Pass]]:
    """Name -> pass class, the package's own and registered ones."""
    import rewriter.passes  # noqa: F401 - importing it registers the families

    return dict(_PASSES)


def make(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass ``name`` with ``options``. Raises PlanError naming the nearest pass or option."""
    passes = known()
    if name not in passes:
        raise PlanError(f"unknown pass {name!r}{nearest(name, passes)}; known: {', '.join(sorted(passes))}")
    cls = passes[name]
    fields = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in fields:
            raise PlanError(
                f"pass {name} has no option {option!r}{nearest(option, fields)}; it has: {', '.join(fields) or 'none'}"
            )
    return cls(**options)


def resolve(passes: Sequence[str | Pass]) -> list[Pass]:
    """Instances for names and instances. Raises PlanError."""
    if isinstance(passes, str | Pass):
        raise PlanError(f"passes must be a list, not {passes!r}; write passes=[{passes!r}]")
    resolved = []
    for one in passes:
        if not isinstance(one, str | Pass):
            raise PlanError(f"passes must be names or Pass instances, not {one!r}")
        resolved.append(make(one, {}) if isinstance(one, str) else one)
    return resolved


def nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f" (nearest: {', '.join(close)})" if close else ""
