# SPDX-License-Identifier: Apache-2.0
"""The ShiftAdd layers and embeddings on the CPU, from packed codes as they are stored, kept in no other form.

Here formats become a `products.Weight`: the code that decodes them (``bcq.cpp``, ``levels.cpp``, compiled for one
format at a time) and the tensors it reads. How that is multiplied is in `products`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rewriter.kernels import native
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.shift_add import codec, products, reference
from rewriter.kernels.shift_add.products import BLOCK, LANES, Weight

_HERE = Path(__file__).parent

Like = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class Build:
    """The library compiled for a format, and the map of groups that it asks for (int32), if any."""

    library: ctypes.CDLL
    group_of: Tensor | None


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
    build = _bcq(features(x), like(codes), like(scale), maybe_like(shift), maybe_like(bias), group, in_features)
    return products.linear(x, _planes(build, codes, scale, shift, group, in_features), bias)


def bcq_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    """`reference.bcq_embedding` for scales in float32, float16 and bfloat16.

    Raises:
        ValueError: arguments that do not fit together, as the reference.
        IndexError: an index that is no row.
        Unsupported: another dtype, or no compiler.
    """
    reference.check_ids(ids)
    build = _bcq(None, like(codes), like(scale), maybe_like(shift), None, group, in_features)
    return products.gather(ids, _planes(build, codes, scale, shift, group, in_features), scale.dtype)


def pot_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    terms: int,
    group: int,
    in_features: int,
) -> Tensor:
    """`reference.pot_linear` for float32, float16 and bfloat16; raises as `bcq_linear`."""
    build = _pot(features(x), like(codes), like(scale), maybe_like(bias), bits, terms, group, in_features)
    return products.linear(x, _stream(build, codes, scale, _pot_table(bits, terms), group, in_features), bias)


def pot_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    """`reference.pot_embedding`; dtypes and errors as `bcq_embedding`."""
    reference.check_ids(ids)
    build = _pot(None, like(codes), like(scale), None, bits, terms, group, in_features)
    weight = _stream(build, codes, scale, _pot_table(bits, terms), group, in_features)
    return products.gather(ids, weight, scale.dtype)


def level_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """`reference.level_linear` for float32, float16 and bfloat16; raises as `bcq_linear`."""
    likes = features(x), like(codes), like(scale), like(levels), maybe_like(bias)
    build = _level(*likes, bits, group, in_features)
    return products.linear(x, _stream(build, codes, scale, _repeated(levels), group, in_features), bias)


def level_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    """`reference.level_embedding`; dtypes and errors as `bcq_embedding`."""
    reference.check_ids(ids)
    build = _level(None, like(codes), like(scale), like(levels), None, bits, group, in_features)
    return products.gather(ids, _stream(build, codes, scale, _repeated(levels), group, in_features), scale.dtype)


def _planes(build: Build, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int) -> Weight:
    if build.group_of is not None:  # groups on no border of lanes: scales of their own for every basis
        scale, shift = codec.bcq_alpha(scale, shift, codes.shape[1], torch.float32), None
    kept = None if shift is None else shift.contiguous()
    tensors = codes.contiguous(), scale.contiguous(), kept, build.group_of
    return Weight(build.library, tensors, codes.shape[0], in_features, group)


def _stream(build: Build, codes: Tensor, scale: Tensor, table: Tensor, group: int, in_features: int) -> Weight:
    if build.group_of is not None and build.group_of.dim() == 3:  # a scale for every lane is fetched as float32
        scale = scale.to(torch.float32)
    tensors = codes.contiguous(), scale.contiguous(), table, build.group_of
    return Weight(build.library, tensors, codes.shape[0], in_features, group)


# ---------------------------------------------------------------------------------- checked and built once per signature


def like(tensor: Tensor) -> Like:
    """What a build and the checks depend on."""
    return tensor.shape, tensor.dtype


def features(x: Tensor) -> Like:
    """Of activations only the last dimension matters: every length of a sequence shares a build."""
    return x.shape[-1:], x.dtype


def maybe_like(tensor: Tensor | None) -> Like | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _stand_in(signature: Like) -> Tensor:
    return torch.empty(signature[0], dtype=signature[1], device="meta")


def _maybe(signature: Like | None) -> Tensor | None:
    return None if signature is None else _stand_in(signature)


def _check_linear(x: Like | None, bias: Like | None, out_features: int, in_features: int) -> None:
    if x is not None:  # else rows are looked up
        reference.check_linear(_stand_in(x), _maybe(bias), out_features, in_features)


def _check_dtypes(*signatures: Like | None) -> None:
    for signature in signatures:
        if signature is not None and signature[1] not in products.TYPES:
            raise Unsupported(f"{signature[1]}: native kernels compute in float32")


@lru_cache(maxsize=4096)
def _bcq(
    x: Like | None, codes: Like, scale: Like, shift: Like | None, bias: Like | None, group: int, in_features: int
) -> Build:
    reference.check_bcq(_stand_in(codes), _stand_in(scale), _maybe(shift), group, in_features)
    _check_linear(x, bias, codes[0][0], in_features)
    _check_dtypes(x, scale, bias)
    parts = tables_per_block(group, in_features)
    shared = shift is not None and parts > 0
    library = _library("bcq.cpp", BITS=codes[0][1], PARTS=parts, SHARED=int(shared))
    k, lane = torch.arange(BLOCK // LANES).unsqueeze(-1), torch.arange(LANES)
    place = 64 * (k % 2) + 4 * lane + k // 2
    return Build(library, None if parts else _group_of(place, group, in_features) * codes[0][1])


@lru_cache(maxsize=4096)
def _pot(
    x: Like | None, codes: Like, scale: Like, bias: Like | None, bits: int, terms: int, group: int, in_features: int
) -> Build:
    reference.check_pot(_stand_in(codes), _stand_in(scale), bits, terms, group, in_features)
    _check_linear(x, bias, codes[0][0], in_features)
    _check_dtypes(x, scale, bias)
    return _of_stream(bits, group, in_features)


@lru_cache(maxsize=4096)
def _level(
    x: Like | None, codes: Like, scale: Like, levels: Like, bias: Like | None, bits: int, group: int, in_features: int
) -> Build:
    reference.check_levels(_stand_in(codes), _stand_in(scale), _stand_in(levels), bits, group, in_features)
    _check_linear(x, bias, codes[0][0], in_features)
    _check_dtypes(x, scale, levels, bias)
    return _of_stream(bits, group, in_features)


def _of_stream(bits: int, group: int, in_features: int) -> Build:
    span = weights_per_scale(group, in_features)
    library = _library("levels.cpp", BITS=bits, SPAN=span)
    if span == BLOCK:
        return Build(library, None)
    lane = 8 * torch.arange(LANES)
    place = lane if span == 8 else torch.arange(8).unsqueeze(-1) + lane
    return Build(library, _group_of(place, group, in_features))


def tables_per_block(group: int, in_features: int) -> int:
    """Groups in 128 columns: 1 (or part of one), 2 or 4; 0 where groups do not end on such borders."""
    if group >= in_features or group % BLOCK == 0:
        return 1
    return next((parts for parts in (2, 4) if group % (BLOCK // parts) == 0), 0)


def weights_per_scale(group: int, in_features: int) -> int:
    """Of consecutive columns surely under one scale: a block (128), eight, or one."""
    if group >= in_features or group % BLOCK == 0:
        return BLOCK
    return 8 if group % 8 == 0 else 1


def _group_of(place: Tensor, group: int, in_features: int) -> Tensor:
    """The group of the column at each place of each block; past the end, that of the last column."""
    start = torch.arange(0, in_features, BLOCK).view(-1, *[1] * place.dim())
    return ((start + place).clamp(max=in_features - 1) // group).to(torch.int32)


def _library(source: str, **macros: int) -> ctypes.CDLL:
    return native.library(_HERE / source, macros, products.FUNCTIONS)


@cache
def _pot_table(bits: int, terms: int) -> Tensor:
    return _repeated(codec.pot_values(torch.arange(1 << bits, dtype=torch.int32), bits, terms, torch.float32))


def _repeated(levels: Tensor) -> Tensor:
    """float32, and sixteen at least: a lookup in a vector takes four bits, of which the lower count."""
    wide = levels.to(torch.float32).contiguous()
    return wide if len(wide) >= LANES else wide.repeat(LANES // len(wide))
