# SPDX-License-Identifier: Apache-2.0
"""Sizes, as every figure of this package means them: unique parameters and persistent buffers, as stored.

As stored means after lossless narrowing (:mod:`rewriter.narrow`): a model loaded from an fp16 checkpoint into float32
counts as the checkpoint does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node

from rewriter import store
from rewriter.narrow import stored_bytes

if TYPE_CHECKING:
    from rewriter.program import Program

__all__ = ["model_bytes", "read_per_token", "stored_bytes", "total"]


def model_bytes(root: nn.Module) -> int:
    """Bytes of all unique parameters and persistent buffers below ``root``."""
    return total(t for name, t in store.tensors(root) if isinstance(t, nn.Parameter) or store.is_persistent(root, name))


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors among ``tensors``."""
    unique = {id(t): t for t in tensors}
    return sum(stored_bytes(t) for t in unique.values())


def read_per_token(program: Program) -> int:
    """Bytes of stored tensors that one token reads at batch 1, as decoding does: a table looked up by ids, one row.

    Activations, keys, values and states are not counted. An upper bound of what a kernel must fetch, and what decides
    the speed of decoding where memory does.
    """
    return sum(
        stored_bytes(tensor) if whole else stored_bytes(tensor) // max(1, tensor.shape[0])
        for tensor, whole in _read_tensors(program)
    )


def _read_tensors(program: Program) -> list[tuple[Tensor, bool]]:
    """Each distinct tensor the graph reads, and whether any of its readers wants more than rows by id."""
    found: dict[int, tuple[Tensor, bool]] = {}
    for name, node in program.parameter_nodes().items():
        tensor = program.tensor(name)
        whole = any(not _is_lookup(user) for user in node.users)
        seen = found.get(id(tensor))
        found[id(tensor)] = (tensor, whole or (seen is not None and seen[1]))
    return list(found.values())


def _is_lookup(node: Node) -> bool:
    """An embedding: ``weight[indices]``, or one of the registered operators that take ids first."""
    if not isinstance(node.target, OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    return node.target is torch.ops.aten.embedding.default or (names[:1] == ["ids"])
