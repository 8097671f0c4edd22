# SPDX-License-Identifier: Apache-2.0
"""The long search for counterexamples to the matcher; writes docs/fuzz.md (`make fuzz`).

Each example is a random graph with a random pattern planted in it; the compiled matcher and the search behind it must
both give exactly the matches of a brute-force enumeration of the pattern language's written meaning
(tests/engine/laws). Examples are drawn in blocks, each from a seed of its own, so that a counterexample can be had again.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "engine"))

from laws.test_enumerator import Example, compiled, enumerated, examples, searched  # noqa: E402

BLOCK = 1000


@dataclass(frozen=True)
class Block:
    """What one block of examples came to."""

    number: int
    counts: Counter[str]
    counterexample: str
    seconds: float


def run_block(number: int, wanted: int) -> Block:
    """Run `wanted` examples from one seed, up to the first counterexample (which is then made as small as possible)."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    began = time.perf_counter()

    @seed(number)
    @settings(
        max_examples=wanted,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(examples())
    def check(example: Example) -> None:
        facts = example.made.facts()
        expected = enumerated(facts, example.pattern)
        counts.update(examples=1, nodes=len(example.made.graph.nodes), matches=len(expected))
        counts.update({"examples with a match": bool(expected), "of several outputs": len(example.pattern.outputs) > 1})
        counts.update({"looking through nodes": bool(example.pattern.transparent)})
        assert compiled(facts, example.pattern) == expected
        assert searched(facts, example.pattern) == expected

    try:
        check()
        failure = ""
    except Exception as error:
        failure = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return Block(number, counts, failure, time.perf_counter() - began)


def report(blocks: list[Block], wall: float, asked: argparse.Namespace, matcher: str) -> str:
    total: Counter[str] = Counter()
    for block in blocks:
        total.update(block.counts)
    failures = [block for block in blocks if block.counterexample]
    lines = [
        "# The long search for counterexamples",
        "",
        "Written by `make fuzz` (benchmarks/fuzz.py); see there for what is compared. Found counterexamples are kept as",
        "tests in tests/engine/laws/test_counterexamples.py.",
        "",
        "| | |",
        "|---|---|",
        f"| examples run | {total['examples']:,} of {asked.examples:,} |",
        f"| counterexamples | {len(failures)} |",
        f"| examples with a match | {total['examples with a match']:,} |",
        f"| matches compared | {total['matches']:,} |",
        f"| graph nodes | {total['nodes']:,} |",
        f"| patterns of several outputs | {total['of several outputs']:,} |",
        f"| patterns that look through nodes | {total['looking through nodes']:,} |",
        f"| seeds | {min(b.number for b in blocks)} to {max(b.number for b in blocks)}, {BLOCK:,} examples each |",
        f"| time | {wall / 60:.1f} min, {asked.workers} processes, {sum(b.seconds for b in blocks) / 60:.1f} min in all |",
        f"| when | {time.strftime('%Y-%m-%d', time.gmtime())} |",
        f"| versions | Python {platform.python_version()}, torch {torch.__version__}, hypothesis {hypothesis.__version__} |",
        f"| matcher | {matcher} |",
    ]
    for block in failures:
        lines += ["", f"Seed {block.number}:", "", "```text", block.counterexample, "```"]
    return "\n".join(lines) + "\n"


def sources() -> str:
    """A digest of the files that decide what matches."""
    names = ("compiled", "emitting", "expressions", "looking", "matcher", "pattern", "solver")
    text = b"".join((ROOT / "rewriter" / f"{name}.py").read_bytes() for name in names)
    return f"sha256 {hashlib.sha256(text).hexdigest()[:16]} of {', '.join(names)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of the first block")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "fuzz.md")
    asked = parser.parse_args()
    began, matcher = time.perf_counter(), sources()
    sizes = [min(BLOCK, asked.examples - start) for start in range(0, asked.examples, BLOCK)]
    blocks: list[Block] = []
    with ProcessPoolExecutor(asked.workers) as pool:
        for done in as_completed(pool.submit(run_block, asked.seed + i, size) for i, size in enumerate(sizes)):
            blocks.append(done.result())
            ran = sum(block.counts["examples"] for block in blocks)
            failed = sum(bool(block.counterexample) for block in blocks)
            text = report(sorted(blocks, key=lambda block: block.number), time.perf_counter() - began, asked, matcher)
            asked.out.write_text(text, encoding="utf-8")  # so that a run that is stopped leaves its record
            print(f"{ran:7,} examples, {failed} counterexamples, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(asked.out.read_text(encoding="utf-8"))
    return int(any(block.counterexample for block in blocks))


if __name__ == "__main__":
    sys.exit(main())
