# SPDX-License-Identifier: Apache-2.0
"""Runs as a program of its own: MLIR passes, and compiled code that may be wrong.

Some inputs make a pass of torch-mlir, or the code it makes, end the process (feasible inputs too: a null pointer, a
native assertion, freed memory). So neither happens in the caller's process: `mlir_process` starts this file with the
caller's interpreter. It needs torch_mlir and the standard library only, which start in 0.2 s; torch takes ten times that.

    python mlir_worker.py lower INPUT OUTPUT PIPELINE...   bytecode in, bytecode out
    python mlir_worker.py run FOLDER                       compile FOLDER/module.mlirbc and call it once

``run`` reads ``FOLDER/call.json``: ``{"inputs": [{"shape": […], "type": "f32"}, …]}``, and the tensors' bytes from
``input_<i>``; it writes ``output_<i>`` and ``results.json`` of the same form. Diagnostics go to stderr.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from pathlib import Path
from typing import Any

# Bytes of one element; what a call may take and give.
WIDTHS = {"i1": 1, "i8": 1, "ui8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}

# Order follows torch-mlir's reference back end: bufferise, loops, LLVM.
_TO_LLVM = (
    "func.func(linalg-generalize-named-ops)",
    "func.func(linalg-fuse-elementwise-ops)",
    "convert-shape-to-std",
    "func.func(refback-generalize-tensor-pad)",
    "func.func(refback-generalize-tensor-concat)",
    "func.func(tm-tensor-bufferize)",
    "one-shot-bufferize{copy-before-write bufferize-function-boundaries"
    " function-boundary-type-conversion=identity-layout-map}",
    "refback-mlprogram-bufferize",
    "buffer-deallocation-pipeline",
    "convert-bufferization-to-memref",
    "func.func(tm-tensor-to-loops)",
    "func.func(refback-munge-memref-copy)",
    "func.func(convert-linalg-to-loops)",
    "func.func(lower-affine)",
    "convert-vector-to-scf{full-unroll=true}",
    "convert-scf-to-cf",
    "func.func(refback-expand-ops-for-llvm)",
    "func.func(arith-expand{include-bf16})",
    "func.func(convert-math-to-llvm)",
    "convert-math-to-libm",
    "expand-strided-metadata",
    "lower-affine",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-vector-to-llvm",
    "convert-index-to-llvm",
    "convert-ub-to-llvm",  # without it ub.poison has no translation
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "convert-complex-to-llvm",
    "reconcile-unrealized-casts",
)


def lower(source: Path, target: Path, pipelines: list[str]) -> None:
    """Apply the pass pipelines in order."""
    with new_context() as context:
        module = parse(source.read_bytes(), context)
        for pipeline in pipelines:
            _apply(pipeline, module)
        with target.open("wb") as file:
            module.operation.write_bytecode(file)


def run(folder: Path) -> None:
    """Compile ``main`` of ``module.mlirbc`` (linalg on tensors, static shapes) and call it once."""
    from torch_mlir import ir
    from torch_mlir.execution_engine import ExecutionEngine

    inputs = json.loads((folder / "call.json").read_text())["inputs"]
    with new_context() as context:
        module = parse((folder / "module.mlirbc").read_bytes(), context)
        main = next(op for op in module.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main")
        main.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
        results = [ir.RankedTensorType(t) for t in ir.FunctionType(main.attributes["function_type"].value).results]
        kinds = [(tuple(t.shape), str(t.element_type)) for t in results]
        _apply(f"builtin.module({','.join(_TO_LLVM)})", module)
        engine = ExecutionEngine(module, opt_level=0)  # it runs once; optimising takes longer than running
        # Memory of the inputs has to live until the call is over.
        blocks = [ctypes.create_string_buffer((folder / f"input_{i}").read_bytes()) for i in range(len(inputs))]
        given = [_given(block, tuple(x["shape"])) for block, x in zip(blocks, inputs, strict=True)]
        returned = _structure([(f"r{i}", _memref(len(shape))) for i, (shape, _) in enumerate(kinds)])()
        pointers = [ctypes.pointer(p) for p in (ctypes.pointer(returned), *map(ctypes.pointer, given))]
        packed = (ctypes.c_void_p * len(pointers))(*[ctypes.cast(p, ctypes.c_void_p) for p in pointers])
        engine.initialize()
        engine.lookup("main")(ctypes.cast(packed, ctypes.c_void_p))
    for i, (shape, kind) in enumerate(kinds):
        (folder / f"output_{i}").write_bytes(_taken(getattr(returned, f"r{i}"), shape, WIDTHS[kind]))
    described = [{"shape": list(shape), "type": kind} for shape, kind in kinds]
    (folder / "results.json").write_text(json.dumps({"outputs": described}))


# -- modules -------------------------------------------------------------------------------------------------------


def new_context() -> Any:
    """A context that knows every dialect torch-mlir writes."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect

    context = ir.Context()
    torch_dialect.register_dialect(context)
    # Some passes report an error and go on; unread, the next pass meets a broken module.
    context.emit_error_diagnostics = True
    # stablehlo and tm_tensor have no bindings: a context knows them once a pass that makes them has run, be it on nothing.
    with context:
        loader = "builtin.module(func.func(convert-torch-to-stablehlo,convert-torch-to-tmtensor))"
        _apply(loader, ir.Module.parse("module {}"))
    return context


def parse(bytecode: bytes, context: Any) -> Any:
    """The module. Raises MLIRError."""
    from torch_mlir import ir

    return ir.Module.parse(bytecode, context)


def _apply(pipeline: str, module: Any) -> None:
    from torch_mlir.passmanager import PassManager

    PassManager.parse(pipeline).run(module.operation)


# -- memory --------------------------------------------------------------------------------------------------------
# A memref is {allocated pointer, aligned pointer, offset, sizes[rank], strides[rank]}; offset and strides in elements.


def _structure(fields: list[tuple[str, Any]]) -> type[ctypes.Structure]:
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


def _memref(rank: int) -> type[ctypes.Structure]:
    dims = [("sizes", ctypes.c_int64 * rank), ("strides", ctypes.c_int64 * rank)] if rank else []
    head: list[tuple[str, Any]] = [
        ("allocated", ctypes.c_void_p),
        ("aligned", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
    ]
    return _structure([*head, *dims])


def _given(block: ctypes.Array[ctypes.c_char], shape: tuple[int, ...]) -> ctypes.Structure:
    address = ctypes.addressof(block)
    if not shape:
        return _memref(0)(address, address, 0)
    integers = ctypes.c_int64 * len(shape)
    return _memref(len(shape))(address, address, 0, integers(*shape), integers(*_strides(shape)))


def _taken(memref: Any, shape: tuple[int, ...], width: int) -> bytes:
    """The elements; results are contiguous, as bufferising with identity layouts has it."""
    if shape and any(
        size > 1 and stride != dense
        for size, stride, dense in zip(shape, memref.strides, _strides(shape), strict=True)
    ):
        raise ValueError(f"a result of shape {list(shape)} has strides {list(memref.strides)}")
    return ctypes.string_at(memref.aligned + memref.offset * width, math.prod(shape) * width)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def main(arguments: list[str]) -> int:
    try:
        if arguments[0] == "lower":
            lower(Path(arguments[1]), Path(arguments[2]), arguments[3:])
        else:
            run(Path(arguments[1]))
    except Exception as reason:  # whatever it is, the parent reads it
        sys.stderr.write(f"{type(reason).__name__}: {reason}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
