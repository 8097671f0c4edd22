# SPDX-License-Identifier: Apache-2.0
"""The zoo: on every architecture, as many sites as its configuration implies, and the exact passes keep the function.

The configuration's counts are formulas in `configs.py`; the page `docs/zoo.md`, which `benchmarks/zoo.py` writes, must
say what these tests find.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .configs import ZOO
from .measuring import Cell, cells, differences, misses
from .page import PAGE, counted, rewritten, rows


@pytest.fixture(scope="module", params=[pytest.param(c, id="-".join(c)) for c in cells()])
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    """Shared by the tests of one cell, which run one after the other."""
    yield Cell.of(*request.param)


def test_every_architecture_is_there() -> None:
    assert len(ZOO) >= 16 and all(architecture.available for architecture in ZOO.values())
    assert {implementation for _, implementation in cells()} == {"sdpa", "eager"}


def test_sites_are_as_many_as_the_configuration_implies(cell: Cell) -> None:
    wrong = differences(cell.found, cell.implied)
    program = cell.opt.original_program()
    reasons = "\n".join(text for column in wrong for text in misses(program, column))
    assert wrong == {}, f"(found, implied) of {wrong}\n{reasons}"


def test_the_exact_passes_keep_the_function(cell: Cell) -> None:
    cell.verification.raise_if_failed()
    assert cell.verification.samples == len(cell.architecture.paddings) + 1
    assert cell.error <= 1e-10
    assert len(cell.verification.gradients) >= 3 and cell.sites


def test_the_page_says_what_was_found(cell: Cell, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    tables = rows(PAGE.read_text(encoding="utf-8"))
    assert tables[f"sites {name}"] == counted(cell) and tables[f"rules {name}"] == rewritten(cell)
