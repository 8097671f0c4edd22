# SPDX-License-Identifier: Apache-2.0
"""A packed weight as the ShiftAdd kernels take it, and small things their launchers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.shift_add import reference

OCTET = 8  # features that share a byte of a plane


@dataclass(frozen=True)
class Weight:
    """A packed weight as the kernels take it.

    Attributes:
        format: "bcq", "pot" or "level".
        codes: uint8, contiguous.
        scale: floating, contiguous.
        table: packed exponents (bcq; None: a scale per basis), levels (level), None (pot).
        bits: bases, or bits of a code word.
        terms: powers of two per word; 1 where that means nothing.
        group: width of a group, at most ``in_features``.
    """

    format: str
    codes: Tensor
    scale: Tensor
    table: Tensor | None
    bits: int
    terms: int
    group: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def pointers(self) -> dict[str, Any]:
        return {"codes_ptr": self.codes, "scale_ptr": self.scale, "table_ptr": self.table}

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "out_features": self.out_features, "in_features": self.in_features, "row_bytes": self.codes.shape[-1],
            "groups": self.scale.shape[1],
        }  # fmt: skip

    @property
    def layout(self) -> dict[str, Any]:
        return {"FORMAT": self.format, "BITS": self.bits, "TERMS": self.terms, "GROUP": self.group}

    @property
    def crosses_bytes(self) -> bool:
        """Whether code words lie across bytes."""
        return self.format != "bcq" and OCTET % self.bits != 0

    def share(self, block: int) -> str:
        """What is known to have one scale: a tile of ``block`` features, eight of them, or only each weight itself."""
        if self.group >= self.in_features or self.group % block == 0:
            return "tile"
        return "weight" if self.group % OCTET else "octet"


def bcq(codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int) -> Weight:
    """A `Weight` of binary bases, checked."""
    reference.check_bcq(codes, scale, shift, group, in_features)
    return _weight("bcq", codes, scale, shift, codes.shape[1], 1, group, in_features)


def pot(codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int) -> Weight:
    """A `Weight` of sums of powers of two, checked."""
    reference.check_pot(codes, scale, bits, terms, group, in_features)
    return _weight("pot", codes, scale, None, bits, terms, group, in_features)


def level(codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int) -> Weight:
    """A `Weight` of indices into a table, checked."""
    reference.check_levels(codes, scale, levels, bits, group, in_features)
    return _weight("level", codes, scale, levels, bits, 1, group, in_features)


def _weight(
    format: str, codes: Tensor, scale: Tensor, table: Tensor | None, bits: int, terms: int, group: int, width: int
) -> Weight:
    refuse_float64(scale, table)
    table = None if table is None else table.contiguous()
    return Weight(format, codes.contiguous(), scale.contiguous(), table, bits, terms, min(group, width), width)


def refuse_float64(*tensors: Tensor | None) -> None:
    if any(t is not None and t.dtype is torch.float64 for t in tensors):
        raise Unsupported("float64 is computed by the reference")


def unit_stride(rows: Tensor) -> Tensor:
    """``[n, in]`` with neighbours along ``in`` beside each other; rows may lie anywhere."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
