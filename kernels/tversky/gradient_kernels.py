# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Gradient of the Tversky similarity in tiles; the formulas are in `gradient`.

`slopes` forms, for each row and prototype, what each sum of the similarity receives; none of these matrices is larger than
rows times prototypes. `memberships` carries them over to the scores: a matrix product with memberships or gates of the
other side, or one row of it after the other where slopes depend on both. Rows and prototypes are told apart by the strides
alone: f(A−B) of one side is f(B−A) of the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.tversky.kernels import (
    TINY,
    all_sums,
    coefficient,
    compare,
    denominator,
    held,
    lacked,
    parts,
    relu,
    root,
    tile,
)


@triton.jit
def half_inverse_root(x):
    """Slope of √x, 0 at 0."""
    return tl.where(x > 0, 0.5 / tl.sqrt(tl.where(x > 0, x, 1.0)), 0.0)


@triton.jit
def half_at_tie(first, second):
    """Slope of the minimum in ``first``: 1 where it is smaller, 1/2 where both are equal."""
    return (first < second).to(tl.float32) + 0.5 * (first == second).to(tl.float32)


@triton.jit
def sides(to_common, first, second, INTERSECTION: tl.constexpr, CONVENTION: tl.constexpr):
    """What I_a and I_b receive of what f(A∩B) does; 0 where it is not made of them."""
    if INTERSECTION == "mean":
        return to_common * 0.5, to_common * 0.5
    elif CONVENTION == "paper":
        if INTERSECTION == "max":  # u + v − min
            return to_common, to_common
        else:
            return tl.zeros_like(to_common), tl.zeros_like(to_common)
    elif INTERSECTION == "product":
        return tl.zeros_like(to_common), tl.zeros_like(to_common)
    elif INTERSECTION == "gmean":
        return to_common * half_inverse_root(first) * root(second), to_common * half_inverse_root(second) * root(first)
    else:
        if INTERSECTION == "softmin":
            share = 1.0 / (1.0 + tl.exp(first - second))
        elif INTERSECTION == "min":
            share = half_at_tie(first, second)
        else:
            share = half_at_tie(second, first)
        return to_common * share, to_common * (1.0 - share)


@triton.jit
def keep(pointer, values, row_inside, column_inside, columns, prototypes):
    """Sums over a block of rows, into ``[blocks, prototypes]``."""
    inside = row_inside[:, None] & column_inside[None, :]
    place = tl.program_id(0).to(tl.int64) * prototypes + columns
    tl.store(pointer + place, tl.sum(tl.where(inside, values, 0.0), 0), mask=column_inside)


