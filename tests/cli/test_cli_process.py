# SPDX-License-Identifier: Apache-2.0
"""The installed command as a process: exit codes, what goes to stdout and stderr, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REWRITER = Path(sys.executable).parent / "rewriter"
LAYERS, WIDTH = 6, 768

BIG = f"""
from torch import nn


def build():
    return nn.Sequential(*(nn.Linear({WIDTH}, {WIDTH}) for _ in range({LAYERS})))


def small():
    return nn.Sequential(nn.Linear(32, 32))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "process_models.py").write_text(BIG)
    return tmp_path


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONDONTWRITEBYTECODE": "1"}
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # a shell that runs the tests in the background has SIGINT ignored, which the command would inherit
        return subprocess.Popen(
            [str(REWRITER), *arguments],
            cwd=place,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, ours)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_done_is_zero_and_json_is_alone_on_stdout(place: Path) -> None:
    code, out, err = finish(start(place, "optimize", "process_models:small", "-p", "shift_add:group=32", "--json"))
    assert code == 0, err
    assert len(json.loads(out)["sites"]) == 1
    assert "rewrite" in err, "progress goes to stderr"
    assert "Warning" not in err


def test_refused_is_one_and_explains_itself_on_stderr(place: Path) -> None:
    code, out, err = finish(start(place, "optimize", "process_models:small", "-p", "shift_ad", "--json"))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("PlanError: unknown pass 'shift_ad' (nearest: shift_add")
    assert "Traceback" not in err


def test_usage_is_two(place: Path) -> None:
    code, out, err = finish(start(place, "optimize", "process_models:small"))
    assert (code, out) == (2, "")
    assert "Missing option" in err
    assert "--passes" in err


def test_interrupted_is_130_and_no_half_written_file_remains(place: Path) -> None:
    """SIGINT as soon as something appears on the disk: whether it is written yet or not, it is whole or gone."""
    process = start(
        place,
        "optimize",
        "process_models:build",
        "-p",
        "shift_add",
        "--onnx",
        "out/model.onnx",
        "--save",
        "out/saved",
        "--report",
        "out/report.json",
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not _written(place / "out"):
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    assert "interrupted: nothing half-written remains" in err
    assert "Traceback" not in err
    left = {p.name for p in (place / "out").iterdir()} if (place / "out").exists() else set()
    assert left <= {"model.onnx"}, "a finished file may be there, a part of one may not"
    if left:
        import onnx

        onnx.checker.check_model(str(place / "out" / "model.onnx"))


def _written(folder: Path) -> bool:
    """Whether a file, finished or not, has been started."""
    return folder.is_dir() and any(folder.iterdir())
