# SPDX-License-Identifier: Apache-2.0
"""Matching and rewriting, side by side in one run: this engine, torch.fx, Inductor, onnxscript.

.venv/bin/python benchmarks/engine.py           # the figures of docs/benchmarks.md and docs/matching.md, 15 minutes
.venv/bin/python benchmarks/engine.py --sizes 100 --runs 1 --out /tmp/engine.json --no-docs

Every side is a process of its own and they take turns, so that a slow minute of the machine meets all of them. A task
that takes more than a minute is stopped, and not tried on larger graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rivals import workload
from rivals.worker import SIDES, Sample, Stopped, Worker
from timing import machine

from rewriter.layout import duration
from rewriter.rendering import table

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60.0  # seconds after which a task is stopped
PATIENCE = 25.0  # seconds after which a cell is not measured again
LARGE = 100_000  # nodes from which dead rules are not measured: minutes for every side but ours
MATCHERS = ("rewriter", "torch.fx", "Inductor", "onnxscript")
SMALL = 40  # nodes of the graph whose outputs are compared as well: an error fades along a longer chain
OURS = "rewriter"
DEAD = len(workload.ABSENT)


@dataclass(frozen=True)
class Cell:
    """One side on one task and size: medians in seconds; no seconds where it was stopped.

    ``edited`` is what is left without recompiling.
    """

    task: str
    nodes: int
    side: str
    seconds: float | None
    edited: float | None = None
    wall: float | None = None
    runs: int = 0
    spread: float = 0.0  # largest over smallest run


@dataclass(frozen=True)
class Results:
    machine: str
    sizes: tuple[int, ...]
    cells: tuple[Cell, ...]

    def cell(self, task: str, nodes: int, side: str) -> Cell | None:
        return next((c for c in self.cells if (c.task, c.nodes, c.side) == (task, nodes, side)), None)

    def seconds(self, task: str, nodes: int, side: str = OURS, edited: bool = False) -> float | None:
        cell = self.cell(task, nodes, side)
        return None if cell is None else cell.edited if edited else cell.seconds


# ---------------------------------------------------------------------------------------------------------- measuring


def check(workers: dict[str, Worker], largest: int) -> None:
    """Every side finds every hit and nothing else, and its outputs after rewriting are NumPy's."""
    for nodes in (SMALL, min(1000, largest)):
        hits = nodes // workload.PER_HIT
        wanted = workload.expected(nodes)
        for side, worker in workers.items():
            worker.ask("prepare", nodes)
            counts = [worker.ask("match", dead).result for dead in (0, DEAD)] + [worker.ask("rewrite").result]
            assert counts == [hits] * 3, f"{side}: {counts} matches of {hits} in {nodes} nodes"
            assert worker.ask("match", 0).result == 0, f"{side}: matches are left after rewriting"
            np.testing.assert_allclose(worker.ask("run").result, wanted, rtol=1e-12, err_msg=side)


def measure(workers: dict[str, Worker], sizes: Sequence[int], runs: int, log: Console) -> Iterator[Cell]:
    stopped: set[tuple[str, str]] = set()
    for nodes in sizes:
        for task, sides in _tasks(tuple(workers), dead=nodes < LARGE):
            samples: dict[str, list[Sample]] = {side: [] for side in sides}
            for turn in range(runs):
                for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                    if (task, side) in stopped or sum(s.seconds for s in samples[side]) > PATIENCE:
                        continue
                    try:
                        samples[side].append(_once(workers[side], task, nodes, fresh=turn == 0))
                    except Stopped as error:
                        # Whoever cannot match a graph in time cannot match and rewrite it either.
                        stopped |= {(task, side)} | ({("rewrite", side)} if task == "match" else set())
                        log.print(str(error), style="yellow")
            for side in sides:
                cell = _cell(task, nodes, side, samples[side])
                shown = "stopped" if cell.seconds is None else f"{cell.seconds:.4f} s ({cell.runs} runs)"
                log.print(f"{nodes:>7} nodes  {task:<11} {side:<32} {shown}", style="dim")
                yield cell


