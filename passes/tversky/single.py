# SPDX-License-Identifier: Apache-2.0
"""One pass S(x, Π) on a paired bank [G; −G], the start of training a Tversky layer in a dense one's place.

With the product, β = 0 and w = Gπ it is a sum of two-slope units (s = sign w),

    S = Σ_k θ|w_k| relu(s_k z_k) − α relu(−s_k z_k),

which is linear only where α = θ|w_k| for every k. No α does that for a general w, so it must be trained. On Gaussian
weights and inputs, with θ = 1:

    one α = E|w| for all prototypes    relative output error √(½(1 − 2/π)) = 43 %
    each its own α_p = mean|w_p|       √(½(1 − 2/π)(1 − 1/π)) = 35 %: nothing is left that all inputs have in common

θ and α per prototype are the least-squares fit of S to x wᵀ on calibration inputs, or on Gaussian ones where there are
none; that is the second line for the product, and gives other intersections their scale.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rewriter.kernels.tversky import reference
from rewriter.passes.tversky.exact import paired_identity
from rewriter.passes.tversky.fits import Fit
from rewriter.passes.tversky.modules import Similarity

ROWS = 1024  # inputs the coefficients are fitted to


def fit(weight: Tensor, features: int, inputs: Tensor, similarity: Similarity) -> Fit:
    """A single pass for a dense weight.

    Args:
        weight: ``[P, d]``.
        features: K, both halves of the bank together; 2d is all there are.
        inputs: ``[n, d]`` that the coefficients are fitted to.
        similarity: what is computed; for a ratio, which cannot follow a linear layer, α = β = 1/2 as the authors start.
    """
    width = weight.shape[1]
    bank = paired_identity(weight) if features >= 2 * width else _paired_directions(weight, features // 2)
    flat = torch.full((weight.shape[0],), 0.5, dtype=weight.dtype, device=weight.device)
    start = Fit(features=bank, prototypes=weight.detach().clone(), theta=flat * 2, alpha=flat, beta=flat * 0)
    if similarity.form == "ratio":
        return replace(start, beta=flat.clone())
    theta, alpha = _least_squares(weight, bank, inputs, similarity)
    return replace(start, theta=theta.to(weight), alpha=alpha.to(weight))


def _paired_directions(weight: Tensor, rank: int) -> Tensor:
    """[V_rᵀ; −V_rᵀ] of the weight's leading right singular vectors, orthonormal."""
    wide = weight.detach().double()
    vectors = torch.linalg.eigh(wide.t() @ wide).eigenvectors.flip(1)[:, :rank].t().to(weight)
    return torch.cat((vectors, -vectors))


def _least_squares(weight: Tensor, bank: Tensor, inputs: Tensor, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """θ, α ≥ 0 ``[P]`` that bring θ I − α D nearest to x wᵀ."""
    x, w = inputs.float(), weight.detach().float()
    z, b = reference.scores(x, bank.float(), w, mirrored=False, projected=False, dtype=torch.float32)
    s = similarity
    model = reference.Model(None, None, None, s.intersection, s.convention, s.difference, s.form)
    common, only = model.common(z, b).double(), model.distinctive(z, b).double()
    target = (x @ w.t()).double()
    aa, ad, dd = (common * common).sum(0), (common * only).sum(0), (only * only).sum(0)
    at, dt = (common * target).sum(0), (only * target).sum(0)
    determinant = aa * dd - ad * ad
    regular = determinant > 1e-9 * aa * dd
    safe = torch.where(regular, determinant, 1.0)
    theta = torch.where(regular, (at * dd - ad * dt) / safe, _quotient(at, aa))
    alpha = torch.where(regular, (at * ad - aa * dt) / safe, 0.0)
    # A coefficient that would be negative is 0, and the other is fitted alone.
    both = (theta >= 0) & (alpha >= 0)
    alone = _quotient(at, aa).clamp_min(0.0)
    return torch.where(both, theta, torch.where(alpha < 0, alone, 0.0)), torch.where(
        both, alpha, torch.where(alpha < 0, 0.0, _quotient(-dt, dd).clamp_min(0.0))
    )


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
