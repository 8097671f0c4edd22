# SPDX-License-Identifier: Apache-2.0
"""Which configuration a kernel runs with: measured once per kernel source, GPU, dtypes and shape bucket, then kept.

Sizes are rounded up to powers of two for the key, so that a growing sequence is not measured at every length. Nothing is
measured while a CUDA graph is being captured: the first configuration serves, and a later call outside measures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.choosing import Choices, bucket
from rewriter.kernels.launching import Config, Request, Start

BACKEND = "cuda" if torch.version.hip is None else "hip"
WARMUP, REPEAT = 10, 30  # milliseconds a configuration is run for before its time is taken, and while
GPU = Choices("triton.json")

Timer = Callable[[Start], float]


def pick(request: Request, *, backend: str = BACKEND, timer: Timer | None = None, choices: Choices = GPU) -> Config:
    """The fastest configuration for these arguments, measured if it is not known yet.

    Args:
        request: what is to run.
        backend: of the device, "cuda" or "hip"; configurations for the other are left out.
        timer: time of a start, to compare; it raises Triton's `OutOfResources` for what does not fit the device.
            Default: its median on the device.
        choices: where choices are kept.

    Raises:
        RuntimeError: no configuration fits the device.
    """
    configs = request.choices(backend)
    if len(configs) == 1:
        return configs[0]
    named = {config.text: config for config in configs}
    kind = key(request, backend)
    if not choices.knows(kind, named) and _capturing():
        return configs[0]
    return named[choices.among(kind, named, lambda: _measured(request, named, timer or _on_device))]


def key(request: Request, backend: str = BACKEND) -> str:
    """Digest of everything the choice depends on: a kernel's source and those it calls, GPU, dtypes, buckets of sizes."""
    first = next(a for a in request.args.values() if isinstance(a, Tensor))
    device = torch.cuda.get_device_name(first.device) if first.is_cuda else first.device.type
    args = tuple([(name, _bucketed(value)) for name, value in request.args.items()])
    constants = tuple([(name, str(value)) for name, value in request.constants.items()])
    configs = tuple([config.text for config in request.choices(backend)])
    return _digest((request.kernel.cache_key, device, backend, args, constants, configs))


@lru_cache(maxsize=4096)  # every start of a kernel asks
def _digest(parts: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded, in which nothing may be timed: that waits for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _bucketed(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(bucket(value))
    return type(value).__name__


def _measured(request: Request, configs: dict[str, Config], timer: Timer) -> str:
    """The name of the fastest; those that do not fit the device are left out.

    Kernels may add into their results, so all run on copies of the tensors.
    """
    from triton.runtime.errors import OutOfResources

    copies = {name: a.clone() if isinstance(a, Tensor) else a for name, a in request.args.items()}
    scratch = Request(request.kernel, request.grid, copies, request.constants, request.configs)
    times: dict[str, float] = {}
    for name, config in configs.items():
        try:
            times[name] = timer(scratch.start(config))
        except OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"no configuration of {request.kernel.__name__} fits this device: {'; '.join(configs)}")
    return min(times, key=lambda name: times[name])


def _on_device(start: Start) -> float:
    """Median milliseconds, the cache of the device emptied before each run."""
    from triton.testing import do_bench

    return float(do_bench(start.run, warmup=WARMUP, rep=REPEAT, return_mode="median"))
