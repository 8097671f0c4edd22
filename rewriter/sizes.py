# SPDX-License-Identifier: Apache-2.0
"""Sizes, as every figure of this package means them: unique parameters and persistent buffers, as stored.

As stored means after lossless narrowing (:mod:`rewriter.narrow`): a model loaded from an fp16 checkpoint into float32
counts as the checkpoint does.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from rewriter import store
from rewriter.narrow import stored_bytes

__all__ = ["model_bytes", "stored_bytes", "total"]


def model_bytes(root: nn.Module) -> int:
    """Bytes of all unique parameters and persistent buffers below ``root``."""
    return total(t for name, t in store.tensors(root) if isinstance(t, nn.Parameter) or store.is_persistent(root, name))


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors among ``tensors``."""
    unique = {id(t): t for t in tensors}
    return sum(stored_bytes(t) for t in unique.values())
