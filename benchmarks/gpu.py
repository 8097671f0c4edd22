# SPDX-License-Identifier: Apache-2.0
"""Every kernel on a GPU, in one command: first whether it is right, then how fast it is against what one would use instead.

.venv/bin/python benchmarks/gpu.py                 # writes benchmarks/results/gpu_<device>.json, after every case
.venv/bin/python benchmarks/gpu.py --out FILE      # writes there instead
.venv/bin/python benchmarks/gpu.py --only shift    # the cases whose name the regular expression finds; needs --out to write
.venv/bin/python benchmarks/gpu.py --device cpu --small    # no kernels and no times: that the cases themselves are right
.venv/bin/python benchmarks/gpu.py --bounds        # needs no GPU: writes the table of least times into docs/kernels.md

How a case is checked and timed is said in `gpu_work/measure.py`. Cases run in a process beside this one: one that raises,
hangs or takes the GPU with it is recorded as failed, and the next is measured all the same. What is written before the
run is stopped stays; ``cases_left`` says what was not reached.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
from gpu_work.bounds import markdown
from gpu_work.cases import cases
from gpu_work.measure import BEGIN, RESULT, Result, peaks, sheet
from rich.console import Console
from rich.table import Table
from timing import machine

HERE = Path(__file__).resolve().parent
LIMIT = 180.0  # seconds without a word until a case counts as hanging


def results(names: Sequence[str], command: Sequence[str], limit: float) -> Iterator[Result]:
    """One result per name, in order, whatever happens to the processes that measure them.

    Args:
        names: of the cases.
        command: starts a process on the names it gets as JSON behind it; it prints what `gpu_work.measure` does.
        limit: seconds without a line after which a process is ended.
    """
    left = list(names)
    while left:
        process = subprocess.Popen([*command, json.dumps(left)], stdout=subprocess.PIPE, text=True, cwd=HERE)
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        begun, answered, why = False, False, ""
        while left and not why:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                why = f"no answer in {limit:.0f} s"
                break
            if line is None:
                why = f"its process ended with status {process.wait()}"
            elif line.startswith(BEGIN):
                begun = True
            elif line.startswith(RESULT):
                begun, answered = False, True
                left.pop(0)
                yield Result.read(json.loads(line.removeprefix(RESULT)))
        process.kill()
        process.wait()
        # One that ends between two cases, as after losing the GPU, has answered for the case that did it.
        if left and (begun or not answered):
            yield Result(left.pop(0), failed=why)


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def show(found: Sequence[Result], console: Console) -> None:
    table = Table("case", "runs", "error (eager's)", "ms", "with backward", "rivals", "GB/s", "TFLOP/s", "of roofline")
    for r in found:
        if r.failed:
            table.add_row(r.name, f"FAILED: {r.failed}")
            continue
        references = [f"{name}: {what}" for name, what in r.ran.items() if what != "kernel"]
        errors = f"{'' if r.right else 'WRONG '}{r.error:.2g} ({r.eager_error:.2g})"
        row = [r.name, "\n".join(references) or "kernels", errors]
        if r.times is None:
            table.add_row(*row, *["–"] * 6)
            continue
        own, seconds = r.times, r.times.forward / 1e3
        rivals = [
            f"{name} {_against(t.forward, own.forward)}; {_against(t.training, own.training)}"
            for name, t in r.rivals.items()
        ]
        rivals += [f"{name}: {why}" for name, why in r.absent.items()]
        share = f"{r.share:.0%} ({r.bound_by})"
        rates = f"{r.nbytes / seconds / 1e9:.0f}", f"{r.flops / seconds / 1e12:.1f}"
        table.add_row(*row, f"{own.forward:.3g}", _number(own.training), "\n".join(rivals), *rates, share)
    console.print(table)


def _against(rival: float | None, own: float | None) -> str:
    return _number(rival) + ("" if rival is None or own is None else f" ({rival / own:.2f} ×)")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def record(device: str, found: Sequence[Result], left: Sequence[str]) -> str:
    """What is written."""
    about = {"machine": machine("triton"), "device": device}
    if device != "cpu":
        bandwidth, flops = peaks()
        about["peaks"] = {
            "bytes_per_second": bandwidth,
            "flops": flops,
            "from": "data sheet" if sheet() else "measured",
        }
    measured = [{**asdict(r), "share": r.share} for r in found]
    return json.dumps({**about, "cases": measured, "cases_left": list(left)}, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="regular expression on the cases' names")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument(
        "--out", type=Path, help="file to write; without it, a whole run on a GPU writes beside the others"
    )
    parser.add_argument("--bounds", action="store_true", help="write the table of least times into docs/kernels.md")
    given = parser.parse_args()
    if given.bounds:
        from engine import insert  # and all the rivals of that benchmark with it

        insert(HERE.parent / "docs" / "kernels.md", "bounds", markdown())
        return 0
    console = Console(width=200)
    if given.device == "cuda" and not torch.cuda.is_available():
        console.print("no GPU here: nothing is measured, and nothing written")
        return 1
    names = [case.name for case in cases() if re.search(given.only, case.name)]
    device, out = "cpu", given.out
    if given.device == "cuda":
        device = torch.cuda.get_device_name()
        if out is None and not given.only and not given.small:
            out = HERE / "results" / f"gpu_{device.replace(' ', '_').lower()}.json"
    command = [sys.executable, "-m", "gpu_work.measure", given.device, "small" if given.small else "full"]
    found: list[Result] = []
    for result in results(names, command, LIMIT):
        found.append(result)
        word = result.failed or ("right" if result.right else "WRONG")
        console.print(f"{len(found)}/{len(names)} {result.name}: {word}", highlight=False, markup=False)
        if out is not None:
            out.write_text(record(device, found, names[len(found) :]))
    show(found, console)
    return 0 if all(r.right for r in found) else 1


if __name__ == "__main__":
    sys.exit(main())
