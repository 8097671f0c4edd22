# SPDX-License-Identifier: Apache-2.0
"""ShiftAdd weights as modules, in place of `nn.Linear` and `nn.Embedding` in a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rewriter.passes.shift_add.codes import AnyCodes
from rewriter.passes.shift_add.layout import BINARY, Layout


class _ShiftAddWeight(nn.Module):
    """The packed weight ``[rows, in_features]`` under the names its parts have in a saved file.

    Attributes:
        layout: how it is packed.
        weight_codes: ``uint8`` buffer.
        weight_scale: trainable scales, floating.
        weight_shift: ``uint8`` buffer of exponents; only where bases share a scale.
        weight_levels: float32 buffer, the value of every code word; only where codes index a table.
    """

    weight_codes: Tensor
    weight_scale: nn.Parameter

    def __init__(self, codes: AnyCodes) -> None:
        super().__init__()
        self.layout = Layout.of(codes)
        tensors = codes.tensors()
        self.weight_scale = _as_parameter(tensors["weight_scale"])
        for role in self.layout.roles:
            if role != "weight_scale":
                self.register_buffer(role, tensors[role])

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by role; the module's own tensors."""
        return {role: getattr(self, role) for role in self.layout.roles}

    @property
    def weight(self) -> Tensor:
        """The dense weight these codes stand for, decoded on every access; differentiable in the scales."""
        return self.codes.decode()

    @property
    def codes(self) -> AnyCodes:
        """The packed weight as the fit returned it, sharing this module's tensors."""
        return self.layout.codes(self.tensors)

    def _describe(self) -> str:
        scale = (", scale=pot" if self.layout.shared else ", scale=fp16") if self.layout.storage == BINARY else ""
        return f"bits={self.layout.bits}, storage={self.layout.storage}{scale}, group={self.layout.group}"


class ShiftAddLinear(_ShiftAddWeight):
    """``y = x Wᵀ + bias`` with W in packed codes; ``[..., in_features] -> [..., out_features]`` in x's dtype.

    Args:
        codes: the fitted weight ``[out_features, in_features]``.
        bias: ``[out_features]`` or None; a `nn.Parameter` is shared, a tensor becomes one.
        input_scale: ``[in_features]`` or None; x is multiplied with it first, and the codes are of the weight over it.
    """

    input_scale: Tensor | None

    def __init__(self, codes: AnyCodes, bias: Tensor | None = None, input_scale: Tensor | None = None) -> None:
        super().__init__(codes)
        self.register_buffer("input_scale", input_scale)
        self.out_features, self.in_features = codes.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self.bias = None if bias is None else _as_parameter(bias)

    def rows(self, start: int, end: int) -> ShiftAddLinear:
        """The layer of outputs ``start`` to ``end - 1`` alone, with tensors of its own."""
        part = {role: t.detach().clone() for role, t in self.codes.rows(start, end).tensors().items()}
        bias = None if self.bias is None else self.bias.detach()[start:end].clone()
        scale = None if self.input_scale is None else self.input_scale.clone()
        return ShiftAddLinear(self.layout.codes(part), bias, scale)

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded on every access; differentiable in the scales."""
        dense = self.codes.decode()
        return dense if self.input_scale is None else dense * self.input_scale

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale
        operator, arguments = self.layout.linear(x, self.tensors, self.bias)
        out: Tensor = operator(*arguments)
        return out

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self._describe()}"


class ShiftAddPointwise(ShiftAddLinear):
    """A convolution with kernel 1: ``[n, in, …] -> [n, out, …]``, the linear over channels at every ``stride``-th place.

    Args:
        codes, bias, input_scale: as for `ShiftAddLinear`, of the weight ``[out, in]``.
        stride: one step per spatial dimension.
    """

    def __init__(
        self,
        codes: AnyCodes,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        *,
        stride: tuple[int, ...],
    ) -> None:
        super().__init__(codes, bias, input_scale)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for axis, step in enumerate(self.stride, 2):
            kept = kept[(slice(None),) * axis + (slice(None, None, step),)]
        out = super().forward(kept.movedim(1, -1)).movedim(-1, 1)
        # As a convolution does: in channels-last format only where the input is.
        return out.contiguous() if x.is_contiguous() else out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}"


class ShiftAddEmbedding(_ShiftAddWeight):
    """``W[ids]`` with W in packed codes; ``[...] -> [..., embedding_dim]`` in the scales' dtype.

    Only the rows asked for are decoded.

    Args:
        codes: the fitted weight ``[num_embeddings, embedding_dim]``.
        padding_idx: row that receives no gradient, as in `nn.Embedding`.
    """

    def __init__(self, codes: AnyCodes, padding_idx: int | None = None) -> None:
        super().__init__(codes)
        self.num_embeddings, self.embedding_dim = codes.shape
        if padding_idx is not None and not -self.num_embeddings <= padding_idx < self.num_embeddings:
            raise ValueError(f"padding_idx={padding_idx} is not a row of {self.num_embeddings}")
        self.padding_idx = None if padding_idx is None else padding_idx % self.num_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        operator, arguments = self.layout.embedding(ids, self.tensors)
        rows: Tensor = operator(*arguments)
        if self.padding_idx is None or not rows.requires_grad:
            return rows
        return torch.where((ids == self.padding_idx).unsqueeze(-1), rows.detach(), rows)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe()}"


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
