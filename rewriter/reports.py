# SPDX-License-Identifier: Apache-2.0
"""The report: every site with what it became and what it cost, what was left alone and why, sizes, measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rewriter.applying import Application, SiteResult
from rewriter.matcher import Miss
from rewriter.sizes import model_bytes

if TYPE_CHECKING:
    from rewriter.calibration import Statistics
    from rewriter.optimized import Optimized


@dataclass(frozen=True)
class Measurement:
    """One figure of the whole model.

    Attributes:
        before, after: of the original and the rewritten model; ``before`` is None where there is nothing to compare.
        unit: "" (a plain number), "share" (0 to 1), "bytes", or the unit's name ("ms", "nats").
        note: how it was measured, or what it means.
    """

    before: float | None
    after: float
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class SiteCode:
    """The code that runs at a site.

    Attributes:
        site: path of the module it stands for.
        operator: without namespace.
        code: "emitted" (a kernel made for this site), "Triton", "native" (C++) or "reference" (aten).
        source: its file, from the package on; of an emitted one from the cache folder on.
        fused: neighbouring operators computed in the same kernel, in order.
        why: of the reference, why nothing faster runs; of a kernel, why no more is fused into it, where that was tried.
    """

    site: str
    operator: str
    code: str
    source: str
    fused: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Report:
    """What ``optimize`` did. Prints as a table with rich, or as data with :meth:`to_json`.

    Attributes:
        model: class name of the original.
        sites: one entry per rewritten site, in the order they were rewritten.
        misses: places a pass looked at and left alone, with the reason.
        bytes_before, bytes_after: the whole model as stored, against the same model losslessly stored before.
        calibrated: whether statistics were used.
        notes: what capturing found or switched.
        measurements: figures added by whoever evaluated the result (the CLI does), by name.
        device: where it is to run: "cpu", "cuda", "hip".
        code: what runs there at each site of the example's program, in graph order.
    """

    model: str
    sites: tuple[SiteResult, ...]
    misses: tuple[Miss, ...]
    bytes_before: int
    bytes_after: int
    calibrated: bool
    notes: tuple[str, ...] = ()
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    device: str = "cpu"
    code: tuple[SiteCode, ...] = ()

    @classmethod
    def of(cls, opt: Optimized, application: Application, statistics: Statistics | None) -> Report:
        skeleton = opt._skeleton
        return cls(
            model=type(skeleton.module).__name__ if skeleton is not None else "ExportedProgram",
            sites=application.results,
            misses=opt.plan.misses,
            bytes_before=opt.original_bytes,
            bytes_after=model_bytes(opt),
            calibrated=statistics is not None,
            notes=opt.original.notes,
            device=opt.lowered.device,
            code=opt.lowered.code(),
        )

    def with_measurements(self, measurements: Mapping[str, Measurement]) -> Report:
        """The same report with more figures."""
        return dataclasses.replace(self, measurements={**self.measurements, **measurements})

    def group_bytes(self, *rules: str) -> tuple[int, int]:
        """Bytes before and after, summed over the sites of ``rules``."""
        chosen = [s for s in self.sites if s.rule in rules]
        return sum(s.bytes_before for s in chosen), sum(s.bytes_after for s in chosen)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "calibrated": self.calibrated,
            "notes": list(self.notes),
            "sites": [
                dataclasses.asdict(s) | {"choice": dict(s.choice), "figures": dict(s.figures)} for s in self.sites
            ],
            "misses": [
                {
                    "rule": m.rule,
                    "site": m.site,
                    "step": m.step,
                    "reason": m.reason,
                    "expected": m.expected,
                    "found": m.found,
                    "source": m.source,
                }
                for m in self.misses
            ],
            "device": self.device,
            "code": [dataclasses.asdict(one) for one in self.code],
            "measurements": {name: dataclasses.asdict(m) for name, m in self.measurements.items()},
        }

    def __rich__(self) -> Any:
        from rewriter.rendering import report

        return report(self)
