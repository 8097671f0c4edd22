# SPDX-License-Identifier: Apache-2.0
"""Uniform grids as MatMulNBits, which keeps them packed in memory; every other grid keeps its function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx_sites import relative_error, run
from torch import Tensor, nn

import rewriter
from rewriter.passes import ShiftAdd


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


class Block(nn.Module):
    """Two layers, one without bias, one shared, and a row width that no block divides."""

    def __init__(self, width: int = 100) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.tanh(self.up(x)))
        return self.down(torch.tanh(self.up(h)))


def uniform(x: Tensor, **options: Any) -> rewriter.Optimized:
    torch.manual_seed(0)
    model = Block(x.shape[-1]).to(x.dtype).eval()
    return rewriter.optimize(model, [ShiftAdd(mode="uniform", **options)], example_inputs=(x,))


@pytest.mark.parametrize("width, bits, group", [(100, 4, 32), (100, 4, 512), (300, 4, 96), (96, 2, 64), (600, 4, 1000)])
def test_uniform_grids_become_matmul_nbits(width: int, bits: int, group: int, tmp_path: Path) -> None:
    x = torch.randn(2, 5, width)
    opt = uniform(x, bits=bits, group=group)
    packed = opt.export_onnx(tmp_path / "packed.onnx", contrib=True)
    assert operators(tmp_path / "packed.onnx").count("MatMulNBits") == 4
    assert packed.functions == ()
    tensors = {t.name: t for t in onnx.load(tmp_path / "packed.onnx").graph.initializer}
    assert not any(name.endswith(("_codes", "_shift")) for name in tensors)
    for name, inputs in (("up", width), ("down", 64)):
        _, blocks, block = tensors[f"{name}.weight_nbits"].dims
        assert (block * 8 // bits) * (blocks - 1) < inputs <= (block * 8 // bits) * blocks
    for other in (x, torch.randn(3, 1, width)):
        assert relative_error(run(tmp_path / "packed.onnx", x=other)[0], opt(other)) <= 2e-6


def test_half_precision(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 128).half()
    opt = uniform(x, group=64)
    opt.export_onnx(tmp_path / "m.onnx", contrib=True)
    assert "MatMulNBits" in operators(tmp_path / "m.onnx")
    golden = opt.to_module().double()(x.double())
    loss = relative_error(opt(x).detach().numpy(), golden)
    assert relative_error(run(tmp_path / "m.onnx", x=x)[0], golden) <= 2 * loss + 2.0**-11


def test_zero_groups_are_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 8)
    with torch.no_grad():
        layer.weight[:, 32:64] = 0
        layer.weight[3] = 0
    x = torch.randn(2, 96)
    opt = rewriter.optimize(layer, [ShiftAdd(mode="uniform", group=32)], example_inputs=(x,))
    opt.export_onnx(tmp_path / "m.onnx", contrib=True)
    assert operators(tmp_path / "m.onnx").count("MatMulNBits") == 1
    assert relative_error(run(tmp_path / "m.onnx", input=x)[0], opt(x)) <= 2e-6


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 4, "group": 24}, {"mode": "bcq", "scale": "fp16"}, {"mode": "apot"}]
)
def test_other_grids_keep_their_functions(options: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(2, 5, 100)
    opt = uniform(x, **({"group": 32} | options)) if "mode" not in options else None
    if opt is None:
        torch.manual_seed(0)
        opt = rewriter.optimize(Block().eval(), [ShiftAdd(group=32, **options)], example_inputs=(x,))
    result = opt.export_onnx(tmp_path / "m.onnx", contrib=True)
    assert len(result.functions) == 1
    assert "MatMulNBits" not in operators(tmp_path / "m.onnx")
    assert relative_error(run(tmp_path / "m.onnx", x=x)[0], opt(x)) <= 2e-6
