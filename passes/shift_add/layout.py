# SPDX-License-Identifier: Apache-2.0
"""A packed weight and the operator that reads it: which tensors, which arguments. Rules and modules both ask here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.shift_add import op
from rewriter.passes.shift_add.bcq import BCQ, Uniform
from rewriter.passes.shift_add.codes import AnyCodes, BCQCodes, LevelCodes, PotCodes
from rewriter.passes.shift_add.modes import Mode
from rewriter.passes.shift_add.pot import Pot

Call = tuple[OpOverload, tuple[Any, ...]]

BINARY, POWERS, LEVELS = "bcq", "pot", "level"


@dataclass(frozen=True)
class Layout:
    """How a weight is stored.

    Attributes:
        storage: `BINARY`, `POWERS` (one signed power of two per weight) or `LEVELS` (indices into a table).
        bits: code bits per weight.
        group: weights per scale.
        in_features: columns of the weight.
        shared: whether binary bases share a scale, powers of two apart (they then have exponents).
    """

    storage: str
    bits: int
    group: int
    in_features: int
    shared: bool = False

    @classmethod
    def of(cls, codes: AnyCodes) -> Layout:
        """The layout of a packed weight."""
        if isinstance(codes, BCQCodes):
            return cls(BINARY, codes.bits, codes.group, codes.in_features, codes.shift is not None)
        storage = LEVELS if isinstance(codes, LevelCodes) else POWERS
        return cls(storage, codes.bits, codes.group, codes.in_features)

    @classmethod
    def planned(cls, mode: Mode, group: int, in_features: int) -> Layout:
        """The layout that ``mode.assemble`` packs to."""
        if isinstance(mode, BCQ | Uniform):
            return cls(BINARY, mode.bits, group, in_features, not mode.free)
        single = isinstance(mode, Pot) and mode.terms == 1
        return cls(POWERS if single else LEVELS, mode.bits, group, in_features)

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        own = {BINARY: ("weight_shift",) if self.shared else (), POWERS: (), LEVELS: ("weight_levels",)}
        return ("weight_codes", "weight_scale", *own[self.storage])

    def codes(self, tensors: Mapping[str, Tensor]) -> AnyCodes:
        """The packed weight made of ``tensors`` by role."""
        packed, scale = tensors["weight_codes"], tensors["weight_scale"]
        if self.storage == BINARY:
            return BCQCodes(packed, scale, tensors.get("weight_shift"), self.group, self.in_features)
        if self.storage == POWERS:
            return PotCodes(packed, scale, self.bits, self.group, self.in_features)
        return LevelCodes(packed, scale, tensors["weight_levels"], self.bits, self.group, self.in_features)

    def linear(self, x: Any, tensors: Mapping[str, Any], bias: Any) -> Call:
        """The operator and its arguments for ``x Wᵀ + bias``; tensors or graph nodes."""
        overloads = {BINARY: op.bcq_linear, POWERS: op.pot_linear, LEVELS: op.level_linear}
        return overloads[self.storage], (x, *self._weight(tensors), bias, *self._numbers)

    def embedding(self, ids: Any, tensors: Mapping[str, Any]) -> Call:
        """The operator and its arguments for ``W[ids]``; tensors or graph nodes."""
        overloads = {BINARY: op.bcq_embedding, POWERS: op.pot_embedding, LEVELS: op.level_embedding}
        return overloads[self.storage], (ids, *self._weight(tensors), *self._numbers)

    def _weight(self, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        both = (tensors["weight_codes"], tensors["weight_scale"])
        if self.storage == BINARY:
            return (*both, tensors.get("weight_shift"))
        return both if self.storage == POWERS else (*both, tensors["weight_levels"])

    @property
    def _numbers(self) -> tuple[int, ...]:
        if self.storage == BINARY:
            return (self.group, self.in_features)
        if self.storage == POWERS:
            return (self.bits, 1, self.group, self.in_features)
        return (self.bits, self.group, self.in_features)
