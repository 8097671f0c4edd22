# SPDX-License-Identifier: Apache-2.0
"""Run Triton kernels on the CPU, one call at a time: ``Interpreted(kernel)[grid](*tensors, **constexprs)``.

``with interpreting():`` does so for whole device implementations, in poisoned memory.

Triton interprets kernels when ``TRITON_INTERPRET`` is set while they are decorated, and then cannot compile them any
more. Here the decorated kernel stays what it is: a call swaps in the interpreted language, under a lock, and puts the
real one back. Three faults of the stock interpreter are mended meanwhile:

* functions a kernel calls (its own helpers, ``tl.sum``, ``tl.cdiv``) were decorated as device functions; they are
  interpreted too;
* a device function patches the language without ever restoring it, so the next real compilation would fail;
* bfloat16 is carried as uint16 and then computed with as integers. It becomes a true bfloat16 (``ml_dtypes``) between
  loads and stores, rounded to nearest even where torch rounds.

For tests only: other threads must not trace Triton kernels meanwhile. It rests on private names of Triton, which
``make compat`` checks for the versions the package allows.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from rewriter.kernels.launching import Request, running

BF16 = np.dtype(ml_dtypes.bfloat16)
_lock = threading.RLock()
_depth = 0
_rewritten: dict[Callable[..., Any], Callable[..., Any]] = {}


class Interpreted:
    """A ``@triton.jit`` kernel to be launched on CPU tensors.

    Programs of the grid run one after another; out-of-bounds access is not checked, as on the device.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = stock.InterpretedFunction(getattr(kernel, "fn", kernel))

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with interpreted_language():
                self._kernel[grid](*args, **kwargs)

        return launch


@contextlib.contextmanager
def interpreted_language() -> Iterator[None]:
    """``triton.language`` computes with numpy inside; everything is as before outside, also after an error."""
    global _depth
    with _lock:
        if _depth:
            yield
            return
        _depth += 1
        try:
            with contextlib.ExitStack() as stack:
                # Once here instead of at each launch and device function, of which only the former is ever undone.
                scope = stock._patch_lang(_names_the_language)
                stack.callback(scope.restore)
                stack.enter_context(patch.object(stock, "_patch_lang", lambda fn: _Nothing()))
                stack.enter_context(patch.object(JITFunction, "__call__", _call_device_function, create=True))
                stack.enter_context(patch.object(stock.InterpretedFunction, "__call__", _call_device_function))
                stack.enter_context(patch.object(stock, "_get_np_dtype", _numpy_dtype))
                for name, method in _BF16_METHODS.items():
                    stack.enter_context(patch.object(stock.InterpreterBuilder, name, method, create=True))
                yield
        finally:
            _depth -= 1


# ------------------------------------------------------------------------------------- requests of device code

CANARY = 256  # bytes before and after every storage