@triton.jit
def slopes(
    z_ptr, b_ptr, theta_ptr, alpha_ptr, beta_ptr, negative_ptr, grad_ptr,
    common_ptr, first_ptr, second_ptr, only_a_ptr, only_b_ptr, to_theta_ptr, to_alpha_ptr, to_beta_ptr, value_ptr,
    count, prototypes, width, theta_stride, alpha_stride, beta_stride,
    INTERSECTION: tl.constexpr, CONVENTION: tl.constexpr, DIFFERENCE: tl.constexpr, FORM: tl.constexpr,
    NEGATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What I, I_a, I_b, D and E receive, each ``[count, prototypes]``, and what θ, α, β and n do, per block of rows.

    Pointers are None to what no sum of this similarity receives. NEGATIVE: the branch of −b, whose gradient is −n times the
    layer's. Grid: blocks of rows, blocks of prototypes.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_inside, column_inside = rows < count, columns < prototypes
    inside = row_inside[:, None] & column_inside[None, :]
    place = rows.to(tl.int64)[:, None] * prototypes + columns[None, :]
    whole_grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = whole_grad
    if NEGATIVE:
        grad = -tl.load(negative_ptr).to(tl.float32) * whole_grad
    common, first, second, only_a, only_b = all_sums(
        z_ptr, b_ptr, rows, columns, row_inside, column_inside, width, -1.0 if NEGATIVE else 1.0,
        alpha_ptr is not None, beta_ptr is not None, INTERSECTION, CONVENTION, DIFFERENCE, BM, BN, BK, PRECISION,
    )  # fmt: skip
    common, only_a, only_b = parts(common, first, second, only_a, only_b, INTERSECTION, CONVENTION, DIFFERENCE)
    if NEGATIVE:
        value = compare(
            common, only_a, only_b, theta_ptr, alpha_ptr, beta_ptr, columns, column_inside,
            theta_stride, alpha_stride, beta_stride, CONVENTION, FORM,
        )  # fmt: skip
        keep(value_ptr, whole_grad * value, row_inside, column_inside, columns, prototypes)
    if FORM == "ratio":
        # ∂I = G (q − I)/q², ∂D = −α G I/q²; 0 where q is 0
        q = denominator(
            common, only_a, only_b, alpha_ptr, beta_ptr, columns, column_inside, alpha_stride, beta_stride, CONVENTION
        )
        none = tl.abs(q) < TINY
        inverse = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, q))
        share = common * inverse
        to_whole = -grad * share * inverse
        to_common = grad * (1.0 - share) * inverse
    else:
        to_whole = -grad
        to_common = grad
        if theta_ptr is not None:
            keep(to_theta_ptr, grad * common, row_inside, column_inside, columns, prototypes)
            to_common = grad * coefficient(theta_ptr, columns, column_inside, theta_stride)
    SURPLUS: tl.constexpr = CONVENTION == "code" and DIFFERENCE == "subtractmatch"
    to_first, to_second = sides(to_common, first, second, INTERSECTION, CONVENTION)
    if alpha_ptr is not None:
        keep(to_alpha_ptr, to_whole * only_a, row_inside, column_inside, columns, prototypes)
        to_only = to_whole * coefficient(alpha_ptr, columns, column_inside, alpha_stride)
        tl.store(only_a_ptr + place, to_only, mask=inside)
        if SURPLUS:  # relu(I_a − I_b)
            surplus = tl.where(first > second, to_only, 0.0)
            to_first += surplus
            to_second -= surplus
    if beta_ptr is not None:
        keep(to_beta_ptr, to_whole * only_b, row_inside, column_inside, columns, prototypes)
        to_only = to_whole * coefficient(beta_ptr, columns, column_inside, beta_stride)
        tl.store(only_b_ptr + place, to_only, mask=inside)
        if SURPLUS:
            surplus = tl.where(second > first, to_only, 0.0)
            to_first -= surplus
            to_second += surplus
    if common_ptr is not None:
        tl.store(common_ptr + place, to_common, mask=inside)
    if first_ptr is not None:
        tl.store(first_ptr + place, to_first, mask=inside)
        tl.store(second_ptr + place, to_second, mask=inside)


