# SPDX-License-Identifier: Apache-2.0
"""Codebook heads as modules: in place of a model's ``lm_head``, trainable, saved under their role names."""

from __future__ import annotations

from torch import Tensor, nn

from rewriter.kernels.vq_logits.codec import decode_product, decode_tiers
from rewriter.kernels.vq_logits.op import (
    vq_logits_product,
    vq_logits_tiers,
    vq_tiers_logsumexp,
    vq_tiers_nll,
)
from rewriter.passes.vq_logits.product import ProductHead
from rewriter.passes.vq_logits.tiers import TiersHead


class VQLogitsTiers(nn.Module):
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

    def nll(self, h: Tensor, target: Tensor) -> Tensor:
        """−log p(target) per position, exact, without logits over the vocabulary; 0 where the target is -100."""
        return vq_tiers_nll(h, self.codebook, self.code_of, self.token_bias, target)

    def logsumexp(self, h: Tensor) -> Tensor:
        """log Σ_i exp logit_i per position, without logits over the vocabulary."""
        return vq_tiers_logsumexp(h, self.codebook, self.code_of, self.token_bias)

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


class VQLogitsProduct(nn.Module):
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
