# SPDX-License-Identifier: Apache-2.0
"""Which configuration a kernel runs with: measured once per kernel source, GPU, dtypes and shape bucket, then kept.

Sizes are rounded up to powers of two for the key, so that a growing sequence is not measured at every length. Nothing is
measured while a CUDA graph is being captured: the first configuration serves, and a later call outside measures.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import cache as files
from rewriter.kernels.launching import Config, Request

_FILE = "triton.json"
_BACKEND = "cuda" if torch.version.hip is None else "hip"
_lock = threading.Lock()


def pick(request: Request) -> Config:
    """The fastest configuration for these arguments, measured if it is not known yet."""
    configs = request.choices(_BACKEND)
    if len(configs) == 1:
        return configs[0]
    known, name = _known(), key(request)
    if name not in known:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        with _lock:
            if name not in known:
                known[name] = _measure(request, configs)
                _keep(known)
    return configs[known[name] % len(configs)]


def key(request: Request) -> str:
    """Digest of everything the choice depends on."""
    first = next(a for a in request.args.values() if isinstance(a, Tensor))
    device = torch.cuda.get_device_name(first.device) if first.is_cuda else first.device.type
    parts = {
        "kernel": request.kernel.cache_key,
        "device": device,
        "args": {name: _bucket(value) for name, value in request.args.items()},
        "constants": {name: str(value) for name, value in request.constants.items()},
        "configs": [[dict(c.constants), c.num_warps, c.num_stages] for c in request.configs],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _bucket(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(1 << max(value - 1, 0).bit_length())
    return type(value).__name__


def _measure(request: Request, configs: Sequence[Config]) -> int:
    """Position of the configuration with the smallest median time; those that do not fit the device are left out.

    Kernels may add into their results, so each runs on copies of the tensors.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    copies = {name: a.clone() if isinstance(a, Tensor) else a for name, a in request.args.items()}
    scratch = Request(request.kernel, request.grid, copies, request.constants, request.configs)
    times: dict[int, float] = {}
    for position, config in enumerate(configs):
        try:
            times[position] = float(do_bench(scratch.start(config).run, warmup=10, rep=30, return_mode="median"))
        except OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"no configuration of {request.kernel.__name__} fits this device")
    return min(times, key=lambda position: times[position])


@cache
def _known() -> dict[str, int]:
    stored = files.read_json(files.folder("tuning") / _FILE)
    return {name: position for name, position in stored.items() if isinstance(position, int) and position >= 0}


def _keep(known: dict[str, int]) -> None:
    """Written with what other processes found meanwhile."""
    path = files.folder("tuning") / _FILE
    files.write(path, json.dumps({**files.read_json(path), **known}, indent=1, sort_keys=True).encode())
