# SPDX-License-Identifier: Apache-2.0
"""The page `docs/zoo.md`: written by `benchmarks/zoo.py`, read again by the test that guards it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .measuring import COLUMNS, EXACT_PASSES, Cell

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"

_INTRODUCTION = """# The zoo

Written by `benchmarks/zoo.py`; `tests/zoo` guards it. {models} architectures of transformers {release}, each with every
implementation of attention it allows: small random models ({layers} layers), captured and rewritten by

```python
opt = rewriter.optimize(model, {passes})
```

with no example call and dynamic shapes.
"""

_SITES = """## Sites

*found/implied*: what the views find in the captured program, and what a formula over the configuration says there is
(`tests/zoo/configs.py`; it knows nothing of the matcher). A site is a call: ALBERT's layers, which read the same
weights, count once each time they run. Norms are RMS and layer norms; rotary embeddings are one each for q and k; GLU
is SwiGLU or GeGLU, packed or not. Experts of a mixture are stored as one tensor and are neither linears nor GLUs; their
router is a linear.

*Golden error* is the largest difference between original and rewritten program, both promoted to float64, over outputs
and gradients, relative to the largest magnitude: calls without padding, with left and right padding, and with a row that
is nothing but padding. The promise is 1e-10. *Capture* is its share of the whole time of `optimize`, in seconds.
"""

_REWRITES = """## Rewrites

Sites of each rule in the plan.
"""


def counted(cell: Cell) -> tuple[str, ...]:
    """found/implied of every column."""
    return tuple(f"{getattr(cell.found, c)}/{getattr(cell.implied, c)}" for c in COLUMNS)


def rewritten(cell: Cell) -> tuple[str, ...]:
    return (", ".join(f"{rule} {count}" for rule, count in cell.sites.items()),)


def measured(cell: Cell) -> tuple[str, ...]:
    """What differs from run to run."""
    share = cell.capture_seconds / cell.seconds
    return f"{cell.error:.0e}", f"{share:.0%} of {cell.seconds:.1f}"


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page(cells: Mapping[str, Cell], release: str, machine: str) -> str:
    """The whole page, from cells by id."""
    models = len({name.rpartition("-")[0] for name in cells})
    layers = max(getattr(cell.architecture.configuration(), "num_hidden_layers", 0) for cell in cells.values())
    sites = table(
        ["", *COLUMNS, "golden error", "capture"],
        [[name, *counted(cell), *measured(cell)] for name, cell in cells.items()],
    )
    rules = table(["", "rewritten"], [[name, *rewritten(cell)] for name, cell in cells.items()])
    head = _INTRODUCTION.format(models=models, release=release, layers=layers, passes=list(EXACT_PASSES))
    return "\n".join([head, _SITES, sites, f"Machine: {machine}.\n", _REWRITES, rules])


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """What a page says that does not differ from run to run: "sites NAME" and "rules NAME" -> cells."""
    found: dict[str, tuple[str, ...]] = {}
    kind = ""
    for line in text.splitlines():
        if line.startswith("## "):
            kind = {"## Sites": "sites", "## Rewrites": "rules"}.get(line, "")
        elif line.startswith("| ") and not line.startswith(("|  |", "| ---")):
            name, *values = (value.strip() for value in line.strip("| ").split("|"))
            found[f"{kind} {name}"] = tuple(values[: len(COLUMNS)] if kind == "sites" else values)
    return found
