# SPDX-License-Identifier: Apache-2.0
"""The zoo: on every architecture, as many sites as its configuration implies, and the exact passes keep the function.

The configuration's counts are formulas in `configs.py`; the page `docs/zoo.md`, which `benchmarks/zoo.py` writes, must
say what these tests find.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import rewriter

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


def test_no_attention_is_lost_to_the_passes_before(cell: Cell) -> None:
    """Each one that is written out is fused, or its plan says why not."""
    if cell.implementation != "eager":
        return
    left = [miss for miss in cell.opt.plan.misses if miss.rule == "fuse.attention"]
    capped = getattr(cell.architecture.configuration(), "attn_logit_softcapping", None)
    assert cell.sites.get("fuse.attention", 0) == (0 if capped else cell.implied.attention), "\n".join(map(str, left))


def test_the_page_says_what_was_found(cell: Cell, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    tables = rows(PAGE.read_text(encoding="utf-8"))
    assert tables[f"sites {name}"] == counted(cell) and tables[f"rules {name}"] == rewritten(cell)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_routers_are_left_alone(name: str) -> None:
    model = ZOO[name].build("sdpa")
    plan = rewriter.plan(rewriter.capture(model), ["shift_add"])
    layers = model.config.num_hidden_layers
    assert len(plan.sites) == ZOO[name].implied(model.config).linear - layers
    assert sum("router" in miss.reason for miss in plan.misses) == layers


def test_parts_with_configurations_of_their_own_keep_their_caches() -> None:
    model = ZOO["t5"].build("sdpa")
    module = rewriter.optimize(model, []).to_module()
    for one in (model, module):
        assert (one.config.use_cache, one.encoder.config.use_cache, one.decoder.config.use_cache) == (True, False, True)
