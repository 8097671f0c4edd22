# SPDX-License-Identifier: Apache-2.0
"""The oracle: a lowered module compiled to plain loops by LLVM and run once, in a child process.

It judges what lowering did to the numbers, and needs nothing but torch-mlir. It is slow (20 to 50 times eager on matrix
products) and may die where a lowering is wrong, which is an error here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewriter.codegen.mlir import ELEMENTS, MlirModule
from rewriter.codegen.mlir_process import require, run_worker
from rewriter.errors import ExportError

_BY_ELEMENT = {name: dtype for dtype, name in ELEMENTS.items()}


def run_oracle(module: MlirModule, *inputs: Tensor) -> list[Tensor]:
    """The outputs of ``main``.

    Args:
        module: in ``linalg-on-tensors``, with static sizes.
        inputs: one tensor per input, of its shape and dtype, on any device.

    Raises:
        ExportError: another dialect, dynamic sizes, inputs that do not fit, or the compiled code died.
    """
    require("torch_mlir")
    if module.dialect != "linalg-on-tensors":
        raise ExportError(f"the oracle runs linalg-on-tensors, not {module.dialect}; lower to that")
    if module.is_dynamic:
        raise ExportError("the oracle needs static sizes; lower with static=True")
    check_inputs(module, inputs)
    with tempfile.TemporaryDirectory(prefix="rewriter-mlir-") as name:
        folder = Path(name)
        (folder / "module.mlirbc").write_bytes(module.bytecode)
        described = [{"shape": list(t.shape), "type": ELEMENTS[t.dtype]} for t in inputs]
        (folder / "call.json").write_text(json.dumps({"inputs": described}))
        for i, tensor in enumerate(inputs):
            (folder / f"input_{i}").write_bytes(_bytes(tensor))
        run_worker(["run", folder], "run the module by the execution engine", module.origins)
        found = json.loads((folder / "results.json").read_text())["outputs"]
        return [
            _tensor((folder / f"output_{i}").read_bytes(), port.dtype, tuple(x["shape"]))
            for i, (port, x) in enumerate(zip(module.outputs, found, strict=True))
        ]


def check_inputs(module: MlirModule, inputs: Sequence[Tensor]) -> None:
    """Refuse tensors that are not what ``main`` takes: compiled code would not. Raises ExportError."""
    if len(inputs) != len(module.inputs):
        raise ExportError(f"main takes {len(module.inputs)} tensors, not {len(inputs)}")
    for port, tensor in zip(module.inputs, inputs, strict=True):
        fits = tensor.dtype is port.dtype and tensor.dim() == len(port.shape)
        if not fits or any(s not in (None, n) for s, n in zip(port.shape, tensor.shape, strict=True)):
            raise ExportError(f"main takes {port}, not {tuple(tensor.shape)} {tensor.dtype}")


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def _tensor(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # bytearray: a tensor on memory that may not be written to would be a trap.
    raw = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return raw.reshape(shape)
