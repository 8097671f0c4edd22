# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of a language-model head, computed in chunks of tokens.

The plain form stores [tokens, V] logits several times over; on one CPU core its memory traffic costs more
than the whole transformer below it. Here each chunk's logits live only long enough to give the chunk's loss
and gradients:

    loss    = mean_t ( logsumexp(W h_t) − (W h_t)[y_t] )
    dloss/dz_t = ( softmax(z_t) − onehot(y_t) ) / T,     dh_t = Wᵀ dz_t,     dW = Σ_t dz_t h_tᵀ
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK = 512


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        tokens = hidden.shape[0]
        low_hidden, low_weight = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, CHUNK):
            part = slice(start, start + CHUNK)
            wanted = targets[part, None]
            logits = (low_hidden[part] @ low_weight.T).float()
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            loss += (log_sum - logits.gather(-1, wanted)).sum()
            gradient = logits.sub_(log_sum).exp_()
            gradient.scatter_add_(-1, wanted, gradient.new_full(wanted.shape, -1.0))
            gradient = gradient.div_(tokens).to(dtype)
            grad_hidden[part] = gradient @ low_weight
            grad_weight += gradient.T @ low_hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mean cross entropy in nats of `targets` [T] int64 under the logits `hidden` [T, d] @ `weight` [V, d]ᵀ.

    The products are computed in `dtype`, everything else in float32. Differentiable once, in `hidden` and
    `weight` (both float32).
    """
    loss: torch.Tensor = _HeadLoss.apply(hidden, weight, targets, dtype)
    return loss
