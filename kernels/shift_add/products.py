# SPDX-License-Identifier: Apache-2.0
"""``y = x Wᵀ + b`` on the CPU for a packed W that compiled code can decode (`Weight`).

A few rows of x are bound by the bytes of W: the packed weight is read once, each weight is decoded in registers and
multiplied at once. Many rows are bound by arithmetic: some rows of W at a time are decoded to dense, and are still in
the cache when torch's own product reads them. Which is faster for a batch is measured. Sums are float32 in both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import choosing, native

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


class Weight(NamedTuple):
    """A packed weight ``[out, width]`` and the library built for its format.

    Attributes:
        library: has `FUNCTIONS`.
        tensors: four, contiguous or None; the second are the scales. What they are is the format's business.
    """

    library: ctypes.CDLL
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    out: int
    width: int
    group: int

    @property
    def arguments(self) -> tuple[int | None, ...]:
        """What every function of the library begins with. Addresses: keep the weight alive."""
        a, b, c, d = self.tensors
        third, fourth = None if c is None else c.data_ptr(), None if d is None else d.data_ptr()
        return (a.data_ptr(), b.data_ptr(), third, fourth, TYPES[b.dtype], self.out, self.width, self.group)

    @property
    def padded(self) -> int:
        """Columns in whole blocks."""
        return -(-self.width // BLOCK) * BLOCK


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``[..., width] -> [..., out]`` in x's dtype, one of `TYPES`."""
    rows = x.reshape(-1, weight.width)
    batch, out = rows.shape[0], weight.out
    if not batch or not out:
        return x.new_empty((*x.shape[:-1], out))
    result = (multiplied if batch <= TILE else _faster(rows, weight, bias))(rows, weight, bias)
    return result.to(x.dtype).view(*x.shape[:-1], out)


def _faster(rows: Tensor, weight: Weight, bias: Tensor | None) -> Callable[[Tensor, Weight, Tensor | None], Tensor]:
    """Of the two ways, by measurement."""
    ways = {way.__name__: way for way in (multiplied, through_dense)}
    sizes = (choosing.bucket(size) for size in (rows.shape[0], weight.width, weight.out))
    kind = (weight.library._name.rpartition("/")[2], rows.dtype, *sizes, torch.get_num_threads())
    measured = {name: partial(way, rows, weight, bias) for name, way in ways.items()}
    return ways[choosing.fastest(" ".join(map(str, kind)), measured)]


def multiplied(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Each weight decoded once per tile of rows; float32 ``[batch, out]``."""
    batch, out, padded = rows.shape[0], weight.out, weight.padded
    tile = min(TILE, 1 << (batch - 1).bit_length())
    tiles = -(-batch // tile)
    rows = rows.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    scratch, result = rows.new_empty((tiles * tile * padded,)), rows.new_empty((batch, out))
    threads = native.threads(tiles * out * padded, GRAIN)
    weight.library.multiply(
        *weight.arguments,
        rows.data_ptr(),
        scratch.data_ptr(),
        None if bias is None else bias.data_ptr(),
        result.data_ptr(),
        batch,
        tile,
        threads,
    )
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
