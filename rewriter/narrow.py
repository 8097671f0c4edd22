# SPDX-License-Identifier: Apache-2.0
"""Lossless narrowing: a wide floating tensor whose every value is a half-precision number is stored as one.

Scales and codebooks are rounded to half precision by the passes that make them, so they take two bytes in the
file whatever the model computes in; nothing is ever rounded here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20  # values checked at a time: bounds the extra memory to a few megabytes
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def fits_float16(tensor: Tensor) -> bool:
    """Whether a float32 or float64 tensor survives a round trip through float16 bit for bit.

    The sign of zero counts. Infinities and NaN stay wide. False for every other dtype.
    """
    bits = _BITS.get(tensor.dtype)
    if bits is None:
        return False
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].contiguous()
        half = chunk.to(torch.float16)
        same = half.to(tensor.dtype).view(bits) == chunk.view(bits)
        if not bool((same & half.isfinite()).all()):
            return False
    return True


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor has neither NaN nor infinities, in a few megabytes of extra memory."""
    flat = tensor.detach().reshape(-1)
    return all(bool(torch.isfinite(chunk).all()) for chunk in flat.split(_CHUNK))


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype a tensor has in the file."""
    return torch.float16 if fits_float16(tensor) else tensor.dtype


def stored_bytes(tensor: Tensor) -> int:
    """Bytes the tensor's values take in the file, after lossless narrowing; headers and names not counted."""
    return tensor.numel() * stored_dtype(tensor).itemsize
