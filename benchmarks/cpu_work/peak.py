# SPDX-License-Identifier: Apache-2.0
"""The other bound beside memory: how many operations the processor does in a second, in registers (``peak.cpp``)."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from rewriter.kernels import native

_FLAGS = (*native.FLAGS, "-fopenmp")
_FUNCTIONS = {"peak": [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]}


@cache
def peak(threads: int, dtype: torch.dtype) -> float:
    """Operations per second in float32 or bfloat16, a multiply-add being two; 0 where there are no such instructions."""
    library = native.library(Path(__file__).with_name("peak.cpp"), {}, _FUNCTIONS, _FLAGS)
    sums, found = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    library.peak(threads, dtype is torch.bfloat16, native.address(sums), native.address(found))
    return float(found)
