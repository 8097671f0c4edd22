# SPDX-License-Identifier: Apache-2.0
"""What the operators after a head have in common: checks of arguments, and ``topk`` as torch wants it."""

from __future__ import annotations

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
