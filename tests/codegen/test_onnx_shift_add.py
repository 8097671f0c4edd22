# SPDX-License-Identifier: Apache-2.0
"""ShiftAdd in ONNX Runtime: the table operators, and uniform grids as MatMulNBits, which keeps them packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_sites import half_values, relative_error, run
from torch import Tensor, nn

import rewriter
from rewriter.codegen.onnx_export import ExportResult, export_program
from rewriter.kernels.shift_add.codec import ceil_div, pack_stream
from rewriter.passes import ShiftAdd

ops = torch.ops.rewriter


class LevelLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bits: int = 4, group: int = 16, *, bias: bool = True) -> None:
        super().__init__()
        self.layout = (bits, group, inputs)
        self.register_buffer("weight_codes", pack_stream(torch.randint(0, 1 << bits, (outputs, inputs)), bits))
        self.weight_scale = nn.Parameter(half_values(outputs, ceil_div(inputs, group)))
        self.register_buffer("weight_levels", torch.randn(1 << bits))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.level_linear(x, self.weight_codes, self.weight_scale, self.weight_levels, self.bias, *self.layout)


class LevelEmbedding(LevelLinear):
    def forward(self, ids: Tensor) -> Tensor:
        return ops.level_embedding(ids, self.weight_codes, self.weight_scale, self.weight_levels, *self.layout)


def exported(module: nn.Module, x: Tensor, path: Path, **options: Any) -> ExportResult:
    program = rewriter.capture(module.eval(), (x,))
    return export_program(program.graph_module, path, program.example, input_names=["x"], **options)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@settings(deadline=None, max_examples=8)
@given(
    inputs=st.integers(1, 40),
    outputs=st.integers(2, 9),
    bits=st.integers(1, 12),
    group=st.integers(1, 48),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_tables(inputs: int, outputs: int, bits: int, group: int, bias: bool, seed: int, tmp_path_factory: Any) -> None:
    torch.manual_seed(seed)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    layer = LevelLinear(inputs, outputs, bits, group, bias=bias)
    result = exported(layer, torch.randn(2, 3, inputs), path)
    assert result.functions == ("LevelLinear",)
    for x in (torch.randn(2, 3, inputs), torch.randn(5, 1, inputs)):
        assert relative_error(run(path, x=x)[0], layer(x), floor=1.0) <= 2e-6
    table = LevelEmbedding(inputs, outputs, bits, group)
    exported(table, torch.zeros(2, 3, dtype=torch.int64), path)
    ids = torch.randint(0, outputs, (4, 5))
    assert relative_error(run(path, x=ids)[0], table(ids), floor=1.0) <= 1e-6


@pytest.mark.parametrize("opset", [20, 25])
def test_tables_at_the_ends_of_the_opsets(opset: int, tmp_path: Path) -> None:
    layer, x = LevelLinear(21, 11), torch.randn(2, 5, 21)
    exported(layer, x, tmp_path / "m.onnx", opset=opset)
    assert relative_error(run(tmp_path / "m.onnx", x=x)[0], layer(x), floor=1.0) <= 2e-6


# ---------------------------------------------------------------------------------- MatMulNBits


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


@pytest.mark.parametrize(
    "width, bits, group", [(100, 4, 32), (128, 4, 128), (100, 4, 512), (300, 4, 96), (96, 2, 64), (600, 4, 1000)]
)
def test_uniform_grids_become_matmul_nbits(width: int, bits: int, group: int, tmp_path: Path) -> None:
    x = torch.randn(2, 5, width)
    opt = uniform(x, bits=bits, group=group)
    plain = opt.export_onnx(tmp_path / "plain.onnx")
    packed = opt.export_onnx(tmp_path / "packed.onnx", contrib=True)
    assert operators(tmp_path / "packed.onnx").count("MatMulNBits") == 4
    assert packed.functions == () and plain.functions == ("BcqLinear",)
    assert packed.bytes < 1.25 * plain.bytes
    names = {t.name for t in onnx.load(tmp_path / "packed.onnx").graph.initializer}
    assert not any(name.endswith(("_codes", "_shift")) for name in names)
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
