# SPDX-License-Identifier: Apache-2.0
"""Runs the zoo, prints it and writes docs/zoo.md: sites found and implied, what was rewritten, and the golden error.

.venv/bin/python benchmarks/zoo.py
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from zoo.measuring import COLUMNS, Cell, cells, differences  # noqa: E402
from zoo.page import PAGE, counted, measured, page, rewritten  # noqa: E402


def main() -> int:
    logging.disable(logging.WARNING)  # transformers' remarks on tiny configurations
    torch.set_num_threads(1)
    Cell.of("bert", "sdpa")  # the first capture of a process pays for imports
    console = Console()
    found = {f"{n}-{i}": Cell.of(n, i) for n, i in track(list(cells()), "running", console=console)}
    shown = Table(title=f"transformers {transformers.__version__}")
    for column in ("", *COLUMNS, "golden error", "capture", "rewritten"):
        shown.add_column(column)
    for name, cell in found.items():
        shown.add_row(name, *counted(cell), *measured(cell), *rewritten(cell))
    console.print(shown)
    wrong = {n for n, c in found.items() if differences(c.found, c.implied) or not c.verification.passed}
    if wrong:
        console.print(f"[red]wrong: {', '.join(sorted(wrong))}; the page is left as it was[/red]")
        return 1
    machine = f"{os.cpu_count()} cores, 1 thread used, torch {torch.__version__}"
    PAGE.write_text(page(found, transformers.__version__, machine), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
