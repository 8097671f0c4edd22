# SPDX-License-Identifier: Apache-2.0
"""One cell of the zoo, an architecture with one implementation of attention: what was found, rewritten and kept."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from torch import Tensor

import rewriter
from rewriter.optimized import Optimized
from rewriter.verification import Verification
from rewriter.views import VIEWS

from .architecture import Architecture, Counts
from .configs import ZOO

EXACT_PASSES = tuple(p for p in ("simplify", "canonical", "fuse", "fold") if p in rewriter.passes.available())
COLUMNS = tuple(Counts.__dataclass_fields__)
# Which views a column adds up.
PARTS: Mapping[str, tuple[str, ...]] = {column: (column,) for column in COLUMNS} | {"norm": ("rms_norm", "layer_norm")}


def cells() -> Iterator[tuple[str, str]]:
    """(architecture, implementation of attention) of every cell that the installed transformers has."""
    for name, architecture in ZOO.items():
        if architecture.available:
            yield from ((name, implementation) for implementation in architecture.implementations)


def found(program: rewriter.Program) -> Counts:
    """Sites that the views report, one per call."""
    return Counts(**{column: sum(len(VIEWS[v].find(program)) for v in views) for column, views in PARTS.items()})


def misses(program: rewriter.Program, column: str, count: int = 3) -> list[str]:
    """Why sites of a column were not found: the nearest misses, as text."""
    return [str(miss) for view in PARTS[column] for miss in VIEWS[view].explain(program)[:count]]


def places(program: rewriter.Program, column: str) -> list[str]:
    """Where the sites of a column are: "2 at model.layers.*.mlp.gate", the most frequent first."""
    paths = Counter(re.sub(r"\d+", "*", match.path) for view in PARTS[column] for match in VIEWS[view].find(program))
    return [f"{count} at {path}" for path, count in paths.most_common()]


@dataclass(frozen=True)
class Cell:
    """A model of the zoo, rewritten by every exact pass the way a newcomer would type it.

    Attributes:
        architecture, implementation: what was built.
        opt: ``rewriter.optimize(model, passes)``, without an example call.
        seconds: what that took; of it ``capture_seconds`` until the graph was there.
    """

    architecture: Architecture
    implementation: str
    opt: Optimized
    seconds: float
    capture_seconds: float

    @classmethod
    def of(cls, name: str, implementation: str) -> Cell:
        architecture = ZOO[name]
        reached: dict[str, float] = {}
        model = architecture.build(implementation)
        start = time.perf_counter()
        opt = rewriter.optimize(
            model, EXACT_PASSES, progress=lambda what, *_: reached.setdefault(what, time.perf_counter())
        )
        return cls(architecture, implementation, opt, time.perf_counter() - start, reached["plan"] - start)

    @cached_property
    def implied(self) -> Counts:
        return self.architecture.implied(self.architecture.configuration())

    @cached_property
    def found(self) -> Counts:
        return found(self.opt.original_program())

    @cached_property
    def sites(self) -> Mapping[str, int]:
        """Rewritten sites by rule."""
        return dict(sorted(Counter(site.rule for site in self.opt.plan.sites).items()))

    def samples(self) -> list[tuple[Tensor, ...]]:
        """Flat inputs: every padding that matters, and other sizes than any example call's."""
        names = self.opt.original_program().input_names()
        calls = [self.architecture.call(padding, seed=i) for i, padding in enumerate(self.architecture.paddings)]
        calls.append(self.architecture.call(batch=4, length=6, seed=9))
        return [tuple(call[name] for name in names) for call in calls]

    @cached_property
    def verification(self) -> Verification:
        """The golden run with gradients."""
        return rewriter.verify(self.opt.original_program(), self.opt.program, self.samples())

    @property
    def error(self) -> float:
        """The largest difference between the promoted programs, outputs and gradients, of the largest magnitude."""
        return max(figure.relative for figure in (*self.verification.outputs, *self.verification.gradients))


def differences(a: Counts, b: Counts) -> dict[str, tuple[int, int]]:
    """Columns in which they differ."""
    return {name: (value, getattr(b, name)) for name, value in asdict(a).items() if value != getattr(b, name)}
