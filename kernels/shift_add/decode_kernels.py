# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Decoding of packed ShiftAdd weights inside Triton kernels; the layouts are those of `rewriter.kernels.shift_add.codec`.

A weight is computed in float32 by the reference's formula, in its order, so that the tile a kernel multiplies is bit for
bit the one the reference decodes. Powers of two are not multiplied up: their bits are put together from sign and exponent.

Bytes are loaded as they lie, many of a row by one thread, and taken apart by `tl.join`, which keeps what comes from a byte
in the thread that has it: no code word is loaded or moved twice.

Common arguments:
    codes, scale, table: the weight. ``table`` is the packed exponents of bcq (None: a scale per basis), the levels of
        level, None for pot; ``FORMAT`` is one of these three names.
    rows, known: int64 rows of the weight, and which of them exist.
    start: first feature of a tile, a multiple of 8, as is its width ``BK``.
    row_bytes, groups: bytes of a row (of a plane of one), scales of a row.
    SHARE: "tile" if all features of a tile are of one group, "octet" if eight are that begin at a multiple of eight, else
        "weight".
"""

import triton
import triton.language as tl


@triton.jit
def weights(
    codes, scale, table, rows, known, start, in_features, row_bytes, groups,
    FORMAT: tl.constexpr, BITS: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Float32 ``[BN, BK]``: some rows, features ``start`` to ``start + BK``; zero beyond ``in_features``."""
    features = start + tl.arange(0, BK)
    if FORMAT == "bcq":
        # w = Σ_b ±alpha_b
        dense = tl.zeros([BN, BK], dtype=tl.float32)
        for basis in tl.static_range(BITS):
            packed = octets(codes, rows * BITS + basis, known, start, row_bytes, BK // 8)
            alpha = shared_scales(
                scale, table, rows, known, start, in_features, groups, basis, BITS, GROUP, SHARE, BN, BK
            )
            dense += tl.where(fields(packed, 1, BN, BK) != 0, alpha, -alpha)
    else:
        # w = scale · value(word)
        if 8 % BITS == 0:
            packed = octets(codes, rows, known, start * BITS, row_bytes, BK * BITS // 8)
            words = fields(packed, BITS, BN, BK)
        else:
            words = stream_words(codes, rows, known, features, row_bytes, BITS)
        dense = unit(words, table, FORMAT, BITS, TERMS)
        dense *= shared_scales(scale, None, rows, known, start, in_features, groups, 0, 1, GROUP, SHARE, BN, BK)
    return tl.where((features < in_features)[None, :], dense, 0.0)


@triton.jit
def octets(codes, rows, known, first_bit, row_bytes, COUNT: tl.constexpr):
    """int32 ``[BN, COUNT]``: consecutive bytes of some rows, zero beyond their end."""
    byte = first_bit // 8 + tl.arange(0, COUNT)
    inside = known[:, None] & (byte < row_bytes)[None, :]
    return tl.load(codes + rows[:, None] * row_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)


@triton.jit
def fields(packed, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """int32 ``[BN, BK]``: bytes taken apart into their fields of 1, 2, 4 or 8 bits, low to high."""
    # the halves of each part beside each other: after the last step the index of a field, in binary, is its three places
    parts = packed
    if BITS <= 4:
        parts = tl.join(parts & 15, parts >> 4)
    if BITS <= 2:
        parts = tl.join(parts & 3, parts >> 2)
    if BITS == 1:
        parts = tl.join(parts & 1, parts >> 1)
    return tl.reshape(parts, [BN, BK])


@triton.jit
def stream_words(codes, rows, known, features, row_bytes, BITS: tl.constexpr):
    """int32 ``[BN, BK]``: code words of any width, of any features; 0 or a part of a word where there is none."""
    span: tl.constexpr = (BITS + 14) // 8 if 8 % BITS else 1  # bytes a word may touch
    first = features * BITS
    stream = tl.zeros([1, 1], dtype=tl.int32)
    for step in tl.static_range(span):
        byte = first // 8 + step
        inside = known[:, None] & (byte < row_bytes)[None, :]
        packed = tl.load(codes + rows[:, None] * row_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)
        stream = stream | (packed << (8 * step))
    return (stream >> (first % 8)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def signs(codes, rows, known, features, row_bytes, basis: tl.constexpr, BITS: tl.constexpr):
    """Float32 ±1 ``[BN, BK]``: one basis, at any features; of no meaning where there is none."""
    bit = stream_words(codes, rows * BITS + basis, known, features, row_bytes, 1)
    return tl.where(bit != 0, 1.0, -1.0)


@triton.jit
def unit(words, levels, FORMAT: tl.constexpr, BITS: tl.constexpr, TERMS: tl.constexpr):
    """Float32 values of code words before the group scale."""
    if FORMAT == "level":
        values = tl.load(levels + words).to(tl.float32)
    else:
        field: tl.constexpr = BITS // TERMS
        values = _power_of_two(words, field)
        for term in tl.static_range(1, TERMS):
            values += _power_of_two(words >> (term * field), field)
    return values


@triton.jit
def _power_of_two(words, FIELD: tl.constexpr):
    # ±2**-(m - 1): sign and exponent 127 - (m - 1) are the whole number; m = 0 stands for zero
    half: tl.constexpr = 1 << (FIELD - 1)
    m = words & (half - 1)
    bits = ((words & half) << (32 - FIELD)) | ((128 - m) << 23)
    return tl.where(m == 0, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def shared_scales(
    scale, shift, rows, known, start, in_features, groups, basis: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Float32 scales of a tile, ``[BN, 1]`` or ``[BN, BK]``; loaded once per tile, octet or weight."""
    if SHARE == "tile":
        found = basis_scale(scale, shift, rows * groups + start // GROUP, known, basis, BITS)[:, None]
    elif SHARE == "octet":
        found = octet_scales(scale, shift, rows, known, start, in_features, groups, basis, BITS, GROUP, BK // 8)
        found = tl.join(found, found)
        found = tl.join(found, found)
        found = tl.reshape(tl.join(found, found), [BN, BK])
    else:
        features = start + tl.arange(0, BK)
        inside = known[:, None] & (features < in_features)[None, :]
        found = basis_scale(scale, shift, rows[:, None] * groups + (features // GROUP)[None, :], inside, basis, BITS)
    return found


@triton.jit
def octet_scales(
    scale, shift, rows, known, start, in_features, groups, basis: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Float32 ``[BN, COUNT]``: the scale of each of some consecutive octets, each of which lies in one group."""
    first = start + 8 * tl.arange(0, COUNT)
    inside = known[:, None] & (first < in_features)[None, :]
    return basis_scale(scale, shift, rows[:, None] * groups + (first // GROUP)[None, :], inside, basis, BITS)


@triton.jit
def basis_scale(scale, shift, place, inside, basis: tl.constexpr, BITS: tl.constexpr):
    """The float32 scale of one basis of some groups, ``scale`` itself or ``scale · 2**-k``; 0 where not ``inside``."""
    if shift is None:
        alpha = tl.load(scale + place * BITS + basis, mask=inside, other=0.0).to(tl.float32)
    else:
        pairs: tl.constexpr = (BITS + 1) // 2
        nibbles = tl.load(shift + place * pairs + basis // 2, mask=inside, other=0).to(tl.int32)
        k = (nibbles >> (4 * (basis % 2))) & 15
        factor = ((127 - k) << 23).to(tl.float32, bitcast=True)  # the bits of 2**-k
        alpha = tl.load(scale + place, mask=inside, other=0.0).to(tl.float32) * factor
    return alpha