@triton.jit
def product_terms(
    rooted, acc, other_ptr, common_ptr, side_ptr, own_only_ptr, rows, features, row_inside, known, begin, end, width,
    other_sign, grad_row, grad_column,
    ROOTS: tl.constexpr, PRODUCT: tl.constexpr, ALONE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds Σ_j ∂_ij f(other_j) for the sums that are matrix products, that of √u apart from the others."""
    for start in range(begin, end, BK):
        terms = start + tl.arange(0, BK)
        there = terms < end
        other = other_sign * tile(other_ptr, terms, features, there[:, None] & known[None, :], width, 1)
        inside = row_inside[:, None] & there[None, :]
        if ROOTS:
            grad = tile(common_ptr, rows, terms, inside, grad_row, grad_column)
            rooted = tl.dot(grad, root(other), rooted, input_precision=PRECISION)
        if PRODUCT:
            grad = tile(common_ptr, rows, terms, inside, grad_row, grad_column)
            acc = tl.dot(grad, relu(other), acc, input_precision=PRECISION)
        if side_ptr is not None:
            grad = tile(side_ptr, rows, terms, inside, grad_row, grad_column)
            acc = tl.dot(grad, held(other), acc, input_precision=PRECISION)
        if ALONE:
            grad = tile(own_only_ptr, rows, terms, inside, grad_row, grad_column)
            acc = tl.dot(grad, lacked(other), acc, input_precision=PRECISION)
    return rooted, acc


@triton.jit
def single_terms(
    acc, own, other_ptr, common_ptr, own_only_ptr, other_only_ptr, rows, features, row_inside, known, begin, end, width,
    other_sign, grad_row, grad_column, INTERSECTION: tl.constexpr, LEAST: tl.constexpr, SOFT: tl.constexpr,
    MATCH: tl.constexpr,
):  # fmt: skip
    """Adds Σ_j ∂_ij slope(own_i, other_j), one j after the other."""
    u = relu(own)
    others = other_ptr + begin.to(tl.int64) * width + features
    place = rows.to(tl.int64) * grad_row + begin.to(tl.int64) * grad_column
    for _ in range(begin, end):
        v = relu(other_sign * tl.load(others, mask=known, other=0.0))[None, :]
        if LEAST or SOFT:
            grad = tl.load(common_ptr + place, mask=row_inside, other=0.0)[:, None]
            if SOFT:
                acc += tl.where((u > 0) & (v > 0), grad / (1.0 + tl.exp(u - v)), 0.0)
            elif INTERSECTION == "max":
                acc -= grad * half_at_tie(u, v)
            else:
                acc += grad * half_at_tie(u, v)
        if MATCH and own_only_ptr is not None:
            grad = tl.load(own_only_ptr + place, mask=row_inside, other=0.0)[:, None]
            acc += tl.where((v > 0) & (u > v), grad, 0.0)
        if MATCH and other_only_ptr is not None:
            grad = tl.load(other_only_ptr + place, mask=row_inside, other=0.0)[:, None]
            acc -= tl.where((u > 0) & (v > u), grad, 0.0)
        others += width
        place += grad_column
    return acc


@triton.jit
def memberships(
    own_ptr, other_ptr, common_ptr, side_ptr, own_only_ptr, other_only_ptr, out_ptr,
    count, others, width, share, own_sign, other_sign, grad_row, grad_column,
    INTERSECTION: tl.constexpr, CONVENTION: tl.constexpr, DIFFERENCE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of one side, ``[parts, count, width]``, each part over ``share`` rows of the other side.

    ``side_ptr`` is what this side's I_a or I_b receives, ``own_only_ptr`` what the features do that only this side has,
    ``other_only_ptr`` those that only the other one has; element (i, j) of a gradient is of row i here and row j there.
    Grid: blocks of BM rows, blocks of BN features, parts.
    """
    PAPER: tl.constexpr = CONVENTION == "paper"
    ROOTS: tl.constexpr = PAPER and INTERSECTION == "gmean"
    SOFT: tl.constexpr = PAPER and INTERSECTION == "softmin"
    LEAST: tl.constexpr = PAPER and (INTERSECTION == "min" or INTERSECTION == "max")
    MATCH: tl.constexpr = PAPER and DIFFERENCE == "subtractmatch"
    PRODUCT: tl.constexpr = INTERSECTION == "product"
    ALONE: tl.constexpr = own_only_ptr is not None and not MATCH
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    features = tl.program_id(1) * BN + tl.arange(0, BN)
    row_inside, known = rows < count, features < width
    inside = row_inside[:, None] & known[None, :]
    own = own_sign * tile(own_ptr, rows, features, inside, width, 1)
    rooted = tl.zeros([BM, BN], tl.float32)
    acc = tl.zeros([BM, BN], tl.float32)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, others)
    if ROOTS or PRODUCT or ALONE or side_ptr is not None:
        rooted, acc = product_terms(
            rooted, acc, other_ptr, common_ptr, side_ptr, own_only_ptr, rows, features, row_inside, known, begin, end,
            width, other_sign, grad_row, grad_column, ROOTS, PRODUCT, ALONE, BK, PRECISION,
        )  # fmt: skip
    if LEAST or SOFT or (MATCH and (own_only_ptr is not None or other_only_ptr is not None)):
        acc = single_terms(
            acc, own, other_ptr, common_ptr, own_only_ptr, other_only_ptr, rows, features, row_inside, known, begin,
            end, width, other_sign, grad_row, grad_column, INTERSECTION, LEAST, SOFT, MATCH,
        )  # fmt: skip
    if ROOTS:
        acc += rooted * half_inverse_root(own)
    place = (tl.program_id(2).to(tl.int64) * count + rows)[:, None] * width + features[None, :]
    tl.store(out_ptr + place, acc * held(own), mask=inside)
