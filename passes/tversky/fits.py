# SPDX-License-Identifier: Apache-2.0
"""What an initialisation makes of a dense layer: the tensors of a Tversky projection, and how far it is from the layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a weight are taken this many values at a time where they are needed in float64.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Fit:
    """Tensors by role, as `rewriter.passes.tversky.modules.TverskyProjection` takes them.

    Attributes:
        features: ``[K, d]``.
        prototypes: ``[P, d]``, or ``[P, K]`` where they are given by their scores; None where they are the dense weight.
        theta, alpha, beta: ``[]`` or ``[P]``; None leaves the term out.
        negative: ``[]``, the coefficient of the similarity to −Π, or None.
        neutral: ``[2, d]``, the input and the prototype a head is centred on, or None.
    """

    features: Tensor
    prototypes: Tensor | None
    theta: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    negative: Tensor | None = None
    neutral: Tensor | None = None


def output_error(weight: Tensor, features: Tensor, prototypes: Tensor, moment: Tensor | None) -> float:
    """√(tr ΔΣΔᵀ / tr WΣWᵀ) with Δ = W − B G, in float64: the relative error of x Wᵀ for inputs of E[x xᵀ] = Σ.

    Args:
        weight: ``[P, d]``; features G ``[r, d]``; prototypes B ``[P, r]``.
        moment: Σ ``[d, d]``; None is the identity, and the result then the relative error of the weight.
    """
    bank = features.double()
    wide = None if moment is None else moment.double().to(weight.device)
    lost = total = 0.0
    for rows, scores in zip(chunks(weight), chunks(prototypes, weight.shape[1]), strict=True):
        dense = rows.double()
        total += energy(dense, wide)
        lost += energy(dense - scores.double() @ bank, wide)
    if total <= 0.0:
        return 0.0 if lost <= 0.0 else float("inf")
    return float((max(lost, 0.0) / total) ** 0.5)


def energy(rows: Tensor, moment: Tensor | None) -> float:
    """tr RΣRᵀ."""
    return float((rows.square() if moment is None else (rows @ moment) * rows).sum())


def chunks(weight: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """The rows of a matrix in parts; ``width`` makes the parts those of a matrix of another width."""
    return weight.detach().split(max(1, _CHUNK // max(1, width or weight.shape[1])))


def scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)


def as_stored(values: Tensor, like: Tensor) -> Tensor:
    """Fitted values in the dtype of ``like``, rounded to fp16 where that costs no more than its last bit.

    A file stores what survives fp16 in two bytes, and a fit is nowhere as exact as that.
    """
    exact = values.to(like.device, like.dtype)
    rounded = values.to(torch.float16).to(exact)
    fits = bool(rounded.isfinite().all()) and float((rounded - exact).norm()) <= 2.0**-9 * float(exact.norm())
    return rounded if fits else exact
