# SPDX-License-Identifier: Apache-2.0
"""docs/own_rules.md runs as it stands, prints what it says, and its ONNX computes what the model computes."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_rules.md"
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)


def test_the_page_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall(PAGE.read_text())
    script = tmp_path / "own_rules.py"
    script.write_text("\n\n".join(text for kind, text in blocks if kind == "python"))
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = runpy.run_path(str(script))
    shown = "".join(text for kind, text in blocks if kind == "text")
    assert printed.getvalue().replace(f"{tmp_path}/", "") == shown
    session = ort.InferenceSession(str(tmp_path / "highway.onnx"))
    other = torch.rand(7, 16)
    (output,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(output, names["model"](other).numpy(), rtol=1e-5, atol=1e-6)
    targets = [n.target for n in names["opt"].program.graph.nodes]
    assert targets.count(torch.ops.aten.lerp.Tensor) == 3
