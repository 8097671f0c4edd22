# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `features_op`: feature maps, their gradients to the tokens, and to the maps' parameters.

    y = s x W + b, u = s x G + g         elu          φ = s x + 1 above 0, e^{s x} below         dx = s φ'(s x) dφ
    σ± = softmax(± y)                    hedgehog     φ = σ₊ ⊕ σ₋       dy = σ₊ (dφ₊ − Σ σ₊ dφ₊) − σ₋ (dφ₋ − Σ σ₋ dφ₋)
                                         exp          φ = e^{min(y, 60)}                         dy = φ dφ where y ≤ 60
    t = log σ₊ + u                       landmark     φ = e^{min(t, 60)}     du = φ dφ where t ≤ 60, dy = du − σ₊ Σ du

    dx = s (dy Wᵀ + du Gᵀ),    dW = s Σ xᵀ dy,    db = Σ dy                                            likewise G and g

A program has some tokens of a head and all columns of W, whose softmax it needs. Products are in the dtype of x: wider
parameters enter y in two parts, since y is an exponent. Gradients make y again from x. Those of parameters are summed
over all tokens, in parts that are added up afterwards: always in the same order.
"""

# mypy: ignore-errors
# (Device code: the syntax of Python, the types of Triton.)

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.linear_attention.feature_maps import LARGEST as LARGEST_EXPONENT
from rewriter.kernels.linear_attention.kernels import place, power_of, store_tile, tile

LARGEST = tl.constexpr(LARGEST_EXPONENT)
ELU, HEDGEHOG, EXP, LANDMARK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def affine(
    x_ptr, x_t, rows, valid, weight_ptr, bias_ptr, width, count, scale,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s x W + b ``[rows, columns]``, float32; the pointers are at the head's parameters, which are dense."""
    columns = tl.arange(0, BM)
    y = tl.zeros([BT, BM], tl.float32)
    for begin in range(0, width, BD):
        at = begin + tl.arange(0, BD)
        x = tile(x_ptr, x_t, rows, valid, at, width)
        w = tile(weight_ptr, count, at, at < width, columns, count).to(tl.float32)
        power = power_of(w, x, 0)
        w = w / power
        high = w.to(x.dtype)
        part = tl.dot(x, high, input_precision=PRECISION)
        if x.dtype != tl.float32:
            part += tl.dot(x, (w - high.to(tl.float32)).to(x.dtype), input_precision=PRECISION)
        y += part * power
    y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < count, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def softmax(y, inside):
    """Over the columns ``inside``, 0 elsewhere."""
    y = tl.where(inside, y, -float("inf"))
    weights = tl.exp(y - tl.max(y, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def log_softmax(y, inside):
    """As `softmax`, finite outside."""
    masked = tl.where(inside, y, -float("inf"))
    top = tl.max(masked, 1)[:, None]
    return y - top - tl.log(tl.sum(tl.exp(masked - top), 1))[:, None]


@triton.jit
def bounded_exp(y):
    """e^min(y, LARGEST); NaN stays."""
    return tl.exp(tl.where(y > LARGEST, LARGEST, y))


@triton.jit
def features_kernel(
    x_ptr, weight_ptr, bias_ptr, gain_ptr, gain_bias_ptr, out_ptr, x_b, x_h, x_t, heads, length, width, count, scale,
    KIND: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ ``[B, H, T, F]``. Grid: (B · H, tiles of T); BM covers the columns of W, or of x without W."""
    row, batch, head = place(tl.program_id(0), heads)
    rows, columns = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BM)
    valid, inside = rows < length, (columns < count)[None, :]
    x_ptr += batch * x_b + head.to(tl.int64) * x_h
    features = 2 * count if KIND == HEDGEHOG else count
    out_ptr += row * length * features
    if KIND == ELU:
        x = tile(x_ptr, x_t, rows, valid, columns, width).to(tl.float32) * scale
        made = tl.where(x > 0, x + 1, tl.exp(x))
    else:
        size = width * count
        if KIND >= EXP:
            bias_ptr += head * count
        y = affine(
            x_ptr, x_t, rows, valid, weight_ptr + head * size, bias_ptr, width, count, scale, BT, BD, BM, PRECISION
        )
        if KIND == HEDGEHOG:
            made = softmax(y, inside)
            store_tile(out_ptr + count, features, rows, valid, columns, count, softmax(-y, inside))
        if KIND == EXP:
            made = bounded_exp(y)
        if KIND == LANDMARK:
            gain_bias_ptr += head * count
            u = affine(
                x_ptr, x_t, rows, valid, gain_ptr + head * size, gain_bias_ptr, width, count, scale, BT, BD, BM, PRECISION
            )
            made = bounded_exp(log_softmax(y, inside) + u)
    store_tile(out_ptr, features, rows, valid, columns, count, made)


@triton.jit
def inner_gradients(
    x_ptr, x_t, rows, valid, weight_ptr, bias_ptr, gain_ptr, gain_bias_ptr, grad_ptr, width, count, scale,
    KIND: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy and du (of landmarks; otherwise dy again) ``[rows, columns]``, 0 outside."""
    columns = tl.arange(0, BM)
    inside = (columns < count)[None, :]
    features = 2 * count if KIND == HEDGEHOG else count
    y = affine(x_ptr, x_t, rows, valid, weight_ptr, bias_ptr, width, count, scale, BT, BD, BM, PRECISION)
    grad = tile(grad_ptr, features, rows, valid, columns, count)
    if KIND == HEDGEHOG:
        up, down = softmax(y, inside), softmax(-y, inside)
        other = tile(grad_ptr + count, features, rows, valid, columns, count)
        dy = up * (grad - tl.sum(up * grad, 1)[:, None]) - down * (other - tl.sum(down * other, 1)[:, None])
        du = dy
    if KIND == EXP:
        dy = tl.where(y > LARGEST, 0.0, bounded_exp(y) * grad)
        du = dy
    if KIND == LANDMARK:
        u = affine(x_ptr, x_t, rows, valid, gain_ptr, gain_bias_ptr, width, count, scale, BT, BD, BM, PRECISION)
        t = log_softmax(y, inside) + u
        du = tl.where(inside & (t <= LARGEST), bounded_exp(t) * grad, 0.0)
        dy = du - softmax(y, inside) * tl.sum(du, 1)[:, None]
    return tl.where(inside & valid[:, None], dy, 0.0), tl.where(inside & valid[:, None], du, 0.0)


@triton.jit
def token_gradients_kernel(
    x_ptr, weight_ptr, bias_ptr, gain_ptr, gain_bias_ptr, grad_ptr, dx_ptr, x_b, x_h, x_t,
    heads, length, width, count, scale,
    KIND: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx ``[B, H, T, D]``. Grid: (B · H, tiles of T)."""
    row, batch, head = place(tl.program_id(0), heads)
    rows, columns = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BM)
    valid = rows < length
    x_ptr += batch * x_b + head.to(tl.int64) * x_h
    dx_ptr += row * length * width
    if KIND == ELU:
        x = tile(x_ptr, x_t, rows, valid, columns, width).to(tl.float32) * scale
        grad = tile(grad_ptr + row * length * width, width, rows, valid, columns, width)
        dx = grad * tl.where(x > 0, 1.0, tl.exp(x)) * scale
        store_tile(dx_ptr, width, rows, valid, columns, width, dx)
    else:
        size = width * count
        weight_ptr += head * size
        grad_ptr += row * length * (2 * count if KIND == HEDGEHOG else count)
        if KIND >= EXP:
            bias_ptr += head * count
        if KIND == LANDMARK:
            gain_ptr += head * size
            gain_bias_ptr += head * count
        dy, du = inner_gradients(
            x_ptr, x_t, rows, valid, weight_ptr, bias_ptr, gain_ptr, gain_bias_ptr, grad_ptr, width, count, scale,
            KIND, BT, BD, BM, PRECISION,
        )  # fmt: skip
        dtype = x_ptr.dtype.element_ty
        like = tl.zeros([1, 1], dtype)
        y_power, u_power = power_of(dy, like, 1), power_of(du, like, 1)
        dy, du = (dy / y_power).to(dtype), (du / u_power).to(dtype)
        for begin in range(0, width, BD):
            at = begin + tl.arange(0, BD)
            w = tl.trans(tile(weight_ptr, count, at, at < width, columns, count).to(dtype))
            dx = tl.dot(dy, w, input_precision=PRECISION) * y_power
            if KIND == LANDMARK:
                w = tl.trans(tile(gain_ptr, count, at, at < width, columns, count).to(dtype))
                dx += tl.dot(du, w, input_precision=PRECISION) * u_power
            store_tile(dx_ptr, width, rows, valid, at, width, dx * scale)


@triton.jit
def parameter_gradients_kernel(
    x_ptr, weight_ptr, bias_ptr, gain_ptr, gain_bias_ptr, grad_ptr, dweight_ptr, dbias_ptr,
    x_b, x_h, x_t, batches, heads, length, width, count, scale, tiles, per_part,
    KIND: tl.constexpr, GAIN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dW ``[parts, H, D, M]`` and db ``[parts, H, M]``, with GAIN those of G and g. Grid: (H, parts, tiles of D).

    Each part has ``per_part`` of the ``tiles`` of tokens of every batch, one batch after the other.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    at, columns = tl.program_id(2) * BD + tl.arange(0, BD), tl.arange(0, BM)
    size = width * count
    features = 2 * count if KIND == HEDGEHOG else count
    weight_ptr += head * size
    if KIND >= EXP:
        bias_ptr += head * count
    if KIND == LANDMARK:
        gain_ptr += head * size
        gain_bias_ptr += head * count
    dweight = tl.zeros([BD, BM], tl.float32)
    dbias = tl.zeros([BM], tl.float32)
    for step in range(part * per_part, tl.minimum((part + 1) * per_part, tiles * batches)):
        batch = (step // tiles).to(tl.int64)
        rows = step % tiles * BT + tl.arange(0, BT)
        valid = rows < length
        of_x = x_ptr + batch * x_b + head.to(tl.int64) * x_h
        of_grad = grad_ptr + (batch * heads + head) * length * features
        dy, du = inner_gradients(
            of_x, x_t, rows, valid, weight_ptr, bias_ptr, gain_ptr, gain_bias_ptr, of_grad, width, count, scale,
            KIND, BT, BD, BM, PRECISION,
        )  # fmt: skip
        grads = du if GAIN else dy
        x = tl.trans(tile(of_x, x_t, rows, valid, at, width))
        power = power_of(grads, x, 0)
        dweight += tl.dot(x, (grads / power).to(x.dtype), input_precision=PRECISION) * power
        dbias += tl.sum(grads, 0)
    own = (part * heads + head).to(tl.int64)
    store_tile(dweight_ptr + own * size, count, at, at < width, columns, count, dweight * scale)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + own * count + columns, dbias, mask=(columns < count) & (tl.program_id(2) == 0))
