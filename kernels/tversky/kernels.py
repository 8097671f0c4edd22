# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Tversky similarities in tiles of rows and prototypes: nothing of rows times prototypes times features.

z = x Ωᵀ and b = Π Ωᵀ are matrix products (`product`). What follows is, in the product contrast, two more (`two_products`)
whose operands are made from the scores as they are loaded,

    S = U (θ V − α (1 − m_V))ᵀ − (1 − m_U) (β V)ᵀ,   U = relu(z), m_U = [z > 0]; V and m_V of b, less n times those of −b

and otherwise (`similarity`) up to five sums over features that `reference` names. A sum of products of a function of z and
one of b is a matrix product; Σ min(u, v), Σ softmin(u, v) and Σ (u − v)⁺ take one feature at a time, outer against each
other. All sums are float32, and the branches of a signed pair meet there.
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32


@triton.jit
def relu(x):
    """Also of NaN, which a maximum would drop."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def held(x):
    """m: 1 where a feature is had."""
    return (x > 0).to(tl.float32)


@triton.jit
def lacked(x):
    return (x <= 0).to(tl.float32)


@triton.jit
def root(x):
    return tl.where(x > 0, tl.sqrt(tl.where(x > 0, x, 1.0)), 0.0)


@triton.jit
def smaller(u, v):
    return tl.minimum(u, v, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(u, v):
    return tl.maximum(u, v, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmin(u, v):
    """−log(e^−u + e^−v), from the smaller of the two so that nothing overflows."""
    return smaller(u, v) - tl.log(1.0 + tl.exp(-tl.abs(u - v)))


@triton.jit
def tile(pointer, rows, columns, inside, row_stride, column_stride):
    """Elements ``[rows, columns]`` of a matrix in float32, 0 outside."""
    place = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + place, mask=inside, other=0.0)


@triton.jit
def coefficient(pointer, columns, inside, stride):
    """θ, α or β of prototypes ``[1, BN]``: one number (stride 0) or one each."""
    return tl.load(pointer + columns * stride, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def product(
    x_ptr, weight_ptr, out_ptr, count, outputs, width, share, x_row, x_feature, weight_row, weight_feature,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X Wᵀ ``[parts, count, outputs]``, each part over ``share`` features. WIDE: the operands are multiplied as float32.

    Grid: blocks of BM rows, blocks of BN outputs, parts.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_inside, column_inside = rows < count, columns < outputs
    acc = tl.zeros([BM, BN], tl.float32)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, width)
    for start in range(first, last, BK):
        features = start + tl.arange(0, BK)
        known = features < last
        x = tile(x_ptr, rows, features, row_inside[:, None] & known[None, :], x_row, x_feature)
        # hook: prologue(x, rows, features)
        w = tile(weight_ptr, features, columns, known[:, None] & column_inside[None, :], weight_feature, weight_row)
        if WIDE:
            acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    inside = row_inside[:, None] & column_inside[None, :]
    place = (tl.program_id(2).to(tl.int64) * count + rows)[:, None] * outputs + columns[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def two_products(
    z_ptr, b_ptr, theta_ptr, alpha_ptr, beta_ptr, negative_ptr, bias_ptr, out_ptr,
    count, prototypes, width, theta_stride, alpha_stride, beta_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product contrast of scores z ``[count, width]`` and b ``[prototypes, width]``. Grid: blocks of either."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_inside, column_inside = rows < count, columns < prototypes
    acc = tl.zeros([BM, BN], tl.float32)
    if negative_ptr is not None:
        n = tl.load(negative_ptr).to(tl.float32)
    if theta_ptr is not None:
        theta = coefficient(theta_ptr, columns, column_inside, theta_stride)
    if alpha_ptr is not None:
        alpha = coefficient(alpha_ptr, columns, column_inside, alpha_stride)
    if beta_ptr is not None:
        beta = coefficient(beta_ptr, columns, column_inside, beta_stride)
    for start in range(0, width, BK):
        features = start + tl.arange(0, BK)
        known = features < width
        z = tile(z_ptr, rows, features, row_inside[:, None] & known[None, :], width, 1)
        b = tile(b_ptr, features, columns, known[:, None] & column_inside[None, :], 1, width)
        v = relu(b)
        if negative_ptr is not None:
            v -= n * relu(-b)
        right = v
        if theta_ptr is not None:
            right = theta * v
        if alpha_ptr is not None:
            only = lacked(b)
            if negative_ptr is not None:
                only -= n * lacked(-b)
            right -= alpha * only
        acc = tl.dot(relu(z), right, acc, input_precision=PRECISION)
        if beta_ptr is not None:
            acc = tl.dot(lacked(z), -beta * v, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += coefficient(bias_ptr, columns, column_inside, 1)
    inside = row_inside[:, None] & column_inside[None, :]
    # hook: epilogue(acc, rows, columns, inside)
    place = rows.to(tl.int64)[:, None] * prototypes + columns[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sums(
    z_ptr, b_ptr, rows, columns, row_inside, column_inside, width, sign,
    ALPHA: tl.constexpr, BETA: tl.constexpr,
    INTERSECTION: tl.constexpr, CONVENTION: tl.constexpr, DIFFERENCE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Those sums of z and sign · b that are matrix products, each ``[BM, BN]``; 0 where it is not asked for.

    Returns:
        common: Σ u v or Σ √(u v).
        first, second: I_a = Σ u and I_b = Σ v over the common features.
        only_a, only_b: Σ u and Σ v over features that only the input, only the prototype has.
    """
    PAPER: tl.constexpr = CONVENTION == "paper"
    ROOTS: tl.constexpr = PAPER and INTERSECTION == "gmean"
    SINGLE: tl.constexpr = PAPER and (INTERSECTION == "min" or INTERSECTION == "softmin")
    PRODUCT: tl.constexpr = ROOTS or INTERSECTION == "product"
    SURPLUS: tl.constexpr = not PAPER and DIFFERENCE == "subtractmatch" and (ALPHA or BETA)
    SIDES: tl.constexpr = SURPLUS or not (PRODUCT or SINGLE)
    MATCH: tl.constexpr = PAPER and DIFFERENCE == "subtractmatch"
    ALONE_A: tl.constexpr = ALPHA and not MATCH
    ALONE_B: tl.constexpr = BETA and not MATCH
    common = tl.zeros([BM, BN], tl.float32)
    first = tl.zeros([BM, BN], tl.float32)
    second = tl.zeros([BM, BN], tl.float32)
    only_a = tl.zeros([BM, BN], tl.float32)
    only_b = tl.zeros([BM, BN], tl.float32)
    if PRODUCT or SIDES or ALONE_A or ALONE_B:
        for start in range(0, width, BK):
            features = start + tl.arange(0, BK)
            known = features < width
            z = tile(z_ptr, rows, features, row_inside[:, None] & known[None, :], width, 1)
            b = sign * tile(b_ptr, features, columns, known[:, None] & column_inside[None, :], 1, width)
            u, v = relu(z), relu(b)
            if ROOTS:
                common = tl.dot(root(u), root(v), common, input_precision=PRECISION)
            elif PRODUCT:
                common = tl.dot(u, v, common, input_precision=PRECISION)
            if SIDES:
                first = tl.dot(u, held(b), first, input_precision=PRECISION)
                second = tl.dot(held(z), v, second, input_precision=PRECISION)
            if ALONE_A:
                only_a = tl.dot(u, lacked(b), only_a, input_precision=PRECISION)
            if ALONE_B:
                only_b = tl.dot(lacked(z), v, only_b, input_precision=PRECISION)
    return common, first, second, only_a, only_b


