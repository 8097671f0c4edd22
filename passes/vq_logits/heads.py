# SPDX-License-Identifier: Apache-2.0
"""Fitted heads: what every structure has in common, so that the rule, the choice of a size and the reports need no cases.

A head is its tensors by role, as they are stored. What the operators compute from them is `CodebookHead.logits`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.vq_logits.codec import decode_exact, decode_product, decode_residual, decode_tiers
from rewriter.kernels.vq_logits.reference import exact_logits, product_logits, residual_logits, tiers_logits
from rewriter.narrow import stored_bytes


@dataclass(frozen=True)
class CodebookHead(ABC):
    """A head of V tokens for hidden states of width d, made of a codebook and integer codes."""

    buffers: ClassVar[frozenset[str]]  # roles of the integer tensors, which do not train

    @abstractmethod
    def logits(self, h: Tensor) -> Tensor:
        """Hidden states ``[..., d]`` -> ``[..., V]`` in their dtype."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The dense head ``[V, d]`` the codes stand for."""

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by role; a bias that is not there is left out."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in fields if isinstance(value, Tensor)}

    @property
    def bytes(self) -> int:
        """Bytes in the stored file."""
        return sum(stored_bytes(t) for t in self.tensors().values())

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The head of these tensors by role."""
        return cls(**{f.name: tensors.get(f.name) for f in dataclasses.fields(cls) if f.name != "singletons"})


@dataclass(frozen=True)
class TiersHead(CodebookHead):
    """Codebook ``[K, d]``, code_of uint8 ``[V, nbytes]``, token_bias ``[V]`` or None.

    Codes below ``singletons`` hold one token each (0 where that is not known any more).
    """

    buffers: ClassVar[frozenset[str]] = frozenset({"code_of"})
    codebook: Tensor
    code_of: Tensor
    token_bias: Tensor | None
    singletons: int = 0

    def logits(self, h: Tensor) -> Tensor:
        return tiers_logits(h, self.codebook, self.code_of, self.token_bias)

    def dense(self) -> Tensor:
        return decode_tiers(self.codebook, self.code_of)


@dataclass(frozen=True)
class ProductHead(CodebookHead):
    """Codebook ``[G, C, w]`` (fp16-representable), codes uint8 ``[V, G]``, bias ``[V]`` or None.

    Its width is that of the hidden states it gets: at most G·w, more than (G − 1)·w. `dense` keeps the padding.
    """

    buffers: ClassVar[frozenset[str]] = frozenset({"codes"})
    codebook: Tensor
    codes: Tensor
    bias: Tensor | None

    def logits(self, h: Tensor) -> Tensor:
        return product_logits(h, self.codebook, self.codes, self.bias)

    def dense(self) -> Tensor:
        groups, _, dims = self.codebook.shape
        return decode_product(self.codebook, self.codes, groups * dims)


@dataclass(frozen=True)
class ExactHead(CodebookHead):
    """A `ProductHead` and the rows of some tokens as they are: ``exact`` ``[m, d]``, their ids ``exact_of`` as bytes."""

    buffers: ClassVar[frozenset[str]] = frozenset({"codes", "exact_of"})
    codebook: Tensor
    codes: Tensor
    bias: Tensor | None
    exact: Tensor
    exact_of: Tensor

    def logits(self, h: Tensor) -> Tensor:
        return exact_logits(h, self.codebook, self.codes, self.bias, self.exact, self.exact_of)

    def dense(self) -> Tensor:
        return decode_exact(self.codebook, self.codes, self.exact, self.exact_of)


@dataclass(frozen=True)
class ProjectedHead(CodebookHead):
    """Projection ``[r, d]`` of the hidden state, then a product codebook for width r (r = d: a rotation)."""

    buffers: ClassVar[frozenset[str]] = frozenset({"codes"})
    projection: Tensor
    codebook: Tensor
    codes: Tensor
    bias: Tensor | None

    def logits(self, h: Tensor) -> Tensor:
        return product_logits(F.linear(h, self.projection.to(h.dtype)), self.codebook, self.codes, self.bias)

    def dense(self) -> Tensor:
        return decode_product(self.codebook, self.codes, self.projection.shape[0]) @ self.projection


@dataclass(frozen=True)
class ResidualHead(CodebookHead):
    """Codebook ``[S, K, d]``, codes uint8 ``[V, S, nbytes]``, bias ``[V]`` or None: rows are sums of S codes."""

    buffers: ClassVar[frozenset[str]] = frozenset({"codes"})
    codebook: Tensor
    codes: Tensor
    bias: Tensor | None

    def logits(self, h: Tensor) -> Tensor:
        return residual_logits(h, self.codebook, self.codes, self.bias)

    def dense(self) -> Tensor:
        return decode_residual(self.codebook, self.codes)
