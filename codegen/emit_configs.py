# SPDX-License-Identifier: Apache-2.0
"""Which configurations of a kernel leave room for what was fused into it: a model of shared memory and registers.

    shared     buffers · (BM·BK + BK·BN) · bytes per element; the pipeline has a buffer for every stage where matrix
               instructions read shared memory (sm_90, sm_100), and one less where they read registers
    registers  accumulator and epilogue tiles in float32, operands of the product as they are, all over the threads;
               and 40 for addresses, masks and counters

It is there to leave out early what cannot fit, not to predict: what it lets through is compiled and checked like any kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.codegen.emit_templates import Hooked
from rewriter.kernels.launching import Config

SHARED = 163 * 1024  # bytes of the smallest chip NVIDIA configurations are for (sm_80)
SHARED_HIP = 64 * 1024  # gfx942
# Per thread: 255, less what decoding a packed weight takes. Calibrated with the ahead-of-time compiler: what needs 200 by
# this count spills nowhere, what needs 216 (tiles of 128×64 by four warps, packed, with a residual) does on sm_100.
REGISTERS = 208
_LOOP = 40  # registers for addresses, masks and loop counters
_WARP = {"cuda": 32, "hip": 64}


@dataclass(frozen=True)
class Need:
    """What a configuration is expected to take: bytes of shared memory, registers per thread."""

    shared: int
    registers: int


def need(config: Config, element_size: int, tiles: int, backend: str = "cuda", *, reads_shared: bool = False) -> Need:
    """What the product of a tile takes.

    Args:
        config: with constants BM, BN and BK; what it has not counts as one.
        element_size: bytes of an activation.
        tiles: operands of the accumulator's size that are in registers beside it.
        backend: "cuda" or "hip".
        reads_shared: whether matrix instructions read shared memory.
    """
    rows, columns, depth = (_size(config.constants, name) for name in ("BM", "BN", "BK"))
    buffers = config.num_stages if reads_shared else max(config.num_stages - 1, 1)
    threads = config.num_warps * _WARP[backend]
    loaded, acc = (rows * depth + depth * columns) * element_size, rows * columns
    alive = acc * (1 + tiles) + loaded // 4
    return Need(buffers * loaded, _LOOP + alive // threads)


def fitting(kernel: Hooked, tiles: int) -> list[Config]:
    """The configurations of a kernel with room for ``tiles`` operands of the accumulator's size, in their order.

    The smallest stays in any case: something has to run.
    """
    found: list[Config] = []
    for request in kernel.requests:
        element_size = max((a.element_size() for a in request.args.values() if _is_real(a)), default=4)
        kept = [config for config in request.configs if fits(config, element_size, tiles)]
        found += [config for config in kept or request.configs[:1] if config not in found]
    return found


def fits(config: Config, element_size: int, tiles: int) -> bool:
    """Whether there is room for it on every chip it is meant for."""
    hip = config.only == "cuda" or need(config, element_size, tiles, "hip").shared <= SHARED_HIP
    needed = need(config, element_size, tiles)
    cuda = config.only == "hip" or (needed.shared <= SHARED and needed.registers <= REGISTERS)
    return hip and cuda


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _size(constants: Mapping[str, object], name: str) -> int:
    value = constants.get(name, 1)
    return value if isinstance(value, int) else 1
