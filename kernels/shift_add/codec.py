# SPDX-License-Identifier: Apache-2.0
"""Packed layouts of the ShiftAdd weights and their decoding to dense, in plain aten.

All is row-major and little-endian: the lowest index lies in the lowest bits, a ragged tail is zero bits.

BCQ (binary coding):      ``w[o, i] = sum_b alpha[o, i // group, b] * (2 * bit(codes[o, b], i) - 1)``
    codes ``uint8 [out, bits, ceil(in / 8)]``, one plane of sign bits per basis.
    Free scales:          ``scale [out, G, bits]`` is alpha itself.
    Power-of-two scales:  ``scale [out, G]``, ``shift uint8 [out, G, ceil(bits / 2)]`` (two 4-bit exponents a
    byte, even basis in the low nibble), ``alpha[o, g, b] = scale[o, g] * 2**-k[o, g, b]``.

PoT (signed powers of two): ``w[o, i] = scale[o, i // group] * sum_t value(field_t)``
    codes ``uint8 [out, ceil(in * bits / 8)]``, a bit stream per row: weight i takes bits
    i*bits to (i+1)*bits - 1, term t of it a sub-field of ``bits / terms`` bits, low to high. The top bit of a
    sub-field is the sign, the rest a magnitude field m: 0 means exactly zero, else ``2**-(m - 1)``.

Levels (a table):         ``w[o, i] = scale[o, i // group] * levels[word_i]``
    codes ``uint8 [out, ceil(in * bits / 8)]``, a bit stream per row as above, levels ``[2**bits]`` floating, shared by
    the whole weight. What the words mean is the table's business: sums of powers of two, zero-free shifts, any grid.

``G = ceil(in / group)``; the last group may be ragged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BASES = 8  # a basis is a bit plane; eight planes are already finer than fp16 scales can use
MAX_POT_BITS = 12
MAX_LEVEL_BITS = 12
MAX_FIELD_BITS = 8  # 2**-(m - 1) with m < 128 stays a normal fp32 number


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b for b > 0."""
    return -(-a // b)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Decoding arithmetic: fp32, or fp64 as soon as one of the tensors is fp64."""
    wide = any(t.dtype is torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


# ---------------------------------------------------------------------------------- packing


def pack_bits(bits: Tensor) -> Tensor:
    """``[..., n]`` of zeros and ones -> ``uint8 [..., ceil(n / 8)]``, bit i % 8 of byte i // 8."""
    return pack_stream(bits, 1)


def unpack_bits(codes: Tensor, count: int) -> Tensor:
    """``uint8 [..., nbytes]`` -> ``uint8 [..., count]`` of zeros and ones; inverse of `pack_bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = torch.bitwise_and(torch.bitwise_right_shift(codes.unsqueeze(-1), places), 1)
    return bits.flatten(-2)[..., :count]


def pack_nibbles(values: Tensor) -> Tensor:
    """``[..., n]`` integers in 0..15 -> ``uint8 [..., ceil(n / 2)]``, even index in the low nibble."""
    return pack_stream(values, 4)


def unpack_nibbles(codes: Tensor, count: int) -> Tensor:
    """``uint8 [..., nbytes]`` -> ``uint8 [..., count]`` in 0..15; inverse of `pack_nibbles`."""
    pairs = torch.stack((torch.bitwise_and(codes, 15), torch.bitwise_right_shift(codes, 4)), dim=-1)
    return pairs.flatten(-2)[..., :count]


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """``[..., n]`` integers below ``2**bits`` -> ``uint8 [..., ceil(n * bits / 8)]``, a bit stream per row.

    Raises:
        ValueError: a value needs more than ``bits`` bits, or ``bits`` is not in 1..16.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"a bit stream holds values of 1 to 16 bits, not {bits}")
    wide = values.to(torch.int32)
    if wide.numel() and (int(wide.min()) < 0 or int(wide.max()) >= 1 << bits):
        raise ValueError(f"values from {int(wide.min())} to {int(wide.max())} do not fit in {bits} bits")
    count = wide.shape[-1] * bits
    flat = torch.empty((*wide.shape[:-1], wide.shape[-1], bits), dtype=torch.uint8, device=wide.device)
    for place in range(bits):
        flat[..., place] = torch.bitwise_and(torch.bitwise_right_shift(wide, place), 1).to(torch.uint8)
    nbytes = ceil_div(count, 8)
    octets = F.pad(flat.flatten(-2), (0, nbytes * 8 - count)).reshape(*wide.shape[:-1], nbytes, 8)
    packed = octets[..., 0].clone()
    for place in range(1, 8):
        packed |= octets[..., place] << place
    return packed


def unpack_stream(codes: Tensor, bits: int, count: int) -> Tensor:
    """``uint8 [..., nbytes]`` -> ``int32 [..., count]``, values of 1 to 16 bits; inverse of `pack_stream`."""
    # Value i starts at bit i*bits and lies in `span` consecutive bytes: one where bits divides 8.
    span = 1 if 8 % bits == 0 else ceil_div(bits + 7, 8)
    start = torch.arange(count, device=codes.device) * bits
    first, offset = start >> 3, (start & 7).to(torch.int32)
    padded = F.pad(codes, (0, span - 1))
    word = padded.index_select(-1, first).to(torch.int32)
    for byte in range(1, span):
        word = word + padded.index_select(-1, first + byte).to(torch.int32) * (1 << (8 * byte))
    return torch.bitwise_and(torch.bitwise_right_shift(word, offset), (1 << bits) - 1)


# ---------------------------------------------------------------------------------- groups


def group_width(group: int, in_features: int) -> int:
    """Width a group has in memory: a group wider than the row is the row."""
    return min(group, in_features)


def to_groups(rows: Tensor, group: int, in_features: int) -> Tensor:
    """``[..., in]`` -> ``[..., G, width]``, the ragged last group padded with zeros."""
    width = group_width(group, in_features)
    count = ceil_div(in_features, width)
    if count * width != in_features:
        rows = F.pad(rows, (0, count * width - in_features))
    return rows.reshape(*rows.shape[:-1], count, width)


def from_groups(groups: Tensor, in_features: int) -> Tensor:
    """``[..., G, width]`` -> ``[..., in]``; inverse of `to_groups`."""
    return groups.flatten(-2)[..., :in_features]


# ---------------------------------------------------------------------------------- decoding


def bcq_factors(shift: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """``2**-k``, ``[..., bits]``, from the packed exponents ``uint8 [..., ceil(bits / 2)]``; exact."""
    return torch.exp2(-unpack_nibbles(shift, bits).to(dtype))


def bcq_alpha(scale: Tensor, shift: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale of every basis, ``[..., G, bits]``."""
    if shift is None:
        return scale.to(dtype)
    return scale.to(dtype).unsqueeze(-1) * bcq_factors(shift, bits, dtype)


def decode_bcq(
    codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Dense ``[out, in_features]`` of BCQ codes, computed in ``dtype``; differentiable in ``scale``."""
    bits = codes.shape[-2]
    alpha = bcq_alpha(scale, shift, bits, dtype).unsqueeze(-1)
    total = bcq_signs(codes, 0, group, in_features, dtype) * alpha[..., 0, :]
    for b in range(1, bits):
        total = torch.addcmul(total, bcq_signs(codes, b, group, in_features, dtype), alpha[..., b, :])
    return from_groups(total, in_features)


def bcq_signs(codes: Tensor, basis: int, group: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """One basis as ±1 in groups, ``[out, G, width]``, padding 0; eight signs are looked up per byte."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    octets = unpack_bits(every_byte, 8).to(dtype) * 2 - 1
    signs = F.embedding(codes[..., basis, :].to(torch.int32), octets).flatten(-2)
    return to_groups(signs[..., :in_features], group, in_features)


def pot_values(words: Tensor, bits: int, terms: int, dtype: torch.dtype) -> Tensor:
    """Unit-scale value of code words of ``bits`` bits: the sum of its ``terms`` signed powers of two."""
    field_bits = bits // terms
    half = 1 << (field_bits - 1)

    def term(t: int) -> Tensor:
        field = torch.bitwise_and(torch.bitwise_right_shift(words, t * field_bits), 2 * half - 1)
        m = torch.bitwise_and(field, half - 1)
        magnitude = torch.where(m == 0, 0.0, torch.exp2((1 - m).to(dtype)))
        return torch.where(field >= half, -magnitude, magnitude)

    total = term(0)
    for t in range(1, terms):
        total = total + term(t)
    return total


def decode_pot_unit(codes: Tensor, bits: int, terms: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Dense ``[out, in_features]`` of PoT codes before the group scale."""
    words = unpack_stream(codes, bits, in_features)
    every_word = torch.arange(1 << bits, dtype=torch.int32, device=codes.device)
    table = pot_values(every_word, bits, terms, dtype)
    return table.index_select(0, words.flatten()).view(words.shape)


def decode_pot(
    codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Dense ``[out, in_features]`` of PoT codes, computed in ``dtype``; differentiable in ``scale``."""
    unit = to_groups(decode_pot_unit(codes, bits, terms, in_features, dtype), group, in_features)
    return from_groups(unit * scale.to(dtype).unsqueeze(-1), in_features)


def decode_level_unit(codes: Tensor, levels: Tensor, bits: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Dense ``[..., in_features]`` of level codes before the group scale; differentiable in ``levels``."""
    words = unpack_stream(codes, bits, in_features)
    return levels.to(dtype).index_select(0, words.flatten()).view(words.shape)


def decode_levels(
    codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Dense ``[out, in_features]`` of level codes, computed in ``dtype``; differentiable in ``scale`` and ``levels``."""
    unit = to_groups(decode_level_unit(codes, levels, bits, in_features, dtype), group, in_features)
    return from_groups(unit * scale.to(dtype).unsqueeze(-1), in_features)
