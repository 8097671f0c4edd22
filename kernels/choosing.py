# SPDX-License-Identifier: Apache-2.0
"""Which of several ways a CPU operator takes: measured at the first call of its kind, then kept on disk.

The ways compute the same; which is faster depends on the processor, its caches and what torch was built with, so it is
not guessed. `tuning` does this for the configurations of Triton kernels.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from rewriter.kernels import cache as files

REPEATS = 3  # timed calls of each way after one that warms up; the fastest counts, others were disturbed
FILE = "cpu.json"

_lock = threading.Lock()


def fastest(kind: str, ways: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the way that was fastest for calls of this kind, measured now if it is not known.

    Args:
        kind: everything the choice depends on: operator and its build, dtypes, sizes (`bucket`), threads.
        ways: what to call for each; measuring calls all of them, so they must have no effects.
    """
    known = _known()
    if known.get(kind) not in ways:
        with _lock:
            if known.get(kind) not in ways:
                known[kind] = _measured(ways)
                _keep(kind, known[kind])
    return known[kind]


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


@cache
def _known() -> dict[str, str]:
    try:
        stored = files.read_json(files.folder("tuning") / FILE)
    except OSError:
        return {}  # no place to keep choices: each process measures its own
    return {kind: name for kind, name in stored.items() if isinstance(name, str)}


def _keep(kind: str, name: str) -> None:
    """Written with what other processes found meanwhile."""
    try:
        path = files.folder("tuning") / FILE
        files.write(path, json.dumps({**files.read_json(path), kind: name}, indent=1, sort_keys=True).encode())
    except OSError:
        return  # as above
