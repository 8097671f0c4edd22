# SPDX-License-Identifier: Apache-2.0
"""Feature maps φ of linear attention: weights are φ_q(q)·φ_k(k) instead of e^{q·k}.

Plain differentiable aten. Inputs are ``[B, H, T, D]``, already multiplied by √scale (softmax attention's scale is
shared between q and k); features come in at least float32, ``[B, H, T, width(D)]``. Parameters are per head.

    elu           elu(x) + 1                              Katharopoulos et al. (arXiv 2006.16236)
    relu          relu(x)                                 SLAB with relu(k + position), see `slab_keys` (2405.11582)
    squared_relu  relu(x)²
    softmax       softmax_d(x)                            Liger (2503.01496), without normaliser
    hedgehog      softmax(x W) ⊕ softmax(−x W)            LoLCATs' code (2410.10254): sums to 2
    hedgehog_fla  softmax(2 (x W + b) ⊕ −2 (x W + b))     flash-linear-attention: one softmax, sums to 1
    hedgehog_exp  exp(x W) ⊕ exp(−x W)                    the paper's own map (2402.04347)
    t2r           relu(x W + b)                           T2R (2103.13076)
    favor         m^{−1/2} exp(x Ω − ‖x‖²/2)              Performer, FAVOR+ (2009.14794): E φ(q)·φ(k) = e^{q·k}
    nala          q: [relu(q̂)^p ; relu(−q̂)^p], q̂ = q/‖q‖, p = 3 (1/2 + tanh ‖q‖)
                  k: [relu(k³) ; relu(−k³)]               NaLaFormer: sharper for larger queries
    identity      x                                       TransNormer (2210.10340): no normaliser, `output_norm` instead

Maps of whole sequences: `cosformer` (needs positions), `rala_keys` (bidirectional only). NaLaFormer rotates the
features of its numerator but not of its normaliser: a caller that wants this calls the operator twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.linear_attention.layout import wide

Init = Callable[[int, int, torch.Generator], tuple[Tensor, ...]]


LARGEST = 60.0  # exponents end here where nothing else bounds them: e^60 times e^20 still fits into float32


def widened(x: Tensor) -> Tensor:
    """float32, or float64 for float64: the dtype of features."""
    return x.to(wide(x.dtype))


def elu(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1."""
    return F.elu(widened(x)) + 1


def relu(x: Tensor) -> Tensor:
    """φ(x) = relu(x)."""
    return F.relu(widened(x))


def squared_relu(x: Tensor) -> Tensor:
    """φ(x) = relu(x)²."""
    return F.relu(widened(x)).square()


def softmax(x: Tensor) -> Tensor:
    """φ(x) = softmax over the features."""
    return torch.softmax(widened(x), dim=-1)


def identity(x: Tensor) -> Tensor:
    """φ(x) = x."""
    return widened(x)


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """φ(x) = softmax(x W) ⊕ softmax(−x W); weight ``[H, D, M]``."""
    y = _projected(x, weight)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


