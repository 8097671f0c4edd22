# SPDX-License-Identifier: Apache-2.0
"""W ≈ B G with the fewest features for an output error: an SVD in the metric of the inputs.

    min ‖(W − B G) Σ^{1/2}‖_F,   Σ = E[x xᵀ],   G ``[r, d]``

The optimum keeps the r largest singular directions of WΣ^{1/2}. With M = WᵀW and Σ^{1/2} M Σ^{1/2} = V diag(λ) Vᵀ,

    G = λ^{-1/2} V_rᵀ Σ^{1/2} M,   B = WΣGᵀ (GΣGᵀ)⁻¹,   relative error² = Σ_{i>r} λ_i / Σ_i λ_i

which inverts no Σ. For several layers on one bank M = Σ_l W_lᵀW_l / tr(W_lΣ_lW_lᵀ), Σ is the mean of theirs, and each
B_l is fitted to its own Σ_l. As a Tversky projection it is the signed pair on the mirrored bank [G; −G] with prototypes
given by their scores B, so that K(P + d) numbers are stored instead of Pd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.tversky.fits import Fit, as_stored, chunks, energy, scalar

# Directions whose share of λ is below this are rounding.
_NOTHING = 1e-13


@dataclass(frozen=True)
class Layer:
    """A dense weight ``[P, d]`` and its inputs' second moment ``[d, d]``, None where nothing is known of them."""

    weight: Tensor
    moment: Tensor | None


@dataclass(frozen=True)
class Directions:
    """λ descending ``[m]`` and all the features they allow ``[m, d]``, float64; m is the numerical rank."""

    values: Tensor
    features: Tensor
    total: float

    def errors(self) -> Tensor:
        """Relative output error with r = 0, 1, … m features ``[m + 1]``."""
        kept = torch.cat((self.values.new_zeros(1), self.values.cumsum(0)))
        return (1.0 - kept / self.total).clamp_min(0.0).sqrt() if self.total > 0 else torch.zeros_like(kept)

    def rank_for(self, error: float) -> int:
        """The smallest number of features whose error is not above ``error``."""
        return int((self.errors() > error).sum())


def directions(layers: Sequence[Layer]) -> Directions:
    """The directions of one layer, or those that several layers on one bank have in common."""
    width = layers[0].weight.shape[1]
    moments = [layer.moment for layer in layers]
    known = [m.double().cpu() for m in moments if m is not None]
    shared = torch.eye(width, dtype=torch.float64) if not known else sum(known[1:], known[0]) / len(known)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for layer in layers:
        own, size = torch.zeros_like(gram), 0.0
        for rows in chunks(layer.weight):
            wide = rows.double().cpu()
            own += wide.t() @ wide
            size += energy(wide, shared)
        gram += own / size if size > 0 and len(layers) > 1 else own
    root = _root(shared)
    values, vectors = torch.linalg.eigh(root @ gram @ root)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    total = float(values.sum())
    count = int((values > _NOTHING * values[0]).sum()) if total > 0 else 0
    values, vectors = values[:count], vectors[:, :count]
    features = (vectors.t() @ root @ gram) / values.sqrt().unsqueeze(1)
    return Directions(values, features, total)


def _root(moment: Tensor) -> Tensor:
    """Σ^{1/2} of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((moment + moment.t()) / 2)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.t()


def scores(layer: Layer, features: Tensor) -> Tensor:
    """B ``[P, r]``: the prototypes' scores that fit a layer best on features ``[r, d]``, in float64."""
    wide = features.double().cpu()
    metric = wide.t() if layer.moment is None else layer.moment.double().cpu() @ wide.t()
    inner = wide @ metric
    # Features another layer brought may be dead here: a little of the mean keeps the system solvable.
    inner = inner + 1e-12 * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
    parts = [torch.linalg.solve(inner, (rows.double().cpu() @ metric).t()).t() for rows in chunks(layer.weight)]
    return torch.cat(parts)


def fit(layer: Layer, features: Tensor) -> Fit:
    """The layer on a bank of features ``[r, d]``, in the weight's dtype."""
    like, one = layer.weight, scalar(1.0, layer.weight)
    bank = as_stored(features, like)
    prototypes = as_stored(scores(layer, bank), like)
    return Fit(
        features=bank, prototypes=prototypes, theta=one, alpha=scalar(0.0, like), beta=None, negative=one.clone()
    )


def stored(features: int, outputs: int, inputs: int, layers: int) -> int:
    """Numbers that a layer takes on a bank of so many layers: K(P + d/layers), θ, α and the negative coefficient."""
    return features * outputs + features * inputs // layers + 3
