# SPDX-License-Identifier: Apache-2.0
"""Lowering to MLIR by torch-mlir: dialects ``torch``, ``linalg-on-tensors``, ``stablehlo`` and ``tosa``.

graph of the dialect ──inline, trace, decompose──▶ core aten ──import──▶ torch dialect ──passes, in a child process──▶ module

Locations of the module are module paths, so that a compiler's message names the site.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from rewriter.codegen import mlir_tracing, mlir_worker
from rewriter.codegen.mlir_process import Origin, require, run_worker
from rewriter.errors import ExportError
from rewriter.files import atomic_file, check_writable

_BACKEND = (
    "builtin.module(func.func(torch-match-quantized-custom-ops),"
    "torchdynamo-export-to-torch-backend-pipeline{extra-library=})"
)
_PIPELINES = {
    "torch": (_BACKEND,),
    "linalg-on-tensors": (_BACKEND, "builtin.module(torch-backend-to-linalg-on-tensors-backend-pipeline)"),
    "stablehlo": (_BACKEND, "builtin.module(torch-backend-to-stablehlo-backend-pipeline)"),
    "tosa": (_BACKEND, "builtin.module(torch-backend-to-tosa-backend-pipeline)"),
}
DIALECTS = tuple(_PIPELINES)
DEFAULT_DIALECT = "torch"

# MLIR's names of the element types; "i1" and signless integers are how torch's come out of every lowering.
ELEMENTS = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "ui8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Port:
    """An input or output: name, element type, sizes (None where dynamic)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = "x".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {sizes + 'x' if sizes else ''}{ELEMENTS[self.dtype]}"


@dataclass(frozen=True)
class MlirModule:
    """A lowered program: one function ``main`` of tensors, weights inside.

    Attributes:
        bytecode: MLIR bytecode, with locations.
        dialect: one of `DIALECTS`.
        inputs, outputs: of ``main``, flat, in order.
        origins: what the numbers in the locations stand for.
    """

    bytecode: bytes
    dialect: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    origins: tuple[Origin, ...]

    @property
    def is_dynamic(self) -> bool:
        return any(size is None for port in self.inputs for size in port.shape)

    def text(self, *, weights: bool = True) -> str:
        """The module as text; the same from run to run.

        Args:
            weights: False leaves tensors of more than 16 elements out (for reading; no compiler takes it).
        """
        module = mlir_worker.parse(self.bytecode, mlir_worker.new_context())
        options: dict[str, Any] = {} if weights else {"large_elements_limit": 16, "large_resource_limit": 16}
        found: str = module.operation.get_asm(enable_debug_info=weights, **options)
        return found


@dataclass(frozen=True)
class MlirExport:
    """What was written: the file, its size, dialect, and the ports of ``main``."""

    path: Path
    bytes: int
    dialect: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class Imported:
    """A program in the raw torch dialect, before any pass; `lower` makes a module of it.

    Attributes:
        bytecode: the raw torch dialect.
        inputs, outputs, origins: as in `MlirModule`.
        byte_arithmetic: the first operator that computes with unsigned bytes, which tosa has not.
    """

    bytecode: bytes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    origins: tuple[Origin, ...]
    byte_arithmetic: Origin | None

    def lower(self, dialect: str = DEFAULT_DIALECT) -> MlirModule:
        """Lower to one of `DIALECTS`, in a child process.

        Raises:
            ExportError: the dialect is none or has no dynamic sizes, or an operator has no lowering; names its site.
        """
        check_dialect(dialect)
        if dialect != DEFAULT_DIALECT and any(size is None for port in self.inputs for size in port.shape):
            raise ExportError(_no_dynamic_sizes(dialect))
        if dialect == "tosa" and self.byte_arithmetic is not None:
            raise ExportError(
                f"{self.byte_arithmetic.operator} at {self.byte_arithmetic.site} computes with uint8, and tosa has no "
                "unsigned integers; convert to int32 first, or choose another dialect"
            )
        with tempfile.TemporaryDirectory(prefix="rewriter-mlir-") as folder:
            source, target = Path(folder) / "raw.mlirbc", Path(folder) / "lowered.mlirbc"
            source.write_bytes(self.bytecode)
            run_worker(["lower", source, target, *_PIPELINES[dialect]], f"lower to {dialect}", self.origins)
            return MlirModule(target.read_bytes(), dialect, self.inputs, self.outputs, self.origins)


