# SPDX-License-Identifier: Apache-2.0
"""The rewritten attention as one function of q, k, v: what a graph, a module and a decoding step all compute.

    causal, window    hybrid_attention(q, k, v, φ_q(q), φ_k(k), ...)       softmax near, linear far
    else              linear_attention(φ_q(q), φ_k(k), v, ...)             no window: every key is linear
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.linear_attention import op
from rewriter.passes.linear_attention.maps import MAPS

CHUNK = 64  # queries per block of the operators
PAST = 7  # tensors that hybrid_attention hands on


@dataclass(frozen=True)
class Form:
    """Everything of a site that is no tensor.

    Attributes:
        feature_map: a name of `maps.MAPS`.
        scale: of the scores.
        window: keys that stay softmax; 0 for none.
        block, sinks, anchor: as the operator has them.
        causal: keys after the query are hidden.
        heads: of queries.
        decays: the linear branch has a fixed decay per head.
    """

    feature_map: str
    scale: float
    window: int
    block: str
    sinks: int
    anchor: str
    causal: bool
    heads: int
    decays: bool

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the site's parameters, in the order of their storage."""
        fmap = MAPS[self.feature_map]
        rest = (("window_gate", "map_scale") if self.window else ()) + (("log_decay",) if self.decays else ())
        return fmap.query_roles + fmap.key_roles + rest

    def query_features(self, q: Tensor, *parameters: Tensor) -> Tensor:
        """φ_q(q) ``[B, H, T, F]``; parameters as `maps.FeatureMap.query_roles`."""
        return MAPS[self.feature_map].query(q, self.scale, *parameters)

    def key_features(self, k: Tensor, *parameters: Tensor) -> Tensor:
        """φ_k(k) ``[B, Hk, S, F]``; parameters as `maps.FeatureMap.key_roles`."""
        return MAPS[self.feature_map].key(k, self.scale, *parameters)

    def features(self, q: Tensor, k: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """φ_q(q) and φ_k(k)."""
        fmap = MAPS[self.feature_map]
        return (
            self.query_features(q, *(tensors[role] for role in fmap.query_roles)),
            self.key_features(k, *(tensors[role] for role in fmap.key_roles)),
        )

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        tensors: Mapping[str, Tensor],
        past: Sequence[Tensor] | None = None,
        with_state: bool = False,
    ) -> tuple[Tensor, ...]:
        """The output ``[B, H, T, Dv]`` in q's dtype, and what the operator hands on.

        Args:
            q, k, v: ``[B, H, T, D]``, ``[B, Hk, S, D]``, ``[B, Hk, S, Dv]``.
            keep: bool ``[B, S]``, False where a key is padding; None for none.
            tensors: the site's parameters by role.
            past: what an earlier call handed on.
            with_state: hand on something that a next call can go on from.
        """
        maps = self.features(q, k, tensors)
        target, arguments = self.arguments((q, k, v), maps, keep, tensors, past, with_state)
        out, *rest = target(*arguments)
        return (out.to(q.dtype), *rest)

    def arguments(
        self,
        qkv: tuple[Any, Any, Any],
        maps: tuple[Any, Any],
        keep: Any,
        tensors: Mapping[str, Any],
        past: Sequence[Any] | None = None,
        with_state: bool = False,
    ) -> tuple[OpOverload, tuple[Any, ...]]:
        """The operator and its arguments; tensors or graph nodes alike. The operator's first result is the output."""
        decay = tensors["log_decay"] if self.decays else None
        if not self.window:
            state = (None, None) if past is None else tuple(past)
            rest = (decay, keep, *state, 1.0, self.causal, "sum", CHUNK)
            return op.linear_attention, (*maps, qkv[2], *rest)
        before = (None,) * PAST if past is None else tuple(past)
        weights = (tensors["window_gate"], tensors["map_scale"], decay)
        options = (self.scale, self.window, self.block, self.sinks, self.anchor, with_state, CHUNK)
        return op.hybrid_attention, (*qkv, *maps, *weights, keep, *before, *options)
