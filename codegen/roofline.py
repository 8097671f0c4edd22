# SPDX-License-Identifier: Apache-2.0
"""The least time a chip could take for an operator's work: its bytes at the speed of memory, its operations at the peak.

    t ≥ max(bytes / bandwidth, FLOPs / peak)          (roofline: Williams, Waterman, Patterson, CACM 52(4), 2009)

A bound, not an estimate: launches, caches and imperfect kernels come on top.
"""

from __future__ import annotations

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
    """

    name: str
    target: str
    bandwidth: float
    flops: float


# Data sheets: NVIDIA A100 80GB SXM, H200 SXM, B200 (dense, without sparsity); AMD Instinct MI300X.
CHIPS = {
    chip.target: chip
    for chip in (
        Chip("A100", "sm_80", 2.04e12, 312e12),
        Chip("H200", "sm_90", 4.8e12, 989e12),
        Chip("B200", "sm_100", 8.0e12, 2250e12),
        Chip("MI300X", "gfx942", 5.3e12, 1307e12),
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
