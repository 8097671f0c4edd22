# SPDX-License-Identifier: Apache-2.0
"""Lowering: the program that runs on a device in place of a rewritten one, and which code runs at each of its sites.

    capture → match → plan → apply → verify → lower

For a GPU the code generator fuses pointwise neighbours into the operators' kernels; the result is what an `Optimized`
runs there. The rewritten program itself stays what is saved, exported, compared and undone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from rewriter.codegen.calls import Call, calls
from rewriter.codegen.emitting import Emission, EmittedSite, emit
from rewriter.codegen.sources import file_of
from rewriter.errors import PlanError
from rewriter.kernels.emitted.loading import LOADED
from rewriter.kernels.launching import Unsupported, recorded
from rewriter.program import Program
from rewriter.reports import SiteCode

GPUS = ("cuda", "hip")


@dataclass(frozen=True)
class Lowered:
    """A program as it runs on a device.

    Attributes:
        device: "cpu", "cuda", "hip".
        program: what is run; on the CPU the rewritten one.
        emission: what was emitted for a GPU.
    """

    device: str
    program: Program
    emission: Emission | None

    def moved(self, program: Program, root: nn.Module) -> Lowered:
        """The same on a copy of the rewritten program and another store."""
        return replace(self, program=program if self.emission is None else self.program.fork(root))

    def code(self) -> tuple[SiteCode, ...]:
        """What runs at every site for sizes like those of the example, in graph order.

        GPU code is asked with tensors without data; native code is called, and built if it was not.
        """
        emitted = {site.node: site for site in self.emission.sites} if self.emission else {}
        misses = {miss.site: miss.reason for miss in self.emission.misses} if self.emission else {}
        return tuple(
            _emitted(emitted[call.node.name])
            if call.node.target in LOADED
            else _registered(call, self.device, misses.get(call.site, ""))
            for call in calls(self.program)
        )


def lower(program: Program, device: str) -> Lowered:
    """For a device. Programs in training mode stay as they are: the gradient of a fused region computes it once more.

    Args:
        program: rewritten; not changed.
        device: "cuda", "hip", or another type of torch's.

    Raises:
        PlanError: it is lowered already, or the cache folder, where emitted files are kept, cannot be written.
    """
    if any(node.target in LOADED for node in program.graph.nodes):
        raise PlanError("this program is lowered already; give the rewritten one (Optimized.program)")
    if device not in GPUS or program.training:
        return Lowered(device, program, None)
    try:
        emission = emit(program)
    except OSError as error:
        raise PlanError(
            f"emitted kernels cannot be kept: {error}; name another cache folder in the environment variable REWRITER_CACHE"
        ) from error
    return Lowered(device, emission.program, emission)


def run_on(call: Call, device: str) -> str:
    """The file of the code that would run a call of a registered operator on a device.

    Raises:
        Unsupported: its aten reference would run.
    """
    on = "cpu" if device == "cpu" else "meta"
    function = call.spec.implementation("cuda" if device in GPUS else device)
    with recorded() as requests, torch.no_grad():
        function(*call.arguments(on))
    return ", ".join(dict.fromkeys(file_of(request.kernel.fn) for request in requests)) or file_of(function)


def _registered(call: Call, device: str, miss: str) -> SiteCode:
    spec = call.spec
    try:
        source = run_on(call, device)
    except Unsupported as reason:
        return SiteCode(call.site, spec.name, "reference", file_of(spec.reference), (), str(reason))
    return SiteCode(call.site, spec.name, "native" if device == "cpu" else "Triton", source, (), miss)


def _emitted(site: EmittedSite) -> SiteCode:
    try:
        site.requests()
    except Unsupported as reason:
        where = file_of(site.emitted.module.reference)
        return SiteCode(site.path, site.name, "reference", where, site.fused, str(reason))
    return SiteCode(site.path, site.name, "emitted", f"emitted/{site.emitted.path.name}", site.fused, site.until)
