# SPDX-License-Identifier: Apache-2.0
"""Tversky projections in ONNX Runtime: the function and its overloads, and similarities that are traced."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.passes.tversky.modules import Similarity, TverskyProjection

onnxruntime = pytest.importorskip("onnxruntime")


class Side(nn.Module):
    """Several projections of one input: one file for all of them, because exporting takes its time."""

    def __init__(self, *projections: nn.Module) -> None:
        super().__init__()
        self.projections = nn.ModuleList(projections)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(projection(x) for projection in self.projections)


def export(module: nn.Module, x: Tensor, path: Path) -> onnx.ModelProto:
    opt = rewriter.optimize(module.eval(), [], (x,))
    rewriter.export_onnx(opt, path)
    return onnx.load(path)


def run(path: Path, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def agree(path: Path, module: nn.Module) -> None:
    x = torch.randn(4, 7, 5)  # other sizes than it was captured with
    for found, expected in zip(run(path, x), module(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def projection(similarity: Similarity, present: str) -> TverskyProjection:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(6, 5, generator=g)
    prototypes = torch.randn(4, 6 if similarity.projected else 5, generator=g)
    given: dict[str, Tensor] = {
        "theta": torch.tensor(1.5), "alpha": torch.rand(4, generator=g), "beta": torch.tensor(0.3),
        "negative": torch.tensor(0.6), "bias": torch.randn(4, generator=g),
    }  # fmt: skip
    chosen = {name: given[name] for name in present.split()}
    return TverskyProjection(features, prototypes, **chosen, similarity=similarity)


def test_the_product_contrast_is_one_function(tmp_path: Path) -> None:
    cases = [
        ("theta alpha beta negative bias", Similarity(), "Tversky"),
        ("", Similarity(), "Tversky"),
        ("theta alpha beta", Similarity(), "Tversky"),
        ("theta alpha negative bias", Similarity(mirrored=True, projected=True), "TverskyMirroredProjected"),
        ("alpha", Similarity(projected=True), "TverskyProjected"),
        ("beta negative", Similarity(mirrored=True), "TverskyMirrored"),
    ]
    module = Side(*(projection(similarity, present) for present, similarity, _ in cases))
    model = export(module, torch.randn(2, 3, 5), tmp_path / "model.onnx")
    called = [n.op_type for n in model.graph.node if n.domain == "ai.rewriter"]
    assert sorted(called) == sorted(name for _, _, name in cases)
    agree(tmp_path / "model.onnx", module)


def test_other_similarities_are_standard_operators(tmp_path: Path) -> None:
    similarities = [
        Similarity("min", "paper", "subtractmatch", "ratio"),
        Similarity("gmean", "paper", mirrored=True),
        Similarity("softmin", "code", "subtractmatch"),
        Similarity("max", "paper", form="ratio", projected=True),
    ]
    module = Side(*(projection(similarity, "theta alpha beta") for similarity in similarities))
    model = export(module, torch.randn(2, 3, 5), tmp_path / "model.onnx")
    assert not model.functions
    agree(tmp_path / "model.onnx", module)


def test_a_rewritten_layer_agrees_with_the_dense_one(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    opt = rewriter.optimize(dense, [rewriter.passes.Tversky(init="signed_pair")], (torch.randn(2, 8),))
    rewriter.export_onnx(opt, tmp_path / "model.onnx")
    x = torch.randn(5, 8)
    torch.testing.assert_close(run(tmp_path / "model.onnx", x)[0], dense(x), rtol=1e-5, atol=1e-5)
