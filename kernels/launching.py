# SPDX-License-Identifier: Apache-2.0
"""How a Triton kernel is started: a *request* says everything, and a *runner* carries it out.

A device implementation of an operator allocates its results and calls `launch`. What happens then is decided outside:
on a GPU the kernel runs with the configuration `tuning` picked; the tests interpret it on the CPU; the kernels report,
`rewriter kernels` and the compile gate only record what would be started, from tensors without data, and compile that
ahead of time. So there is one description of every start, and none is written for the checks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]


class Unsupported(Exception):
    """Arguments a device implementation does not do, as text. The operator then runs its reference."""


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel: block sizes and other constants, warps per program, stages of the pipeline.

    ``only`` is the back end, "cuda" or "hip", whose chips alone have room for it.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    only: str | None = None

    @cached_property
    def text(self) -> str:
        """``BM=16, BN=64, 4 warps, 3 stages``."""
        constants = [f"{name}={value}" for name, value in self.constants.items()]
        return ", ".join([*constants, f"{self.num_warps} warps", f"{self.num_stages} stages"])


@dataclass(frozen=True)
class Request:
    """A kernel to start.

    Attributes:
        kernel: a function under ``@triton.jit``.
        grid: number of programs, from the constants of the chosen configuration.
        args: run-time arguments by name: tensors, numbers, None (which is compiled in).
        constants: ``tl.constexpr`` arguments common to all configurations.
        configs: ways to compile it, the one to use where nothing was measured first; that one fits every chip.
    """

    kernel: Any
    grid: Callable[[Mapping[str, Any]], Grid]
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    configs: Sequence[Config]

    def choices(self, backend: str) -> list[Config]:
        """The configurations for a back end, "cuda" or "hip"."""
        return [config for config in self.configs if config.only in (None, backend)]

    def start(self, config: Config) -> Start:
        constants = {**self.constants, **config.constants}
        return Start(self.kernel, self.grid(constants), self.args, constants, config.num_warps, config.num_stages)


@dataclass(frozen=True)
class Start:
    """A request with one of its configurations."""

    kernel: Any
    grid: Grid
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """On the device of the arguments, on its current stream."""
        device = next(a.device for a in self.args.values() if isinstance(a, Tensor))
        with torch.cuda.device(device):
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[self.grid](**self.args, **self.constants, **options)


Runner = Callable[[Request], None]


def _on_device(request: Request) -> None:
    from rewriter.kernels import tuning

    request.start(tuning.pick(request)).run()


_runner: ContextVar[Runner] = ContextVar("runner", default=_on_device)


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, Any]], Grid],
    args: Mapping[str, Any],
    constants: Mapping[str, Any],
    configs: Sequence[Config],
) -> None:
    """Start a kernel; see `Request` for the arguments. A grid without programs starts nothing."""
    request = Request(kernel, grid, args, constants, configs)
    if 0 not in request.start(configs[0]).grid:
        _runner.get()(request)


@contextmanager
def running(runner: Runner) -> Iterator[None]:
    """Carry out requests by ``runner`` inside, in this thread."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


@contextmanager
def recorded() -> Iterator[list[Request]]:
    """Start nothing inside, and collect what would be started. Tensors on the meta device are enough."""
    requests: list[Request] = []
    with running(requests.append):
        yield requests


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 is multiplied as float32 unless the user allowed TF32 for matmul.

    Triton's own default would be TF32, ten bits of mantissa, whatever ``torch.set_float32_matmul_precision`` says.
    """
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@dataclass(frozen=True)
class Shipped:
    """A call whose kernels are compiled ahead of time for every target and checked (``make kernels-report``).

    Attributes:
        name: of the case, for people.
        function: the device implementation.
        arguments: makes its arguments, on the meta device.
        matrix: what must be in the assembly of at least one of its kernels: "tensor core" for the target's widest
            matrix instruction, "mma" for any (small tiles), "none" where there is no product to compute.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], Sequence[Any]]
    matrix: str = "tensor core"

    def requests(self) -> list[Request]:
        with recorded() as requests:
            self.function(*self.arguments())
        return requests
