# SPDX-License-Identifier: Apache-2.0
"""What a Tversky projection sees: features of inputs and prototypes as sets, and which of them decide a similarity.

    A_x = {k: ω_k·x > 0},  A_x(k) = relu(ω_k·x)        the features of an input (of a prototype: ω_k·π)
    salience(x) = Σ_k A_x(k)
    A ∩ B = min(A, B)    A ∪ B = max(A, B)    A − B = A where B is 0

The sets are those of the model, so a question about them is a question about what it computes. Σ_k of `contributions` is
the similarity itself, wherever that is a sum over features.
Tversky, "Features of similarity" (1977); Doumbouya et al., "Tversky Neural Networks" (arXiv 2506.11035).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rewriter.kernels.tversky import reference
from rewriter.passes.tversky.modules import TverskyProjection

T = TypeVar("T")


@dataclass(frozen=True)
class Weighted:
    """A feature, prototype or row of a table by its number, with its weight (in what, the function says)."""

    index: int
    weight: float


@dataclass(frozen=True)
class FeatureSet:
    """A set of features, each with its weight ≥ 0 ``[K]``; it has those of positive weight.

    ``a & b`` takes the smaller weight, ``a | b`` the larger, ``a - b`` those of a that b lacks: A ∩ B − C is
    ``(a & b) - c``.
    """

    weights: Tensor

    def __post_init__(self) -> None:
        if self.weights.dim() != 1 or bool((self.weights < 0).any()):
            raise ValueError(f"a feature set has one weight ≥ 0 per feature [K], not {list(self.weights.shape)}")

    def __and__(self, other: FeatureSet) -> FeatureSet:
        return FeatureSet(torch.minimum(self.weights, other.weights))

    def __or__(self, other: FeatureSet) -> FeatureSet:
        return FeatureSet(torch.maximum(self.weights, other.weights))

    def __sub__(self, other: FeatureSet) -> FeatureSet:
        return FeatureSet(torch.where(other.weights > 0, 0.0, self.weights))

    def __len__(self) -> int:
        return int((self.weights > 0).sum())

    def __contains__(self, feature: int) -> bool:
        return bool(self.weights[feature] > 0)

    def salience(self) -> float:
        """The sum of the weights."""
        return float(self.weights.sum())

    def top(self, count: int = 5) -> tuple[Weighted, ...]:
        """The heaviest features, at most ``count``, heaviest first."""
        return _largest(self.weights, count, above=0.0)


# ------------------------------------------------------------------------------------------- sets of a projection


def salience(projection: TverskyProjection, x: Tensor) -> Tensor:
    """How much inputs ``[..., d]`` stand out: Σ_k relu(ω_k·x) ``[...]``. Per feature: ``projection.memberships(x)``."""
    return projection.memberships(x).sum(-1)


def features_of(projection: TverskyProjection, x: Tensor) -> FeatureSet:
    """The features of one input ``[d]``."""
    if x.dim() != 1:
        raise ValueError(f"one input [d] at a time, not {list(x.shape)}")
    with torch.no_grad():
        return FeatureSet(projection.memberships(x))


def features_of_prototype(projection: TverskyProjection, prototype: int) -> FeatureSet:
    """The features of a prototype."""
    with torch.no_grad():
        return FeatureSet(projection.prototype_memberships()[_known(projection, prototype)])


def common_features(projection: TverskyProjection, x: Tensor, prototype: int, count: int = 5) -> tuple[Weighted, ...]:
    """The features that an input ``[d]`` and a prototype have in common, by what each adds to f(A∩B).

    That is Ψ(u_k, v_k) with the projection's own Ψ; for softmin, whose terms may be negative, the largest all the same.
    """
    with torch.no_grad():
        u, v = _scores(projection, x, prototype)
        common = torch.where(
            (u > 0) & (v > 0), _PSI[projection.similarity.intersection](u.relu(), v.relu()), -torch.inf
        )
        return _largest(common, count, above=-torch.inf)


def distinctive_features(
    projection: TverskyProjection, x: Tensor, prototype: int, count: int = 5, of_prototype: bool = False
) -> tuple[Weighted, ...]:
    """The features that an input ``[d]`` has and a prototype lacks, by weight; ``of_prototype``: the other way round."""
    a, b = features_of(projection, x), features_of_prototype(projection, prototype)
    return (b - a if of_prototype else a - b).top(count)


def similar_prototypes(projection: TverskyProjection, wanted: FeatureSet, count: int = 5) -> tuple[Weighted, ...]:
    """The prototypes with most of a set of features: the largest Σ_k min(wanted_k, v_k). The answer to a query."""
    with torch.no_grad():
        shares = torch.minimum(projection.prototype_memberships(), wanted.weights).sum(-1)
        return _largest(shares, count, above=0.0)


def contributions(projection: TverskyProjection, x: Tensor, prototype: int) -> Tensor:
    """What each feature adds to the similarity of an input ``[d]`` and a prototype: ``[K]``, with the bias S in sum.

    Of a mirrored bank [Ω; −Ω], 2K. With a negative branch (the exact pair) its share is subtracted.

    Raises:
        ValueError: the similarity is no sum over features: a ratio, or sums combined as in the authors' code.
    """
    s = projection.similarity
    additive = s.convention == "paper" or (s.intersection in ("product", "mean") and s.difference == "ignorematch")
    if s.form != "contrast" or not additive:
        raise ValueError(
            f"a {s.form} in the convention {s.convention!r} with {s.intersection} and {s.difference} is no sum over "
            "features; common_features and distinctive_features say what it is made of"
        )
    u, v = _scores(projection, x, prototype)
    total = _terms(projection, u, v, prototype)
    if projection.negative is None:
        return total
    return total - projection.negative.to(total.dtype) * _terms(projection, u, -v, prototype)


# ------------------------------------------------------------------------------------------- prototypes as data


def prototype_vectors(projection: TverskyProjection) -> Tensor:
    """The prototypes Π ``[P, d]`` in the space of the inputs.

    Prototypes stored by their scores B = ΠΩᵀ come back as the shortest such Π, B (Ω⁺)ᵀ, which has the same scores
    where the features are linearly independent.
    """
    stored = projection.prototypes.detach()
    if not projection.similarity.projected:
        return stored
    wide = torch.promote_types(stored.dtype, torch.float32)
    return (stored.to(wide) @ torch.linalg.pinv(projection.features.detach().to(wide)).t()).to(stored.dtype)


def render(vectors: Tensor, decode: Callable[[Tensor], T]) -> list[T]:
    """Vectors ``[n, d]`` (prototypes, or features) in data space, one by one through ``decode``.

    ``decode`` is what leads from the projection's input space back to data: a reshape where the inputs are images,
    :func:`nearest_rows` of the embedding where they are hidden states, a decoder where there is one.
    """
    return [decode(vector) for vector in vectors.detach()]


def nearest_rows(table: Tensor, count: int = 5) -> Callable[[Tensor], tuple[Weighted, ...]]:
    """A ``decode`` for :func:`render`: the rows of a table ``[n, d]`` with the largest cosine to a vector ``[d]``."""
    rows = torch.nn.functional.normalize(table.detach().float(), dim=-1)

    def decode(vector: Tensor) -> tuple[Weighted, ...]:
        return _largest(rows @ torch.nn.functional.normalize(vector.float(), dim=-1), count, above=-torch.inf)

    return decode


def exemplars(projection: TverskyProjection, inputs: Tensor, prototype: int, count: int = 5) -> tuple[Weighted, ...]:
    """The inputs ``[n, d]`` most similar to a prototype, with their similarities: a prototype shown by real data."""
    with torch.no_grad():
        number = _known(projection, prototype)
        return _largest(projection.rows(number, number + 1)(inputs)[:, 0], count, above=-torch.inf)


# ------------------------------------------------------------------------------------------- one input, one prototype

# Ψ(u, v) for u, v > 0.
_PSI: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "mean": lambda u, v: (u + v) / 2,
    "gmean": lambda u, v: reference.root(u * v),
    "softmin": lambda u, v: -torch.logaddexp(-u, -v),
}


def _scores(projection: TverskyProjection, x: Tensor, prototype: int) -> tuple[Tensor, Tensor]:
    """z ``[K]`` of one input ``[d]`` and b ``[K]`` of one prototype, 2K wide for a mirrored bank."""
    if x.dim() != 1:
        raise ValueError(f"one input [d] at a time, not {list(x.shape)}")
    s, number = projection.similarity, _known(projection, prototype)
    row = projection.prototypes[number : number + 1]
    z, b = reference.scores(x, projection.features, row, s.mirrored, s.projected, reference.compute_dtype(x))
    return z, b[0]


def _terms(projection: TverskyProjection, z: Tensor, b: Tensor, prototype: int) -> Tensor:
    """θ Ψ(u_k, v_k) − α d_k − β e_k, per feature."""
    u, v, s = z.relu(), b.relu(), projection.similarity
    both = (z > 0) & (b > 0)
    total = torch.where(both, _PSI[s.intersection](u, v), 0.0)
    theta, alpha, beta = (_of(t, prototype) for t in (projection.theta, projection.alpha, projection.beta))
    total = total if theta is None else theta.to(total.dtype) * total
    for coefficient, mine, its in ((alpha, u, v), (beta, v, u)):
        if coefficient is not None:
            alone = (
                torch.where(its > 0, 0.0, mine)
                if s.difference == "ignorematch"
                else torch.where(both, (mine - its).relu(), 0.0)
            )
            total = total - coefficient.to(total.dtype) * alone
    return total


def _of(coefficient: Tensor | None, prototype: int) -> Tensor | None:
    """A coefficient ``[]`` or ``[P]`` for one prototype."""
    return coefficient if coefficient is None or coefficient.dim() == 0 else coefficient[prototype]


def _known(projection: TverskyProjection, prototype: int) -> int:
    if not 0 <= prototype < projection.out_features:
        raise IndexError(f"prototype {prototype} of {projection.out_features}")
    return prototype


def _largest(values: Tensor, count: int, above: float) -> tuple[Weighted, ...]:
    """The ``count`` largest values greater than ``above``, largest first; among equals the lowest index first."""
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    order = torch.argsort(values, descending=True, stable=True)[:count]
    return tuple(Weighted(int(i), float(values[i])) for i in order if float(values[i]) > above)
