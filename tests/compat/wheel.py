# SPDX-License-Identifier: Apache-2.0
"""Build the wheel from a copy of the sources, so that neither leftovers in ``build/`` nor new ones get in the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rewriter", "passes", "codegen", "kernels")
FILES = ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md")


def build_wheel(folder: Path) -> Path:
    """The wheel, built into ``folder`` by the running interpreter's setuptools; nothing is downloaded."""
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", folder, source], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the wheel does not build:\n{done.stdout}{done.stderr}")
    (wheel,) = folder.glob("*.whl")
    return wheel
