# SPDX-License-Identifier: Apache-2.0
"""exp(s) ≈ φ_q(q) · φ_k(k),  s = scale · q·k: the feature maps a site can have, and where their parameters start.

    landmark       φ_k(k)_i = exp(scale · c_i·k − o_i),   φ_q(q)_i = softmax_i(−τ/2 · scale² ‖q − c_i‖²) · e^(o_i + g_i·(q − c_i))
    rala           φ = elu + 1, keys weighted by N · softmax_j(scale · q̄·φ(k_j)): bidirectional only
    slab           φ_q(q) = relu(√scale q),  φ_k(k_j) = relu(√scale k_j + p_j),  a table p that starts at zero
    cosformer      φ(x_i) = relu(√scale x_i) ⊗ [cos θ_i, sin θ_i],  θ_i = π i / (2 · horizon)
    all others     as `rewriter.kernels.linear_attention.feature_maps` has them, of √scale · x; where x is projected by
                   a W that is learned (hedgehog, t2r), of x itself: W takes the scale up

Landmarks c_i are typical queries. Each keeps its own softmax over the keys, exactly; a query reads the mixture of those
of the landmarks near it, and its mass is corrected to first order: g_i = scale · (mean key that c_i attends to) is the
gradient of log Σ_j exp(scale · c·k_j) at c_i. So the map is a partition of unity over attention patterns that occur.
It is placed in closed form (`rewriter.passes.linear_attention.landmarks`) and can be trained on like any other.

The maps work on ``[batch, heads, time, D]`` and per-head parameters ``[heads, D, F]`` and ``[heads, F]``; features are
float32 (float64 for float64), since many are exponentials. Queries start with the parameters of their key head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewriter.kernels.linear_attention import feature_maps, op
from rewriter.kernels.linear_attention.feature_maps import widened


@dataclass(frozen=True)
class Tokens:
    """What features are made of.

    Attributes:
        q, k: ``[B, H, T, D]`` and ``[B, Hk, S, D]``.
        scale: of the scores.
        keep: bool ``[B, S]``, False at padding; None for none.
        position: of the queries and of the keys, int64 ``[T]`` or ``[B, T]``; given to positional maps.
        horizon: positions that positional maps tell apart; later ones count as the last.
    """

    q: Tensor
    k: Tensor
    scale: float
    keep: Tensor | None = None
    position: tuple[Tensor, Tensor] | None = None
    horizon: int = 0

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        if self.position is None:
            raise ValueError("a positional map was given no positions")
        return self.position


_ABSENT = (None,) * 4  # parameters of the operator that a map does not have

Features = Callable[[Tokens, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
Start = Callable[[int, int, int, torch.Generator], dict[str, Tensor]]


def _nothing(heads: int, dim: int, horizon: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class FeatureMap:
    """One kind of feature map.

    Attributes:
        features: ``(tokens, parameters by role)`` -> features of the queries ``[B, H, T, F]`` and keys ``[B, Hk, S, F]``.
        query_roles: names of the parameters with one entry per query head.
        key_roles: names of those with one entry per key head.
        buffers: names among them that do not train.
        start: ``(key heads, D, horizon, generator)`` -> parameters of the key heads, and of a query head each has.
        width: F of D where the map starts.
        calibrated: the parameters only make sense when they are placed from data.
        positive: no weight is negative. Without it there is no normaliser, but a norm of the output with a fitted gain,
            and nothing to share with a window.
        positional: the map reads positions.
        whole: features of one token depend on others, or on its position.
        causal: can be used where later keys are hidden.
    """

    features: Features
    query_roles: tuple[str, ...] = ()
    key_roles: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    start: Start = _nothing
    width: Callable[[int], int] = lambda dim: dim
    calibrated: bool = False
    positive: bool = True
    positional: bool = False
    whole: bool = False
    causal: bool = True


def _scaled(x: Tensor, scale: float) -> Tensor:
    return widened(x) * scale**0.5


def _landmark(tokens: Tokens, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    near = (given["choice_weight"], given["choice_bias"], given["gain_weight"], given["gain_bias"])
    q = op.attention_features(tokens.q, *near, "landmark", 1.0)
    k = op.attention_features(tokens.k, given["key_weight"], given["key_bias"], None, None, "exp", 1.0)
    return q, k


def _in_one_pass(name: str, *, scaled: bool) -> FeatureMap:
    """A map of `feature_maps.MAPS` that is a kind of the operator ``attention_features``."""
    plain = _of_tokens(name, scaled=scaled)

    def features(tokens: Tokens, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        scale = tokens.scale**0.5 if scaled else 1.0
        weights = tuple((*(given[r] for r in roles), *_ABSENT)[:4] for roles in (plain.query_roles, plain.key_roles))
        q, k = (op.attention_features(x, *w, name, scale) for x, w in zip((tokens.q, tokens.k), weights, strict=True))
        return q, k

    return replace(plain, features=features)


def _of_tokens(name: str, *, scaled: bool) -> FeatureMap:
    """A map of `feature_maps.MAPS`; roles ``query_<name>`` and ``key_<name>``."""
    kernel = feature_maps.MAPS[name]
    query_roles = tuple(f"query_{role}" for role in kernel.roles)
    key_roles = tuple(f"key_{role}" for role in kernel.roles)

    def features(tokens: Tokens, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        q, k = (_scaled(x, tokens.scale) if scaled else x for x in (tokens.q, tokens.k))
        return kernel.query(q, *(given[r] for r in query_roles)), kernel.key(k, *(given[r] for r in key_roles))

    def start(heads: int, dim: int, horizon: int, generator: torch.Generator) -> dict[str, Tensor]:
        made = kernel.init(heads, dim, generator)
        both = (*zip(query_roles, made, strict=True), *zip(key_roles, made, strict=True))
        return {role: value.clone() for role, value in both}

    return FeatureMap(features, query_roles, key_roles, start=start, width=kernel.width, positive=kernel.positive)


def _favor(tokens: Tokens, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    # One Ω per key head: the estimate of e^{q·k} needs the same random directions on both sides.
    projection = given["projection"]
    of_queries = projection.repeat_interleave(tokens.q.shape[1] // tokens.k.shape[1], 0)
    q, k = (_scaled(x, tokens.scale) for x in (tokens.q, tokens.k))
    return feature_maps.favor(q, of_queries), feature_maps.favor(k, projection)


def _favor_start(heads: int, dim: int, horizon: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"projection": feature_maps.MAPS["favor"].init(heads, dim, generator)[0]}


def _cosformer(tokens: Tokens, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    # Beyond the horizon the cosine would turn negative: later positions count as the horizon.
    at_q, at_k = (p.clamp(max=tokens.horizon) for p in tokens.positions)
    q, k = (_scaled(x, tokens.scale) for x in (tokens.q, tokens.k))
    return feature_maps.cosformer(q, at_q, tokens.horizon), feature_maps.cosformer(k, at_k, tokens.horizon)


def _slab(tokens: Tokens, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    at = tokens.positions[1].clamp(max=tokens.horizon - 1)
    table = given["key_position"][:, at]  # [Hk, S, D] or [Hk, B, S, D]
    if at.dim() == 2:
        table = table.transpose(0, 1)
    k = feature_maps.slab_keys(_scaled(tokens.k, tokens.scale), widened(table))
    return feature_maps.relu(_scaled(tokens.q, tokens.scale)), k


def _slab_start(heads: int, dim: int, horizon: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"key_position": torch.zeros(heads, horizon, dim)}


def _rala(tokens: Tokens, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    q, k = (feature_maps.elu(_scaled(x, tokens.scale)) for x in (tokens.q, tokens.k))
    shared = q.unflatten(1, (tokens.k.shape[1], -1)).mean(2)  # queries that share a key head share its mean query
    return q, feature_maps.rala_keys(shared, k, tokens.keep, tokens.scale)


def _double(dim: int) -> int:
    return 2 * dim


MAPS: dict[str, FeatureMap] = {
    "landmark": FeatureMap(
        _landmark,
        ("choice_weight", "choice_bias", "gain_weight", "gain_bias"),
        ("key_weight", "key_bias"),
        width=_double,
        calibrated=True,
    ),
    **{name: _of_tokens(name, scaled=False) for name in ("hedgehog_fla", "hedgehog_exp", "t2r")},
    "hedgehog": _in_one_pass("hedgehog", scaled=False),
    "elu": _in_one_pass("elu", scaled=True),
    **{name: _of_tokens(name, scaled=True) for name in ("relu", "squared_relu", "softmax", "nala", "identity")},
    "favor": FeatureMap(
        _favor, (), ("projection",), ("projection",), _favor_start, width=feature_maps.MAPS["favor"].width
    ),
    "cosformer": FeatureMap(_cosformer, width=_double, positional=True, whole=True),
    "slab": FeatureMap(_slab, (), ("key_position",), start=_slab_start, positional=True, whole=True),
    "rala": FeatureMap(_rala, whole=True, causal=False),
}
