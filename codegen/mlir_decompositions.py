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

    table = {**get_decomposition_table(), **_OWN}  # a copy: the function gives every caller the same dictionary
    return {**table, aten._to_copy.default: _cast_by(table[aten._to_copy.default])}


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


# -- bytes -------------------------------------------------------------------------------------------------------------
# Codes are unsigned bytes. torch-mlir moves, gathers and casts those; it makes no constants of them (linalg: the pass
# dies; tosa: refused), so constants and bit operations are made in int32, where they are the same numbers.


def _wide(dtype: torch.dtype | None) -> torch.dtype | None:
    return torch.int32 if dtype in (torch.uint8, torch.int8) else dtype


def _constant(operator: OpOverload) -> Callable[..., Any]:
    """A constructor of bytes as one of int32 and a cast."""

    def replaced(*args: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
        like = args[0].dtype if isinstance(args[0], Tensor) else None
        asked = dtype or like
        return NotImplemented if _wide(asked) is asked else operator(*args, dtype=_wide(asked), **options).to(asked)

    return replaced


def _bitwise(operator: OpOverload) -> Callable[[Tensor, Tensor], Any]:
    """x ∘ y of one shape and not of bytes: stablehlo broadcasts none."""

    def replaced(x: Tensor, y: Tensor) -> Any:
        dtype = torch.result_type(x, y)
        wide = _wide(dtype)
        if x.dtype is y.dtype is wide and x.shape == y.shape:
            return NotImplemented  # torch-mlir's own lowering is right
        one, two = torch.broadcast_tensors(x.to(wide), y.to(wide))
        return operator(one, two).to(dtype)

    return replaced


def _spelled(operator: OpOverload) -> Callable[[Tensor, Tensor | int], Tensor]:
    """x ∘ n = x ∘ [n, n, …]: the other spellings of an operator, of which torch-mlir knows some in some dialects."""

    def replaced(x: Tensor, y: Tensor | int) -> Tensor:
        return operator(x, y if isinstance(y, Tensor) else torch.full_like(x, y))

    return replaced


def _summed(operator: OpOverload) -> Callable[..., Any]:
    """A sum of bytes: torch-mlir's takes them for signed ones."""

    def replaced(x: Tensor, *args: Any, **options: Any) -> Any:
        return operator(x.to(torch.int64), *args, **options) if x.dtype is torch.uint8 else NotImplemented

    return replaced


def _running(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """sᵢ = Σ xⱼ over j ≤ i, as a sum over a triangle where the last dimension is another one (states of chunks).

    There IREE's scan keeps all that lies behind one step on the stack, which is small ("exceeded stack allocation limit").
    """
    dim %= max(x.dim(), 1)
    if dim == x.dim() - 1 or not x.is_floating_point():
        return _summed(aten.cumsum.default)(x, dim, dtype=dtype)
    place = torch.arange(x.shape[dim], device=x.device)
    earlier = (place <= place.unsqueeze(1)).reshape(*place.shape, *place.shape, *[1] * (x.dim() - 1 - dim))
    terms = x.to(dtype or x.dtype).unsqueeze(dim)
    return torch.where(earlier, terms, torch.zeros_like(terms)).sum(dim + 1)


def _joined(x: Tensor, pad: list[int], value: float = 0.0) -> Any:
    """Padding with another number than 0 (the column of ones of linear attention) as ``cat``.

    Padded once more with zeros, as chunks are, it is two insertions into one buffer, which IREE's CPU back end cannot
    place ("write affecting operations on global resources are restricted ...").
    """
    if value == 0 or not x.is_floating_point() or not all(isinstance(n, int) and n >= 0 for n in pad):
        return NotImplemented
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = x.dim() - 1 - i
        ends = [x.new_full((*x.shape[:dim], n, *x.shape[dim + 1 :]), value) for n in (before, after)]
        parts = [*ends[:1] * (before > 0), x, *ends[1:] * (after > 0)]
        x = torch.cat(parts, dim=dim) if len(parts) > 1 else x
    return x


_OWN: Table = {
    aten.constant_pad_nd.default: _joined,
    aten.cumsum.default: _running,
    **{op: _summed(op) for op in (aten.sum.default, aten.sum.dim_IntList)},
    **{op: _constant(op) for op in (aten.arange.start_step, aten.full_like.default, aten.scalar_tensor.default)},
}
for _operator, *_spellings in (
    (aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.__and__.Tensor, aten.__and__.Scalar),
    (aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.__or__.Tensor, aten.__or__.Scalar),
    (aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar, aten.__xor__.Tensor, aten.__xor__.Scalar),
    (
        aten.bitwise_left_shift.Tensor,
        aten.bitwise_left_shift.Tensor_Scalar,
        aten.__lshift__.Tensor,
        aten.__lshift__.Scalar,
    ),
    (
        aten.bitwise_right_shift.Tensor,
        aten.bitwise_right_shift.Tensor_Scalar,
        aten.__rshift__.Tensor,
        aten.__rshift__.Scalar,
    ),
):
    _OWN |= {_operator: _bitwise(_operator), **dict.fromkeys(_spellings, _spelled(_operator))}


# TOSA has no unsigned integers: its cast of a byte extends the sign. With the low eight bits taken, a cast is right
# everywhere, and what the package's operators need of bytes is to move, gather and cast them.


def _cast_by(other: Callable[..., Any]) -> Callable[..., Any]:
    """A byte as a number: the cast, then the low eight bits; any other cast by ``other``."""

    def replaced(x: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
        if x.dtype is not torch.uint8 or dtype in (None, torch.uint8):
            return other(x, dtype=dtype, **options)
        signed = torch.ops.prims.convert_element_type.default(x, torch.int32)
        return torch.bitwise_and(signed, torch.full_like(signed, 255)).to(dtype)

    return replaced