def import_program(
    graph_module: fx.GraphModule,
    example: Sequence[Tensor],
    *,
    static: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Imported:
    """Import a graph of the dialect.

    Args:
        graph_module: flat tensor placeholders, flat outputs; not changed.
        example: one tensor per placeholder, of valid values.
        static: fix every size to the example's; needed for all dialects but ``torch`` where the graph is dynamic.
        input_names, output_names: of the ports (default: of the placeholders; ``output_0``, ...).

    Raises:
        ExportError: torch-mlir is not installed, the example does not fit, or the graph cannot be traced or imported.
    """
    require("torch_mlir")
    program = mlir_tracing.trace(graph_module, example, static=static)
    inputs, outputs = _ports(program, input_names, output_names)
    origins, bytes_at = mlir_tracing.locate(program.graph), mlir_tracing.byte_arithmetic(program.graph)
    return Imported(_import(program), inputs, outputs, origins, bytes_at)


def lower(
    graph_module: fx.GraphModule,
    example: Sequence[Tensor],
    dialect: str = DEFAULT_DIALECT,
    *,
    static: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> MlirModule:
    """`import_program` and `Imported.lower` in one; refuses a dialect the graph's sizes rule out before any work."""
    require("torch_mlir")
    check_dialect(dialect)
    if dialect != DEFAULT_DIALECT and not static and mlir_tracing.is_dynamic(graph_module.graph):
        raise ExportError(_no_dynamic_sizes(dialect))
    imported = import_program(
        graph_module, example, static=static, input_names=input_names, output_names=output_names
    )
    return imported.lower(dialect)


def write(module: MlirModule, path: str | os.PathLike[str]) -> MlirExport:
    """Write a module: MLIR bytecode where the name ends in ``.mlirbc``, else text. Raises ExportError."""
    target = check_writable(path, ExportError)
    content = module.bytecode if target.suffix == ".mlirbc" else module.text().encode()
    with atomic_file(target, ExportError) as temporary:
        temporary.write_bytes(content)
    return MlirExport(target, len(content), module.dialect, module.inputs, module.outputs)


def check_dialect(dialect: str) -> None:
    """Refuse what is no dialect. Raises ExportError."""
    if dialect not in _PIPELINES:
        raise ExportError(f"{dialect!r} is no dialect to lower to; choose one of {', '.join(DIALECTS)}")


def _no_dynamic_sizes(dialect: str) -> str:
    """stablehlo and tosa have no lowering for whole models with dynamic sizes; linalg has one that computes wrongly."""
    why = "is wrong" if dialect == "linalg-on-tensors" else "does not exist"
    return (
        f"the program has dynamic sizes, for which torch-mlir's lowering to {dialect} {why}; pass static=True to fix them "
        'to the example\'s, capture with dynamic_shapes="static", or choose the dialect torch'
    )


# -- ports -----------------------------------------------------------------------------------------------------------


def _ports(
    program: torch.export.ExportedProgram, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    given = set(program.graph_signature.user_inputs)
    placeholders = [n for n in program.graph.find_nodes(op="placeholder") if n.name in given]
    results: Any = program.graph.output_node().args[0]
    inputs = tuple(input_names or (n.name for n in placeholders))
    outputs = tuple(output_names or (f"output_{i}" for i in range(len(results))))
    return (
        tuple(_port(name, node) for name, node in zip(inputs, placeholders, strict=True)),
        tuple(_port(name, node) for name, node in zip(outputs, results, strict=True)),
    )


def _port(name: str, node: fx.Node) -> Port:
    value = node.meta["val"]
    if value.dtype not in ELEMENTS:
        raise ExportError(f"{name} is {value.dtype}, which has no MLIR element type here")
    return Port(name, value.dtype, tuple(int(s) if is_concrete_int(s) else None for s in value.shape))


# -- passes ----------------------------------------------------------------------------------------------------------


def _import(program: torch.export.ExportedProgram) -> bytes:
    """The raw torch dialect as bytecode."""
    from torch_mlir.extras.fx_importer import FxImporter

    importer = FxImporter(context=mlir_worker.new_context())
    try:
        importer.import_frozen_program(program)
    except Exception as reason:
        raise ExportError(f"torch-mlir cannot import the program: {type(reason).__name__}: {reason}") from reason
    stream = io.BytesIO()
    importer.module.operation.write_bytecode(stream)
    return stream.getvalue()