def _tasks(sides: tuple[str, ...], dead: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    matchers = tuple(side for side in sides if side in MATCHERS)
    yield "match", matchers
    if dead:
        yield "dead rules", matchers
    yield "rewrite", sides


def _once(worker: Worker, task: str, nodes: int, fresh: bool) -> Sample:
    if fresh or task == "rewrite":
        worker.ask("prepare", nodes)
    sample = worker.ask("rewrite", limit=LIMIT) if task == "rewrite" else worker.ask("match", _dead(task), limit=LIMIT)
    if sample.result != nodes // workload.PER_HIT:
        raise AssertionError(f"{worker.side}: {sample.result} matches in {nodes} nodes")
    if task == "rewrite" and worker.side != "onnxscript" and not sample.recompiling:
        raise AssertionError(f"{worker.side}: nothing was recompiled")  # compiling later would not be counted
    return sample


def _dead(task: str) -> int:
    return DEAD if task == "dead rules" else 0


def _cell(task: str, nodes: int, side: str, samples: Sequence[Sample]) -> Cell:
    if not samples:
        return Cell(task, nodes, side, None)
    taken = [s.seconds for s in samples]
    return Cell(
        task,
        nodes,
        side,
        statistics.median(taken),
        statistics.median(s.seconds - s.recompiling for s in samples),
        statistics.median(s.wall for s in samples),
        len(samples),
        max(taken) / min(taken),
    )


# ------------------------------------------------------------------------------------------------------------ showing


@dataclass(frozen=True)
class Target:
    """One line of what the engine has to reach."""

    words: str
    wanted: str
    value: float | None
    holds: bool | None


def targets(results: Results) -> list[Target]:
    middle, largest = results.sizes[min(1, len(results.sizes) - 1)], results.sizes[-1]
    at = f"at {middle:,} nodes"

    def faster(words: str, rival: str, task: str, least: float, edited: bool = False) -> Target:
        ratio = over(results.seconds(task, middle, rival, edited), results.seconds(task, middle, OURS, edited))
        return Target(words, f"≥ {least:g} ×", ratio, None if ratio is None else ratio >= least)

    def growth(task: str) -> Target:
        ratio = over(results.seconds(task, largest), results.seconds(task, middle))
        return Target(
            f"{task}, {middle:,} → {largest:,} nodes", "≤ 12 ×", ratio, None if ratio is None else ratio <= 12
        )

    dead = over(results.seconds("dead rules", middle), results.seconds("match", middle))
    return [
        faster(f"matching {at} against Inductor", "Inductor", "match", 3),
        faster(f"matching {at} against SubgraphMatcher", "torch.fx", "match", 50),
        faster(f"match and rewrite {at} against replace_pattern", "torch.fx", "rewrite", 4),
        faster("the same, recompiling left out on both sides", "torch.fx", "rewrite", 4, edited=True),
        growth("match"),
        growth("rewrite"),
        Target(
            f"matching {at} with {DEAD} more rules that match nothing",
            "≤ 1.1 ×",
            dead,
            None if dead is None else dead <= 1.1,
        ),
    ]


def over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def rows(results: Results) -> Iterator[tuple[str, ...]]:
    """Task and side, then time and ratio to ours for each size."""
    for task, edited, title in (
        ("match", False, "match"),
        ("dead rules", False, f"match, {DEAD} dead rules more"),
        ("rewrite", False, "match + rewrite + recompile"),
        ("rewrite", True, "match + rewrite"),
    ):
        for side in SIDES:
            if any(results.cell(task, nodes, side) for nodes in results.sizes):
                yield title, side, *(_shown(results, task, nodes, side, edited) for nodes in results.sizes)


def _shown(results: Results, task: str, nodes: int, side: str, edited: bool) -> str:
    cell = results.cell(task, nodes, side)
    taken = results.seconds(task, nodes, side, edited)
    if cell is None:
        return "–"
    if taken is None:
        return f"stopped (> {LIMIT:g} s)"
    ratio = over(taken, results.seconds(task, nodes, OURS, edited))
    return duration(taken) + (f" ({ratio:.3g} ×)" if ratio is not None and side != OURS else "")


def verdict(target: Target) -> tuple[str, str, str, str]:
    value = "–" if target.value is None else f"{target.value:.3g} ×"
    return target.words, target.wanted, value, {True: "yes", False: "no", None: "not measured"}[target.holds]


def heads(results: Results) -> tuple[str, ...]:
    return "task", "side", *(f"{nodes:,} nodes" for nodes in results.sizes)


def show(results: Results, console: Console) -> None:
    sized = heads(results)
    measured = table(*sized, right=sized[2:])
    for row in rows(results):
        measured.add_row(*row)
    wanted = table("target", "wanted", "measured", "holds", right=("measured",))
    for target in targets(results):
        wanted.add_row(*verdict(target))
    console.print(results.machine, measured, wanted)


def markdown(results: Results) -> str:
    def lines(head: Sequence[str], body: Iterator[tuple[str, ...]]) -> list[str]:
        return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]

    ours = results.seconds("match", results.sizes[min(1, len(results.sizes) - 1)])
    hits = results.sizes[min(1, len(results.sizes) - 1)] // workload.PER_HIT
    each = "" if ours is None else f" One match costs {1e6 * ours / hits:.2g} µs at {10 * hits:,} nodes."
    return "\n".join(
        [
            f"Machine: {results.machine}. Medians of processor time, one thread; in brackets the ratio to `rewriter`.{each}",
            "",
            *lines(heads(results), rows(results)),
            "",
            *lines(("target", "wanted", "measured", "holds"), (verdict(t) for t in targets(results))),
        ]
    )


