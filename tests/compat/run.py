# SPDX-License-Identifier: Apache-2.0
"""Which versions work: run ``smoke.py`` in throw-away environments and write ``docs/compat.md``.

Three environments, one after the other, each a minute or two: *oldest* takes every dependency at the lowest minor
version ``pyproject.toml`` allows, *pinned* is ``constraints.txt``, *newest* takes what the package index offers today,
beyond the declared ranges too. torch is the pinned one in all. Exit status 1 if a check fails within those ranges.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from wheel import ROOT, build_wheel

PAGE = ROOT / "docs" / "compat.md"
NEEDED_BY_SMOKE = ("transformers", "ml_dtypes")
ENVIRONMENTS = ("oldest", "pinned", "newest")

INTRODUCTION = """\
# Versions that work

`make compat` wrote this page. It installs the package into three throw-away environments and runs
`tests/compat/smoke.py` in each: import, start the command line, capture four transformers models and compare with the
models at two sizes, run one of them in ONNX Runtime, interpret a Triton kernel. *oldest* is the lowest minor version
of every dependency that `pyproject.toml` allows, *pinned* is `constraints.txt`, which `make test` uses, *newest* is
what the package index offered on the day. The ranges in `pyproject.toml` are what this table shows.
"""
NOTES = """\
The interpreter serves the tests only. Its wrapper uses private names of Triton, hence the upper bound on triton;
capture depends on the details of torch's export, hence the one on torch. With numpy 2.4, Triton 3.6 interprets no loop
over a run-time range (`TypeError: only 0-dimensional arrays can be converted to Python scalars`): testing with it
takes an older numpy.
"""


@dataclass(frozen=True)
class Outcome:
    """What one check did: seconds taken, and the error if there was one."""

    seconds: float
    error: str | None

    def __str__(self) -> str:
        return "failed" if self.error else f"{self.seconds:.1f} s"


@dataclass(frozen=True)
class Result:
    """One environment: installed versions by distribution, and the outcome of every check."""

    versions: Mapping[str, str]
    checks: Mapping[str, Outcome]
    install_seconds: float


def declared() -> dict[str, Requirement]:
    """The core dependencies, and what the smoke test needs from the extras, by name."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    optional = [text for extra in project["optional-dependencies"].values() for text in extra]
    extras = {r.name: r for r in map(Requirement, optional) if r.name in NEEDED_BY_SMOKE}
    return {r.name: r for r in map(Requirement, project["dependencies"])} | extras


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line)


def lowest(requirement: Requirement) -> str:
    """``name>=1.2`` as ``name==1.2.*``: the lowest minor version, in its newest patch."""
    (bound,) = (s.version for s in requirement.specifier if s.operator == ">=")
    return f"{requirement.name}=={bound}.*"


def wanted(environment: str) -> list[str]:
    """What to install, torch first."""
    names, pinned = declared(), pins()
    if environment == "pinned":
        found = [f"{name}=={pinned[name]}" for name in names]
    elif environment == "oldest":
        found = [lowest(requirement) for requirement in names.values()]
    else:
        found = list(names)
    return [f"torch=={pinned['torch']}", *(text for text in found if not re.match(r"torch\b", text))]


def install(python: Path, environment: str, wheel: Path) -> None:
    """Everything from the index; triton last and without dependencies, for a CUDA build of torch insists on its own."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")] if environment == "pinned" else []
    packages = wanted(environment)
    triton = [text for text in packages if re.match(r"triton\b", text)]
    _run([*pip, *constraints, *(text for text in packages if text not in triton)])
    _run([*pip, "--no-deps", *triton])
    _run([*pip, "--no-deps", str(wheel)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr}")


def versions(python: Path) -> dict[str, str]:
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {package["name"]: package["version"] for package in listed}


def smoke(python: Path) -> Iterator[tuple[str, Outcome]]:
    """Run the smoke test away from the repository, so that only what was installed is imported."""
    script = ROOT / "tests" / "compat" / "smoke.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(python), str(script)]
    done = subprocess.run(command, cwd=python.parent, env=environment, stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        record = json.loads(line)
        yield record["check"], Outcome(record["seconds"], record["error"])
    if done.returncode:
        yield "the smoke test", Outcome(0.0, f"exit status {done.returncode}")


def examine(environment: str, wheel: Path) -> Result:
    with tempfile.TemporaryDirectory(prefix="rewriter-compat-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        start = time.perf_counter()
        install(python, environment, wheel)
        installed = time.perf_counter() - start
        return Result(versions(python), dict(smoke(python)), installed)


def rows(results: Mapping[str, Result]) -> Iterator[tuple[str, list[str]]]:
    """The table's body: versions, seconds of installing, then one row per check."""
    for name in declared():
        yield name, [r.versions.get(name, "–") for r in results.values()]
    yield "installation", [f"{r.install_seconds:.0f} s" for r in results.values()]
    for check in dict.fromkeys(name for r in results.values() for name in r.checks):
        yield check, [str(r.checks.get(check, "not run")) for r in results.values()]


def failures(results: Mapping[str, Result]) -> Iterator[str]:
    for environment, result in results.items():
        for check, outcome in result.checks.items():
            if outcome.error:
                yield f"{environment}, {check}: {outcome.error}"


def beyond(result: Result) -> list[str]:
    """What this environment has outside the declared ranges."""
    installed = [(r, result.versions[r.name]) for r in declared().values() if r.name in result.versions]
    return [f"{r.name} {v}" for r, v in installed if not r.specifier.contains(Version(v), prereleases=True)]


def page(results: Mapping[str, Result]) -> str:
    cells = [["", *results], ["---"] * (len(results) + 1), *([name, *values] for name, values in rows(results))]
    table = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    found = [f"Failed: {text}" for text in failures(results)]
    found += [f"Outside the declared ranges, {name}: {', '.join(b)}" for name, r in results.items() if (b := beyond(r))]
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    machine = f"Python {platform.python_version()}, {system}, no GPU used."
    findings = [*(f"- {text}" for text in found), ""] if found else []
    return "\n".join([INTRODUCTION, table, "", machine, "", *findings, NOTES])


def show(results: Mapping[str, Result], console: Console) -> None:
    table = Table(title="Versions × checks")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for name, values in rows(results):
        table.add_row(name, *("[red]failed[/red]" if value == "failed" else value for value in values))
    console.print(table)


def main(chosen: Sequence[str]) -> int:
    if unknown := set(chosen) - set(ENVIRONMENTS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; the environments are {', '.join(ENVIRONMENTS)}")
    console = Console()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="rewriter-wheel-") as folder:
        wheel = build_wheel(Path(folder))
        for environment in chosen or ENVIRONMENTS:
            with console.status(f"{environment}: installing and running"):
                results[environment] = examine(environment, wheel)
    show(results, console)
    for text in failures(results):
        console.print(f"[red]{text}[/red]")
    if not chosen:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(results), encoding="utf-8")
    return int(any(outcome.error for r in results.values() if not beyond(r) for outcome in r.checks.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
