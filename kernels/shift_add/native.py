# SPDX-License-Identifier: Apache-2.0
"""The ShiftAdd layers on the CPU, from packed codes: decoded in registers, or piece by piece into the cache.

``y = x Wᵀ + b``. A few rows of x are bound by the bytes of W: the packed weight is read once, each weight is decoded
in registers and multiplied at once (``bcq.cpp``). Many rows are bound by arithmetic: some rows of W at a time are
decoded to dense, still in cache when torch's own product reads them. Sums are float32 in both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import native
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.shift_add import codec, reference

_HERE = Path(__file__).parent
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int

BLOCK = 128  # columns that are decoded together; those of linear.h
TILE = 8  # rows of x a weight is decoded for, at most
PIECE = 1 << 20  # weights decoded at a time: 4 MiB of float32
GRAIN = 1 << 17  # products worth a thread: some 5 µs
# Rows of x from which decoding to dense is faster.
MANY = 48

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # `Type` of lanes.h

_WEIGHT = [_POINTER] * 4 + [_INT] + [_LONG] * 3
_BCQ = {
    "multiply": [*_WEIGHT, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _INT, _INT],
    "decode": [*_WEIGHT, _POINTER, _LONG, _LONG, _INT],
    "order": [_POINTER, _POINTER, _LONG, _LONG, _INT],
}


def bcq_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    group: int,
    in_features: int,
) -> Tensor:
    """`reference.bcq_linear` for float32, float16 and bfloat16.

    Raises:
        ValueError: arguments that do not fit together, as the reference.
        Unsupported: another dtype, or no compiler.
    """
    reference.check_bcq(codes, scale, shift, group, in_features)
    reference.check_linear(x, bias, codes.shape[0], in_features)
    _check_types(x, scale, bias)
    bits, parts = codes.shape[1], tables_per_block(group, in_features)
    first = None
    if parts == 0:
        scale, shift = codec.bcq_alpha(scale, shift, bits, torch.float32), None
        first = _scale_positions(group, in_features, bits)
    library = _bcq(bits, parts, shift is not None)
    kept = [None if t is None else t.contiguous() for t in (codes, scale, shift, first)]
    weight = (*map(native.address, kept), TYPES[scale.dtype], codes.shape[0], in_features, group)
    return _linear(library, weight, x, bias, codes.shape[0])


def tables_per_block(group: int, in_features: int) -> int:
    """Groups in 128 columns: 1 (or part of one), 2 or 4; 0 where groups do not fall on such borders."""
    if group >= in_features or group % BLOCK == 0:
        return 1
    return next((parts for parts in (2, 4) if group % (BLOCK // parts) == 0), 0)


@cache
def _bcq(bits: int, parts: int, shared: bool) -> ctypes.CDLL:
    macros = {"BITS": bits, "PARTS": parts, "SHARED": int(shared)}
    return native.library(_HERE / "bcq.cpp", macros, _BCQ)


@lru_cache(maxsize=64)
def _scale_positions(group: int, in_features: int, bits: int) -> Tensor:
    """Where the scales of each weight begin in its row, int32 by block, vector and lane (`place` of ``bcq.cpp``)."""
    k, lane = torch.arange(8).unsqueeze(-1), torch.arange(16)
    place = 64 * (k % 2) + 4 * lane + k // 2
    start = torch.arange(0, in_features, BLOCK).view(-1, 1, 1)
    return ((start + place).clamp(max=in_features - 1) // group * bits).to(torch.int32).contiguous()


# ---------------------------------------------------------------------------------- any packed weight


def _check_types(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in TYPES:
            raise Unsupported(f"{tensor.dtype}: native kernels compute in float32")


Weight = tuple[int | None, ...]


def _linear(library: ctypes.CDLL, weight: Weight, x: Tensor, bias: Tensor | None, out: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not rows.numel() or not out:
        return x.new_zeros((*x.shape[:-1], out))
    compute: Callable[..., Tensor] = _multiplied if rows.shape[0] < MANY else _through_dense
    return compute(library, weight, rows, bias, out).to(x.dtype).view(*x.shape[:-1], out)


def _multiplied(library: ctypes.CDLL, weight: Weight, rows: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """Each weight decoded once per tile of rows; float32."""
    batch, width = rows.shape
    tile = min(TILE, 1 << (batch - 1).bit_length())
    rows = rows.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    scratch = rows.new_empty(codec.ceil_div(batch, tile) * tile * _padded(width))
    result = rows.new_empty((batch, out))
    threads = native.threads(out * width * codec.ceil_div(batch, tile), GRAIN)
    tensors = map(native.address, (rows, scratch, bias, result))
    library.multiply(*weight, *tensors, batch, tile, threads)
    return result


def _through_dense(library: ctypes.CDLL, weight: Weight, rows: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """Some rows of W at a time, decoded and rounded to the dtype of the activations; columns in the order of lanes."""
    batch, width = rows.shape
    threads, step = torch.get_num_threads(), max(1, PIECE // _padded(width))
    wide = rows.to(torch.float32).contiguous()
    ordered = wide.new_empty((batch, _padded(width)))
    library.order(native.address(wide), native.address(ordered), batch, width, threads)
    ordered = ordered.to(rows.dtype)
    bias = None if bias is None else bias.to(rows.dtype)
    dense = wide.new_empty((min(step, out), _padded(width)))
    result = rows.new_empty((batch, out))
    for begin in range(0, out, step):
        end = min(begin + step, out)
        library.decode(*weight, native.address(dense), begin, end, threads)
        piece = dense[: end - begin].to(rows.dtype)
        result[:, begin:end] = F.linear(ordered, piece, None if bias is None else bias[begin:end])
    return result


def _padded(width: int) -> int:
    return codec.ceil_div(width, BLOCK) * BLOCK