def summary(results: Results) -> str:
    """The figures of docs/matching.md."""
    middle, largest = results.sizes[min(1, len(results.sizes) - 1)], results.sizes[-1]
    hits = middle // workload.PER_HIT
    lines = [f"{hits:,} sites and twice as many near misses in {middle:,} nodes ({results.machine}):", ""]
    for side in MATCHERS:
        taken = [results.seconds(task, middle, side) for task in ("match", "dead rules", "rewrite")]
        match, dead, rewrite = ("stopped" if seconds is None else duration(seconds) for seconds in taken)
        each = "" if taken[0] is None else f" ({1e6 * taken[0] / hits:,.0f} µs a site)"
        lines.append(
            f"- {side}: matches in {match}{each}, with {DEAD} more rules that match nothing in {dead}; "
            f"matches, rewrites and recompiles in {rewrite}"
        )
    grown = [over(results.seconds(task, largest), results.seconds(task, middle)) for task in ("match", "rewrite")]
    if None not in grown:
        lines += [
            "",
            f"From {middle:,} to {largest:,} nodes our matching takes {grown[0]:.3g} times as long, rewriting {grown[1]:.3g} times.",
        ]
    return "\n".join(lines)


def insert(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the page's markers ``<!-- name -->`` and ``<!-- /name -->``. Raises ValueError without them."""
    before, start, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise ValueError(f"{page} has no <!-- {name} --> … <!-- /{name} -->")
    page.write_text(f"{before}{start}{text}\n{end}{after}")


def write(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def read(path: Path) -> Results:
    data: dict[str, Any] = json.loads(path.read_text())
    return Results(data["machine"], tuple(data["sizes"]), tuple(Cell(**cell) for cell in data["cells"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="nodes of the graphs")
    parser.add_argument("--runs", type=int, default=5, help="runs per cell, of which the median counts")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine.json")
    parser.add_argument(
        "--docs", action=argparse.BooleanOptionalAction, default=True, help="write the figures into docs/"
    )
    parser.add_argument("--read", action="store_true", help="measure nothing; show and write what --out holds")
    given = parser.parse_args()
    console = Console(width=150)
    results = read(given.out) if given.read else measured(given.sides, given.sizes, given.runs, console)
    show(results, console)
    if not given.read:
        write(results, given.out)
    if given.docs:
        insert(ROOT / "docs" / "benchmarks.md", "engine", markdown(results))
        insert(ROOT / "docs" / "matching.md", "figures", summary(results))


def measured(sides: Sequence[str], sizes: Sequence[int], runs: int, console: Console) -> Results:
    """Check every side, then measure all of them."""
    workers = {side: Worker(side) for side in sides}
    try:
        check(workers, max(sizes))
        return Results(machine("onnxscript"), tuple(sizes), tuple(measure(workers, sizes, runs, console)))
    finally:
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
