# SPDX-License-Identifier: Apache-2.0
"""Packed layouts: round trips for all sizes, the documented bit positions, decoding against the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.kernels.shift_add import codec

SEEDS = st.integers(0, 2**31 - 1)


def _random(seed: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, bits=st.integers(1, 16), count=st.integers(1, 70), rows=st.integers(0, 3))
def test_streams_survive_packing(seed: int, bits: int, count: int, rows: int) -> None:
    values = _random(seed, 1 << bits, rows, 2, count)
    packed = codec.pack_stream(values, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (rows, 2, -(-count * bits // 8))
    assert torch.equal(codec.unpack_stream(packed, bits, count).to(values.dtype), values)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, count=st.integers(1, 70))
def test_bits_and_nibbles_survive_packing(seed: int, count: int) -> None:
    bits, nibbles = _random(seed, 2, 3, count), _random(seed, 16, 3, count)
    assert torch.equal(codec.unpack_bits(codec.pack_bits(bits), count).to(bits.dtype), bits)
    assert torch.equal(codec.unpack_nibbles(codec.pack_nibbles(nibbles), count).to(nibbles.dtype), nibbles)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 12])
def test_bit_positions_are_little_endian_and_the_tail_is_zero(bits: int) -> None:
    values = _random(bits, 1 << bits, 1, 11)
    packed = codec.pack_stream(values, bits)[0].tolist()
    stream = sum(byte << (8 * i) for i, byte in enumerate(packed))
    expected = sum(int(v) << (bits * i) for i, v in enumerate(values[0]))
    assert stream == expected  # the same integer, so every bit beyond the last value is zero too


def test_bit_i_lies_in_byte_i_div_8() -> None:
    bits = torch.zeros(1, 19)
    bits[0, 10] = 1
    assert codec.pack_bits(bits).tolist() == [[0, 4, 0]]
    assert codec.pack_nibbles(torch.tensor([[1, 2, 3]])).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("values", [[-1, 0], [0, 16]])
def test_values_that_do_not_fit_are_refused(values: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit in 4 bits"):
        codec.pack_nibbles(torch.tensor([values]))


def test_widths_outside_1_to_16_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 16 bits, not 17"):
        codec.pack_stream(torch.zeros(1, 1), 17)


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    bits=st.integers(1, 8),
    width=st.integers(1, 40),
    group=st.integers(1, 48),
    pot=st.booleans(),
)
def test_bcq_decodes_to_its_formula(seed: int, bits: int, width: int, group: int, pot: bool) -> None:
    out, groups = 3, -(-width // group)
    generator = torch.Generator().manual_seed(seed)
    sign = _random(seed, 2, out, bits, width)
    k = _random(seed + 1, 16, out, groups, bits)
    free = torch.rand(out, groups, bits, generator=generator, dtype=torch.float64)
    scale = torch.rand(out, groups, generator=generator, dtype=torch.float64) if pot else free
    shift = codec.pack_nibbles(k) if pot else None
    dense = codec.decode_bcq(codec.pack_bits(sign), scale, shift, group, width, torch.float64)
    for o in range(out):
        for i in range(width):
            g = i // group
            alpha = [float(scale[o, g]) * 2.0 ** -int(k[o, g, b]) for b in range(bits)] if pot else free[o, g]
            expected = sum(float(a) * (2 * int(sign[o, b, i]) - 1) for b, a in enumerate(alpha))
            assert float(dense[o, i]) == pytest.approx(expected, rel=1e-14, abs=1e-14)


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    layout=st.sampled_from([(2, 1), (4, 1), (5, 1), (8, 1), (4, 2), (6, 2), (8, 2), (9, 3), (12, 3)]),
    width=st.integers(1, 40),
    group=st.integers(1, 48),
)
def test_pot_decodes_to_its_formula(seed: int, layout: tuple[int, int], width: int, group: int) -> None:
    bits, terms = layout
    out, field_bits = 3, bits // terms
    words = _random(seed, 1 << bits, out, width)
    scale = torch.rand(out, -(-width // group), dtype=torch.float64)
    codes = codec.pack_stream(words, bits)
    dense = codec.decode_pot(codes, scale, bits, terms, group, width, torch.float64)
    for o in range(out):
        for i in range(width):
            total = 0.0
            for t in range(terms):
                field = (int(words[o, i]) >> (t * field_bits)) & ((1 << field_bits) - 1)
                sign, m = field >> (field_bits - 1), field & ((1 << (field_bits - 1)) - 1)
                total += 0.0 if m == 0 else (-1) ** sign * 2.0 ** -(m - 1)
            assert float(dense[o, i]) == float(scale[o, i // group]) * total


def test_the_powers_of_two_are_exact() -> None:
    # exp2 is the only transcendental function of the decoding; at integers it must not round.
    for dtype, lowest in ((torch.float32, 126), (torch.float64, 1022)):
        powers = torch.exp2(-torch.arange(lowest + 1, dtype=dtype))
        assert powers.tolist() == [2.0**-k for k in range(lowest + 1)]
