# SPDX-License-Identifier: Apache-2.0
"""Files that cannot be read or written, and Ctrl-C in the middle: a clear error, and nothing half-done remains.

Attacks on single files of a saved model are in ``tests/engine/test_storage.py``.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unchanged import X, language_model, mlp, unchanged

import rewriter
from rewriter.errors import CaptureError, ExportError, LoadError

# --------------------------------------------------------------------------------------------------------- saved files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    rewriter.optimize(mlp(), ["shift_add"], X).save(path)
    return path


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _load_refusal(path: Path) -> str:
    before = {f: f.read_bytes() for f in path.parent.rglob("*") if f.is_file()}
    with pytest.raises(LoadError) as caught:
        rewriter.load(path)
    assert {f: f.read_bytes() for f in path.parent.rglob("*") if f.is_file()} == before
    return str(caught.value)


def test_the_saved_folder_loads(saved: Path) -> None:
    assert rewriter.load(saved)(X).shape == (2, 64)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "graph.json", "plan.json"])
def test_a_truncated_file(broken: Path, name: str) -> None:
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[: len(content) // 2])
    assert name in _load_refusal(broken)


def test_a_newer_file(broken: Path) -> None:
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["version"] += 1
    (broken / "manifest.json").write_text(json.dumps(manifest))
    message = _load_refusal(broken)
    assert "newer" in message
    assert str(manifest["version"]) in message


def test_a_foreign_folder_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("hello")
    assert "notes" in _load_refusal(tmp_path / "notes")
    assert "is not a folder" in _load_refusal(tmp_path / "notes" / "readme.txt")
    assert "is not a folder" in _load_refusal(tmp_path / "nowhere")


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_in_place_of_the_weights_is_never_unpickled(broken: Path, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    (broken / "model.safetensors").write_bytes(pickle.dumps(_Bomb(fired)))
    assert "model.safetensors" in _load_refusal(broken)
    assert not fired.exists()


def test_code_where_a_shape_is_expected_is_never_run(broken: Path, tmp_path: Path) -> None:
    """Also with digests that fit: they protect against accidents, not against authors."""
    import hashlib

    fired = tmp_path / "fired"
    graph = (broken / "graph.json").read_text()
    symbol = next(iter(json.loads(graph)["programs"][0]["graph"]["symbols"]))
    attack = f"__import__('os').system('touch {fired}')"
    tampered = graph.replace(f'"{symbol}"', json.dumps(attack))
    assert tampered != graph
    (broken / "graph.json").write_text(tampered)
    manifest = json.loads((broken / "manifest.json").read_text())
    record = manifest["files"]["graph.json"]
    digest = hashlib.sha256(tampered.encode()).hexdigest()
    manifest["files"]["graph.json"] = digest if isinstance(record, str) else {**record, "sha256": digest}
    (broken / "manifest.json").write_text(json.dumps(manifest))
    message = _load_refusal(broken)
    assert "digest" not in message, "refused for what it says"
    assert not fired.exists()


def test_a_model_that_does_not_fit_the_saved_calls(saved: Path) -> None:
    opt = rewriter.load(saved)
    with pytest.raises(CaptureError, match=r"no model to capture it from.*rewriter.load\(path, model=…\)"):
        opt(X[None])


# -------------------------------------------------------------------------------------------------------- output paths


@pytest.fixture(scope="module")
def opt() -> rewriter.Optimized:
    return rewriter.optimize(mlp(), ["shift_add"], X)


def _everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


WRITERS: dict[str, Callable[[rewriter.Optimized, Path], Any]] = {
    "save": lambda opt, path: opt.save(path),
    "export_onnx": lambda opt, path: opt.export_onnx(path),
    "export_pt2": lambda opt, path: opt.export_pt2(path),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("place", ["file/below", "file\0null", "/proc/nowhere/model"])
def test_an_unwritable_path(opt: rewriter.Optimized, tmp_path: Path, writer: str, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    before = _everything(tmp_path)
    with unchanged(opt), pytest.raises(ExportError, match=r"cannot write .*choose another path"):
        WRITERS[writer](opt, tmp_path / place)
    assert _everything(tmp_path) == before


@pytest.mark.parametrize("writer", ["export_onnx", "export_pt2"])
def test_an_unwritable_path_is_refused_before_the_work(
    opt: rewriter.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setattr(torch.export, "export", work)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="cannot write"):
        WRITERS[writer](opt, tmp_path / "file" / "below")


def test_somebody_elses_folder_is_not_replaced(opt: rewriter.Optimized, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds files that were not written by this function"):
        opt.save(tmp_path)
    assert _everything(tmp_path) == {str(tmp_path / "thesis.txt"): b"mine"}


# -------------------------------------------------------------------------------------------------------- interruption


def _rules_of_a_fresh_call(model: nn.Module) -> list[str]:
    return [site.rule for site in rewriter.optimize(model, ["fuse"]).plan.sites]


@pytest.mark.parametrize("stage", ["capture", "plan", "rewrite"])
def test_an_interruption_restores_the_callers_state(stage: str) -> None:
    model = language_model()
    model.model.layers[0].mlp.eval()
    model.lm_head.train()  # modes of single modules are the caller's too

    def interrupt(what: str, done: int, total: int) -> None:
        if what.partition(" ")[0] == stage:
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        rewriter.optimize(model, ["fuse", "shift_add"], progress=interrupt)
    assert _rules_of_a_fresh_call(model) == ["fuse.qkv", "fuse.gate_up"], "the next call works"


def test_an_interruption_while_export_traces_restores_the_callers_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst place: torch has its modes pushed and the model's configuration is switched over."""
    model = language_model()
    forward = nn.Linear.forward

    def interrupted(self: nn.Linear, x: Tensor) -> Tensor:
        if x.shape[-1] == 48:  # the last linear of the block
            raise KeyboardInterrupt
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", interrupted)
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            rewriter.optimize(model, ["fuse"])
    assert _rules_of_a_fresh_call(model) == ["fuse.qkv", "fuse.gate_up"]


@pytest.mark.parametrize("writer", WRITERS)
def test_an_interruption_while_writing_keeps_the_old_content(
    opt: rewriter.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    path = tmp_path / "model"
    WRITERS[writer](opt, path)
    before = _everything(tmp_path)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)  # everything is written, nothing is in its place
    with pytest.raises(KeyboardInterrupt):
        WRITERS[writer](opt, path)
    assert _everything(tmp_path) == before
