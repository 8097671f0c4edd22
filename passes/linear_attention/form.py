# SPDX-License-Identifier: Apache-2.0
"""The rewritten attention as one function of q, k, v: what a graph, a module and a decoding step all compute.

    hybrid     (Σ_near γ e^s v + m Σ_far φ_q(q)·φ_k(k) v) / (the same without v)    one normaliser; causal, with a window
    linear     Σ φ_q(q)·φ_k(k) v / Σ φ_q(q)·φ_k(k)                                  no window: every key is linear
    unnormed   g · rms_norm(Σ φ_q(q)·φ_k(k) v)                                      weights that may be negative; no window
    mixture    g · softmax over the window + (1 − g) · recurrence over all keys      causal; Liger (arXiv 2503.01496), g = ½

The recurrences of a mixture have no normaliser, and no parameters but the ones named here:

    key gates  S ← diag(σ(k)^(1/16)) S + softmax(k) vᵀ,  read by softmax(q);  q and k before rotary
    delta      S ← e^λ S;  S ← S + β k̂ (v − Sᵀ k̂)ᵀ,  read by q̂;  k̂ and q̂ of unit length, β = σ(b) per head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels.linear_attention import op
from rewriter.kernels.linear_attention.feature_maps import output_norm, widened
from rewriter.passes.linear_attention.maps import MAPS, Tokens

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
        horizon: positions that positional maps tell apart; 0 for other maps.
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
    horizon: int = 0

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
        weights = ("window_gate", "map_scale") if self.window else () if fmap.positive else ("output_gain",)
        return fmap.query_roles + fmap.key_roles + weights + decay

    @property
    def buffers(self) -> tuple[str, ...]:
        """Those of `roles` that do not train."""
        return () if self.is_mixture else MAPS[self.feature_map].buffers

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
        fmap, tokens = MAPS[self.feature_map], Tokens(q, k, self.scale, keep, horizon=self.horizon)
        if not fmap.positional:
            return self._mapped(tokens, v, tensors, past, with_state)
        seen_q, seen_k = (self._count(x, keep, None if past is None else past[-1]) for x in (q, k))
        tokens = replace(tokens, position=((seen_q - 1).clamp(min=0), (seen_k - 1).clamp(min=0)))
        results = self._mapped(tokens, v, tensors, None if past is None else past[:-1], with_state)
        return (*results, seen_k[:, -1])

    def _mapped(
        self, tokens: Tokens, v: Tensor, tensors: Mapping[str, Tensor], past: Past | None, with_state: bool
    ) -> tuple[Tensor, ...]:
        """Linear attention with a feature map: hybrid, linear or unnormed."""
        fmap, q, keep = MAPS[self.feature_map], tokens.q, tokens.keep
        maps = fmap.features(tokens, tensors)
        decay = tensors["log_decay"] if self.gate == "fixed" else None
        if self.window:
            weights = (tensors["window_gate"], tensors["map_scale"], decay)
            return self._windowed((q, tokens.k, v), maps, weights, keep, past, with_state)
        out, *left = self._linear(*maps, v, decay, keep, past, "sum" if fmap.positive else "none")
        if not fmap.positive:
            out = output_norm(out) * tensors["output_gain"].to(out.dtype).reshape(1, -1, 1, 1)
        return (out.to(q.dtype), *left)

    def _count(self, x: Tensor, keep: Tensor | None, seen: Tensor | None) -> Tensor:
        """int64 ``[B, T]``: tokens of x up to each, itself too; real ones alone where causal, on from ``seen [B]``."""
        # Summed, not counted from a size: sizes are no values of a graph that serves every length.
        ones = torch.ones_like(x.select(1, 0).select(-1, 0), dtype=torch.int64)
        if self.causal and keep is not None:
            ones = ones * keep
        count = ones.cumsum(-1)
        return count if seen is None else count + seen.unsqueeze(-1)

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
            unit_q, unit_k = F.normalize(widened(q), dim=-1), F.normalize(widened(k), dim=-1)
            beta = torch.zeros_like(unit_k[..., 0]) + tensors["beta"].to(unit_k.dtype).sigmoid().unsqueeze(-1)
            decay = tensors["log_decay"] if self.gate == "fixed" else None
            state = None if memory is None else memory[0]
            recurrent, *left = op.delta_attention(unit_q, unit_k, v, beta, decay, keep, state, 1.0, CHUNK)
        else:
            gates = F.logsigmoid(widened(plain[1])) * _GATE_POWER
            soft_q, soft_k = widened(plain[0]).softmax(-1), widened(plain[1]).softmax(-1)
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
