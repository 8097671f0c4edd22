# SPDX-License-Identifier: Apache-2.0
"""Which of several ways to compute the same is fastest: measured at the first call of its kind, then kept on disk.

It depends on the processor or GPU, its caches and what torch was built with, so it is not guessed. CPU operators choose
between ways here (`fastest`); `tuning` chooses between the configurations of a Triton kernel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rewriter.kernels import cache as files

REPEATS = 3  # timed calls of each way after one that warms up; the fastest counts, others were disturbed


class Choices:
    """What was chosen, by kind of call: in this process, and in a file that other processes and later ones read.

    A file that cannot be read counts as empty, and where none can be written every process measures for itself.

    Args:
        file: its name, in the cache folder ``tuning``.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._known: dict[str, str] | None = None

    def among(self, kind: str, names: Collection[str], measure: Callable[[], str]) -> str:
        """The one of ``names`` that was chosen for calls of this kind; measured now if none was."""
        known = self._read() if self._known is None else self._known
        chosen = known.get(kind)
        if chosen is not None and chosen in names:
            return chosen
        with self._lock:  # one thread measures, so that none disturbs another's clock
            if known.get(kind) not in names:
                known[kind] = measure()
                self._keep(kind, known[kind])
        return known[kind]

    def knows(self, kind: str, names: Collection[str]) -> bool:
        """Whether nothing would be measured."""
        return (self._read() if self._known is None else self._known).get(kind) in names

    def forget(self) -> None:
        """What is in memory; the file is read again when it is needed."""
        self._known = None

    def _read(self) -> dict[str, str]:
        try:
            stored = files.read_json(files.folder("tuning") / self.file)
        except OSError:
            stored = {}
        self._known = {kind: name for kind, name in stored.items() if isinstance(name, str)}
        return self._known

    def _keep(self, kind: str, name: str) -> None:
        try:
            files.merge_json(files.folder("tuning") / self.file, {kind: name})
        except OSError:
            return  # no place to keep it


CPU = Choices("cpu.json")


def fastest(kind: str, ways: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the way that was fastest for calls of this kind, measured now if it is not known.

    Args:
        kind: everything the choice depends on: operator and its build, dtypes, sizes (`bucket`), threads.
        ways: what to call for each; measuring calls all of them, so they must have no effects.
    """
    return CPU.among(kind, ways, lambda: _measured(ways))


def bucket(size: int) -> int:
    """``size`` rounded up to a power of two, so that a growing batch is not measured at every size."""
    return 1 << max(size - 1, 0).bit_length()


def _measured(ways: Mapping[str, Callable[[], Any]]) -> str:
    times = {name: float("inf") for name in ways}
    for turn in range(REPEATS + 1):
        for name, way in ways.items():  # in turns: a disturbance meets all of them
            begin = time.perf_counter()
            way()
            if turn:
                times[name] = min(times[name], time.perf_counter() - begin)
    return min(times, key=lambda name: times[name])