@triton.jit
def single_sums(
    common, only_a, only_b, z_ptr, b_ptr, rows, columns, row_inside, column_inside, width, sign,
    ALPHA: tl.constexpr, BETA: tl.constexpr,
    INTERSECTION: tl.constexpr, CONVENTION: tl.constexpr, DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """Adds the paper's sums that take one feature at a time: Σ min, Σ softmin; Σ (u − v)⁺ and Σ (v − u)⁺ of common ones."""
    PAPER: tl.constexpr = CONVENTION == "paper"
    SOFT: tl.constexpr = PAPER and INTERSECTION == "softmin"
    LEAST: tl.constexpr = PAPER and (INTERSECTION == "min" or INTERSECTION == "max")
    MATCH: tl.constexpr = PAPER and DIFFERENCE == "subtractmatch"
    if LEAST or SOFT or (MATCH and (ALPHA or BETA)):
        z_rows = z_ptr + rows.to(tl.int64) * width
        b_rows = b_ptr + columns.to(tl.int64) * width
        for k in range(width):
            u = relu(tl.load(z_rows + k, mask=row_inside, other=0.0))[:, None]
            v = relu(sign * tl.load(b_rows + k, mask=column_inside, other=0.0))[None, :]
            if LEAST:
                common += smaller(u, v)
            if SOFT:
                common += tl.where((u > 0) & (v > 0), softmin(u, v), 0.0)
            if MATCH and ALPHA:
                only_a += tl.where(v > 0, relu(u - v), 0.0)
            if MATCH and BETA:
                only_b += tl.where(u > 0, relu(v - u), 0.0)
    return common, only_a, only_b


@triton.jit
def all_sums(
    z_ptr, b_ptr, rows, columns, row_inside, column_inside, width, sign,
    ALPHA: tl.constexpr, BETA: tl.constexpr,
    INTERSECTION: tl.constexpr, CONVENTION: tl.constexpr, DIFFERENCE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`sums` and `single_sums`: everything that a similarity is made of."""
    common, first, second, only_a, only_b = sums(
        z_ptr, b_ptr, rows, columns, row_inside, column_inside, width, sign, ALPHA, BETA,
        INTERSECTION, CONVENTION, DIFFERENCE, BM, BN, BK, PRECISION,
    )  # fmt: skip
    common, only_a, only_b = single_sums(
        common, only_a, only_b, z_ptr, b_ptr, rows, columns, row_inside, column_inside, width, sign, ALPHA, BETA,
        INTERSECTION, CONVENTION, DIFFERENCE,
    )  # fmt: skip
    return common, first, second, only_a, only_b


@triton.jit
def parts(
    common, first, second, only_a, only_b,
    INTERSECTION: tl.constexpr, CONVENTION: tl.constexpr, DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """f(A∩B), f(A−B) and f(B−A) from `sums`."""
    if INTERSECTION == "mean":
        common = (first + second) / 2
    elif CONVENTION == "code":
        if INTERSECTION == "min":
            common = smaller(first, second)
        elif INTERSECTION == "max":
            common = larger(first, second)
        elif INTERSECTION == "gmean":
            common = root(first) * root(second)
        elif INTERSECTION == "softmin":
            common = softmin(first, second)
    elif INTERSECTION == "max":  # max = u + v − min
        common = first + second - common
    if CONVENTION == "code" and DIFFERENCE == "subtractmatch":
        only_a += relu(first - second)
        only_b += relu(second - first)
    return common, only_a, only_b


@triton.jit
def denominator(
    common, only_a, only_b, alpha_ptr, beta_ptr, columns, column_inside, alpha_stride, beta_stride,
    CONVENTION: tl.constexpr,
):  # fmt: skip
    """q = I + α D + β E, and 1 more in the authors' convention."""
    q = common
    if CONVENTION == "code":
        q += 1.0
    if alpha_ptr is not None:
        q += coefficient(alpha_ptr, columns, column_inside, alpha_stride) * only_a
    if beta_ptr is not None:
        q += coefficient(beta_ptr, columns, column_inside, beta_stride) * only_b
    return q


@triton.jit
def compare(
    common, only_a, only_b, theta_ptr, alpha_ptr, beta_ptr, columns, column_inside,
    theta_stride, alpha_stride, beta_stride, CONVENTION: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """S ``[BM, BN]``."""
    if FORM == "ratio":
        q = denominator(
            common, only_a, only_b, alpha_ptr, beta_ptr, columns, column_inside, alpha_stride, beta_stride, CONVENTION
        )
        none = tl.abs(q) < TINY
        return tl.where(none, 0.0, common / tl.where(none, 1.0, q))
    else:
        if theta_ptr is not None:
            common = coefficient(theta_ptr, columns, column_inside, theta_stride) * common
        if alpha_ptr is not None:
            common -= coefficient(alpha_ptr, columns, column_inside, alpha_stride) * only_a
        if beta_ptr is not None:
            common -= coefficient(beta_ptr, columns, column_inside, beta_stride) * only_b
        return common


@triton.jit
def similarity(
    z_ptr, b_ptr, theta_ptr, alpha_ptr, beta_ptr, negative_ptr, bias_ptr, out_ptr,
    count, prototypes, width, theta_stride, alpha_stride, beta_stride,
    INTERSECTION: tl.constexpr, CONVENTION: tl.constexpr, DIFFERENCE: tl.constexpr, FORM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S(z, b) − n S(z, −b) + bias of scores z ``[count, width]`` and b ``[prototypes, width]``. Grid: blocks of either."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_inside, column_inside = rows < count, columns < prototypes
    acc = tl.zeros([BM, BN], tl.float32)
    for branch in range(1 if negative_ptr is None else 2):
        common, first, second, only_a, only_b = all_sums(
            z_ptr, b_ptr, rows, columns, row_inside, column_inside, width, 1.0 - 2.0 * branch,
            alpha_ptr is not None, beta_ptr is not None, INTERSECTION, CONVENTION, DIFFERENCE, BM, BN, BK, PRECISION,
        )  # fmt: skip
        common, only_a, only_b = parts(common, first, second, only_a, only_b, INTERSECTION, CONVENTION, DIFFERENCE)
        one = compare(
            common, only_a, only_b, theta_ptr, alpha_ptr, beta_ptr, columns, column_inside,
            theta_stride, alpha_stride, beta_stride, CONVENTION, FORM,
        )  # fmt: skip
        if negative_ptr is None:
            acc += one
        else:
            acc += tl.where(branch == 0, 1.0, -tl.load(negative_ptr).to(tl.float32)) * one
    if bias_ptr is not None:
        acc += coefficient(bias_ptr, columns, column_inside, 1)
    inside = row_inside[:, None] & column_inside[None, :]
    # hook: epilogue(acc, rows, columns, inside)
    place = rows.to(tl.int64)[:, None] * prototypes + columns[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)
