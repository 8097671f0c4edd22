# SPDX-License-Identifier: Apache-2.0
"""IREE: compiles a lowered module for this machine's CPU and runs it on torch tensors.

IREE takes every dialect that torch-mlir writes. ``torch`` is the one to give it: it is compiled best, and alone has
dynamic sizes (see docs/mlir.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewriter.codegen.mlir import MlirModule
from rewriter.codegen.mlir_oracle import check_inputs
from rewriter.codegen.mlir_process import failure, require
from rewriter.errors import ExportError

_INPUT_TYPES = {"torch": "torch", "linalg-on-tensors": "auto", "stablehlo": "stablehlo", "tosa": "tosa"}
_DEVICES = ("local-task", "local-sync")

# -O3 without one of its parts. "Aggressive fusion" (from -O2 on; "all backends dont support it yet", says its help) puts
# the producers of a padded or reduced tensor into one dispatch with it, which the CPU back end of IREE 3.13 then cannot
# place: several linear attentions ("write affecting operations on global resources are restricted ..."), masks of
# attention with dynamic sizes ("exceeded stack allocation limit").
_FLAGS = (
    "--iree-llvmcpu-target-cpu=host",
    "--iree-opt-level=O3",
    "--iree-dispatch-creation-enable-aggressive-fusion=false",
    # A small weight in bfloat16 that is copied into a dispatch gets a type its bytes do not have ("'arith.constant' op
    # failed to verify"); left where it is, it is right.
    "--iree-flow-inline-constants-max-byte-length=0",
)

# numpy has no bfloat16: those tensors travel as 16-bit integers and are called by their name on both sides.
_CARRIERS = {torch.bfloat16: torch.int16}
_ELEMENTS = {
    torch.float64: "FLOAT_64",
    torch.float32: "FLOAT_32",
    torch.float16: "FLOAT_16",
    torch.bfloat16: "BFLOAT_16",
    torch.int64: "SINT_64",
    torch.int32: "SINT_32",
    torch.int16: "SINT_16",
    torch.int8: "SINT_8",
    torch.uint8: "UINT_8",
    torch.bool: "BOOL_8",
}


@dataclass(frozen=True)
class IreeProgram:
    """A compiled ``main``: call it with one torch tensor per input, get the list of outputs.

    Attributes:
        binary: what IREE compiled, for this machine's processor; ``iree-run-module --module=FILE`` runs it too.
        module: what it was compiled from.
    """

    binary: bytes
    module: MlirModule
    _context: Any
    _function: Any
    _device: Any

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs, new tensors on the CPU. Raises ExportError where inputs do not fit, or IREE refuses them."""
        import iree.runtime as runtime

        check_inputs(self.module, inputs)
        given, taken = runtime.VmVariantList(len(inputs)), runtime.VmVariantList(len(self.module.outputs))
        for tensor in inputs:
            given.push_ref(self._view(tensor))
        try:
            self._context.invoke(self._function, given, taken)
        except Exception as reason:
            raise ExportError(f"IREE cannot run the program on these inputs: {_first_line(reason)}") from reason
        views = [taken.get_as_object(i, runtime.HalBufferView) for i in range(len(self.module.outputs))]
        return [self._tensor(view, port.dtype) for view, port in zip(views, self.module.outputs, strict=True)]

    def _view(self, tensor: Tensor) -> Any:
        import iree.runtime as runtime

        carried = tensor.detach().cpu().contiguous().view(_CARRIERS.get(tensor.dtype, tensor.dtype))
        return self._device.allocator.allocate_buffer_copy(
            memory_type=runtime.MemoryType.DEVICE_LOCAL,
            allowed_usage=runtime.BufferUsage.DEFAULT,
            device=self._device,
            buffer=carried.numpy(),
            element_type=getattr(runtime.HalElementType, _ELEMENTS[tensor.dtype]),
        )

    @staticmethod
    def _tensor(view: Any, dtype: torch.dtype) -> Tensor:
        carrier = _CARRIERS.get(dtype, dtype)
        width = torch.empty(0, dtype=carrier).element_size()
        # The mapping lives as long as the view; the tensor must not.
        content = view.map().asarray(list(view.shape), np.dtype(f"i{width}")).copy()
        return torch.from_numpy(content).view(dtype)


def compile_program(module: MlirModule, *, device: str = "local-task") -> IreeProgram:
    """Compile a lowered module for this machine's CPU.

    Args:
        module: of any dialect.
        device: ``local-task`` runs on all processors, ``local-sync`` on the calling thread.

    Raises:
        ExportError: IREE is not installed, or refuses the module; names operator and site.
    """
    require("iree.compiler", "iree.runtime")
    if device not in _DEVICES:
        raise ExportError(f"{device!r} is no CPU device of IREE; choose one of {', '.join(_DEVICES)}")
    import iree.compiler as compiler
    import iree.runtime as runtime

    try:
        binary: bytes = compiler.tools.compile_str(
            module.bytecode,
            input_type=_INPUT_TYPES[module.dialect],
            target_backends=["llvm-cpu"],
            extra_args=list(_FLAGS),
        )
    except compiler.tools.CompilerToolError as reason:
        raise failure(f"compile {module.dialect} by IREE", str(reason), module.origins, _status(reason)) from reason
    config = runtime.Config(device)
    loaded = runtime.VmModule.copy_buffer(config.vm_instance, binary)
    context = runtime.SystemContext(config=config)
    context.add_vm_module(loaded)
    return IreeProgram(binary, module, context.vm_context, loaded.lookup_function("main"), config.device)


def _status(reason: Exception) -> int:
    for line in str(reason).splitlines():
        if line.startswith("Error code:"):
            return int(line.partition(":")[2])
    return 1


def _first_line(reason: Exception) -> str:
    return next((line for line in str(reason).splitlines() if line.strip()), type(reason).__name__)
