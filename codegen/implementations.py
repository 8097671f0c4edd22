# SPDX-License-Identifier: Apache-2.0
"""Which code runs at each rewritten site of a program, why, and what it takes: here, or on a GPU that is not here.

For a GPU the program is lowered (:mod:`rewriter.codegen.lowering`), and what each site would start is compiled ahead of
time. On the CPU every site is timed. What an `Optimized` reports of itself is the same list without the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.codegen import roofline
from rewriter.codegen.calls import Call, calls
from rewriter.codegen.emitting import EmittedSite
from rewriter.codegen.lowering import Lowered, lower
from rewriter.errors import PlanError
from rewriter.kernels.launching import Request, recorded
from rewriter.kernels.spec import Cost
from rewriter.program import Program
from rewriter.reports import SiteCode

RUNS = 5  # timed calls per site, of which the fastest counts


@dataclass(frozen=True)
class Kernel:
    """A kernel of a site, compiled.

    Attributes:
        name: its own.
        configuration: the one that runs before anything was measured.
        programs: it is started with.
        registers, spills: per thread; spills in bytes.
        shared: bytes per program.
    """

    name: str
    configuration: str
    programs: int
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Implementation:
    """What runs at a site, and what it takes.

    Attributes:
        runs: the code.
        rule: what put the operator there; empty if the program came with it.
        target: "cpu", or a GPU of `ahead_of_time.TARGETS`.
        kernels: what a GPU would start.
        bound: least seconds for the work at the device's peaks; on the CPU at the speed of memory.
        bound_by: "memory" or "compute".
        seconds: on the CPU measured; for a GPU that is not here predicted (`roofline.predicted`), None for a reference.
    """

    runs: SiteCode
    rule: str
    target: str
    kernels: tuple[Kernel, ...]
    bound: float
    bound_by: str
    seconds: float | None

    @property
    def share(self) -> float | None:
        """Of the roofline: the bound over the time."""
        return None if not self.seconds else self.bound / self.seconds

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name != "runs"}
        return {**asdict(self.runs), **own, "share": self.share}


def implementations(program: Program, target: str) -> list[Implementation]:
    """What would run at every site of a program on ``target``, for the sizes of its example.

    Args:
        program: rewritten.
        target: "cpu", or one of `ahead_of_time.TARGETS`.

    Raises:
        PlanError: no such target.
    """
    if target == "cpu":
        lowered, bandwidth = lower(program, "cpu"), _bandwidth()
        return [_on_cpu(call, runs, bandwidth) for call, runs in _sites(lowered)]
    if target not in roofline.CHIPS:
        known = ", ".join(("cpu", *roofline.CHIPS))
        raise PlanError(f"kernels are made for {known}, not for {target!r}")
    from rewriter.codegen.ahead_of_time import TARGETS

    lowered = lower(program, TARGETS[target].gpu.backend)
    return [_on_gpu(call, runs, lowered, target) for call, runs in _sites(lowered)]


def _sites(lowered: Lowered) -> list[tuple[Call, SiteCode]]:
    return list(zip(calls(lowered.program), lowered.code(), strict=True))


# --- a GPU that is not here ------------------------------------------------------------------------------------------


def _on_gpu(call: Call, runs: SiteCode, lowered: Lowered, target: str) -> Implementation:
    emitted = {site.node: site for site in lowered.emission.sites} if lowered.emission else {}
    site = emitted.get(call.node.name)
    rule = site.rule if site else call.rule
    cost = site.cost if site else call.spec.cost(*call.arguments("meta"))
    chip = roofline.CHIPS[target]
    bound = roofline.bound(cost, chip.bandwidth, chip.flops)
    if runs.code == "reference":
        return Implementation(runs, rule, target, (), bound.seconds, bound.by, None)
    requests = requests_of(call, site)
    kernels = tuple(_compiled(request, target) for request in requests)
    work = [(kernel.programs, _bytes(request)) for kernel, request in zip(kernels, requests, strict=True)]
    seconds = roofline.predicted(bound.seconds, work, chip)
    return Implementation(runs, rule, target, kernels, bound.seconds, bound.by, seconds)


def requests_of(call: Call, site: EmittedSite | None) -> list[Request]:
    """What a call would start on a GPU: its emitted kernel, or its operator's. Raises Unsupported."""
    if site is not None:
        return site.requests()
    with recorded() as requests, torch.no_grad():
        call.spec.implementation("cuda")(*call.arguments("meta"))
    return requests


def _compiled(request: Request, target: str) -> Kernel:
    from rewriter.codegen import ahead_of_time

    config = request.choices(ahead_of_time.TARGETS[target].gpu.backend)[0]
    start = request.start(config)
    found = ahead_of_time.compile(start, target)
    programs = 1
    for size in start.grid:
        programs *= size
    return Kernel(found.kernel, config.text, programs, found.registers, found.spills, found.shared)


def _bytes(request: Request) -> int:
    """Of the tensors a kernel is given."""
    return sum(a.numel() * a.element_size() for a in request.args.values() if isinstance(a, Tensor))


# --- here ------------------------------------------------------------------------------------------------------------


def _on_cpu(call: Call, runs: SiteCode, bandwidth: float) -> Implementation:
    spec, args = call.spec, call.arguments("cpu")
    cost: Cost = spec.cost(*args)
    bound = roofline.bound(cost, bandwidth, float("inf"))
    function = spec.reference if runs.code == "reference" else spec.implementation("cpu")
    return Implementation(runs, call.rule, "cpu", (), bound.seconds, bound.by, _seconds(function, args))


def _seconds(function: Callable[..., Any], args: Sequence[Any]) -> float:
    with torch.no_grad():
        return min(_timed(function, args) for _ in range(RUNS))


def _timed(function: Callable[..., Any], args: Sequence[Any]) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def _bandwidth() -> float:
    """Bytes per second of reading 64 MiB, the best of three."""
    data = torch.ones(1 << 24)
    return data.numel() * 4 / min(_timed(data.sum, ()) for _ in range(3))
