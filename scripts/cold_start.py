# SPDX-License-Identifier: Apache-2.0
"""How long a saved model waits before its first call on a GPU: emitting, compiling, tuning.

.venv/bin/rewriter optimize examples/tiny_lm -p fuse,shift_add,vq_logits --save out/model
.venv/bin/python scripts/cold_start.py out/model --target sm_90

Files are emitted into an empty folder and kernels compiled with an empty cache, in this process, one after another, for
a GPU that need not be there. Tuning takes a device; what it takes at least follows from how long it times each
configuration. What is counted is the saved call, its sizes those of the example.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import rewriter
from rewriter.codegen.ahead_of_time import TARGETS, Target, built
from rewriter.codegen.calls import calls
from rewriter.codegen.emitting import emit
from rewriter.codegen.implementations import requests_of
from rewriter.kernels import tuning
from rewriter.kernels.launching import Config, Request

Value = TypeVar("Value")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that rewriter optimize --save wrote")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    given = parser.parse_args()
    chip = TARGETS[given.target]
    program = rewriter.load(given.model).program
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        emission, cold = timed(lambda: emit(program, folder=Path(folder)))
        _, warm = timed(lambda: emit(program, folder=Path(folder)))
        sites = {site.node: site for site in emission.sites}
        found = [r for call in calls(emission.program) for r in requests_of(call, sites.get(call.node.name))]
        kernels = list({tuning.key(r, chip.gpu.backend): r for r in found}.values())
        starts = [(request, config) for request in kernels for config in request.choices(chip.gpu.backend)]
        chosen = [(request, request.choices(chip.gpu.backend)[0]) for request in kernels]
        _, first = timed(lambda: compiled(chosen, chip))
        _, rest = timed(lambda: compiled(starts, chip))
        _, again = timed(lambda: compiled(starts, chip))
    files = len({site.emitted.path for site in emission.sites})
    tuned = sum(len(r.choices(chip.gpu.backend)) for r in kernels if len(r.choices(chip.gpu.backend)) > 1)
    print(f"| step, {given.target} | of what | first | again |")
    print("|---|---|---|---|")
    print(f"| emit | {len(sites)} sites, {files} files | {cold:.2f} s | {warm:.2f} s |")
    print(f"| compile what runs first | {len(chosen)} kernels | {first:.2f} s | |")
    others = len(starts) - len(chosen)
    print(f"| compile what is tuned besides | {others} configurations | {rest:.2f} s | {again:.2f} s |")
    least = tuned * (tuning.WARMUP + tuning.REPEAT) / 1e3
    print(f"| tune, on the device | {tuned} configurations, at least | {least:.2f} s | 0 |")


def timed(call: Callable[[], Value]) -> tuple[Value, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def compiled(starts: Sequence[tuple[Request, Config]], chip: Target) -> None:
    for request, config in starts:
        built(request.start(config), chip)


if __name__ == "__main__":
    main()
