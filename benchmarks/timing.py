# SPDX-License-Identifier: Apache-2.0
"""Timing several ways of one piece of work against each other, so that only ratios count.

All sides take turns within one run, each for a while at least as long as the clock is noisy. The figure of a side is the
median over the turns; a side whose quartiles are further apart than 1.5 is measured again, and marked if it stays so.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

RUNS = 9  # turns, at least 7
TURN = 0.02  # seconds a turn takes at least
SPREAD = 1.5  # p75 / p25 above which a median is not believed
STREAM = 256 << 20  # bytes whose reading says how fast memory is

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one side: median and quartiles over the turns. ``noisy`` if they disagree twice."""

    median: float
    low: float
    high: float

    @property
    def noisy(self) -> bool:
        return self.high > SPREAD * self.low


def interleaved(sides: Mapping[str, Call], *, runs: int = RUNS) -> dict[str, Timing]:
    """Time every side in turns."""
    timings = _measure(sides, runs)
    again = {name: call for name, call in sides.items() if timings[name].noisy}
    if again:  # all of them, so that the sides are still measured side by side
        timings = _measure(sides, 2 * runs)
    return timings


def _measure(sides: Mapping[str, Call], runs: int) -> dict[str, Timing]:
    calls = {name: _calls(side) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    for _ in range(runs):
        for name, side in sides.items():
            side()  # the caches hold what this side uses, not what the one before used
            start = time.perf_counter()
            for _ in range(calls[name]):
                side()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: _timing(times) for name, times in seconds.items()}


def _calls(side: Call) -> int:
    """How many calls fill a turn; the first ones, which allocate and choose, do not count."""
    for _ in range(2):
        start = time.perf_counter()
        side()
        once = time.perf_counter() - start
    return max(1, round(TURN / max(once, 1e-7)))


def _timing(times: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high)


def bandwidth(threads: int) -> float:
    """Bytes per second of reading memory that is in no cache, by a sum over 256 MiB: the best of five."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(STREAM // 4)
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            data.sum()
            best = max(best, STREAM / (time.perf_counter() - start))
        return best
    finally:
        torch.set_num_threads(before)


def machine(*packages: str) -> str:
    """One line: processor, cores and how busy they were, versions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    busy = f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f})"
    versions = [f"{name} {version(name)}" for name in ("torch", *packages)]
    return " · ".join(
        [names[0] if names else platform.machine(), busy, f"Python {platform.python_version()}", *versions]
    )
