# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not here, and read what they take: registers, spills, shared memory, instructions.

A `Start` (`rewriter.kernels.launching`) has everything the compiler specialises on: dtypes of tensors, which numbers are
1 or divisible by 16, constants, warps, stages. So what is compiled is what a device with these arguments would run.
Triton brings the assemblers of NVIDIA and AMD along; no driver is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError

from rewriter.errors import ExportError
from rewriter.kernels.launching import Start

ALIGNMENT = 16  # bytes of pointers, and divisor of numbers, for which Triton compiles wider loads


@dataclass(frozen=True)
class Target:
    """A chip to compile for.

    Attributes:
        name: "sm_90", "gfx942".
        gpu: Triton's name of it.
        shared: bytes of shared memory (LDS) one program may have.
        registers: 32-bit registers one thread may have; for AMD, vector and accumulation registers together.
        matrix: its matrix instructions, the widest first.
    """

    name: str
    gpu: GPUTarget
    shared: int
    registers: int
    matrix: tuple[str, ...]


# Shared memory per block: CUDA C++ programming guide, technical specifications per compute capability (163 and 227 KiB);
# LDS and registers: AMD Instinct MI300 instruction set architecture (64 KiB, 512 registers).
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, 255, ("mma.sync",)),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, 255, ("wgmma.mma_async", "mma.sync")),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, 255, ("tcgen05.mma", "mma.sync")),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 512, ("v_mfma",)),
    )
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target.

    Attributes:
        kernel: its name.
        target: the chip's name.
        registers: per thread.
        spills: bytes per thread that did not fit into registers.
        shared: bytes per program.
        matrix: matrix instructions in its assembly, the target's widest first.
        warps: per program.
        narrowed: products asked for in float32 are done in TF32 (Triton 3.7 does so for some tiles on sm_100).
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    matrix: tuple[str, ...]
    warps: int
    narrowed: bool = False

    def faults(self) -> list[str]:
        """Why it would not run well, or at all, on its target."""
        limit = TARGETS[self.target]
        return [
            *([f"{self.spills} bytes spilled per thread"] if self.spills else []),
            *(
                [f"{self.shared} bytes of shared memory, {limit.shared} there are"]
                if self.shared > limit.shared
                else []
            ),
            *(["float32 is multiplied as TF32"] if self.narrowed else []),
            *([f"{self.registers} registers, {limit.registers} there are"] if self.registers > limit.registers else []),
        ]


def compile(start: Start, target: str | Target) -> Compiled:
    """Compile a kernel as a device with these arguments would.

    Triton keeps what it compiled in its own cache (``TRITON_CACHE_DIR``).

    Raises:
        ExportError: the kernel does not compile for the target; the compiler's message is in the text.
    """
    chip = TARGETS[target] if isinstance(target, str) else target
    artifact, name = built(start, chip), str(start.kernel.__name__)
    registers, spills = _amd(artifact.asm["amdgcn"]) if chip.gpu.backend == "hip" else _nvidia(artifact.asm["cubin"])
    text = artifact.asm["amdgcn" if chip.gpu.backend == "hip" else "ptx"]
    found = tuple(instruction for instruction in chip.matrix if instruction in text)
    shared, warps = int(artifact.metadata.shared), int(artifact.metadata.num_warps)
    narrowed = "ieee" in start.constants.values() and "tf32" in text
    return Compiled(name, chip.name, registers, spills, shared, found, warps, narrowed)


def built(start: Start, chip: Target) -> Any:
    """What Triton makes of a start, from its cache where it is there. Raises ExportError."""
    source = ASTSource(start.kernel, *_specialised(start))
    options = {"num_warps": start.num_warps, "num_stages": start.num_stages}
    try:
        return triton.compile(source, target=chip.gpu, options=options)
    except (CompilationError, RuntimeError) as error:
        raise ExportError(f"kernel {start.kernel.__name__} does not compile for {chip.name}: {error}") from error


# --- what the just-in-time compiler would specialise on -----------------------------------------------------


def _specialised(start: Start) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and divisibility by position, as `triton.jit` derives them from a call."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(start.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(start.kernel.arg_names):
        if name in start.constants:
            signature[name] = "constexpr"
            continue
        value = start.args[name]
        signature[name] = _type(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif _divisible(value):
            attributes[(position,)] = [["tt.divisibility", ALIGNMENT]]
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_ELEMENTS[value.dtype]}"
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel takes tensors and numbers, not {type(value).__name__}")


def _divisible(value: Any) -> bool:
    if isinstance(value, Tensor):  # storages begin aligned
        return value.storage_offset() * value.element_size() % ALIGNMENT == 0
    return isinstance(value, int) and value % ALIGNMENT == 0


_ELEMENTS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}

# --- reading the results ------------------------------------------------------------------------------------


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread. Our kernels have no arrays of their own, so the stack is spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    return int(_number(r"REG:(\d+)", listing)), int(_number(r"STACK:(\d+)", listing))


@cache
def _cuobjdump() -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")


def _amd(assembly: str) -> tuple[int, int]:
    """Vector registers, those for accumulation included, and bytes of scratch per thread."""
    registers = int(_number(r"\.vgpr_count:\s+(\d+)", assembly))
    return registers, int(_number(r"\.private_segment_fixed_size:\s+(\d+)", assembly))


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ExportError(f"the assembler's listing has no {pattern!r}; this Triton writes another format")
    return found[1]
