# SPDX-License-Identifier: Apache-2.0
"""What the operators after a head have in common: checks of arguments, and ``topk`` as torch wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.vq_logits.shared import check_hidden, check_per_token

Pair = tuple[Tensor, Tensor]


def check_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """h ``[..., d]``, weight ``[V, d]``, bias ``[V]``."""
    check_hidden(h)
    torch._check(weight.dim() == 2, lambda: f"weight must be [V, d], not {tuple(weight.shape)}")
    torch._check(
        h.shape[-1] == weight.shape[1],
        lambda: f"h has width {h.shape[-1]}, the weight {weight.shape[1]}",
    )
    check_per_token("bias", bias, weight)


def check_probabilities(h: Tensor, target: Tensor, tokens: int) -> None:
    """Class probabilities: target floating, ``[..., V]``."""
    torch._check(target.is_floating_point(), lambda: f"target must be floating, not {target.dtype}")
    torch._check(
        target.shape == (*h.shape[:-1], tokens),
        lambda: f"target must be {(*h.shape[:-1], tokens)} for h {tuple(h.shape)}, not {tuple(target.shape)}",
    )


def check_smoothing(label_smoothing: float) -> None:
    torch._check(0 <= label_smoothing <= 1, lambda: f"label_smoothing must lie in [0, 1], not {label_smoothing}")


def fake_topk(h: Tensor, k: int) -> Pair:
    shape = (*h.shape[:-1], k)
    return h.new_empty(shape), h.new_empty(shape, dtype=torch.int64)


def topk_vmap(name: str) -> Callable[..., tuple[Pair, tuple[int, int]]]:
    """As `vmap_rule`, for an operator (h, tensors of the head..., k) with two results."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Pair, tuple[int, int]]:
        op = getattr(torch.ops.rewriter, name)
        front = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims, strict=True)]
        if all(d is None for d in in_dims[1:]):
            return op(*front), (0, 0)
        examples = [
            op(*(a if d is None else a[n] for a, d in zip(front, in_dims, strict=True))) for n in range(info.batch_size)
        ]
        values, tokens = zip(*examples, strict=True)
        return (torch.stack(values), torch.stack(tokens)), (0, 0)

    return rule
