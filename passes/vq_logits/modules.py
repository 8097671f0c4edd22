# SPDX-License-Identifier: Apache-2.0
"""Codebook heads as modules: in place of a model's ``lm_head``, trainable, saved under their role names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.kernels.vq_logits.codec import decode_exact, decode_product, decode_residual, decode_tiers
from rewriter.kernels.vq_logits.op import (
    vq_logits_product,
    vq_logits_product_exact,
    vq_logits_residual,
    vq_logits_tiers,
)
from rewriter.passes.vq_logits.heads import (
    CodebookHead,
    ExactHead,
    ProductHead,
    ProjectedHead,
    ResidualHead,
    TiersHead,
)
from rewriter.passes.vq_logits.methods import AfterRows, AfterTiers


class VQLogitsTiers(AfterTiers):
    """Tiers head: parameters ``codebook`` ``[K, d]`` and ``token_bias`` ``[V]`` (or None), buffer ``code_of``."""

    code_of: Tensor

    def __init__(self, head: TiersHead) -> None:
        super().__init__()
        self.codebook = nn.Parameter(head.codebook)
        self.token_bias = None if head.token_bias is None else nn.Parameter(head.token_bias)
        self.register_buffer("code_of", head.code_of)
        self.out_features = head.code_of.shape[0]
        self.in_features = head.codebook.shape[1]
        self.singletons = head.singletons

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., d]``."""
        return vq_logits_tiers(h, self.codebook, self.code_of, self.token_bias)

    @property
    def weight(self) -> Tensor:
        """The dense head ``[V, d]`` these codes stand for, decoded on each access."""
        return decode_tiers(self.codebook, self.code_of)

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[V]`` of the equivalent dense head."""
        return self.token_bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, codes={self.codebook.shape[0]}, "
            f"singletons={self.singletons}, bias={self.token_bias is not None}"
        )


class VQLogitsProduct(AfterRows):
    """Product head: parameters ``codebook`` ``[G, C, w]`` and ``bias`` ``[V]`` or None, buffer ``codes`` ``[V, G]``."""

    codes: Tensor

    def __init__(self, head: ProductHead, in_features: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(head.codebook)
        self.bias = None if head.bias is None else nn.Parameter(head.bias)
        self.register_buffer("codes", head.codes)
        self.out_features = head.codes.shape[0]
        self.in_features = in_features

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., d]``."""
        return vq_logits_product(h, self.codebook, self.codes, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense head ``[V, d]`` these codes stand for, decoded on each access."""
        return decode_product(self.codebook, self.codes, self.in_features)

    def extra_repr(self) -> str:
        groups, per_group, dims = self.codebook.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"groups={groups}, dims={dims}, codes={per_group}, bias={self.bias is not None}"
        )


class VQLogitsExact(VQLogitsProduct):
    """Product head and rows of its own for some tokens: parameter ``exact`` ``[m, d]``, buffer ``exact_of``."""

    exact_of: Tensor

    def __init__(self, head: ExactHead) -> None:
        super().__init__(ProductHead(head.codebook, head.codes, head.bias), head.exact.shape[1])
        self.exact = nn.Parameter(head.exact)
        self.register_buffer("exact_of", head.exact_of)

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., d]``."""
        return vq_logits_product_exact(h, self.codebook, self.codes, self.bias, self.exact, self.exact_of)

    @property
    def weight(self) -> Tensor:
        """The dense head ``[V, d]`` these codes and rows stand for, decoded on each access."""
        return decode_exact(self.codebook, self.codes, self.exact, self.exact_of)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, exact_rows={self.exact.shape[0]}"


class VQLogitsProjected(VQLogitsProduct):
    """Projection (parameter ``[r, d]``: a rotation, or low rank) of the hidden state, then a product head of width r."""

    def __init__(self, head: ProjectedHead) -> None:
        super().__init__(ProductHead(head.codebook, head.codes, head.bias), head.projection.shape[1])
        self.projection = nn.Parameter(head.projection)

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., d]``."""
        return vq_logits_product(F.linear(h, self.projection), self.codebook, self.codes, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense head ``[V, d]`` these codes stand for, decoded on each access."""
        return decode_product(self.codebook, self.codes, self.projection.shape[0]) @ self.projection

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.projection.shape[0]}"


class VQLogitsResidual(AfterRows):
    """Residual head: parameters ``codebook`` ``[S, K, d]`` and ``bias`` ``[V]`` or None, buffer ``codes``."""

    codes: Tensor

    def __init__(self, head: ResidualHead) -> None:
        super().__init__()
        self.codebook = nn.Parameter(head.codebook)
        self.bias = None if head.bias is None else nn.Parameter(head.bias)
        self.register_buffer("codes", head.codes)
        self.out_features = head.codes.shape[0]
        self.in_features = head.codebook.shape[2]

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., d]``."""
        return vq_logits_residual(h, self.codebook, self.codes, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense head ``[V, d]`` these codes stand for, decoded on each access."""
        return decode_residual(self.codebook, self.codes)

    def extra_repr(self) -> str:
        stages, codes, _ = self.codebook.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"stages={stages}, codes={codes}, bias={self.bias is not None}"
        )


def of(head: CodebookHead, in_features: int) -> nn.Module:
    """The module of a fitted head; a product head alone does not say how much of its last group is padding.

    Raises:
        TypeError: a kind of head without a module.
    """
    match head:
        case TiersHead():
            return VQLogitsTiers(head)
        case ProductHead():
            return VQLogitsProduct(head, in_features)
        case ExactHead():
            return VQLogitsExact(head)
        case ProjectedHead():
            return VQLogitsProjected(head)
        case ResidualHead():
            return VQLogitsResidual(head)
    raise TypeError(f"no module for a head of type {type(head).__name__}")
