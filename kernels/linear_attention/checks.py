# SPDX-License-Identifier: Apache-2.0
"""What the operators of linear attention refuse, the same in eager, fake and compiled execution (ValueError)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check(condition: Any, message: str) -> None:
    """ValueError with ``message`` unless ``condition``, which may be symbolic."""
    if condition is True:  # nothing symbolic about it; a step of decoding makes dozens of checks
        return
    torch._check_value(condition, lambda: f"linear attention: {message}")


def activations(**tensors: Tensor) -> None:
    """Floating ``[batch, heads, time, features]``."""
    for name, x in tensors.items():
        check(x.dim() == 4, f"{name} must be [batch, heads, time, features], not {list(x.shape)}")
        check(x.is_floating_point(), f"{name} must be floating, not {x.dtype}")


def _same_number(a: Any, b: Any) -> bool:
    """Whether two sizes are equal numbers, without asking anything of symbolic ones."""
    return type(a) is int and type(b) is int and a == b


def same(name: str, got: Any, what: str, expected: Any) -> None:
    """One size of a tensor."""
    check(got == expected, f"{name} has {what} {got}, expected {expected}")


def shape(name: str, x: Tensor | None, expected: Sequence[Any]) -> None:
    """All sizes of an optional tensor."""
    if x is None or (len(x.shape) == len(expected) and all(map(_same_number, x.shape, expected))):
        return
    check(x.dim() == len(expected), f"{name} must be {list(expected)}, not {list(x.shape)}")
    check(
        all(a == b for a, b in zip(x.shape, expected, strict=True)),
        f"{name} must be {list(expected)}, not {list(x.shape)}",
    )


def heads(queries: int, states: int, **counts: int) -> None:
    """Each count divides the number of states, which divides the heads of the queries."""
    check(queries % states == 0, f"{states} states cannot be shared by {queries} heads of q")
    for name, count in counts.items():
        check(states % count == 0, f"{count} heads of {name} cannot be shared by {states} states")


def decay(log_decay: Tensor | None, k: Tensor, forms: Sequence[int]) -> None:
    """``[h]``, ``[B, h, T]`` or ``[B, h, T, F]``, as far as ``forms`` (numbers of dimensions) allows."""
    if log_decay is None:
        return
    words = {1: "[heads]", 3: "[batch, heads, time]", 4: "[batch, heads, time, features]"}
    check(
        log_decay.dim() in forms,
        f"log_decay must be {' or '.join(words[n] for n in forms)}, not {list(log_decay.shape)}",
    )
    check(log_decay.is_floating_point(), f"log_decay must be floating, not {log_decay.dtype}")
    if log_decay.dim() > 1:
        same("log_decay", log_decay.shape[0], "batch", k.shape[0])
        same("log_decay", log_decay.shape[2], "length", k.shape[2])
    if log_decay.dim() == 4:
        same("log_decay", log_decay.shape[3], "features", k.shape[3])


def decay_heads(log_decay: Tensor | None) -> dict[str, int]:
    """The decay's number of heads, as an argument of :func:`heads`."""
    return {} if log_decay is None else {"log_decay": log_decay.shape[0 if log_decay.dim() == 1 else 1]}


def per_head(name: str, x: Tensor | None, count: int) -> None:
    """Floating ``[heads]``."""
    shape(name, x, (count,))
    check(x is None or x.is_floating_point(), f"{name} must be floating")


def keep(mask: Tensor | None, k: Tensor) -> None:
    """Boolean ``[B, T]``, True for real tokens."""
    if mask is None:
        return
    check(mask.dtype is torch.bool, f"keep must be bool, not {mask.dtype}")
    shape("keep", mask, (k.shape[0], k.shape[2]))


def together(names: str, *tensors: Tensor | None) -> None:
    """All or none."""
    check(len({x is None for x in tensors}) == 1, f"{names} come together or not at all")
