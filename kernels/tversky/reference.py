# SPDX-License-Identifier: Apache-2.0
"""Tversky similarity of inputs to prototypes, in plain aten, with the checks that the fake kernel shares.

    z = x Ωᵀ, b = Π Ωᵀ                     scores of an input and of a prototype on the features
    U = relu(z), V = relu(b)               how much of each feature they have; they *have* those with a positive score
    I = f(A∩B), D = f(A−B), E = f(B−A)     common and distinctive features, below
    contrast  S = θ I − α D − β E
    ratio     S = I / (I + α D + β E)      0 where that is 0/0; θ is not used

Common features, sums over the features k that both have:

    product Σ u v,  min Σ min(u, v),  max Σ max(u, v),  mean Σ (u + v)/2,  gmean Σ √(u v),  softmin −Σ log(e^−u + e^−v)

Distinctive ones: ignorematch D = Σ u over the features that only the input has; subtractmatch D = Σ (u − v) over those
that both have and the input has more of. E is D with the roles exchanged.

There are two conventions (they agree on product, mean and ignorematch). ``"paper"`` is what stands above: Tversky
Neural Networks, arXiv 2506.11035. ``"code"`` is the authors' program: min, max, gmean and softmin are taken of the two
*sums* I_a = Σ u and I_b = Σ v over the common features; subtractmatch is ignorematch plus relu(I_a − I_b); and the ratio
has 1 added to its denominator. So the softmin of two empty sets is −log 2 there, and 0 in the paper's.

Everything is computed in float32 at least. A gmean has the gradient 0, not NaN, where a set is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INTERSECTIONS = ("product", "min", "max", "mean", "gmean", "softmin")
CONVENTIONS = ("paper", "code")
DIFFERENCES = ("ignorematch", "subtractmatch")
FORMS = ("contrast", "ratio")

# Sums of a function of (u_k, v_k) that is no product form this many values per input row at a time.
CHUNK = 1 << 13


def compute_dtype(x: Tensor) -> torch.dtype:
    """What everything is computed and accumulated in: the activations' dtype, float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def tversky(
    x: Tensor,
    features: Tensor,
    prototypes: Tensor,
    theta: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    negative: Tensor | None,
    bias: Tensor | None,
    intersection: str,
    convention: str,
    difference: str,
    form: str,
    mirrored: bool,
    projected: bool,
) -> Tensor:
    """Similarity of every row of ``x`` to every prototype: S(x, Π) − negative · S(x, −Π) + bias.

    Args:
        x: ``[..., d]``, floating.
        features: the bank Ω ``[K, d]``.
        prototypes: Π ``[P, d]``; where ``projected``, their scores ΠΩᵀ ``[P, K]``.
        theta: of the common features; ``[]`` or one per prototype ``[P]``; None is 1.
        alpha, beta: of what only the input, only the prototype has; same shapes; None is 0.
        negative: coefficient of the similarity to the negated prototypes, ``[]``; None computes no such branch.
        bias: ``[P]`` or None.
        intersection: one of `INTERSECTIONS`; convention: of `CONVENTIONS`; difference: of `DIFFERENCES`; form: of
            `FORMS`.
        mirrored: the bank is [Ω; −Ω], 2K features of which half are stored.
        projected: whether ``prototypes`` are given by their scores.

    Returns:
        ``[..., P]`` in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or names that do not fit.
    """
    check(x, features, prototypes, theta, alpha, beta, negative, bias, projected)
    check_names(intersection, convention, difference, form)
    dtype = compute_dtype(x)
    z, b = scores(x, features, prototypes, mirrored, projected, dtype)
    model = Model.of((theta, alpha, beta), (intersection, convention, difference, form), dtype)
    n = None if negative is None else negative.to(dtype)
    out = model.two_products(z, b, n) if model.bilinear else model.similarity(z, b)
    if n is not None and not model.bilinear:
        out = out - n * model.similarity(z, -b)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(x.dtype)


def scores(
    x: Tensor, features: Tensor, prototypes: Tensor, mirrored: bool, projected: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """z = x Ωᵀ ``[..., K]`` and b = Π Ωᵀ ``[P, K]``; for a mirrored bank twice as wide, the negated scores second."""
    bank = features.to(dtype)
    z = F.linear(x.to(dtype), bank)
    b = prototypes.to(dtype) if projected else F.linear(prototypes.to(dtype), bank)
    return (mirror(z), mirror(b)) if mirrored else (z, b)


def mirror(z: Tensor) -> Tensor:
    return torch.cat((z, -z), -1)


def is_bilinear(intersection: str, difference: str, form: str) -> bool:
    """Whether the similarity of these names is two matrix products."""
    return (intersection, difference, form) == ("product", "ignorematch", "contrast")


@dataclass(frozen=True)
class Model:
    """The similarity as a function of scores. Coefficients are ``[]`` or ``[P]`` in the scores' dtype, or None."""

    theta: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    intersection: str
    convention: str
    difference: str
    form: str

    @classmethod
    def of(
        cls,
        weights: tuple[Tensor | None, Tensor | None, Tensor | None],
        names: tuple[str, str, str, str],
        dtype: torch.dtype,
    ) -> Model:
        """The model of θ, α, β and the four names, computing in ``dtype``."""
        theta, alpha, beta = (None if t is None else t.to(dtype) for t in weights)
        return cls(theta, alpha, beta, *names)

    @property
    def bilinear(self) -> bool:
        """Whether S is linear in U and its gate, so that both branches and all terms are two matrix products."""
        return is_bilinear(self.intersection, self.difference, self.form)

    def two_products(self, z: Tensor, b: Tensor, negative: Tensor | None) -> Tensor:
        """U (θ V − α (1 − m_V))ᵀ − (1 − m_U) (β V)ᵀ, with V − n V⁻ and m⁻ − n m⁻ for the pair.

        The branches meet in the second factor: with θ = n = 1 it is b itself and nothing is left to cancel.
        """
        v, only = b.relu(), gate(b, False)
        if negative is not None:
            v, only = v - negative * (-b).relu(), only - negative * gate(-b, False)
        right = v if self.theta is None else _rows(self.theta) * v
        if self.alpha is not None:
            right = right - _rows(self.alpha) * only
        out = F.linear(z.relu(), right)
        return out if self.beta is None else out - F.linear(gate(z, False), _rows(self.beta) * v)

    def similarity(self, z: Tensor, b: Tensor) -> Tensor:
        """S ``[..., P]`` of scores z ``[..., K]`` and b ``[P, K]``."""
        common = self.common(z, b)
        first = None if self.alpha is None else self.alpha * self.distinctive(z, b)
        second = None if self.beta is None else self.beta * self.distinctive(z, b, of_prototype=True)
        if self.form == "contrast":
            out = common if self.theta is None else self.theta * common
            out = out if first is None else out - first
            return out if second is None else out - second
        return ratio(common, self.denominator(common, first, second))

    def denominator(self, common: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
        q = common + 1.0 if self.convention == "code" else common
        q = q if first is None else q + first
        return q if second is None else q + second

    def common(self, z: Tensor, b: Tensor) -> Tensor:
        """f(A∩B)."""
        u, v = z.relu(), b.relu()
        if self.intersection == "product":
            return F.linear(u, v)
        if self.intersection == "gmean" and self.convention == "paper":
            return F.linear(root(u), root(v))  # √(u v) = √u √v
        if self.intersection == "mean" or self.convention == "code":
            return combine(self.intersection, F.linear(u, gate(b)), F.linear(gate(z), v))
        if self.intersection == "max":  # max = u + v − min
            both = F.linear(u, gate(b)) + F.linear(gate(z), v)
            return both - over_features(TERMS["min"], u, v)
        return over_features(TERMS[self.intersection], u, v)

    def distinctive(self, z: Tensor, b: Tensor, of_prototype: bool = False) -> Tensor:
        """f(A−B), or f(B−A)."""
        u, v = z.relu(), b.relu()
        if self.difference == "subtractmatch" and self.convention == "paper":
            return over_features(TERMS["less" if of_prototype else "more"], u, v)
        alone = F.linear(gate(z, False), v) if of_prototype else F.linear(u, gate(b, False))
        if self.difference == "ignorematch":
            return alone
        surplus = F.linear(u, gate(b)) - F.linear(gate(z), v)  # I_a − I_b
        return alone + (-surplus if of_prototype else surplus).relu()


def gate(scores: Tensor, positive: bool = True) -> Tensor:
    """1 where a feature is had (or, not ``positive``, where it is not), else 0."""
    return (scores > 0 if positive else scores <= 0).to(scores.dtype)


def root(values: Tensor) -> Tensor:
    """√v of values ≥ 0, with gradient 0 at 0."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


def combine(intersection: str, first: Tensor, second: Tensor) -> Tensor:
    """Ψ of the two sums I_a and I_b, as the authors' code has it."""
    if intersection == "mean":
        return (first + second) / 2
    if intersection == "gmean":
        return root(first) * root(second)
    if intersection == "softmin":
        return -torch.logaddexp(-first, -second)
    return torch.minimum(first, second) if intersection == "min" else torch.maximum(first, second)


def ratio(common: Tensor, whole: Tensor) -> Tensor:
    """common / whole, and 0 (with gradient 0) where the whole is empty."""
    none = empty(whole)
    return torch.where(none, 0.0, common / torch.where(none, 1.0, whole))


def empty(whole: Tensor) -> Tensor:
    """Where a denominator is 0, or so small that its inverse overflows."""
    return whole.abs() < torch.finfo(whole.dtype).tiny


def over_features(term: Callable[[Tensor, Tensor], Tensor], u: Tensor, v: Tensor) -> Tensor:
    """Σ_k term(u_k, v_k) ``[..., P]`` of u ``[..., K]`` and v ``[P, K]``, some prototypes at a time."""
    wide = u.unsqueeze(-2)
    return torch.cat([term(wide, part).sum(-1) for part in parts(v)], -1)


def parts(v: Tensor) -> tuple[Tensor, ...]:
    """The rows of v in chunks whose terms take `CHUNK` values per input row: how many is known without the input."""
    return v.split(max(1, CHUNK // max(1, v.shape[1])))


def _softmin(u: Tensor, v: Tensor) -> Tensor:
    return torch.where((u > 0) & (v > 0), -torch.logaddexp(-u, -v), 0.0)


def _more(u: Tensor, v: Tensor) -> Tensor:
    return torch.where(v > 0, (u - v).relu(), 0.0)


def _less(u: Tensor, v: Tensor) -> Tensor:
    return _more(v, u)


# Terms of sums over features; u and v are memberships, so 0 where a feature is not had.
TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": torch.minimum,
    "softmin": _softmin,
    "more": _more,
    "less": _less,
}


def _rows(coefficient: Tensor) -> Tensor:
    """A coefficient per prototype as a column, beside ``[P, K]``."""
    return coefficient.unsqueeze(-1) if coefficient.dim() else coefficient


# ------------------------------------------------------------------------------------------------------ checks


def check(
    x: Tensor,
    features: Tensor,
    prototypes: Tensor,
    theta: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    negative: Tensor | None,
    bias: Tensor | None,
    projected: bool,
) -> None:
    """Refuse tensors that do not fit together (ValueError)."""
    for name, tensor in (("x", x), ("features", features), ("prototypes", prototypes)):
        _check(tensor.is_floating_point(), f"{name} must be floating, got {tensor.dtype}")
    _check(x.dim() >= 1, "x must have at least one dimension")
    _check(features.dim() == 2, f"features must be [K, d], got {list(features.shape)}")
    _check(prototypes.dim() == 2, f"prototypes must be two-dimensional, got {list(prototypes.shape)}")
    _check(x.shape[-1] == features.shape[1], f"x has {x.shape[-1]} dimensions, features have {features.shape[1]}")
    width, what = (features.shape[0], "scores") if projected else (features.shape[1], "dimensions")
    _check(prototypes.shape[1] == width, f"prototypes have {prototypes.shape[1]} {what}, the features ask for {width}")
    for name, coefficient in (("theta", theta), ("alpha", alpha), ("beta", beta)):
        if coefficient is not None:
            _check(
                coefficient.dim() == 0 or (coefficient.dim() == 1 and coefficient.shape[0] == prototypes.shape[0]),
                f"{name} must be [] or [{prototypes.shape[0]}], got {list(coefficient.shape)}",
            )
    if negative is not None:
        _check(negative.dim() == 0, f"negative must be a scalar [], got {list(negative.shape)}")
    if bias is not None:
        _check(
            bias.dim() == 1 and bias.shape[0] == prototypes.shape[0],
            f"bias must be [{prototypes.shape[0]}], got {list(bias.shape)}",
        )


def check_names(intersection: str, convention: str, difference: str, form: str) -> None:
    """Refuse unknown names (ValueError)."""
    for what, name, known in (
        ("intersection", intersection, INTERSECTIONS),
        ("convention", convention, CONVENTIONS),
        ("difference", difference, DIFFERENCES),
        ("form", form, FORMS),
    ):
        _check(name in known, f"unknown {what} {name!r}; one of {', '.join(known)}")


def _check(condition: bool, message: str) -> None:
    torch._check_value(condition, lambda: f"tversky: {message}")
