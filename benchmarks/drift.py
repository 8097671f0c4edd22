# SPDX-License-Identifier: Apache-2.0
"""The drift matrix: the zoo's counts under three releases of transformers, in throw-away environments; docs/drift.md.

.venv/bin/python benchmarks/drift.py [RELEASE ...]

Each release is installed beside the environment's other packages, together with those of its dependencies that the
environment has in a version it does not accept; torch and the rewriter are the same in all. Patterns that silently stop
matching when a library is updated are what this page is for: a count that differs from what the configuration implies is
listed with the reason `explain` gives.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "drift.md"
RELEASES = ("4.57.6", "5.10.4", "5.23.0")  # the last of the fourth series, one between, and the pinned one

INTRODUCTION = """# Drift

Written by `benchmarks/drift.py`. The zoo's models ([zoo.md](zoo.md)), built and captured under several releases of
transformers with the same torch: sites the views find over sites the configuration implies. One number stands for both
implementations of attention where they agree, else sdpa, then eager. **Bold** is drift: not what the configuration
implies, which is counted for the pinned release; – is a model that cannot be captured at all. The reasons are below the
tables, those of a count that is too small as `explain` gives them.
"""


@dataclass(frozen=True)
class Entry:
    """One architecture under one release: counts per implementation of attention, or why there are none.

    Attributes:
        implied: column -> what the configuration implies.
        found: implementation -> column -> what the views find.
        reasons: for every count that is off, the nearest miss; or the error.
    """

    implied: Mapping[str, int] = field(default_factory=dict)
    found: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def cell(self, column: str) -> str:
        """E.g. ``15/15``, or ``**8, 0/8**`` where sdpa has 8 and eager none."""
        if not self.found:
            return "–"
        counts = [counts[column] for counts in self.found.values()]
        shown = ", ".join(map(str, dict.fromkeys(counts)))
        text = f"{shown}/{self.implied[column]}"
        return text if set(counts) == {self.implied[column]} else f"**{text}**"


Matrix = Mapping[str, Mapping[str, Entry]]  # release -> architecture -> entry


# ------------------------------------------------------------------------------------- in an environment


def count() -> Iterator[tuple[str, Entry]]:
    """Every architecture under the transformers that is installed here."""
    sys.path.insert(0, str(ROOT / "tests"))
    from zoo.configs import ZOO

    absent = Entry(reasons=("all: this release does not have it",))
    for name, architecture in ZOO.items():
        yield name, _entry(architecture) if architecture.available else absent


def _entry(architecture: Any) -> Entry:
    from zoo.measuring import differences, found, misses, places

    import rewriter

    implied = architecture.implied(architecture.configuration())
    counts: dict[str, Mapping[str, int]] = {}
    reasons: list[str] = []
    for implementation in architecture.implementations:
        try:
            program = rewriter.capture(architecture.build(implementation))
        except Exception as error:  # whatever a release raises is what the matrix reports
            reasons.append(f"{implementation}: {type(error).__name__}: {_short(str(error).splitlines()[0])}")
            continue
        here = found(program)
        counts[implementation] = asdict(here)
        for column, (have, want) in differences(here, implied).items():
            why = places(program, column) if have > want else misses(program, column, 1)
            said = _short("; ".join(why)) or "no place looks like one"
            reasons.append(f"{implementation}: {column} {have}/{want}: {said}")
    return Entry(asdict(implied), counts, tuple(reasons))


def _short(text: str) -> str:
    """On one line, without the folder transformers is installed in and without names of constants; one sentence."""
    text = re.sub(r"\S*/(?=transformers/models/)", "", " ".join(text.split()))
    text = re.sub(r" \(\w*(?:func_spec|ModIndex)\d+\)", "", text)
    return text.partition(". ")[0]


# ----------------------------------------------------------------------------------------- environments


def install(release: str, folder: Path) -> None:
    """transformers, and what it needs in another version than is installed, into `folder`."""
    wanted = [f"transformers=={release}"]
    while wanted:
        _pip(folder, wanted)
        needed = {text for d in distributions(path=[str(folder)]) for text in d.requires or ()}
        wanted = sorted(text for text in needed if _missing(Requirement(text), folder))


def _missing(requirement: Requirement, folder: Path) -> bool:
    """Whether neither `folder` nor this environment has an accepted version."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return False
    for found in distributions(name=requirement.name, path=[str(folder), *sys.path]):
        return not requirement.specifier.contains(found.version, prereleases=True)
    return True


def _pip(folder: Path, packages: Sequence[str]) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--upgrade", "--target", str(folder), *packages])


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What it prints; its log (export writes whole graphs there) only where it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr[-4000:]}")
    return done


def examine(release: str) -> dict[str, Entry]:
    """Count in a new process whose transformers is `release`."""
    with tempfile.TemporaryDirectory(prefix="rewriter-drift-") as folder:
        install(release, Path(folder))
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--count"]
        done = _run(command, environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: Entry(line["implied"], line["found"], tuple(line["reasons"])) for line in lines}


# ---------------------------------------------------------------------------------------------- the page


def drifted(matrix: Matrix) -> Iterator[str]:
    """All that is not as implied, architectures with one reason together."""
    for release, entries in matrix.items():
        together: dict[str, dict[str, list[str]]] = {}
        for name, entry in entries.items():
            for reason in entry.reasons:
                implementation, _, why = reason.partition(": ")
                together.setdefault(why, {}).setdefault(name, []).append(implementation)
        for why, names in together.items():
            who = ", ".join(f"{name} ({', '.join(how)})" for name, how in names.items())
            yield f"{release}, {who}: {why}"


def page(matrix: Matrix) -> str:
    import torch

    columns = next(e.implied for entries in matrix.values() for e in entries.values() if e.implied)
    blocks = [INTRODUCTION]
    for column in columns:
        lines = [["", *matrix], ["---"] * (len(matrix) + 1)]
        names = dict.fromkeys(name for entries in matrix.values() for name in entries)
        lines += [[name, *(entries[name].cell(column) for entries in matrix.values())] for name in names]
        blocks.append(f"## {column}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    reasons = [f"- {reason}" for reason in drifted(matrix)]
    blocks.append("## What drifted, and why\n\n" + ("\n".join(reasons) if reasons else "Nothing.") + "\n")
    blocks.append(f"torch {torch.__version__} in all.\n")
    return "\n".join(blocks)


def show(matrix: Matrix, console: Console) -> None:
    table = Table(title="found/implied: " + " ".join(next(iter(next(iter(matrix.values())).values())).implied))
    table.add_column("")
    for release in matrix:
        table.add_column(release)
    for name in next(iter(matrix.values())):
        cells = [" ".join(e.cell(c) for c in e.implied) or "–" for e in (entries[name] for entries in matrix.values())]
        table.add_row(name, *cells)
    console.print(table)
    for reason in drifted(matrix):
        console.print(reason, markup=False)


def main(arguments: Sequence[str]) -> int:
    logging.disable(logging.WARNING)
    if list(arguments) == ["--count"]:
        for name, entry in count():
            sys.stdout.write(json.dumps({"name": name, **asdict(entry)}) + "\n")
            sys.stdout.flush()
        return 0
    console = Console()
    matrix = {}
    for release in arguments or RELEASES:
        with console.status(f"transformers {release}"):
            matrix[release] = examine(release)
    show(matrix, console)
    if not arguments:
        PAGE.write_text(page(matrix), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
