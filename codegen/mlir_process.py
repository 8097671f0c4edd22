# SPDX-License-Identifier: Apache-2.0
"""Starts `mlir_worker` in a child process, and turns what it says on failure into an error that names the site."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rewriter.errors import ExportError

_WORKER = Path(__file__).with_name("mlir_worker.py")
_INSTALL = "pip install 'fx-rewriter[mlir]'"

# "path":12:0 or path:12:0, then the severity: our locations are module paths, the "line" is the number of the node.
_DIAGNOSTIC = re.compile(r'"?(?P<site>[^"\n:(]*)"?:(?P<node>\d+):\d+\)?(?: at [^\n]*?)?: error: (?P<text>[^\n]*)')
_OPERATOR = re.compile(r'name = "torch\.(?P<unregistered>[\w.]+)"|torch\.(?P<registered>aten\.[\w.]+)')

# What to do about operators known to fail, by the dialects they fail in; what is not listed gets the general advice.
_ADVICE = (
    (("aten.view.dtype",), "bit-casts lower to stablehlo only: take powers of two apart with log2, exp2 or ldexp"),
    (("aten.scatter", "aten.index_add", "aten.index_put"), "choose linalg-on-tensors or stablehlo"),
    (("aten.frexp",), "write it with log2 and floor"),
)


@dataclass(frozen=True)
class Origin:
    """Where a node of the imported graph comes from: operator (``aten.linear.default``) and module path, or ``root``."""

    operator: str
    site: str


def require(*modules: str) -> None:
    """Refuse early where the optional back end is not installed. Raises ExportError."""
    missing = [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is None]
    if missing:
        names = " and ".join(sorted({m.partition(".")[0] for m in missing}))
        raise ExportError(f"the MLIR back end needs {names}, not installed here: {_INSTALL}")


def run_worker(arguments: Sequence[str | Path], doing: str, origins: Sequence[Origin]) -> None:
    """Run `mlir_worker` with the caller's interpreter; its death is an error here and nothing worse.

    Args:
        arguments: of the worker.
        doing: what the message says it was doing, as in ``lower to tosa``.
        origins: of the module's nodes, which its locations number.

    Raises:
        ExportError: the worker refused or died; names operator, site and what to do.
    """
    # -P: the folder of the worker is no place to import from.
    command = [sys.executable, "-P", str(_WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise failure(doing, done.stderr.decode(errors="replace"), origins, done.returncode)


def failure(doing: str, output: str, origins: Sequence[Origin], status: int) -> ExportError:
    """The error for what a compiler wrote before it stopped with exit status ``status``."""
    found = _DIAGNOSTIC.search(output)
    ending = f"; the compiler then died of {_signal(status)}" if status < 0 else ""
    if found is None:
        last = [line for line in output.splitlines() if line.strip()][-1:] or [f"exit status {status}, no message"]
        return ExportError(f"cannot {doing}: {_cut(last[0])}{ending}; try another dialect")
    origin = _origin(found, origins)
    return ExportError(
        f"cannot {doing}: {origin.operator} at {origin.site}: {_cut(found['text'])}{ending}. "
        f"{_advice(origin.operator)}"
    )


def _origin(found: re.Match[str], origins: Sequence[Origin]) -> Origin:
    number = int(found["node"])
    if number < len(origins) and origins[number].site == found["site"]:
        return origins[number]
    named = _OPERATOR.search(found["text"])
    operator = (named["unregistered"] or named["registered"]) if named else "an operator"
    return Origin(operator, found["site"])


def _advice(operator: str) -> str:
    for operators, advice in _ADVICE:
        if operator.startswith(operators):
            return advice[0].upper() + advice[1:]
    return "Try another dialect, or leave the site as it was with select={site: None}"


def _signal(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _cut(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length] + "…"
