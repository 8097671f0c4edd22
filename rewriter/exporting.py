# SPDX-License-Identifier: Apache-2.0
"""Exports for others: ONNX for any runtime, MLIR for other compilers, ``.pt2`` for PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewriter.capturing import capture
from rewriter.errors import ExportError
from rewriter.files import atomic_file, check_writable
from rewriter.optimized import Optimized
from rewriter.program import Program

if TYPE_CHECKING:
    from rewriter.codegen.mlir import MlirExport
    from rewriter.codegen.onnx_export import ExportResult


def export_onnx(
    model_or_optimized: nn.Module | Optimized | Program, path: str | Path, opset: int = 24, *, contrib: bool = False
) -> ExportResult:
    """Write ONNX that plain ONNX Runtime (CPU) runs.

    New operators are model-local functions over standard ones; codes stay packed uint8 in the file, floating tensors
    whose values all are fp16 values are stored as float16; batch and sequence are dynamic; names lead back to modules.

    Args:
        model_or_optimized: an :class:`Optimized`, a :class:`Program`, or any module with inferable inputs.
        path: the file; weights above 2 GB go to ``<path>.data`` beside it.
        opset: 20 to 25.
        contrib: use operators of ``com.microsoft`` where one means the same: weights then stay packed in memory too, and
            only ONNX Runtime runs the file.

    Raises:
        ExportError: an operator without translation, an opset out of range, or an unwritable path.
        CaptureError: a module that cannot be captured.
    """
    from rewriter.codegen.onnx_export import export_program

    program = _program(model_or_optimized)
    return export_program(
        program.graph_module,
        path,
        program.example,
        input_names=program.input_names(),
        output_names=program.output_names(),
        opset=opset,
        contrib=contrib,
    )


def export_mlir(
    model_or_optimized: nn.Module | Optimized | Program,
    path: str | Path,
    dialect: str = "torch",
    *,
    static: bool = False,
) -> MlirExport:
    """Write MLIR made by torch-mlir (extra ``mlir``): one function ``main`` of flat tensors, weights inside.

    Operators of this package are inlined as aten; codes stay packed bytes. Locations are module paths.

    Args:
        model_or_optimized: an :class:`Optimized`, a :class:`Program`, or any module with inferable inputs.
        path: the file: bytecode where it ends in ``.mlirbc``, else text.
        dialect: ``torch``, ``linalg-on-tensors``, ``stablehlo`` or ``tosa``.
        static: fix every size to the example's; all dialects but ``torch`` need it where sizes are dynamic.

    Raises:
        ExportError: torch-mlir is not installed, an operator without lowering (with its site), dynamic sizes where the
            dialect has none, or an unwritable path.
        CaptureError: a module that cannot be captured.
    """
    from rewriter.codegen import mlir
    from rewriter.codegen.mlir_process import require

    require("torch_mlir")
    check_writable(path)
    mlir.check_dialect(dialect)
    program = _program(model_or_optimized)
    module = mlir.lower(
        program.graph_module,
        program.example,
        dialect,
        static=static,
        input_names=program.input_names(),
        output_names=program.output_names(),
    )
    return mlir.write(module, path)


def export_pt2(model_or_optimized: nn.Module | Optimized | Program, path: str | Path) -> None:
    """Write a ``torch.export`` archive in which the package's operators are inlined as aten, so that it loads without
    this package. Reading one is trusting its author: PyTorch unpickles it.

    Raises:
        ExportError: torch refuses the program, or the path is not writable.
    """
    from rewriter.codegen.decomposition import inline

    check_writable(path)
    program = _program(model_or_optimized)
    dims = tuple(
        {d: _dim(s) for d, s in enumerate(n.meta["val"].shape)} for n in program.graph.find_nodes(op="placeholder")
    )
    try:
        exported = torch.export.export(
            _Callable(inline(program.graph_module)), tuple(program.example), dynamic_shapes=(dims,), strict=False
        )
    except Exception as error:
        raise ExportError(f"torch.export refuses the rewritten program: {error}") from error
    with atomic_file(path) as temporary:
        torch.export.save(exported, temporary)


class _Callable(nn.Module):
    """A graph module as a module of flat tensors."""

    def __init__(self, graph_module: nn.Module) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, *tensors: Tensor) -> Any:
        return self.graph_module(*tensors)


def _dim(size: Any) -> Any:
    return torch.export.Dim.AUTO if isinstance(size, torch.SymInt) else None


def _program(model: nn.Module | Optimized | Program) -> Program:
    if isinstance(model, Program):
        return model
    return model.program if isinstance(model, Optimized) else capture(model)
