# SPDX-License-Identifier: Apache-2.0
"""``y = x Wᵀ + b``, and rows of W, on the CPU for a packed W that compiled code can decode (`Weight`).

A few rows of x are bound by the bytes of W: the packed weight is read once, each weight is decoded in registers and
multiplied at once. More rows share the decoding (``linear.h``). Many are bound by arithmetic: some rows of W at a time
are decoded to dense, and are still in the cache when torch's own product reads them. Which is faster is measured.

Activations in float32 and float16 are multiplied in float32; those in bfloat16 with weights rounded to bfloat16, as the
reference does, where the processor multiplies such pairs. Sums are float32 in all.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import choosing, native

BLOCK, LANES = 128, 16  # columns decoded together, in vectors of LANES: as in linear.h
FEW = 8  # rows of x; so many are never worth decoding W to memory for
PIECE = 1 << 20  # weights decoded to dense at a time: 4 MiB of float32
GRAIN = 1 << 17  # weights to decode that are worth a thread: some 5 µs
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # `Type` of lanes.h

_pack = struct.Struct("16q").pack  # `Call` of linear.h
_CALL = ctypes.c_char_p
FUNCTIONS: dict[str, list[Any]] = {
    "multiply": [_CALL],
    "decode": [_CALL, ctypes.c_void_p, ctypes.c_long, ctypes.c_long],
    "order": [_CALL],
    "gather": [_CALL],
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
    def padded(self) -> int:
        """Columns in whole blocks."""
        return -(-self.width // BLOCK) * BLOCK

    def call(
        self, x: Tensor, bias: Tensor | None, y: int, scratch: int, batch: int, threads: int, kind: int | None = None
    ) -> bytes:
        """What every function of the library takes. Addresses: keep the tensors alive."""
        a, b, c, d = self.tensors
        return _pack(
            a.data_ptr(),
            b.data_ptr(),
            0 if c is None else c.data_ptr(),
            0 if d is None else d.data_ptr(),
            TYPES[b.dtype],
            self.out,
            self.width,
            self.group,
            x.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y,
            scratch,
            TYPES[x.dtype] if kind is None else kind,
            0 if bias is None else TYPES[bias.dtype],
            batch,
            threads,
        )


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``[..., width] -> [..., out]`` in x's dtype, one of `TYPES`."""
    if x.dtype is torch.float16:
        return linear(x.to(torch.float32), weight, bias).to(torch.float16)
    batch = x.numel() // weight.width
    if not batch or not weight.out:
        return x.new_empty((*x.shape[:-1], weight.out))
    if bias is not None:
        bias = bias.contiguous()
    way = multiplied if batch <= FEW else _faster(x, weight, bias, batch)
    return way(x.contiguous(), weight, bias, batch)


Way = Callable[[Tensor, Weight, "Tensor | None", int], Tensor]


def _faster(x: Tensor, weight: Weight, bias: Tensor | None, batch: int) -> Way:
    """Of the two ways, by measurement."""
    ways: dict[str, Way] = {way.__name__: way for way in (multiplied, through_dense)}
    sizes = (choosing.bucket(size) for size in (batch, weight.width, weight.out))
    kind = (weight.library._name.rpartition("/")[2], x.dtype, *sizes, torch.get_num_threads())
    measured = {name: partial(way, x.contiguous(), weight, bias, batch) for name, way in ways.items()}
    return ways[choosing.fastest(" ".join(map(str, kind)), measured)]


def multiplied(x: Tensor, weight: Weight, bias: Tensor | None, batch: int) -> Tensor:
    """From packed codes, with nothing of W in memory but what the first cache holds."""
    padded = weight.padded
    result = x.new_empty((*x.shape[:-1], weight.out))
    scratch = x.new_empty((batch * padded,), dtype=torch.float32)  # where pairs are not multiplied, so is bfloat16
    threads = native.threads(batch * weight.out * padded, GRAIN)
    weight.library.multiply(weight.call(x, bias, result.data_ptr(), scratch.data_ptr(), batch, threads))
    return result


def through_dense(x: Tensor, weight: Weight, bias: Tensor | None, batch: int) -> Tensor:
    """Some rows of W at a time, decoded and rounded to the activations' dtype, columns in the order of lanes."""
    out, padded, threads = weight.out, weight.padded, torch.get_num_threads()
    step = min(max(1, PIECE // padded), out)
    ordered, dense = x.new_empty((batch, padded)), x.new_empty((step, padded))
    result = x.new_empty((batch, out))
    call = weight.call(x, None, 0, ordered.data_ptr(), batch, threads)
    weight.library.order(call)
    bias = None if bias is None else bias.to(x.dtype)
    for begin in range(0, out, step):
        end = min(begin + step, out)
        weight.library.decode(call, dense.data_ptr(), begin, end)
        result[:, begin:end] = F.linear(ordered, dense[: end - begin], None if bias is None else bias[begin:end])
    return result.view(*x.shape[:-1], out)


def gather(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows of W by index, ``[...] -> [..., width]``, decoded in float32.

    Raises:
        IndexError: an index that is no row.
    """
    flat = ids.to(torch.int64).contiguous()
    result = torch.empty((*ids.shape, weight.width), dtype=torch.float32)
    outside = ctypes.c_int64(0)
    threads = native.threads(ids.numel() * weight.padded, GRAIN)
    call = weight.call(flat, None, result.data_ptr(), ctypes.addressof(outside), ids.numel(), threads, kind=0)
    weight.library.gather(call)
    if outside.value:
        raise IndexError(f"shift_add: an index is outside of the {weight.out} rows of the weight")
    return result.to(dtype)
