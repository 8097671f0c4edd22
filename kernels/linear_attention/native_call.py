# SPDX-License-Identifier: Apache-2.0
"""Calling C with one structure of numbers and addresses, prepared once for all calls alike.

A token's step computes for some microseconds. So what depends only on shapes, strides, dtypes and options (checks, sizes,
conversions, results) is worked out at the first call with them, on tensors without data, and kept as the bytes of the
structure; a call copies these and fills in addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Unsupported

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_WORD = 8

Signature = tuple[Any, ...]
Made = Callable[[Sequence[int], torch.dtype], Tensor]


class Rows(ctypes.Structure):
    """``[B, h, T, width]`` of any strides, dense in its last dimension: `Rows` of blocks.h."""

    _fields_ = (
        ("data", POINTER),
        *((name, INT) for name in ("heads", "batch", "head", "row", "width", "type")),
    )


def signature(arguments: Sequence[Any]) -> Signature:
    """What a prepared call depends on: descriptions of the tensors, everything else as it is."""
    return tuple([(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in arguments])


def described(known: Signature) -> list[Any]:
    """The arguments of a signature, tensors without data."""
    return [torch.empty_strided(a[0], a[1], dtype=a[2], device="meta") if isinstance(a, tuple) else a for a in known]


class Prepared:
    """One structure, to be filled.

    Args:
        structure: its class; it has a field ``threads`` and whole words, so that it is an array of them.
        arguments: of the operator, described.
        numbers: fields that are the same in every call.
    """

    def __init__(self, structure: type[ctypes.Structure], arguments: Sequence[Any], **numbers: float) -> None:
        self.structure, self.arguments = structure, arguments
        self.filled = structure(**numbers)
        self._threads = structure.threads.offset // _WORD
        self._addresses: list[tuple[int, int, Callable[[Tensor], Tensor] | None]] = []
        self._computed: list[tuple[int, Callable[[Sequence[Any]], Tensor]]] = []
        self._results: list[tuple[int, Sequence[int], torch.dtype]] = []

    def rows(self, dtype: torch.dtype | None = None, **places: int) -> None:
        """``[B, h, T, width]`` by place among the arguments, as they are or in ``dtype``; None is left out.

        Raises:
            Unsupported: a dtype that is none of `TYPES`.
        """
        for name, place in places.items():
            x = self.arguments[place]
            if x is None:
                continue
            kind = x.dtype if dtype is None else dtype
            if kind not in TYPES:
                raise Unsupported(f"the CPU kernels of linear attention compute in float32; {name} is {kind}")
            fits = x.stride(3) == 1 and x.dtype is kind
            self._address(name, place, None if fits else _dense_in(kind))
            strides = (x if fits else _dense_in(kind)(x)).stride()
            setattr(self.filled, name, Rows(None, x.shape[1], *strides[:3], x.shape[3], TYPES[kind]))

    def dense(self, dtype: torch.dtype = torch.float32, **places: int) -> None:
        """Contiguous in ``dtype``; None is left out."""
        for name, place in places.items():
            x = self.arguments[place]
            if x is not None:
                fits = x.dtype is dtype and x.is_contiguous()
                self._address(name, place, None if fits else _dense_in(dtype))

    def computed(self, name: str, function: Callable[[Sequence[Any]], Tensor]) -> None:
        """What a function makes of the arguments, anew in every call."""
        self._computed.append((_word(self.structure, name), function))

    def result(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        """A tensor that the call makes; in the order of these calls."""
        self._results.append((_word(self.structure, name), tuple(shape), dtype))

    def _address(self, name: str, place: int, convert: Callable[[Tensor], Tensor] | None) -> None:
        self._addresses.append((_word(self.structure, name), place, convert))

    def ready(self) -> Prepared:
        """Nothing is added any more."""
        self.arguments = ()
        self._bytes = bytes(self.filled)
        self._words = INT * (len(self._bytes) // _WORD)
        return self

    def run(self, function: Callable[..., Any], arguments: Sequence[Any], threads: int, made: Made) -> list[Tensor]:
        """Call it; the results."""
        words = self._words.from_buffer_copy(self._bytes)
        words[self._threads] = threads
        held = []  # what the addresses point to must outlive the call
        for word, place, convert in self._addresses:
            x = arguments[place]
            if convert is not None:
                x = convert(x)
                held.append(x)
            words[word] = x.data_ptr()
        for word, function_of in self._computed:
            x = function_of(arguments)
            held.append(x)
            words[word] = x.data_ptr()
        results = []
        for word, shape, dtype in self._results:
            result = made(shape, dtype)
            words[word] = result.data_ptr()
            results.append(result)
        function(words)
        return results


def _dense_in(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).contiguous()


def _word(structure: type[ctypes.Structure], name: str) -> int:
    """Where a pointer, or that of rows, stands in the structure, in words."""
    return int(getattr(structure, name).offset) // _WORD
