# SPDX-License-Identifier: Apache-2.0
"""Storage of codebook heads: which code each token uses, and the dense head the codes stand for.

Tiers keep one code per token. ``code_of`` is uint8 ``[V, nbytes]``: the code's number as little-endian bytes, 1 byte
up to 256 codes, 2 up to 65 536, 3 above. Product codebooks keep one code per token and group of dimensions:
uint8 ``[V, G]``, at most 256 codes per group; the last group of a width not divisible by the group's is zero-padded.
Beside them some tokens may keep a row of their own: ``exact`` ``[m, d]``, and ``exact_of`` ``[m, nbytes]``, their token
numbers as bytes; their product codes stay in the file and are not used. Residual codebooks add up a whole row from
each of S stages: ``codes`` is uint8 ``[V, S, nbytes]``, numbers as those of tiers.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CODES = 1 << 24
MAX_GROUP_CODES = 256


def code_bytes(codes: int) -> int:
    """Bytes that number ``codes`` codes: 1, 2 or 3.

    Raises:
        ValueError: for less than one or more than 2^24 codes.
    """
    if not 1 <= codes <= MAX_CODES:
        raise ValueError(f"a codebook holds 1 to {MAX_CODES} codes, not {codes}")
    if codes <= 1 << 8:
        return 1
    return 2 if codes <= 1 << 16 else 3


def pack_codes(index: Tensor, codes: int) -> Tensor:
    """Code numbers ``[...]`` (any integer dtype, each in [0, codes)) -> uint8 ``[..., nbytes]``, little-endian.

    Raises:
        ValueError: a number is outside [0, codes).
    """
    nbytes = code_bytes(codes)
    wide = index.to(torch.int64)
    if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < codes:
        raise ValueError(f"code numbers must lie in [0, {codes}); found {int(wide.min())} to {int(wide.max())}")
    return torch.stack([(wide >> 8 * byte) & 0xFF for byte in range(nbytes)], dim=-1).to(torch.uint8)


def unpack_codes(code_of: Tensor) -> Tensor:
    """uint8 ``[..., nbytes]`` -> int64 ``[...]``: sum over bytes of ``byte · 256^position``."""
    index = code_of[..., 0].to(torch.int64)
    for byte in range(1, code_of.shape[-1]):
        index = index + code_of[..., byte].to(torch.int64) * (1 << 8 * byte)
    return index


def decode_tiers(codebook: Tensor, code_of: Tensor) -> Tensor:
    """Codebook ``[K, d]`` and uint8 ``[V, nbytes]`` -> the dense head ``[V, d]`` they stand for."""
    return codebook.index_select(0, unpack_codes(code_of))


def flat_codes(codes: Tensor, per_group: int) -> Tensor:
    """uint8 ``[V, G]`` -> int64 ``[V, G]``, rows of the codebook flattened to ``[G·C, w]``: ``g·C + code``."""
    start = torch.arange(codes.shape[1], device=codes.device) * per_group
    return codes.to(torch.int64) + start


def decode_product(codebook: Tensor, codes: Tensor, width: int) -> Tensor:
    """Codebook ``[G, C, w]`` and uint8 ``[V, G]`` -> the dense head ``[V, width]``; the padding is cut off."""
    _, per_group, dims = codebook.shape
    rows = codebook.reshape(-1, dims).index_select(0, flat_codes(codes, per_group).reshape(-1))
    return rows.reshape(codes.shape[0], -1)[:, :width]


def decode_exact(codebook: Tensor, codes: Tensor, exact: Tensor, exact_of: Tensor) -> Tensor:
    """The dense head ``[V, d]`` of a product codebook with the rows ``exact`` ``[m, d]`` in place of their tokens'."""
    weight = decode_product(codebook, codes, exact.shape[1])
    return weight.index_copy(0, unpack_codes(exact_of), exact)


def decode_residual(codebook: Tensor, codes: Tensor) -> Tensor:
    """Codebooks ``[S, K, d]`` and uint8 ``[V, S, nbytes]`` -> the dense head ``[V, d]``: Σ_s C[s, a_s(i)]."""
    index = unpack_codes(codes)
    weight = codebook[0].index_select(0, index[:, 0])
    for stage in range(1, codebook.shape[0]):
        weight = weight + codebook[stage].index_select(0, index[:, stage])
    return weight
