# SPDX-License-Identifier: Apache-2.0
"""The rewritten attention as one function of q, k, v: what a graph, a module and a decoding step all compute.

    hybrid     (Σ_near γ e^s v + m Σ_far φ_q(q)·φ_k(k) v) / (the same without v)    one normaliser; causal, with a window
    linear     Σ φ_q(q)·φ_k(k) v / Σ φ_q(q)·φ_k(k)                                  no window: every key is linear
    mixture    g · softmax over the window + (1 − g) · recurrence over all keys      causal; Liger (arXiv 2503.01496), g = ½

The recurrences of a mixture have no normaliser, and no parameters but the ones named here:

    key gates  S ← diag(σ(k)^(1/16)) S + softmax(k) vᵀ,  read by softmax(q);  q and k before rotary
    delta      S ← e^λ S;  S ← S + β k̂ (v − Sᵀ k̂)ᵀ,  read by q̂;  k̂ and q̂ of unit length, β = σ(b) per head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels.linear_attention import op
from rewriter.passes.linear_attention.maps import MAPS, wide

CHUNK = 64  # queries per block of the operators
_WINDOW_PAST = 7  # tensors that hybrid_attention hands on
_GATE_POWER = 1 / 16  # of key gates, as in GLA and Liger

Past = Sequence[Tensor]


@dataclass(frozen=True)
class Form:
    """Everything of a site that is no tensor.

    Attributes:
        feature_map: a name of `maps.MAPS`; unused by mixtures.
        scale: of the scores.
        window: keys that stay softmax; 0 for none.
        block, sinks, anchor: as the operator has them.
        causal: keys after the query are hidden.
        heads: of queries.
        gate: None, ``"fixed"`` or ``"key"``.
        rule: ``"additive"`` or ``"delta"``.
    """

    feature_map: str
    scale: float
    window: int
    block: str
    sinks: int
    anchor: str
    causal: bool
    heads: int
    gate: str | None = None
    rule: str = "additive"

    @property
    def is_mixture(self) -> bool:
        return self.gate == "key" or self.rule == "delta"

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the site's parameters, in the order of their storage."""
        decay = ("log_decay",) if self.gate == "fixed" else ()
        if self.is_mixture:
            return (("window_share",) if self.window else ()) + (("beta",) if self.rule == "delta" else ()) + decay
        fmap = MAPS[self.feature_map]
        return fmap.query_roles + fmap.key_roles + (("window_gate", "map_scale") if self.window else ()) + decay

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        tensors: Mapping[str, Tensor],
        plain: tuple[Tensor, Tensor] | None = None,
        past: Past | None = None,
        with_state: bool = False,
    ) -> tuple[Tensor, ...]:
        """The output ``[B, H, T, Dv]`` in q's dtype, and what a next call goes on from.

        Args:
            q, k, v: ``[B, H, T, D]``, ``[B, Hk, S, D]``, ``[B, Hk, S, Dv]``; S = T where causal.
            keep: bool ``[B, S]``, False where a key is padding; None for none.
            tensors: the site's parameters by role.
            plain: q and k before rotary, for key gates; None where they are q and k.
            past: what an earlier call handed on.
            with_state: hand something on.
        """
        if self.is_mixture:
            return self._mixture(q, k, v, keep, tensors, plain or (q, k), past, with_state)
        fmap = MAPS[self.feature_map]
        maps = (
            fmap.query(q, self.scale, *(tensors[role] for role in fmap.query_roles)),
            fmap.key(k, self.scale, *(tensors[role] for role in fmap.key_roles)),
        )
        decay = tensors["log_decay"] if self.gate == "fixed" else None
        if not self.window:
            out, *left = self._linear(*maps, v, decay, keep, past, "sum")
            return (out.to(q.dtype), *left)
        weights = (tensors["window_gate"], tensors["map_scale"], decay)
        return self._windowed((q, k, v), maps, weights, keep, past, with_state)

    def _windowed(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        maps: tuple[Tensor | None, Tensor | None],
        weights: tuple[Tensor, Tensor | None, Tensor | None],
        keep: Tensor | None,
        past: Past | None,
        with_state: bool,
    ) -> tuple[Tensor, ...]:
        before = (None,) * _WINDOW_PAST if past is None else tuple(past)
        options = (self.scale, self.window, self.block, self.sinks, self.anchor, with_state, CHUNK)
        results: tuple[Tensor, ...] = op.hybrid_attention(*qkv, *maps, *weights, keep, *before, *options)
        return tuple(results)

    def _linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        keep: Tensor | None,
        past: Past | None,
        normalise: str,
    ) -> tuple[Tensor, ...]:
        before = (None, None) if past is None else tuple(past)
        results: tuple[Tensor, ...] = op.linear_attention(
            q, k, v, decay, keep, *before, 1.0, self.causal, normalise, CHUNK
        )
        return tuple(results)

    def _mixture(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        tensors: Mapping[str, Tensor],
        plain: tuple[Tensor, Tensor],
        past: Past | None,
        with_state: bool,
    ) -> tuple[Tensor, ...]:
        split = _WINDOW_PAST if self.window else 0
        memory = None if past is None else past[split:]
        if self.rule == "delta":
            unit_q, unit_k = F.normalize(wide(q), dim=-1), F.normalize(wide(k), dim=-1)
            beta = torch.zeros_like(unit_k[..., 0]) + tensors["beta"].to(unit_k.dtype).sigmoid().unsqueeze(-1)
            decay = tensors["log_decay"] if self.gate == "fixed" else None
            state = None if memory is None else memory[0]
            recurrent, *left = op.delta_attention(unit_q, unit_k, v, beta, decay, keep, state, 1.0, CHUNK)
        else:
            gates = F.logsigmoid(wide(plain[1])) * _GATE_POWER
            soft_q, soft_k = wide(plain[0]).softmax(-1), wide(plain[1]).softmax(-1)
            recurrent, *left = self._linear(soft_q, soft_k, v, gates, keep, memory, "none")
        recurrent = recurrent.to(q.dtype)
        if not self.window:
            return (recurrent, *left)
        gate = torch.ones_like(tensors["window_share"])
        near, *caches = self._windowed(
            (q, k, v), (None, None), (gate, None, None), keep, None if past is None else past[:split], with_state
        )
        share = tensors["window_share"].to(q.dtype).reshape(1, -1, 1, 1)
        return (share * near + (1 - share) * recurrent, *caches, *left)
