# SPDX-License-Identifier: Apache-2.0
"""exp(s) ≈ φ_q(q) · φ_k(k) ≥ 0,  s = scale · q·k: the feature maps a site can have, and where their parameters start.

    landmark       φ_k(k)_i = exp(scale · c_i·k − o_i),   φ_q(q)_i = softmax_i(−τ/2 · scale² ‖q − c_i‖²) · e^(o_i + g_i·(q − c_i))
    hedgehog       φ(x) = softmax(x W) ⊕ softmax(−x W)              W per head, starts at τ · identity
    elu            φ(x) = elu(√scale · x) + 1
    relu           φ(x) = relu(√scale · x)
    squared_relu   φ(x) = relu(√scale · x)²

Landmarks c_i are typical queries. Each keeps its own softmax over the keys, exactly; a query reads the mixture of those
of the landmarks near it, and its mass is corrected to first order: g_i = scale · (mean key that c_i attends to) is the
gradient of log Σ_j exp(scale · c·k_j) at c_i. So the map is a partition of unity over attention patterns that occur.
It is placed in closed form (`rewriter.passes.linear_attention.landmarks`) and can be trained on like any other.

Hedgehog is LoLCATs' convention (two softmaxes, arXiv 2402.04347 and 2410.10254); elu: arXiv 2006.16236.
The functions work on ``[batch, heads, time, D]`` and per-head parameters ``[heads, D, F]`` and ``[heads, F]``; features
are float32 (float64 for float64), since they are exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 60.0  # exponents of features end here: e^60 times e^20 still fits into float32


@dataclass(frozen=True)
class FeatureMap:
    """One kind of feature map.

    Attributes:
        query, key: ``(x, scale, *parameters) -> features [batch, heads, time, F]``.
        query_roles, key_roles: names of the parameters, in the order the functions take them. Those of keys have one
            entry per key head, those of queries one per query head.
        calibrated: whether the parameters only make sense when they are placed from data.
    """

    query: Callable[..., Tensor]
    key: Callable[..., Tensor]
    query_roles: tuple[str, ...] = ()
    key_roles: tuple[str, ...] = ()
    calibrated: bool = False


def wide(x: Tensor) -> Tensor:
    """float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b for each head: ``[..., heads, time, D]`` -> ``[..., heads, time, F]``."""
    return x @ weight.to(x.dtype) + bias.to(x.dtype).unsqueeze(1)


def _landmark_query(
    q: Tensor, scale: float, choice: Tensor, choice_bias: Tensor, gain: Tensor, gain_bias: Tensor
) -> Tensor:
    q = wide(q)
    near = torch.log_softmax(_affine(q, choice, choice_bias), -1)
    return (near + _affine(q, gain, gain_bias)).clamp(max=LARGEST).exp()


def _landmark_key(k: Tensor, scale: float, weight: Tensor, bias: Tensor) -> Tensor:
    return _affine(wide(k), weight, bias).clamp(max=LARGEST).exp()


def _hedgehog(x: Tensor, scale: float, weight: Tensor) -> Tensor:
    x = wide(x)
    y = x @ weight.to(x.dtype)
    return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1)


def _elu(x: Tensor, scale: float) -> Tensor:
    return F.elu(wide(x) * scale**0.5) + 1


def _relu(x: Tensor, scale: float) -> Tensor:
    return F.relu(wide(x) * scale**0.5)


def _squared_relu(x: Tensor, scale: float) -> Tensor:
    return F.relu(wide(x) * scale**0.5).square()


MAPS: dict[str, FeatureMap] = {
    "landmark": FeatureMap(
        _landmark_query,
        _landmark_key,
        ("choice_weight", "choice_bias", "gain_weight", "gain_bias"),
        ("key_weight", "key_bias"),
        calibrated=True,
    ),
    "hedgehog": FeatureMap(_hedgehog, _hedgehog, ("query_map",), ("key_map",)),
    "elu": FeatureMap(_elu, _elu),
    "relu": FeatureMap(_relu, _relu),
    "squared_relu": FeatureMap(_squared_relu, _squared_relu),
}
