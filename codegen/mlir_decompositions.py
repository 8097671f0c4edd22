# SPDX-License-Identifier: Apache-2.0
"""Operators that torch-mlir does not lower, or lowers wrongly, in terms of others that it does.

Two tables: what is inlined before the graph is traced again (composite operators, which would otherwise come apart the
wrong way), and what the tracer replaces afterwards, beside torch-mlir's own decompositions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.spec import decompositions

aten = torch.ops.aten
Table = dict[OpOverload, Callable[..., Any]]


def inlined() -> Table:
    """Composite operators and the package's own: replaced by graph edit, with their provenance."""
    return {**decompositions(), aten.scaled_dot_product_attention.default: attention}


def lowered() -> Table:
    """torch-mlir's decompositions and ours, for `ExportedProgram.run_decompositions`."""
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    # A copy: the function returns the same dictionary to every caller.
    return {**get_decomposition_table(), **_OWN}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v in at least float32; rows without a key are 0.

    torch's own decomposition goes through the flash kernel, whose result has other strides than the graph expects.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if enable_gqa:
        heads = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(heads, dim=-3), value.repeat_interleave(heads, dim=-3)
    if is_causal:
        attn_mask = query.new_ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
    scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        zero, hidden = scores.new_zeros(()), scores.new_full((), -torch.inf)
        bias = torch.where(attn_mask, zero, hidden) if attn_mask.dtype is torch.bool else attn_mask.to(dtype)
        scores = scores + bias
    weights = torch.dropout(torch.softmax(scores, dim=-1), dropout_p, train=dropout_p > 0)
    result = (weights @ value.to(dtype)).to(query.dtype)
    if attn_mask is None:
        return result
    return torch.where((bias > -torch.inf).any(dim=-1, keepdim=True), result, 0.0)


# -- bit operations with a number ------------------------------------------------------------------------------------


def _with_number(operator: OpOverload) -> Callable[[Tensor, int], Tensor]:
    """x ∘ n = x ∘ [n, n, …]: torch-mlir knows the overloads of two tensors only."""

    def replaced(x: Tensor, number: int) -> Tensor:
        return operator(x, torch.full_like(x, number))

    return replaced


_OWN: Table = {
    aten.bitwise_and.Scalar: _with_number(aten.bitwise_and.Tensor),
    aten.bitwise_or.Scalar: _with_number(aten.bitwise_or.Tensor),
    aten.bitwise_xor.Scalar: _with_number(aten.bitwise_xor.Tensor),
    aten.bitwise_left_shift.Tensor_Scalar: _with_number(aten.bitwise_left_shift.Tensor),
    aten.bitwise_right_shift.Tensor_Scalar: _with_number(aten.bitwise_right_shift.Tensor),
    aten.__and__.Scalar: _with_number(aten.bitwise_and.Tensor),
    aten.__or__.Scalar: _with_number(aten.bitwise_or.Tensor),
    aten.__xor__.Scalar: _with_number(aten.bitwise_xor.Tensor),
    aten.__lshift__.Scalar: _with_number(aten.bitwise_left_shift.Tensor),
    aten.__rshift__.Scalar: _with_number(aten.bitwise_right_shift.Tensor),
}
