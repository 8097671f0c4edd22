# SPDX-License-Identifier: Apache-2.0
"""Dense layers that *are* Tversky projections. With the bank [G; −G], z = Gx and b = Gπ:

signed pair   S(x, π) − S(x, −π) = Σ_k relu(z_k)(b_k⁺ − b_k⁻) + relu(−z_k)(b_k⁻ − b_k⁺) = Σ_k z_k b_k     (α = β = 0, θ = 1)

so with G = I and Π = W it is x Wᵀ for any W: 2d features more than the layer had, and nothing saved. It is where training
starts.

sign codes    W = diag(c) S G with S ∈ {±1}:  S(x, π) = Σ_k c (relu(s_k z_k) − relu(−s_k z_k)) = c Σ_k s_k z_k

with b = c s, α = c, β = 0: a single pass. A matrix is recognised as such where its entries have one magnitude per row
(G = I) or one per column (c = 1, G diagonal). Weights of one binary basis are: those of `ShiftAdd(bits=1)` with one
group, decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.passes.tversky.fits import Fit, scalar


def signed_pair(weight: Tensor) -> Fit:
    """The exact pair of a dense weight ``[P, d]``: features [I; −I], prototypes W, in the weight's dtype."""
    one = scalar(1.0, weight)
    return Fit(
        features=paired_identity(weight), prototypes=weight.detach().clone(), theta=one, alpha=scalar(0.0, weight),
        beta=scalar(0.0, weight), negative=one.clone(),
    )  # fmt: skip


def paired_identity(weight: Tensor) -> Tensor:
    """[I; −I] ``[2d, d]`` for a weight ``[P, d]``."""
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return torch.cat((identity, -identity))


def sign_codes(weight: Tensor, by_row: bool) -> Fit:
    """A weight of sign codes ``[P, d]`` as a single pass on a mirrored bank, prototypes by their scores.

    Args:
        weight: with entries ±c_p (``by_row``) or ±g_k.
        by_row: which of the two; see :func:`magnitudes`.
    """
    w = weight.detach()
    signs, scale = w.sign(), w.abs().amax(1 if by_row else 0)
    diagonal = torch.ones_like(w[0]) if by_row else scale
    alpha = scale if by_row else torch.ones_like(w[:, 0])
    # Prototypes by their scores: in input coordinates they would be c S G⁻¹, which rounds.
    return Fit(
        features=torch.diag(diagonal), prototypes=signs * alpha.unsqueeze(1), theta=scalar(1.0, w), alpha=alpha,
        beta=None,
    )  # fmt: skip


def magnitudes(weight: Tensor) -> bool | str:
    """Whether a weight ``[P, d]`` has one magnitude per row (True) or per column (False); or why it has neither."""
    size = weight.detach().abs()
    if size.numel() == 0 or not bool((size > 0).all()):
        return "its weight has zeros, and a sign code has none"
    if bool((size == size[:, :1]).all()):
        return True
    if bool((size == size[:1]).all()):
        return False
    off = int(((size != size[:, :1]) & (size != size[:1])).sum())
    return (
        f"its weight is no sign code: {off} of {size.numel()} entries have neither their row's magnitude nor their "
        'column\'s; init="signed_pair" is exact for any weight'
    )
