# SPDX-License-Identifier: Apache-2.0
"""What the rewritten operators win on this processor, side by side with what they replace, at 1 and 2 threads.

.venv/bin/python benchmarks/cpu.py                  # everything; writes benchmarks/results/cpu.json and docs/benchmarks_cpu.md
.venv/bin/python benchmarks/cpu.py --only "tiers"   # only the rows whose name the regular expression finds, the others stay
.venv/bin/python benchmarks/cpu.py --read           # the page from the stored results

Sides take turns within one run (`timing`), inputs and weights rotate. Only ratios count.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cpu_work import attention, heads, layers, model
from cpu_work.memory import loss_memory
from cpu_work.peak import peak
from cpu_work.work import OURS, Work
from rich.console import Console
from rich.table import Table
from timing import Timing, bandwidth, interleaved, machine

from rewriter.layout import duration

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
PAGE = ROOT / "docs" / "benchmarks_cpu.md"
THREADS = (2, 1)
NOISY = "~"


@dataclass(frozen=True)
class Row:
    """One rival of one piece of work at one number of threads.

    Attributes:
        ours, theirs: seconds, per unit of work.
        ratio: theirs over ours; against "speed of memory" and "of arithmetic" the share of it.
        asked: what the ratio should be; None where nothing is asked.
        bound: what the ratio would be at the speed of memory; None where memory is not what bounds it.
        noisy: a side's quartiles were more than 1.5 apart, twice.
    """

    group: str
    name: str
    threads: int
    rival: str
    ours: float
    theirs: float
    ratio: float
    asked: float | None
    bound: float | None
    noisy: bool

    @property
    def holds(self) -> bool | None:
        return None if self.asked is None else self.ratio >= self.asked


@dataclass(frozen=True)
class Site:
    """Seconds that modules of one kind take in a program and in the rewritten one."""

    path: str
    original: float
    rewritten: float


@dataclass(frozen=True)
class Results:
    machine: str
    bandwidth: dict[str, float]
    rows: tuple[Row, ...]
    sites: tuple[Site, ...] = ()  # of the model in `cpu_work.model`


def measure(only: str, console: Console) -> Results:
    """Time every piece of work whose heading and name the expression finds."""
    torch.manual_seed(0)
    speed = {threads: bandwidth(threads) for threads in THREADS}
    rows: list[Row] = []
    for work in works():
        if not re.search(only, f"{work.group}: {work.name}"):
            continue
        sides = work.sides()
        for threads in THREADS:
            torch.set_num_threads(threads)
            with torch.no_grad() if "backward" not in work.name else torch.enable_grad():
                found = list(_rows(work, threads, interleaved(sides), speed[threads]))
            rows += found
            for row in found:
                console.print(" · ".join(_cells(row)), markup=False, highlight=False)
        del sides
        gc.collect()
    if re.search(only, "loss: peak memory"):
        rows.append(_memory())
    sites: tuple[Site, ...] = ()
    if re.search(only, "tiny_lm: sites"):
        torch.set_num_threads(THREADS[0])
        sites = tuple(Site(path, 1e-3 * original, 1e-3 * rewritten) for path, original, rewritten in model.by_site())
    return Results(machine(), {str(t): s for t, s in speed.items()}, tuple(rows), sites)


def works() -> Iterator[Work]:
    for family in (heads, attention, layers, model):
        yield from family.works()


def _rows(work: Work, threads: int, timings: dict[str, Timing], speed: float) -> Iterator[Row]:
    per_unit = {name: timing.median / work.units.get(name, 1) for name, timing in timings.items()}
    ours, at_bound = per_unit[OURS], work.nbytes / speed
    if work.share:
        share, noisy = at_bound / ours, timings[OURS].noisy
        yield Row(work.group, work.name, threads, "speed of memory", ours, at_bound, share, work.share, None, noisy)
        if work.flops and (most := peak(threads, work.dtype)):
            least = work.flops / most
            share = least / ours
            yield Row(work.group, work.name, threads, "speed of arithmetic", ours, least, share, None, None, noisy)
    for name, theirs in per_unit.items():
        if name == OURS:
            continue
        noisy = timings[OURS].noisy or timings[name].noisy
        bound = theirs / at_bound if at_bound else None
        asked = work.at_least.get(name)
        yield Row(work.group, work.name, threads, name, ours, theirs, theirs / ours, asked, bound, noisy)


def _memory() -> Row:
    """Peak memory of the loss with its gradients, not time: bytes over the inputs, in processes of their own."""
    fused, unfused = loss_memory()
    name = "peak memory above the inputs, linear + cross entropy, forward + backward (bytes)"
    return Row("loss", name, 1, "unfused", fused, unfused, unfused / fused, 1 / 0.15, None, False)


# -- showing ------------------------------------------------------------------------------------------------------

HEADS = ("work", "threads", "against", "theirs", "ours", "ratio", "asked", "at the bound", "holds")


def _cells(row: Row) -> tuple[str, ...]:
    unit = _bytes if "bytes" in row.name else duration
    return (
        f"{row.group}: {row.name}",
        str(row.threads),
        row.rival,
        unit(row.theirs),
        unit(row.ours),
        f"{row.ratio:.3g} ×{' ' + NOISY if row.noisy else ''}",
        "–" if row.asked is None else f"{row.asked:.3g} ×",
        "–" if row.bound is None else f"{row.bound:.3g} ×",
        {None: "–", True: "yes", False: "**no**"}[row.holds],
    )


def _bytes(count: float) -> str:
    return f"{count / 2**20:.4g} MiB"


def show(results: Results, console: Console) -> None:
    table = Table(title=results.machine, title_justify="left")
    for head in HEADS:
        table.add_column(head)
    for row in results.rows:
        table.add_row(*(cell.strip("*") for cell in _cells(row)))
    console.print(table)


def page(results: Results) -> str:
    """docs/benchmarks_cpu.md."""
    missed = sum(row.holds is False for row in results.rows)
    asked = sum(row.holds is not None for row in results.rows)
    lines = [
        "# Benchmarks on the CPU",
        "",
        "Made by `benchmarks/cpu.py`; the sides of a row took turns within one run. *Theirs* and *ours* are medians per call",
        "(per token where lengths differ). The ratio is theirs over ours; *at the bound* is what it would be if ours took",
        "only the time to read and write its bytes once. Against *speed of memory* stands that time, against *speed of",
        "arithmetic* the time of its operations if all were multiply-adds in registers. "
        f"{NOISY}: quartiles more than 1.5 apart, twice.",
        "",
        f"Machine: {results.machine}. Memory read by a sum over 256 MiB: "
        + ", ".join(f"{speed / 1e9:.3g} GB/s at {t} thread{'s' * (t != '1')}" for t, speed in results.bandwidth.items())
        + ".",
        "",
        f"{asked - missed} of {asked} rows with a target hold.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|" + " --- |" * len(HEADS),
        *("| " + " | ".join(_cells(row)) + " |" for row in results.rows),
        *_sites(results.sites),
    ]
    return "\n".join(lines) + "\n"


def _sites(sites: Sequence[Site]) -> Iterator[str]:
    """The section on where a rewritten model wins and loses."""
    if not sites:
        return
    total = Site("all", sum(s.original for s in sites), sum(s.rewritten for s in sites))
    yield from (
        "",
        f"## Where tiny_lm wins and loses: {model.LENGTH} tokens",
        "",
        f"{THREADS[0]} threads; modules of equal layers together (`*`), each operator timed by itself, so that the sum is more",
        "than a call takes. The original runs eagerly.",
        "",
        "| modules | original | rewritten | ratio |",
        "| --- | --- | --- | --- |",
    )
    for site in (*sites, total):
        ratio = f"{site.original / site.rewritten:.3g} ×" if site.original and site.rewritten else "–"
        times = (duration(seconds) if seconds else "–" for seconds in (site.original, site.rewritten))
        name = "all" if site is total else f"`{site.path}`" if site.path else "the model itself"
        yield f"| {' | '.join((name, *times, ratio))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="regular expression on the rows' names")
    parser.add_argument("--read", action="store_true", help="measure nothing; write the page from the stored results")
    given = parser.parse_args(arguments)
    console = Console(width=180)
    results = stored() if given.read else measure(given.only, console)
    if given.only:
        results = merged(stored(), results)
    show(results, console)
    RESULTS.write_text(json.dumps(asdict(results), indent=1) + "\n")
    PAGE.write_text(page(results))


def stored() -> Results:
    if not RESULTS.exists():
        return Results("", {}, ())
    data = json.loads(RESULTS.read_text())
    rows, sites = (Row(**row) for row in data["rows"]), (Site(**site) for site in data.get("sites", ()))
    return Results(data["machine"], data["bandwidth"], tuple(rows), tuple(sites))


def merged(old: Results, new: Results) -> Results:
    """The new rows in place of the old ones of the same work, in the order of the works."""
    rows = {(r.group, r.name, r.threads, r.rival): r for r in (*old.rows, *new.rows)}
    order = {(work.group, work.name): position for position, work in enumerate(works())}
    ordered = sorted(rows.values(), key=lambda row: order.get((row.group, row.name), len(order)))
    return Results(new.machine, new.bandwidth, tuple(ordered), new.sites or old.sites)


if __name__ == "__main__":
    main()
