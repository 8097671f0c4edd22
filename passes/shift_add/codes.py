# SPDX-License-Identifier: Apache-2.0
"""Packed ShiftAdd weights, one class per stored layout; `rewriter.kernels.shift_add.codec` describes the layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.shift_add import codec
from rewriter.passes.shift_add import measures


@dataclass(frozen=True, eq=False)
class BCQCodes:
    """A weight in binary coding.

    Attributes:
        codes: ``uint8 [out, bits, ceil(in / 8)]``.
        scale: in the weight's dtype; ``[out, G]`` with ``shift``, else ``[out, G, bits]``.
        shift: ``uint8 [out, G, ceil(bits / 2)]`` packed exponents; None where each basis has its own scale.
        group: weights per group; the last may be ragged.
        in_features: columns of the weight.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    group: int
    in_features: int

    @property
    def bits(self) -> int:
        """Bases, that is stored code bits per weight."""
        return self.codes.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the dense weight."""
        return self.codes.shape[0], self.in_features

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and exponents included."""
        return _bits_per_weight(self)

    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by role."""
        shift = {} if self.shift is None else {"weight_shift": self.shift}
        return {"weight_codes": self.codes, "weight_scale": self.scale, **shift}

    def rows(self, start: int, end: int) -> BCQCodes:
        """The codes of rows ``start`` to ``end - 1``, sharing memory."""
        shift = None if self.shift is None else self.shift[start:end]
        return replace(self, codes=self.codes[start:end], scale=self.scale[start:end], shift=shift)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[out, in]`` in ``dtype`` (the scales' by default)."""
        work = codec.compute_dtype(self.scale)
        dense = codec.decode_bcq(self.codes, self.scale, self.shift, self.group, self.in_features, work)
        return dense.to(self.scale.dtype if dtype is None else dtype)


@dataclass(frozen=True, eq=False)
class PotCodes:
    """A weight as signed powers of two, one per weight.

    Attributes:
        codes: ``uint8 [out, ceil(in * bits / 8)]``.
        scale: ``[out, G]`` in the weight's dtype.
        bits: stored code bits per weight, sign and exponent.
        group: weights per group; the last may be ragged.
        in_features: columns of the weight.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    group: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the dense weight."""
        return self.codes.shape[0], self.in_features

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return _bits_per_weight(self)

    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by role."""
        return {"weight_codes": self.codes, "weight_scale": self.scale}

    def rows(self, start: int, end: int) -> PotCodes:
        """The codes of rows ``start`` to ``end - 1``, sharing memory."""
        return replace(self, codes=self.codes[start:end], scale=self.scale[start:end])

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[out, in]`` in ``dtype`` (the scales' by default)."""
        layout = (self.bits, 1, self.group, self.in_features)
        dense = codec.decode_pot(self.codes, self.scale, *layout, codec.compute_dtype(self.scale))
        return dense.to(self.scale.dtype if dtype is None else dtype)


@dataclass(frozen=True, eq=False)
class LevelCodes:
    """A weight as indices into a small table of levels under a group scale.

    Attributes:
        codes: ``uint8 [out, ceil(in * bits / 8)]``.
        scale: ``[out, G]`` in the weight's dtype.
        levels: ``[2**bits]`` float32, the value of every code word at unit scale.
        bits: stored code bits per weight.
        group: weights per group; the last may be ragged.
        in_features: columns of the weight.
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor
    bits: int
    group: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the dense weight."""
        return self.codes.shape[0], self.in_features

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and the table included."""
        return _bits_per_weight(self)

    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by role."""
        return {"weight_codes": self.codes, "weight_scale": self.scale, "weight_levels": self.levels}

    def rows(self, start: int, end: int) -> LevelCodes:
        """The codes of rows ``start`` to ``end - 1``, sharing memory."""
        return replace(self, codes=self.codes[start:end], scale=self.scale[start:end])

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[out, in]`` in ``dtype`` (the scales' by default)."""
        work = codec.compute_dtype(self.scale)
        layout = (self.bits, self.group, self.in_features)
        dense = codec.decode_levels(self.codes, self.scale, self.levels, *layout, work)
        return dense.to(self.scale.dtype if dtype is None else dtype)


AnyCodes = BCQCodes | PotCodes | LevelCodes


def joined(parts: Sequence[Any]) -> Any:
    """Packed rows below each other: weights of one layout, whose tables (where they have one) are the same."""
    by_row = [name for name in ("codes", "scale", "shift") if getattr(parts[0], name, None) is not None]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in by_row})


def _bits_per_weight(codes: AnyCodes) -> float:
    out, width = codes.shape
    return measures.bits_per_weight(*codes.tensors().values(), weights=out * width)
