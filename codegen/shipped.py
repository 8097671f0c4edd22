# SPDX-License-Identifier: Apache-2.0
"""Every shipped kernel configuration, compiled for every target: what ``make kernels-report`` prints and CI checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from rewriter import kernels
from rewriter.codegen.ahead_of_time import TARGETS, Compiled, compile
from rewriter.kernels.launching import Shipped


@dataclass(frozen=True)
class Row:
    """One kernel of one case in one configuration on one target."""

    case: str
    configuration: str
    compiled: Compiled


def cases() -> list[Shipped]:
    """The ``SHIPPED`` of every operator's ``launch.py``, by family and name."""
    families = sorted(module.name for module in iter_modules(kernels.__path__) if module.ispkg)
    found: list[Shipped] = []
    for family in families:
        if any((Path(folder) / family / "launch.py").exists() for folder in kernels.__path__):
            found += import_module(f"rewriter.kernels.{family}.launch").SHIPPED
    return found


def rows(case: Shipped, target: str) -> Iterator[Row]:
    """Compile all kernels of a case in all configurations a target has room for."""
    for request in case.requests():
        for config in request.choices(TARGETS[target].gpu.backend):
            yield Row(case.name, config.text, compile(request.start(config), target))


def faults(case: Shipped, target: str, found: list[Row]) -> list[str]:
    """What is wrong with a case on a target: resources of any of its kernels, or a product without matrix instruction."""
    wrong = [f"{row.compiled.kernel} ({row.configuration}): {f}" for row in found for f in row.compiled.faults()]
    seen = {instruction for row in found for instruction in row.compiled.matrix}
    widest, *others = TARGETS[target].matrix
    wanted = {"tensor core": {widest}, "mma": {widest, *others}, "none": set[str]()}[case.matrix]
    if wanted and not wanted & seen:
        wrong.append(f"none of {', '.join(sorted(wanted))} in its assembly")
    return wrong
