# SPDX-License-Identifier: Apache-2.0
"""What ``rewriter export`` writes and shows, by format: a rich table and data for ``--json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

import rewriter
from rewriter.layout import add, human_bytes, table


def onnx(source: Any, out: Path, opset: int) -> tuple[Table, dict[str, Any]]:
    made = rewriter.export_onnx(source, out, opset=opset)
    data = {
        "path": str(made.path),
        "bytes": made.bytes,
        "opset": made.opset,
        "ir_version": made.ir_version,
        "external_data": made.external_data,
        "functions": list(made.functions),
        "inputs": [vars(p) for p in made.inputs],
        "outputs": [vars(p) for p in made.outputs],
    }
    rows = table("ONNX", str(made.path))
    add(rows, "size", human_bytes(made.bytes) + (" with external data" if made.external_data else ""))
    add(rows, "opset, IR version", f"{made.opset}, {made.ir_version}")
    for kind, ports in (("input", made.inputs), ("output", made.outputs)):
        for port in ports:
            add(rows, kind, f"{port.name} {port.dtype.lower()}[{', '.join(map(str, port.shape))}]")
    add(rows, "functions", ", ".join(made.functions) or "none: standard operators only")
    return rows, data


def mlir(source: Any, out: Path, dialect: str, static: bool) -> tuple[Table, dict[str, Any]]:
    made = rewriter.export_mlir(source, out, dialect, static=static)
    data = {
        "path": str(made.path),
        "bytes": made.bytes,
        "dialect": made.dialect,
        "inputs": [_port(p) for p in made.inputs],
        "outputs": [_port(p) for p in made.outputs],
    }
    rows = table("MLIR", str(made.path))
    add(rows, "size", human_bytes(made.bytes))
    add(rows, "dialect", made.dialect)
    for kind, ports in (("input", made.inputs), ("output", made.outputs)):
        for port in ports:
            add(rows, kind, str(port))
    return rows, data


def _port(port: Any) -> dict[str, Any]:
    return {"name": port.name, "dtype": str(port.dtype).removeprefix("torch."), "shape": list(port.shape)}
