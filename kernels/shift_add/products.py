# SPDX-License-Identifier: Apache-2.0
"""``y = x Wᵀ + b`` on the CPU for a packed W that compiled code can decode (`Weight`).

A few rows of x are bound by the bytes of W: the packed weight is read once, each weight is decoded in registers and
multiplied at once. Many rows are bound by arithmetic: some rows of W at a time are decoded to dense, and are still in
the cache when torch's own product reads them. Which is faster for a batch is measured. Sums are float32 in both.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import choosing, native
from rewriter.kernels.shift_add import codec

BLOCK, LANES = 128, 16  # columns decoded together, in vectors of LANES: as in linear.h
TILE = 8  # rows of x a weight is decoded for, at most; so many are never worth decoding to memory for
PIECE = 1 << 20  # weights decoded to dense at a time: 4 MiB of float32
GRAIN = 1 << 17  # weights to decode that are worth a thread: some 5 µs
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # `Type` of lanes.h

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_WEIGHT = [*[_POINTER] * 4, _INT, *[_LONG] * 3]
FUNCTIONS = {
    "multiply": [*_WEIGHT, *[_POINTER] * 4, _LONG, _INT, _INT],
    "decode": [*_WEIGHT, _POINTER, _LONG, _LONG, _INT],
    "order": [_POINTER, _POINTER, _LONG, _LONG, _INT],
}


@dataclass(frozen=True)
class Weight:
    """A packed weight ``[out, width]`` and the library built for its format.

    Attributes:
        library: has `FUNCTIONS`.
        tensors: four, contiguous or None; the second are the scales. What they are is the format's business.
    """

    library: ctypes.CDLL
    tensors: tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]
    out: int
    width: int
    group: int

    @property
    def arguments(self) -> tuple[int | None, ...]:
        """What every function of the library begins with. Addresses: keep the weight alive."""
        addresses = map(native.address, self.tensors)
        return (*addresses, TYPES[self.tensors[1].dtype], self.out, self.width, self.group)

    @property
    def padded(self) -> int:
        """Columns in whole blocks."""
        return codec.ceil_div(self.width, BLOCK) * BLOCK


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``[..., width] -> [..., out]`` in x's dtype, one of `TYPES`."""
    rows = x.reshape(-1, weight.width)
    batch = rows.shape[0]
    if not batch or not weight.out:
        return x.new_empty((*x.shape[:-1], weight.out))
    compute = multiplied
    if batch > TILE:
        ways = {way.__name__: way for way in (multiplied, through_dense)}
        sizes = (choosing.bucket(size) for size in (batch, weight.width, weight.out))
        kind = (weight.library._name.rpartition("/")[2], x.dtype, *sizes, torch.get_num_threads())
        measured = {name: partial(way, rows, weight, bias) for name, way in ways.items()}
        compute = ways[choosing.fastest(" ".join(map(str, kind)), measured)]
    return compute(rows, weight, bias).to(x.dtype).view(*x.shape[:-1], weight.out)


def multiplied(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Each weight decoded once per tile of rows; float32 ``[batch, out]``."""
    batch, out = rows.shape[0], weight.out
    tile = min(TILE, choosing.bucket(batch))
    tiles = codec.ceil_div(batch, tile)
    rows = rows.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    scratch = rows.new_empty(tiles * tile * weight.padded)
    result = rows.new_empty((batch, out))
    threads = native.threads(tiles * out * weight.width, GRAIN)
    addresses = map(native.address, (rows, scratch, bias, result))
    weight.library.multiply(*weight.arguments, *addresses, batch, tile, threads)
    return result


def through_dense(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Some rows of W at a time, decoded and rounded to the activations' dtype, columns in the order of lanes."""
    batch, out = rows.shape[0], weight.out
    threads, step = torch.get_num_threads(), max(1, PIECE // weight.padded)
    wide = rows.to(torch.float32).contiguous()
    ordered = wide.new_empty((batch, weight.padded))
    weight.library.order(native.address(wide), native.address(ordered), batch, weight.width, threads)
    ordered = ordered.to(rows.dtype)
    bias = None if bias is None else bias.to(rows.dtype)
    dense = wide.new_empty((min(step, out), weight.padded))
    result = rows.new_empty((batch, out))
    for begin in range(0, out, step):
        end = min(begin + step, out)
        weight.library.decode(*weight.arguments, native.address(dense), begin, end, threads)
        piece = dense[: end - begin].to(rows.dtype)
        result[:, begin:end] = F.linear(ordered, piece, None if bias is None else bias[begin:end])
    return result