def hedgehog_fla(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """φ(x) = softmax(2 (x W + b) ⊕ −2 (x W + b)); weight ``[H, D, M]``, bias ``[H, M]``."""
    y = 2 * _projected(x, weight, bias)
    return torch.cat([y, -y], dim=-1).softmax(-1)


def hedgehog_exp(x: Tensor, weight: Tensor) -> Tensor:
    """φ(x) = exp(x W) ⊕ exp(−x W), exponents within ±`LARGEST`; weight ``[H, D, M]``."""
    y = _projected(x, weight).clamp(-LARGEST, LARGEST)
    return torch.cat([y.exp(), (-y).exp()], dim=-1)


def t2r(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """φ(x) = relu(x W + b); weight ``[H, D, M]``, bias ``[H, M]``."""
    return F.relu(_projected(x, weight, bias))


def favor(x: Tensor, projection: Tensor) -> Tensor:
    """φ(x) = m^{−1/2} exp(x Ω − ‖x‖²/2); projection Ω ``[H, D, m]``.

    The exponent is at most ‖ω‖²/2, about D/2: no overflow in float32 up to D = 128.
    """
    exponent = _projected(x, projection) - widened(x).square().sum(-1, keepdim=True) / 2
    return exponent.exp() * projection.shape[-1] ** -0.5


def nala_queries(q: Tensor) -> Tensor:
    """φ(q) = [relu(q̂)^p ; relu(−q̂)^p] with q̂ = q/‖q‖ and p = 3 (1/2 + tanh ‖q‖) between 3/2 and 9/2."""
    q = widened(q)
    # The norm of a zero vector has no gradient; a zero query has the features of none.
    square = q.square().sum(-1, keepdim=True)
    norm = torch.where(square > 0, square, 1.0).sqrt()
    power = 3 * (0.5 + torch.tanh(norm))
    both = torch.cat([q, -q], dim=-1) / norm
    # 0^p by choice: its derivative in p is 0 · log 0.
    return torch.where(both > 0, torch.where(both > 0, both, 1.0) ** power, 0.0)


def nala_keys(k: Tensor) -> Tensor:
    """φ(k) = [relu(k³) ; relu(−k³)]."""
    cube = widened(k) ** 3
    return torch.cat([F.relu(cube), F.relu(-cube)], dim=-1)


# -- maps of whole sequences -------------------------------------------------------------------------------------


def cosformer(x: Tensor, position: Tensor, horizon: int) -> Tensor:
    """φ(x_i) = relu(x_i) ⊗ [cos θ_i, sin θ_i], θ_i = π i / (2 M): weights relu(q)·relu(k) · cos(π (i − j) / (2 M)).

    cosFormer (arXiv 2202.08791). Positive while all positions are in [0, M].

    Args:
        position: i, ``[T]`` or ``[B, T]``; counts on where a sequence goes on from a state.
        horizon: M, at least the length of the longest sequence.
    """
    angle = position.to(wide(x.dtype)) * (math.pi / (2 * horizon))
    angle = angle[:, None, :, None] if position.dim() == 2 else angle[:, None]
    y = F.relu(widened(x))
    return torch.cat([y * angle.cos(), y * angle.sin()], dim=-1)


def rala_keys(q: Tensor, k: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """k_j ← N · softmax_j(scale · q̄·k_j) · k_j for features q, k: keys near the mean query count for more.

    RALA (arXiv 2411.07635), with q̄ the mean of the queries' features: every key depends on every query, so the map
    is bidirectional only. With equal scores it changes nothing. ``keep [B, T]`` leaves padding out of mean and N.
    """
    if keep is None:
        mean, count = q.mean(-2, keepdim=True), torch.ones_like(q[..., :1]).sum(-2, keepdim=True)
        return k * (count * torch.softmax(scale * (k @ mean.mT), dim=-2))
    real = keep[:, None, :, None]
    count = real.sum(-2, keepdim=True)
    mean = torch.where(real, q, 0.0).sum(-2, keepdim=True) / count.clamp(min=1)
    scores = (scale * (k @ mean.mT)).masked_fill(~real, torch.finfo(k.dtype).min)
    return torch.where(real, k * (count * torch.softmax(scores, dim=-2)), 0.0)


def slab_keys(k: Tensor, position: Tensor) -> Tensor:
    """φ(k) = relu(k + position): SLAB's simplified linear attention, position ``[T, D]`` or ``[H, T, D]``."""
    return F.relu(widened(k) + position)


# -- beside the maps ---------------------------------------------------------------------------------------------


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(‖x‖² + eps): the keys of the delta rule."""
    x = widened(x)
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


def output_norm(out: Tensor, eps: float = 1e-6) -> Tensor:
    """o / rms(o) over the head dimension: TransNormer's stand-in for the normaliser (`normalise="none"`)."""
    y = widened(out)
    return (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).to(out.dtype)


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W (+ b) per head."""
    y = widened(x) @ weight.to(wide(x.dtype))
    return y if bias is None else y + bias.to(y.dtype).unsqueeze(-2)


# -- initial parameters ------------------------------------------------------------------------------------------


def _eye(heads: int, dim: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.eye(dim).expand(heads, -1, -1).clone(),)


def _eye_and_bias(heads: int, dim: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (*_eye(heads, dim, generator), torch.zeros(heads, dim))


def _kaiming_and_bias(heads: int, dim: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    bound = dim**-0.5
    weight = torch.empty(heads, dim, dim).uniform_(-bound, bound, generator=generator)
    return weight, torch.zeros(heads, dim)


def orthogonal_features(heads: int, dim: int, generator: torch.Generator, count: int | None = None) -> Tensor:
    """Ω of FAVOR+, ``[heads, dim, count]`` (default 2 · dim): orthogonal directions with the lengths of Gaussian rows.

    Blocks of ``dim`` columns are orthogonal among themselves; each column alone is N(0, I), which keeps the estimate
    unbiased and lowers its variance.
    """
    count = 2 * dim if count is None else count
    blocks = -(-count // dim)
    gaussian = torch.randn(heads, blocks, dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # Q alone is not uniform: LAPACK fixes signs.
    q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign().unsqueeze(-2)
    length = torch.randn(heads, blocks, dim, dim, generator=generator, dtype=torch.float64).norm(dim=-2, keepdim=True)
    return (q * length).movedim(1, 2).flatten(2)[..., :count].float()


def _none(heads: int, dim: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class FeatureMap:
    """A map that looks at one token at a time.

    Attributes:
        query, key: ``(x, *parameters) -> features``.
        roles: names of the parameters, the same for queries and keys.
        width: number of features from D (with the initial parameters).
        positive: no weight is negative, so that the normaliser "sum" is safe.
        init: ``(heads, D, generator)`` -> parameters in the order of ``roles``.
    """

    query: Callable[..., Tensor]
    key: Callable[..., Tensor]
    roles: tuple[str, ...] = ()
    width: Callable[[int], int] = lambda dim: dim
    positive: bool = True
    init: Init = _none


def _double(dim: int) -> int:
    return 2 * dim


MAPS: dict[str, FeatureMap] = {
    "elu": FeatureMap(elu, elu),
    "relu": FeatureMap(relu, relu),
    "squared_relu": FeatureMap(squared_relu, squared_relu),
    "softmax": FeatureMap(softmax, softmax),
    "hedgehog": FeatureMap(hedgehog, hedgehog, ("map",), _double, init=_eye),
    "hedgehog_fla": FeatureMap(hedgehog_fla, hedgehog_fla, ("map", "bias"), _double, init=_eye_and_bias),
    "hedgehog_exp": FeatureMap(hedgehog_exp, hedgehog_exp, ("map",), _double, init=_eye),
    "t2r": FeatureMap(t2r, t2r, ("map", "bias"), init=_kaiming_and_bias),
    "favor": FeatureMap(favor, favor, ("projection",), _double, init=lambda h, d, g: (orthogonal_features(h, d, g),)),
    "nala": FeatureMap(nala_queries, nala_keys, width=_double),
    "identity": FeatureMap(identity, identity, positive=False),
}
