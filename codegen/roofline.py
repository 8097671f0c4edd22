# SPDX-License-Identifier: Apache-2.0
"""The least time a chip could take for an operator's work: its bytes at the speed of memory, its operations at the peak.

    t ≥ max(bytes / bandwidth, FLOPs / peak)          (roofline: Williams, Waterman, Patterson, CACM 52(4), 2009)

A bound, not an estimate: launches, caches and imperfect kernels come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewriter.kernels.spec import Cost


@dataclass(frozen=True)
class Chip:
    """Peaks of a device.

    Attributes:
        name: as people call it.
        target: what is compiled for it (`ahead_of_time.TARGETS`).
        bandwidth: bytes per second of its memory.
        flops: dense bfloat16 operations per second of its matrix units, float32 accumulation.
        units: streaming multiprocessors, or compute units.
    """

    name: str
    target: str
    bandwidth: float
    flops: float
    units: int


# Data sheets: NVIDIA A100 80GB SXM, H200 SXM, B200 (dense, without sparsity); AMD Instinct MI300X.
CHIPS = {
    chip.target: chip
    for chip in (
        Chip("A100", "sm_80", 2.04e12, 312e12, 108),
        Chip("H200", "sm_90", 4.8e12, 989e12, 132),
        Chip("B200", "sm_100", 8.0e12, 2250e12, 148),
        Chip("MI300X", "gfx942", 5.3e12, 1307e12, 304),
    )
}


@dataclass(frozen=True)
class Bound:
    """The least time, in seconds, and which of the two makes it: "memory" or "compute"."""

    seconds: float
    by: str


def bound(cost: Cost, bandwidth: float, flops: float) -> Bound:
    """Of this work on a device with these peaks."""
    memory, compute = (cost.bytes_read + cost.bytes_written) / bandwidth, cost.flops / flops
    return Bound(memory, "memory") if memory >= compute else Bound(compute, "compute")


def predicted(seconds: float, kernels: Sequence[tuple[int, int]], chip: Chip) -> float:
    """What whole programs make of a bound: they are dealt to the chip's units, and the last round may leave some idle.

        t = bound · Σ_k share_k · ⌈P_k / U⌉ · U / P_k

    for kernels of P_k equal programs on U units, of which each has its part of the bandwidth and of the peak. A site's
    work is shared among its kernels by the bytes they are given. Not in it: the time to start a kernel, latencies that
    too few warps leave unhidden, caches. It tells where a grid is too small for a chip, and is no measurement.

    Args:
        seconds: the bound.
        kernels: programs and bytes of each.
    """
    total = sum(size for _, size in kernels)
    if not total:
        return seconds
    return sum(
        seconds * size / total * -(-programs // chip.units) * chip.units / programs for programs, size in kernels
    )
