# SPDX-License-Identifier: Apache-2.0
"""ShiftAdd weights as modules, in place of `nn.Linear` and `nn.Embedding` in a model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rewriter.kernels.shift_add import op
from rewriter.passes.shift_add.bcq import BCQCodes
from rewriter.passes.shift_add.pot import PotCodes

Codes = BCQCodes | PotCodes


class _ShiftAddWeight(nn.Module):
    """The packed weight ``[rows, in_features]`` under the names its parts have in a saved file.

    Attributes:
        weight_codes: ``uint8`` buffer.
        weight_scale: trainable scales, floating.
        weight_shift: ``uint8`` buffer of exponents, or None (absent from the state dict).
    """

    weight_codes: Tensor
    weight_scale: nn.Parameter
    weight_shift: Tensor | None

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.group = codes.group
        self.bits = codes.bits
        self.terms = codes.terms if isinstance(codes, PotCodes) else None
        self._columns = codes.in_features
        self.register_buffer("weight_codes", codes.codes)
        self.weight_scale = _as_parameter(codes.scale)
        self.register_buffer("weight_shift", codes.shift if isinstance(codes, BCQCodes) else None)

    @property
    def weight(self) -> Tensor:
        """The dense weight these codes stand for, decoded on every access; differentiable in the scales."""
        return self.codes.decode()

    @property
    def codes(self) -> Codes:
        """The packed weight as the fit returned it, sharing this module's tensors."""
        if self.terms is None:
            return BCQCodes(self.weight_codes, self.weight_scale, self.weight_shift, self.group, self._columns)
        return PotCodes(self.weight_codes, self.weight_scale, self.bits, self.terms, self.group, self._columns)

    def _describe(self) -> str:
        if self.terms is not None:
            return f"bits={self.bits}, mode=pot, terms={self.terms}, group={self.group}"
        scale = "fp16" if self.weight_shift is None else "pot"
        return f"bits={self.bits}, mode=bcq, scale={scale}, group={self.group}"


class ShiftAddLinear(_ShiftAddWeight):
    """``y = x Wᵀ + bias`` with W in packed codes; ``[..., in_features] -> [..., out_features]`` in x's dtype.

    Args:
        codes: the fitted weight ``[out_features, in_features]``.
        bias: ``[out_features]`` or None; a `nn.Parameter` is shared, a tensor becomes one.
    """

    def __init__(self, codes: Codes, bias: Tensor | None = None) -> None:
        super().__init__(codes)
        self.out_features, self.in_features = codes.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self.bias = None if bias is None else _as_parameter(bias)

    def rows(self, start: int, end: int) -> ShiftAddLinear:
        """The layer of outputs ``start`` to ``end - 1`` alone, with tensors of its own."""
        whole = self.codes
        codes, scale = whole.codes[start:end].clone(), whole.scale.detach()[start:end].clone()
        bias = None if self.bias is None else self.bias.detach()[start:end].clone()
        if isinstance(whole, PotCodes):
            return ShiftAddLinear(replace(whole, codes=codes, scale=scale), bias)
        shift = None if whole.shift is None else whole.shift[start:end].clone()
        return ShiftAddLinear(replace(whole, codes=codes, scale=scale, shift=shift), bias)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, width = self.weight_codes, self.weight_scale, self.in_features
        if self.terms is None:
            out: Tensor = op.bcq_linear(x, codes, scale, self.weight_shift, self.bias, self.group, width)
        else:
            out = op.pot_linear(x, codes, scale, self.bias, self.bits, self.terms, self.group, width)
        return out

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self._describe()}"


class ShiftAddEmbedding(_ShiftAddWeight):
    """``W[ids]`` with W in packed codes; ``[...] -> [..., embedding_dim]`` in the scales' dtype.

    Only the rows asked for are decoded.

    Args:
        codes: the fitted weight ``[num_embeddings, embedding_dim]``.
        padding_idx: row that receives no gradient, as in `nn.Embedding`.
    """

    def __init__(self, codes: Codes, padding_idx: int | None = None) -> None:
        super().__init__(codes)
        self.num_embeddings, self.embedding_dim = codes.shape
        if padding_idx is not None and not -self.num_embeddings <= padding_idx < self.num_embeddings:
            raise ValueError(f"padding_idx={padding_idx} is not a row of {self.num_embeddings}")
        self.padding_idx = None if padding_idx is None else padding_idx % self.num_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        codes, scale, width = self.weight_codes, self.weight_scale, self.embedding_dim
        if self.terms is None:
            rows: Tensor = op.bcq_embedding(ids, codes, scale, self.weight_shift, self.group, width)
        else:
            rows = op.pot_embedding(ids, codes, scale, self.bits, self.terms, self.group, width)
        if self.padding_idx is None or not rows.requires_grad:
            return rows
        return torch.where((ids == self.padding_idx).unsqueeze(-1), rows.detach(), rows)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe()}"


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