@contextlib.contextmanager
def interpreting(which: int = 0) -> Iterator[None]:
    """Device implementations run on CPU tensors inside: `launch` interprets configuration ``which`` (or the last).

    The device checks no bounds and starts with whatever memory holds. So each storage a kernel sees is a copy between
    canaries (NaN in every floating type), outside of which no address may be touched; and what is allocated inside begins
    as NaN, or as the largest integer.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # which fills what `empty` returns
    try:
        with running(lambda request: _interpret(request, which)):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _interpret(request: Request, which: int) -> None:
    start = request.start(request.configs[min(which, len(request.configs) - 1)])
    storages = {a.untyped_storage().data_ptr(): a for a in start.args.values() if isinstance(a, torch.Tensor)}
    guarded = {address: _Guarded(tensor, seed) for seed, (address, tensor) in enumerate(storages.items())}
    args = {
        name: guarded[a.untyped_storage().data_ptr()].twin(a) if isinstance(a, torch.Tensor) else a
        for name, a in start.args.items()
    }
    with _only_within([storage.extent for storage in guarded.values()]):
        Interpreted(start.kernel)[start.grid](**args, **start.constants)
    for storage in guarded.values():
        storage.give_back(start.kernel.__name__)


class _Guarded:
    """A storage copied between two canaries.

    Units of 16 bits 1111111111xxxxxx are NaN in bfloat16 and float16, pairs of them in float32, fours in float64. The x
    are random for each storage, since arithmetic hands the bits of a NaN on: a kernel that reads one canary and writes
    what it got to another must not leave it as it was.
    """

    def __init__(self, tensor: torch.Tensor, seed: int) -> None:
        self._original = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        size = self._original.numel()
        units = np.random.default_rng(seed).integers(0xFFC0, 0x10000, (size + 2 * CANARY + 1) // 2, dtype=np.uint16)
        self._memory = torch.from_numpy(units.view(np.uint8))
        self._outside = self._memory.clone()
        self._inside = slice(CANARY, CANARY + size)
        self._memory[self._inside] = self._original

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses of the copy, the second exclusive."""
        start = self._memory.data_ptr() + CANARY
        return start, start + self._original.numel()

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of the copy that ``tensor`` is of the original."""
        offset = CANARY // tensor.element_size() + tensor.storage_offset()
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(self._memory.untyped_storage(), offset, tensor.shape, tensor.stride())

    def give_back(self, kernel: str) -> None:
        self._original.copy_(self._memory[self._inside])
        self._memory[self._inside] = self._outside[self._inside]
        if not torch.equal(self._memory, self._outside):
            raise AssertionError(f"{kernel} wrote outside a tensor")


_extents: Sequence[tuple[int, int]] | None = None  # where kernels may read and write; None: anywhere


@contextlib.contextmanager
def _only_within(extents: Sequence[tuple[int, int]]) -> Iterator[None]:
    global _extents
    before, _extents = _extents, extents
    try:
        yield
    finally:
        _extents = before


def _check_bounds(ptrs: Any, mask: Any, verb: str) -> None:
    """What is read outside need not show in any result, but on a device it may be no memory at all."""
    if _extents is None:
        return
    touched = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]  # masks may be integers
    if not touched.size:
        return
    # One access has one pointer, so one storage: enough to look at both ends.
    first, last = int(touched.min()), int(touched.max()) + max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
    if not any(start <= first and last <= end for start, end in _extents):
        raise AssertionError(f"{verb} outside a tensor")


class _Nothing:
    def restore(self) -> None:
        pass


# `_patch_lang` patches the language modules it finds among the globals of a function.
_names_the_language = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    fn = self.fn
    if fn not in _rewritten:
        _rewritten[fn] = stock.FunctionRewriter(fn).rewrite_ast()
    return _rewritten[fn](*args, **kwargs)


# ------------------------------------------------------------------------------------------------------- bfloat16

_stock_numpy_dtype = stock._get_np_dtype
_stock = {
    name: getattr(stock.InterpreterBuilder, name)
    for name in ("cast_impl", "create_fp_to_fp", "create_masked_load", "create_masked_store", "create_dot")
}


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return BF16 if element == tl.bfloat16 else _stock_numpy_dtype(dtype)


def _bf16_constant(self: Any, value: float) -> Any:
    return stock.TensorHandle(np.array([value], dtype=BF16), tl.bfloat16)


def _bf16_cast(src: Any, dst_type: Any) -> Any | None:
    """The cast from or to bfloat16, by way of float32 as torch does; None if neither side is bfloat16."""
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target):
        return None
    if any(t.is_floating() and t.primitive_bitwidth == 8 for t in (source, target)):
        raise NotImplementedError(f"interpreted cast {source} -> {target}: cast through float32 in the kernel")
    return stock.TensorHandle(src.data.astype(np.float32).astype(_numpy_dtype(target)), target)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    cast = _bf16_cast(src, dst_type)
    return _stock["cast_impl"](self, src, dst_type) if cast is None else cast


def _fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    cast = _bf16_cast(src, dst_type)
    return _stock["create_fp_to_fp"](self, src, dst_type, rounding_mode) if cast is None else cast


def _masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *hints: Any, **named: Any) -> Any:
    _check_bounds(ptrs, mask, "read")
    if ptrs.get_element_ty() != tl.bfloat16:
        return _stock["create_masked_load"](self, ptrs, mask, other, *hints, **named)
    fill = np.zeros((), BF16) if other is None else np.asarray(other.data, dtype=BF16)
    raw = np.ascontiguousarray(np.broadcast_to(fill, ptrs.data.shape)).view(np.uint16)
    loaded = stock._interpreter.load(ptrs.data, mask.data, raw, np.dtype(np.uint16))
    return stock.TensorHandle(loaded.view(BF16), tl.bfloat16)


def _masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *hints: Any, **named: Any) -> Any:
    _check_bounds(ptrs, mask, "wrote")
    if value.data.dtype == BF16:
        value = stock.TensorHandle(np.ascontiguousarray(value.data).view(np.uint16), tl.uint16)
    return _stock["create_masked_store"](self, ptrs, value, mask, *hints, **named)


def _dot(self: Any, a: Any, b: Any, accumulator: Any, *precision: Any) -> Any:
    """Products of bfloat16 are exact in float32, in which the device adds them up too."""
    a, b, total = (_widened(handle) for handle in (a, b, accumulator))
    result = _stock["create_dot"](self, a, b, total, *precision)
    return result if total is accumulator else _bf16_cast(result, tl.bfloat16)


def _widened(handle: Any) -> Any:
    return stock.TensorHandle(handle.data.astype(np.float32), tl.float32) if handle.data.dtype == BF16 else handle


_BF16_METHODS: dict[str, Callable[..., Any]] = {
    "get_bf16": _bf16_constant,
    "cast_impl": _cast,
    "create_fp_to_fp": _fp_to_fp,
    "create_masked_load": _masked_load,
    "create_masked_store": _masked_store,
    "create_dot": _dot,
}
