# SPDX-License-Identifier: Apache-2.0
"""Pointwise functions emitted kernels call, in float32: what the device's language lacks, or loses digits in.

NaN and infinities go through them as through torch's functions of the same names. Differences that cancel near zero
(tanh, expm1, log1p) are computed by series or by Kahan's quotient there, so that small values keep their relative error.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # (1 - e)/(1 + e), e = exp(-2|x|);  |x| < 1/4: x - x³/3 + 2x⁵/15 - 17x⁷/315 + 62x⁹/2835, the rest is below 1e-8·x
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
    s = x * x
    near = x + x * s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def gelu(x):
    # x · Φ(x), Φ(x) = (1 + erf(x/√2))/2
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    # x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def expm1(x):
    # |x| < 1/2: x + x²/2! + … + x⁸/8!, the rest is below 1.1e-8·x
    s = 1.0 / 720.0 + x * (1.0 / 5040.0 + x * (1.0 / 40320.0))
    near = x + x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * s))))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0)


@triton.jit
def elu(x, alpha):
    return tl.where(x <= 0.0, alpha * expm1(x), x)


@triton.jit
def log1p(x):
    # Kahan: log(u) · x/(u - 1), u = 1 + x rounded; x itself where u is 1
    u = 1.0 + x
    whole = (u == 1.0) | (u == float("inf"))
    return tl.where(u == 1.0, x, tl.log(u) * tl.where(whole, 1.0, x / tl.where(whole, 1.0, u - 1.0)))


@triton.jit
def softplus(x, beta, threshold):
    scaled = x * beta
    # What is above the threshold is not read, but must not overflow either.
    small = tl.where(scaled > threshold, 0.0, scaled)
    return tl.where(scaled > threshold, x, log1p(tl.exp(small)) / beta)


@triton.jit
def maximum(x, y):
    return tl.where(x != x, x, tl.where(x > y, x, y))


@triton.jit
def minimum(x, y):
    return tl.where(x != x, x, tl.where(x < y, x, y))


@triton.jit
def clamp_min(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def clamp_max(x, high):
    return tl.where(x > high, high, x)
