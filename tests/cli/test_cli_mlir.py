# SPDX-License-Identifier: Apache-2.0
"""`rewriter export --mlir`: dialects, sizes, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import Run, data, readable, refused

MODULE = '''
import torch
from torch import nn


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU())
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of one model, which the command line finds as the working directory."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "cli_mlir_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "cli_mlir_model", raising=False)
    return tmp_path


def test_mlir_is_written_in_the_dialect_asked_for(run: Run, module: Path) -> None:
    fixed = data(
        run("export", "cli_mlir_model:model", "--mlir", "m.mlir", "--dialect", "stablehlo", "--static-shapes", "--json")
    )
    text = (module / "m.mlir").read_text()
    assert "stablehlo.dot" in text and "func.func @main" in text
    assert fixed["dialect"] == "stablehlo" and fixed["bytes"] == len(text.encode())
    assert all(isinstance(size, int) for size in fixed["inputs"][0]["shape"])
    free = data(run("export", "cli_mlir_model:model", "--mlir", "m.mlirbc", "--json"))
    assert (module / "m.mlirbc").read_bytes().startswith(b"ML\xefR")
    assert free["dialect"] == "torch" and free["outputs"][0]["shape"] == [None, 4]


def test_what_no_dialect_has_is_refused_and_writes_nothing(run: Run, module: Path) -> None:
    export = ("export", "cli_mlir_model:model", "--mlir", "m.mlir")
    assert "dynamic sizes" in refused(run(*export, "--dialect", "tosa"))
    assert "'llvm' is no dialect" in refused(run(*export, "--dialect", "llvm"))
    assert "give one of --onnx FILE and --mlir FILE" in " ".join(readable(run(*export, "--onnx", "m.onnx").output))
    assert [p.name for p in module.iterdir()] == ["cli_mlir_model.py"]
