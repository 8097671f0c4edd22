# SPDX-License-Identifier: Apache-2.0
"""``make kernels-report``: compile every shipped kernel configuration for every target, print what each one takes.

Exit status 1 where one spills, asks for more than the chip has, or computes a product without matrix instructions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rewriter.codegen import shipped
from rewriter.codegen.ahead_of_time import TARGETS


def main(only: Sequence[str]) -> int:
    """Report the cases whose name contains one of ``only``, or all; the exit status."""
    table = Table(title="shipped kernels: registers / bytes of shared memory / matrix instruction", title_justify="left")
    for heading in ("case", "kernel", "configuration", *TARGETS):
        table.add_column(heading, overflow="fold")
    wrong: list[str] = []
    for case in shipped.cases():
        if only and not any(part in case.name for part in only):
            continue
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for target in TARGETS:
            rows = list(shipped.rows(case, target))
            wrong += [f"{case.name} on {target}: {fault}" for fault in shipped.faults(case, target, rows)]
            for row in rows:
                c = row.compiled
                text = f"{c.registers} / {c.shared} / {c.matrix[0] if c.matrix else '–'}"
                cells.setdefault((c.kernel, row.configuration), {})[target] = text
        for (kernel, configuration), by_target in cells.items():
            table.add_row(case.name, kernel, configuration, *(by_target.get(target, "") for target in TARGETS))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for fault in wrong:
        console.print(fault, style="red", markup=False)
    console.print("spills: none" if not wrong else f"{len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
