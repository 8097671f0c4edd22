# SPDX-License-Identifier: Apache-2.0
"""`optimize`, `apply`, `verify` and `export`: commands that make something."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from commands import ALL, VOCABULARY, Run, data, done, readable, refused
from safetensors.torch import save_file

import rewriter

MODULE = '''
import torch
from torch import nn


class Pair(nn.Module):
    """Two inputs of different shapes: nothing says which."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 32), nn.Linear(48, 32)

    def forward(self, a, b):
        return self.left(a) + self.right(b)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def pair():
    torch.manual_seed(0)
    return Pair()


def number():
    return 3


def broken():
    raise RuntimeError("no weights today")
'''


@pytest.fixture(scope="session")
def optimized(run: Run, folder: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One full run with everything it can write."""
    out = tmp_path_factory.mktemp("out")
    result = run(
        "optimize",
        folder,
        "-p",
        ALL,
        "--calibration",
        tokens,
        "--calibration-rows",
        4,
        "--evaluate",
        tokens,
        "--evaluate-rows",
        2,
        "--onnx",
        out / "new" / "model.onnx",
        "--save",
        out / "saved",
        "--report",
        out / "report.json",
    )
    return {"out": out, "text": done(result), "report": json.loads((out / "report.json").read_text())}


def test_the_report_names_every_site_with_rule_contract_bytes_and_error(optimized: dict[str, Any]) -> None:
    lines = readable(optimized["text"])
    assert any(line.startswith("shift_add.linear · CALIBRATED · 8 sites") for line in lines)  # four in each layer
    assert any(line.startswith("fuse.qkv · EXACT · 2 sites") for line in lines)
    assert any(line.startswith("fuse.gate_up · EXACT · 2 sites") for line in lines)
    for site in optimized["report"]["sites"]:
        path = site["created"][0].rpartition(".")[0]
        rows = [line.split() for line in lines if line.split()[:1] == [path]]
        assert rows, f"{path} has no line of its own"
    gate_up = "model.layers.0.mlp.gate_up_proj"  # first merged, then stored as shifts and additions
    _, row = [line.split() for line in lines if line.split()[:1] == [gate_up]]
    _, site = [s for s in optimized["report"]["sites"] if s["created"][0].startswith(gate_up)]
    assert site["rule"] == "shift_add.linear"
    assert row[1:3] == ["24.58", "kB"]  # 192 × 64 fp16
    assert f"{100 * site['figures']['weight_error']:.1f}" in row
    assert any("taken by vq_logits.head" in line for line in lines)


def test_the_report_has_the_measurements_of_both_models(optimized: dict[str, Any]) -> None:
    found = optimized["report"]["measurements"]
    assert set(found) == {
        "perplexity",
        "KL(original ‖ rewritten)",
        "top-1 agreement",
        "latency",
        "ONNX file",
        "ONNX parity",
    }
    assert found["perplexity"]["before"] > 1
    assert found["KL(original ‖ rewritten)"]["after"] > 0
    assert 0 <= found["top-1 agreement"]["after"] <= 1
    assert found["ONNX parity"]["after"] <= 1e-3
    assert found["ONNX file"]["after"] == (optimized["out"] / "new" / "model.onnx").stat().st_size
    assert "perplexity" in optimized["text"]


def test_what_was_written_is_what_was_reported(optimized: dict[str, Any]) -> None:
    opt = rewriter.load(optimized["out"] / "saved")
    ids = torch.arange(12).reshape(2, 6) % VOCABULARY
    with torch.no_grad():
        expected = opt(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    session = onnxruntime.InferenceSession(str(optimized["out"] / "new" / "model.onnx"))
    (got,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    assert torch.allclose(torch.from_numpy(got), expected, atol=1e-3 * float(expected.abs().max()))


def test_a_saved_model_is_exported(run: Run, optimized: dict[str, Any], tmp_path: Path) -> None:
    found = data(run("export", optimized["out"] / "saved", "--onnx", tmp_path / "again.onnx", "--json"))
    assert found["bytes"] == (tmp_path / "again.onnx").stat().st_size
    assert [p["name"] for p in found["inputs"]] == ["input_ids", "attention_mask"]
    assert all(isinstance(size, str) for port in found["inputs"] for size in port["shape"]), "sizes are still free"
    assert "BcqLinear" in found["functions"]


def test_a_stored_plan_is_applied(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done(run("plan", folder, "-p", "shift_add:group=32", "--select", "lm_head=none", "--out", out))
    found = data(run("apply", folder, "--plan", out, "--out", tmp_path / "rewritten", "--json"))
    direct = rewriter.load(tmp_path / "rewritten")
    assert found["bytes"]["after"] < found["bytes"]["before"]
    assert {s["rule"] for s in found["sites"]} == {"shift_add.linear"}
    assert "lm_head.weight" in dict(direct.named_parameters())
    readable(done(run("apply", folder, "--plan", out, "--out", tmp_path / "rewritten")))  # ours, so it is replaced


def test_verify_accepts_what_is_exact_and_reports_what_is_not(run: Run, folder: Path) -> None:
    exact = run("verify", folder)
    assert "golden run passed" in "\n".join(readable(done(exact)))
    inexact = run("verify", folder, "-p", "shift_add:group=32", "--json")
    assert inexact.exit_code == 1
    verdict = json.loads(inexact.stdout)
    assert not verdict["passed"]
    assert "logits" in verdict["reason"]


# ---------------------------------------------------------------------------------------------------- module:callable


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of models, which the command line finds as the working directory."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "cli_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return tmp_path


def test_a_callable_is_optimised_with_inferred_inputs(run: Run, module: Path) -> None:
    found = data(run("optimize", "cli_models:plain", "-p", "shift_add:bits=3:group=64", "--save", "saved", "--json"))
    assert [s["paths"] for s in found["sites"]] == [["0"], ["2"]]
    assert found["sites"][0]["figures"]["bits"] < 4
    assert "uncalibrated" not in found
    assert rewriter.load(module / "saved")(torch.randn(3, 64)).shape == (3, 64)


def test_example_inputs_come_from_a_file(run: Run, module: Path) -> None:
    save_file({"a": torch.randn(2, 64), "b": torch.randn(2, 48)}, module / "call.safetensors")
    found = data(
        run("optimize", "cli_models:pair", "-p", "shift_add", "--example-inputs", "call.safetensors", "--json")
    )
    assert sorted(s["paths"][0] for s in found["sites"]) == ["left", "right"]
    text = done(run("export", "cli_models:pair", "--example-inputs", "call.safetensors", "--onnx", "pair.onnx"))
    assert "a float[" in "\n".join(readable(text))
    assert "golden run passed" in done(run("verify", "cli_models:pair", "--example-inputs", "call.safetensors"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("cli_models:number", "returned a int, not a torch.nn.Module"),
        ("cli_models:broken", "calling broken() raised RuntimeError: no weights today"),
        ("cli_models:missing", "cannot be imported"),
        ("no_such_module:build", "cannot be imported"),
        ("nowhere", "neither a folder nor module:callable"),
        (".", "has no config.json"),
    ],
)
def test_what_is_no_model_is_refused(run: Run, module: Path, model: str, message: str) -> None:
    assert message in refused(run("optimize", model, "-p", "fuse"))


def test_inputs_that_cannot_be_inferred_are_asked_for(run: Run, module: Path) -> None:
    message = refused(run("inspect", "cli_models:pair"))
    assert "example_inputs=(a, b,)" in message
    assert "--example-inputs FILE" in message


# ------------------------------------------------------------------------------------------------- refused before work


@pytest.mark.parametrize("option", ["--onnx", "--save", "--report"])
def test_an_unwritable_output_path_is_refused_before_the_model_is_loaded(run: Run, module: Path, option: str) -> None:
    (module / "file").write_text("mine")
    message = refused(run("optimize", "cli_models:no_such_model", "-p", "fuse", option, "file/below"))
    assert "ExportError: cannot write" in message
    assert "choose another path" in message
    assert sorted(p.name for p in module.iterdir()) == ["cli_models.py", "file"]


def test_what_is_there_is_not_overwritten_by_mistake(run: Run, module: Path) -> None:
    assert "files that were not written by this function" in refused(
        run("optimize", "x:y", "-p", "fuse", "--save", ".")
    )
    assert "it is a folder" in refused(run("optimize", "x:y", "-p", "fuse", "--onnx", "."))
    assert "cannot write" in refused(run("plan", "x:y", "-p", "fuse", "--out", "cli_models.py/plan.json"))
    assert "cannot write" in refused(run("apply", "x:y", "--plan", "plan.json", "--out", "cli_models.py"))
    assert "cannot write" in refused(run("export", "x:y", "--onnx", "cli_models.py/model.onnx"))
    assert [p.name for p in module.iterdir()] == ["cli_models.py"]
    assert (module / "cli_models.py").read_text() == MODULE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "shift_add:bit=3"), "nearest: bits"),
        (("-p", "shift_add:group=0"), "group=0 must be at least 1"),
        (("-p", "shift_add", "--select", "lm_head"), "must be written NAME=VALUE"),
        (("-p", "shift_add", "--expect", "shift_add=many"), "must end in a number of sites"),
        (("-p", "shift_add", "--dtype", "float8"), "unknown dtype 'float8'"),
        (("-p", "shift_add", "--target", "mlir"), "call export_mlir on it"),
        (("-p", "shift_add", "--calibration", "cli_models.py"), "not a safetensors file with a tensor input_ids"),
        (("-p", "shift_add", "--evaluate", "missing.safetensors"), "not a safetensors file with a tensor input_ids"),
        (("-p", "shift_add", "--example-inputs", "cli_models.py"), "not a safetensors file of example inputs"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused(run: Run, module: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(run("optimize", "cli_models:plain", *arguments))
    assert [p.name for p in module.glob("*.*")] == ["cli_models.py"]


def test_a_plan_that_is_none_or_newer_is_refused(run: Run, module: Path) -> None:
    (module / "plan.json").write_text("[]")
    apply = ("apply", "cli_models:plain", "--plan", "plan.json", "--out", "out")
    assert "rewriter plan --out writes one" in refused(run(*apply))
    (module / "plan.json").write_text('{"schema": 99}')
    assert "plan schema 99 is not one this version reads (1 to 2)" in refused(run(*apply))
    assert not (module / "out").exists()


@pytest.mark.parametrize(
    "arguments", [("optimise",), ("plan", "x:y"), ("plan", "x:y", "-p", "fuse", "--calibration-rows", "0")]
)
def test_usage_errors_are_two(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr
