# SPDX-License-Identifier: Apache-2.0
"""Gradient of the Tversky similarity, by hand: what autograd would keep of sums over features is n × P × K.

With G = ∂L/∂S ``[..., P]``, the contrast gives ∂I = θG, ∂D = −αG, ∂E = −βG, the ratio S = I/q, q = I + αD + βE (+ 1),

    ∂I = G (q − I)/q²,   ∂D = −α G I/q²,   ∂E = −β G I/q²,   ∂α = −Σ G D I/q²,   ∂β = −Σ G E I/q²,

and 0 where q is 0. From there to the memberships U and V, and through the gates (which are constant nearly everywhere) to
the scores. All of it is differentiable aten, so second derivatives are right too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.tversky.arguments import Arguments
from rewriter.kernels.tversky.reference import Model, compute_dtype, empty, gate, parts, root, scores

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gradients:
    """∂L of one branch: scores z ``[..., K]`` and b ``[P, K]``; per row and prototype ``[..., P]`` what θ, α, β get."""

    z: Tensor
    b: Tensor
    theta: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None


def branch(model: Model, z: Tensor, b: Tensor, grad: Tensor) -> Gradients:
    """Gradients of S(z, b) for ``grad`` ``[..., P]``; everything in the scores' dtype."""
    common = model.common(z, b)
    first, second = model.alpha, model.beta
    only_a = None if first is None else model.distinctive(z, b)
    only_b = None if second is None else model.distinctive(z, b, of_prototype=True)
    theta = None
    if model.form == "contrast":
        to_common = grad if model.theta is None else grad * model.theta
        theta = None if model.theta is None else grad * common
        to_whole = -grad
    else:
        weighted = (None if w is None or only is None else w * only for w, only in ((first, only_a), (second, only_b)))
        whole = model.denominator(common, *weighted)
        none = empty(whole)
        inverse = torch.where(none, 0.0, 1.0 / torch.where(none, 1.0, whole))
        share = common * inverse
        to_whole = -grad * share * inverse
        to_common = grad * (1.0 - share) * inverse
    u, v = _common(model, z, b, to_common)
    if first is not None:
        du, dv = _distinctive(model, z, b, to_whole * first)
        u, v = u + du, v + dv
    if second is not None:
        du, dv = _distinctive(model, z, b, to_whole * second, of_prototype=True)
        u, v = u + du, v + dv
    alpha, beta = (None if only is None else to_whole * only for only in (only_a, only_b))
    return Gradients(u * gate(z), v * gate(b), theta, alpha, beta)


def gradients(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of the eight tensors in their dtypes; empty for one that is not given or not used (θ in a ratio).

    Args:
        grad: ``[..., P]``.
        args: `Arguments`.
    """
    a = Arguments(*args)
    dtype = compute_dtype(a.x)
    wide = grad.to(dtype)
    z, b = scores(a.x, a.features, a.prototypes, a.mirrored, a.projected, dtype)
    model = Model.of(a.coefficients, a.names, dtype)
    found, to_negative = with_negative(model, z, b, None if a.negative is None else a.negative.to(dtype), wide)
    to_z, to_b = (_unmirror(found.z), _unmirror(found.b)) if a.mirrored else (found.z, found.b)
    bank, flat = a.features.to(dtype), to_z.reshape(-1, to_z.shape[-1])
    to_bank = flat.t() @ a.x.to(dtype).reshape(-1, a.x.shape[-1])
    if a.projected:
        to_prototypes = to_b
    else:
        to_bank = to_bank + to_b.t() @ a.prototypes.to(dtype)
        to_prototypes = to_b @ bank
    none = a.x.new_empty(0)
    return (
        (to_z @ bank).to(a.x.dtype),
        to_bank.to(a.features.dtype),
        to_prototypes.to(a.prototypes.dtype),
        *(none if t is None else t for t in map(_coefficient, (found.theta, found.alpha, found.beta), a.coefficients)),
        none if a.negative is None or to_negative is None else to_negative.to(a.negative.dtype),
        none if a.bias is None else wide.reshape(-1, wide.shape[-1]).sum(0).to(a.bias.dtype),
    )


def _unmirror(grad: Tensor) -> Tensor:
    """From the scores on [Ω; −Ω] to those on Ω."""
    first, second = grad.chunk(2, -1)
    return first - second


def _coefficient(per_value: Tensor | None, coefficient: Tensor | None) -> Tensor | None:
    """Sum of a gradient ``[..., P]`` for a coefficient ``[]`` or ``[P]``."""
    if coefficient is None or per_value is None:  # θ is not used in a ratio
        return None
    rows = per_value.reshape(-1, per_value.shape[-1])
    return (rows.sum(0) if coefficient.dim() else rows.sum()).to(coefficient.dtype)


def with_negative(
    model: Model, z: Tensor, b: Tensor, negative: Tensor | None, grad: Tensor
) -> tuple[Gradients, Tensor | None]:
    """Gradients of S(z, b) − n S(z, −b), and that of n ``[]``."""
    one = branch(model, z, b, grad)
    if negative is None:
        return one, None
    other = branch(model, z, -b, -grad * negative)
    both = replace(
        one, z=one.z + other.z, b=one.b - other.b, theta=_sum(one.theta, other.theta),
        alpha=_sum(one.alpha, other.alpha), beta=_sum(one.beta, other.beta),
    )  # fmt: skip
    return both, -(grad * model.similarity(z, -b)).sum()


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else first + second


def _common(model: Model, z: Tensor, b: Tensor, grad: Tensor) -> Pair:
    """Gradients of U and V from that of f(A∩B)."""
    u, v = z.relu(), b.relu()
    if model.intersection == "product":
        return _product(u, v, grad)
    if model.intersection == "gmean" and model.convention == "paper":
        to_u, to_v = _product(root(u), root(v), grad)
        return to_u * _half_inverse_root(u), to_v * _half_inverse_root(v)
    if model.intersection == "mean" or model.convention == "code":
        held_a, held_b = gate(z), gate(b)
        first, second = u @ held_b.t(), held_a @ v.t()
        to_first, to_second = _combined(model.intersection, first, second)
        return (grad * to_first) @ held_b, _over_rows(grad * to_second, held_a)
    if model.intersection == "max":
        to_u, to_v = _over_features(_SLOPES["min"], u, v, grad)
        return grad @ gate(b) - to_u, _over_rows(grad, gate(z)) - to_v
    return _over_features(_SLOPES[model.intersection], u, v, grad)


def _distinctive(model: Model, z: Tensor, b: Tensor, grad: Tensor, of_prototype: bool = False) -> Pair:
    """Gradients of U and V from that of f(A−B), or of f(B−A)."""
    u, v = z.relu(), b.relu()
    if model.difference == "subtractmatch" and model.convention == "paper":
        return _over_features(_SLOPES["less" if of_prototype else "more"], u, v, grad)
    if of_prototype:
        to_u, to_v = torch.zeros_like(u), _over_rows(grad, gate(z, False))
    else:
        to_u, to_v = grad @ gate(b, False), torch.zeros_like(v)
    if model.difference == "ignorematch":
        return to_u, to_v
    held_a, held_b = gate(z), gate(b)
    surplus = u @ held_b.t() - held_a @ v.t()
    through = grad * (gate(-surplus) if of_prototype else gate(surplus))
    through = -through if of_prototype else through
    return to_u + through @ held_b, to_v - _over_rows(through, held_a)


def _product(u: Tensor, v: Tensor, grad: Tensor) -> Pair:
    return grad @ v, _over_rows(grad, u)


def _over_rows(grad: Tensor, rows: Tensor) -> Tensor:
    """gradᵀ rows ``[P, K]``, summed over all leading dimensions."""
    return grad.reshape(-1, grad.shape[-1]).t() @ rows.reshape(-1, rows.shape[-1])


def _half_inverse_root(values: Tensor) -> Tensor:
    """The slope of √v, and 0 at 0."""
    positive = values > 0
    return torch.where(positive, 0.5 / torch.where(positive, values, 1.0).sqrt(), 0.0)


def _combined(intersection: str, first: Tensor, second: Tensor) -> Pair:
    """Slopes of `reference.combine` in I_a and I_b; at ties of min and max half each, as torch has it."""
    if intersection == "mean":
        half = torch.full_like(first, 0.5)
        return half, half
    if intersection == "gmean":
        return _half_inverse_root(first) * root(second), _half_inverse_root(second) * root(first)
    if intersection == "softmin":
        weight = torch.sigmoid(second - first)
        return weight, 1.0 - weight
    smaller = _half_at_tie(first, second)
    return (smaller, 1.0 - smaller) if intersection == "min" else (1.0 - smaller, smaller)


def _half_at_tie(first: Tensor, second: Tensor) -> Tensor:
    """1 where the first is smaller, 1/2 where both are equal."""
    return (first < second).to(first.dtype) + 0.5 * (first == second).to(first.dtype)


# ------------------------------------------------------------------------------- sums over features, in chunks


def _over_features(slopes: Callable[[Tensor, Tensor], Pair], u: Tensor, v: Tensor, grad: Tensor) -> Pair:
    """Gradients of Σ_k term(u_k, v_k), some prototypes at a time."""
    wide = u.unsqueeze(-2)
    to_u, to_v, start = torch.zeros_like(u), [], 0
    for part in parts(v):
        weight = grad[..., start : start + part.shape[0]].unsqueeze(-1)
        first, second = slopes(wide, part)
        to_u = to_u + (weight * first).sum(-2)
        to_v.append((weight * second).reshape(-1, *part.shape).sum(0))
        start += part.shape[0]
    return to_u, torch.cat(to_v)


def _min_slopes(u: Tensor, v: Tensor) -> Pair:
    smaller = _half_at_tie(u, v)
    return smaller, 1.0 - smaller


def _softmin_slopes(u: Tensor, v: Tensor) -> Pair:
    both = ((u > 0) & (v > 0)).to(u.dtype)
    weight = torch.sigmoid(v - u)
    return both * weight, both * (1.0 - weight)


def _more_slopes(u: Tensor, v: Tensor) -> Pair:
    slope = ((v > 0) & (u > v)).to(u.dtype)
    return slope, -slope


def _less_slopes(u: Tensor, v: Tensor) -> Pair:
    second, first = _more_slopes(v, u)
    return first, second


_SLOPES: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "min": _min_slopes, "softmin": _softmin_slopes, "more": _more_slopes, "less": _less_slopes,
}  # fmt: skip
