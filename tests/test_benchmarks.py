# SPDX-License-Identifier: Apache-2.0
"""The engine benchmark at a tiny size: every side finds and rewrites the same sites, and the tables say what was measured."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """Scripts find their neighbours because their own folder is on the path."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def engine(on_the_path: None) -> ModuleType:
    """benchmarks/engine.py, under a name that no package of the tests has."""
    spec = importlib.util.spec_from_file_location("benchmarks_engine", BENCHMARKS / "engine.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_sides_are_measured_at_a_tiny_size(engine: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    command = [sys.executable, str(BENCHMARKS / "engine.py"), "--sizes", "20", "200", "--runs", "1"]
    command += ["--sides", "rewriter", "torch.fx", "--no-docs", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = engine.read(out)
    assert {(c.task, c.nodes, c.side) for c in results.cells} == {
        (task, nodes, side)
        for task in ("match", "dead rules", "rewrite")
        for nodes in (20, 200)
        for side in ("rewriter", "torch.fx")
    }
    assert all(c.seconds and c.runs == 1 and 0 < c.edited <= c.seconds for c in results.cells)
    rewritten = results.cell("rewrite", 200, "rewriter")
    assert rewritten.edited < rewritten.seconds  # recompiling was seen
    assert "match + rewrite + recompile" in done.stdout


@pytest.mark.parametrize(
    "side", ["rivals.inductor:InductorExample", "rivals.onnx_rewriter:OnnxScript", "rivals.ours:Ours"]
)
def test_a_side_finds_every_hit_and_computes_what_numpy_does(engine: ModuleType, side: str) -> None:
    module, _, name = side.partition(":")
    one = getattr(importlib.import_module(module), name)()
    one.prepare(40)
    assert (one.match(0), one.match(50)) == (4, 4)
    before = one.run()
    assert one.rewrite() == 4
    assert one.match(0) == 0
    for output in (before, one.run()):
        np.testing.assert_allclose(output, engine.workload.expected(40), rtol=1e-12)


def results_of(engine: ModuleType, **seconds: float | None) -> object:
    cells = [
        engine.Cell(task.replace("_", " "), 10_000, side, taken, taken, taken, 1, 1.0)
        for key, taken in seconds.items()
        for side, _, task in [key.partition("__")]
    ]
    named = {"ours": "rewriter", "fx": "torch.fx", "inductor": "Inductor"}
    cells = [engine.Cell(c.task, c.nodes, named[c.side], c.seconds, c.edited, c.wall, 1, 1.0) for c in cells]
    return engine.Results("machine", (1_000, 10_000), tuple(cells))


def test_targets_hold_exactly_where_the_figures_say_so(engine: ModuleType) -> None:
    results = results_of(
        engine,
        ours__match=1.0,
        inductor__match=3.0,
        fx__match=49.0,
        ours__dead_rules=1.2,
        ours__rewrite=2.0,
        fx__rewrite=None,
    )
    found = {t.words: (t.value, t.holds) for t in engine.targets(results)}
    assert found["matching at 10,000 nodes against Inductor"] == (3.0, True)
    assert found["matching at 10,000 nodes against SubgraphMatcher"] == (49.0, False)
    assert found["match and rewrite at 10,000 nodes against replace_pattern"] == (None, None)
    assert found["matching at 10,000 nodes with 50 more rules that match nothing"] == (1.2, False)
    text = engine.markdown(results)
    assert "stopped (> 60 s)" in text and "49 s (49 ×)" in text and "not measured" in text


def test_figures_go_between_the_markers_of_a_page_and_nowhere_else(engine: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    engine.insert(page, "figures", "new")
    assert page.read_text() == "before\n<!-- figures -->\nnew\n<!-- /figures -->\nafter\n"
    with pytest.raises(ValueError, match="has no <!-- other -->"):
        engine.insert(page, "other", "new")


def test_the_page_shows_the_stored_results(engine: ModuleType) -> None:
    """docs/benchmarks.md was written by the run whose results are stored."""
    stored = BENCHMARKS / "results" / "engine.json"
    assert json.loads(stored.read_text())["sizes"] == [1_000, 10_000, 100_000]
    assert engine.markdown(engine.read(stored)) in (ROOT / "docs" / "benchmarks.md").read_text()
