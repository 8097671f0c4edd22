# SPDX-License-Identifier: Apache-2.0
"""Tensors in a safetensors file: written one at a time, every memory once, narrowed where nothing is lost."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rewriter.errors import ExportError, LoadError
from rewriter.graphio import is_safe_name
from rewriter.graphvals import dtype_name, dtype_of
from rewriter.narrow import stored_dtype

Json = Any
_ALIGNMENT = 8  # of the header, and so of the data

# torch -> the format's names of dtypes.
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def check_storable(name: str, tensor: Any) -> None:
    """Refuse a name or a tensor that the format cannot hold.

    Raises:
        ExportError: an unsafe name; a tensor subclass; no dense values (meta, sparse); a dtype without a
            code.
    """
    if not is_safe_name(name):
        raise ExportError(f"tensor name {name!r} cannot be saved; use letters, digits, '_' and '-'")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ExportError(f"tensor {name!r} is a {type(tensor).__name__}; make it a plain tensor")
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise ExportError(f"tensor {name!r} has no dense values ({tensor.device}, {tensor.layout}); load it first")
    if tensor.dtype not in _CODES:
        raise ExportError(f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold")


def alias_groups(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the same view of the same storage together; groups and names in the order of the mapping.

    Storages are told apart by identity, not by address: lazy clones share memory until one is written, and
    are not tied. Addresses are never asked for, which would end that sharing.

    Raises:
        ExportError: two tensors overlap in a storage without being the same view, which could not be
            restored.
    """
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()._cdata
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault(view if tensor.numel() else id(tensor), []).append(name)
    spans = []
    for first, *_ in groups.values():
        tensor = tensors[first]
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        start = tensor.storage_offset() * tensor.itemsize
        if tensor.numel():
            spans.append((tensor.untyped_storage()._cdata, start, start + reach * tensor.itemsize, first))
    spans.sort()
    for (storage, _, end, one), (other_storage, start, _, other) in itertools.pairwise(spans):
        if storage == other_storage and start < end:
            raise ExportError(f"tensors {one!r} and {other!r} overlap in memory but differ; clone one of them")
    return list(groups.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors row-major in `stored_dtype`; extra memory is that of one of them."""
    if sys.byteorder != "little":
        raise ExportError("saving needs a little-endian machine; the format's byte order is little-endian")
    dtypes = {name: stored_dtype(tensor) for name, tensor in tensors.items()}
    # Widest first keeps every tensor aligned to its own element size.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": _CODES[dtypes[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(_bytes_of(tensors[name], dtypes[name]))


def _bytes_of(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    packed = tensor.detach().resolve_conj().resolve_neg().to("cpu", dtype, copy=True)
    return packed.contiguous().reshape(-1).view(torch.uint8).numpy().data


def record_of(tensor: Tensor, *, parameter: bool, persistent: bool) -> dict[str, Json]:
    """What the manifest says about a tensor."""
    return {
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "parameter": parameter,
        "persistent": persistent,
        "requires_grad": tensor.requires_grad,
    }


def check_record(name: Json, record: Json) -> None:
    """Refuse a record that `record_of` would not have made.

    Raises:
        LoadError: naming the tensor.
    """
    if not is_safe_name(name):
        raise LoadError(f"tensor name {str(name)[:80]!r} is refused")
    flags = ("parameter", "persistent", "requires_grad")
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", *flags}:
        raise LoadError(f"the record of tensor {name!r} is malformed")
    shape = record["shape"]
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
        raise LoadError(f"the shape of tensor {name!r} is malformed")
    if not all(isinstance(record[flag], bool) for flag in flags):
        raise LoadError(f"the flags of tensor {name!r} are malformed")
    dtype = dtype_of(record["dtype"])
    if record["requires_grad"] and not (dtype.is_floating_point or dtype.is_complex):
        raise LoadError(f"tensor {name!r} of dtype {record['dtype']} cannot require gradients")


def read_tensors(path: Path, records: Mapping[str, dict[str, Json]]) -> dict[str, Tensor]:
    """The tensors of a file, which must be exactly those of `records`, in their own dtypes and memory, on the
    CPU.

    Raises:
        LoadError: not a complete safetensors file, or not the tensors that the records describe.
    """
    try:
        with safe_open(path, framework="pt") as file:
            odd = sorted(set(file.keys()) ^ records.keys())
            if odd:
                raise LoadError(f"tensor {odd[0][:80]!r} is in the file or in the manifest, but not in both")
            return {name: _restored(name, file.get_tensor(name), record) for name, record in records.items()}
    except SafetensorError as reason:
        raise LoadError(f"not a complete safetensors file: {reason}") from reason


def _restored(name: str, tensor: Tensor, record: dict[str, Json]) -> Tensor:
    dtype = dtype_of(record["dtype"])
    narrowed = tensor.dtype is torch.float16 and dtype in (torch.float32, torch.float64)
    if list(tensor.shape) != record["shape"] or (tensor.dtype is not dtype and not narrowed):
        found = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
        raise LoadError(f"tensor {name!r} is {found}, the manifest says {record['dtype']}{record['shape']}")
    return as_recorded(tensor.to(dtype, copy=True), record)  # a copy: safetensors maps the file


def as_recorded(tensor: Tensor, record: dict[str, Json]) -> Tensor:
    """The same memory as a parameter or a buffer, as the record says."""
    if record["parameter"]:
        return nn.Parameter(tensor.detach(), requires_grad=record["requires_grad"])
    return tensor.detach().requires_grad_(record["requires_grad"])
