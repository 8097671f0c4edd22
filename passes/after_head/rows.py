# SPDX-License-Identifier: Apache-2.0
"""The rows of a codebook head as nodes of a graph: what its operator decodes inside, laid open for others to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from rewriter.editing import Editor
from rewriter.kernels.vq_logits import op as heads

aten = torch.ops.aten


def decoded(edit: Editor, head: Any, h: Node, tensors: Sequence[Node | None]) -> tuple[Node, Node | None]:
    """Weight ``[V, d]`` and bias ``[V]`` or None of the head that ``head`` makes of ``h`` and ``tensors``."""
    codebook, codes, bias, *rest = tensors
    return _ROWS[head](edit, h.meta["val"].shape[-1], codebook, codes, *rest), bias


def has_rows(head: Any) -> bool:
    """Whether the operator is of a head that `decoded` knows."""
    return head in _ROWS


def _product(edit: Editor, width: int, codebook: Node, codes: Node) -> Node:
    """Row i is C_1[a_1(i)], …, C_G[a_G(i)] side by side, the padding cut off."""
    groups, per_group, dims = codebook.meta["val"].shape
    tokens, device = codes.meta["val"].shape[0], codes.meta["val"].device
    start = edit.call(aten.arange.start_step, 0, groups * per_group, per_group, dtype=torch.int64, device=device)
    place = edit.call(aten.add.Tensor, edit.call(aten.to.dtype, codes, torch.int64), start)
    flat = edit.call(aten.reshape.default, codebook, [groups * per_group, dims])
    rows = edit.call(aten.index_select.default, flat, 0, edit.call(aten.reshape.default, place, [tokens * groups]))
    rows = edit.call(aten.reshape.default, rows, [tokens, groups * dims])
    return edit.call(aten.slice.Tensor, rows, 1, 0, width)


def _exact(edit: Editor, width: int, codebook: Node, codes: Node, exact: Node, exact_of: Node) -> Node:
    """Those of the product code, and in their place the rows that are kept."""
    rows = _product(edit, width, codebook, codes)
    return edit.call(aten.index_copy.default, rows, 0, _numbers(edit, exact_of), exact)


def _residual(edit: Editor, width: int, codebook: Node, codes: Node) -> Node:
    """Σ_s C_s[a_s(i)]"""
    total = None
    for stage in range(codebook.meta["val"].shape[0]):
        book = edit.call(aten.select.int, codebook, 0, stage)
        number = _numbers(edit, edit.call(aten.select.int, codes, 1, stage))
        rows = edit.call(aten.index_select.default, book, 0, number)
        total = rows if total is None else edit.call(aten.add.Tensor, total, rows)
    if total is None:
        raise ValueError("a residual codebook has at least one stage")
    return total


def _numbers(edit: Editor, packed: Node) -> Node:
    """uint8 ``[m, nbytes]``, little-endian -> int64 ``[m]``."""
    number = edit.call(aten.to.dtype, edit.call(aten.select.int, packed, 1, 0), torch.int64)
    for byte in range(1, packed.meta["val"].shape[1]):
        digit = edit.call(aten.to.dtype, edit.call(aten.select.int, packed, 1, byte), torch.int64)
        number = edit.call(aten.add.Tensor, number, edit.call(aten.mul.Tensor, digit, 1 << 8 * byte))
    return number


_ROWS: Mapping[Any, Callable[..., Node]] = MappingProxyType(
    {
        heads.vq_logits_product: _product,
        heads.vq_logits_product_exact: _exact,
        heads.vq_logits_residual: _residual,
    }
)
