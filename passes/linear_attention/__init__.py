# SPDX-License-Identifier: Apache-2.0
"""Linear attention: softmax stays in a window, everything before it is a state of constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.errors import PlanError
from rewriter.passes.linear_attention.maps import MAPS
from rewriter.passes.linear_attention.rules import LinearAttentionRule, UntrainedRule
from rewriter.registry import nearest, register
from rewriter.rules import CALIBRATED, Contract, Pass, Rule

_BLOCKS = ("sliding", "terrace")
_ANCHORS = ("none", "max")
_GATES = (None, "fixed", "key")
_RULES = ("additive", "delta")
_KEEP = ("position", "sensitivity")


@register
@dataclass(frozen=True)
class LinearAttention(Pass):
    """Softmax attention becomes linear attention, with softmax kept in a window before each query.

    Attributes:
        feature_map: φ of the linear branch: ``"landmark"`` (typical queries, placed by calibration), ``"elu"``,
            ``"relu"``, ``"squared_relu"``, ``"softmax"``, ``"hedgehog"`` (LoLCATs), ``"hedgehog_fla"``,
            ``"hedgehog_exp"``, ``"t2r"``, ``"favor"`` (Performer), ``"nala"`` (NaLaFormer), ``"slab"``, ``"cosformer"``,
            ``"identity"`` (TransNormer: a norm of the output, no window), ``"rala"`` (bidirectional attention only);
            formulas and papers are in `rewriter.kernels.linear_attention.feature_maps`.
        horizon: for ``"cosformer"`` and ``"slab"``, whose maps depend on positions: tokens of the longest sequence the
            model will see. Positions beyond it count as the last.
        features: landmarks per key head; default 2 · head dim, Hedgehog's size.
        window: keys before each query that stay softmax, the query's own among them; None for none. Bidirectional
            attention (full and padding masks, cross-attention) never has one.
        block: ``"sliding"``: exactly the last `window` keys; ``"terrace"``: the own block of `window` positions and
            the one before (LoLCATs).
        sinks: the first keys of a sequence stay softmax for every query.
        gate: None; ``"fixed"``: the linear branch decays by e^λ per step, λ ≤ 0 per head (RetNet, Lightning); ``"key"``:
            per feature and step, by gates taken from the keys without new weights, half and half with the window's
            softmax (Liger).
        rule: ``"additive"``, or ``"delta"``: each step corrects what the state holds for its key (DeltaNet; with
            ``gate="fixed"`` the gated delta rule), half and half with the window's softmax.
        anchor: what the linear terms are measured against. ``"none"``: φ_q·φ_k stands for e^s itself, and both branches
            share one scale; ``"max"``: relative to the window's largest exponential (LoLCATs).
        calibrate: fit maps, scales and decays to calibration data, per head in closed form; sites are kept where
            there is none. False: start from identity maps, to be trained (the contract is then LEARNED).
        keep_softmax_every: one in so many attentions stays softmax; None for none.
        keep: which ones: by ``"position"`` (the last of every run), or by ``"sensitivity"``: those with the largest
            output error on the calibration data.
        min_length: sites whose sequences are shorter stay softmax: ``"auto"`` asks the cost model from which length on
            the rewrite pays on the model's device, a number says it, None rewrites always. The length is that of the
            calibration sequences or the example call, whichever is longer.
    """

    name: ClassVar[str] = "linear_attention"
    contract: ClassVar[Contract] = CALIBRATED("per head in closed form from calibration sequences")
    feature_map: str = "landmark"
    features: int | None = None
    window: int | None = 64
    block: str = "sliding"
    sinks: int = 0
    gate: str | None = None
    rule: str = "additive"
    anchor: str = "none"
    calibrate: bool = True
    keep_softmax_every: int | None = None
    keep: str = "position"
    min_length: int | str | None = "auto"
    horizon: int | None = None

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("feature_map", self.feature_map, tuple(MAPS)),
            ("block", self.block, _BLOCKS),
            ("gate", self.gate, _GATES),
            ("rule", self.rule, _RULES),
            ("anchor", self.anchor, _ANCHORS),
            ("keep", self.keep, _KEEP),
        ):
            if value not in allowed:
                raise PlanError(
                    f"linear_attention: unknown {option} {value!r}{nearest(str(value), [str(a) for a in allowed])}; "
                    f"one of {', '.join(map(repr, allowed))}"
                )
        self._check_window()
        self._check_mixture()
        self._check_map()
        if self.features is not None and (self.features < 1 or self.feature_map != "landmark"):
            raise PlanError(
                "linear_attention: features= counts landmarks, at least 1; other maps have a size of their own"
            )
        if not self._is_mixture and not self.calibrate and MAPS[self.feature_map].calibrated:
            raise PlanError(
                f"linear_attention: the map {self.feature_map!r} is placed from data; calibrate=False needs another one"
            )
        if not self.calibrate and self.keep == "sensitivity" and self.keep_softmax_every is not None:
            raise PlanError("linear_attention: keep='sensitivity' measures calibration error; it needs calibrate=True")
        if self.keep_softmax_every is not None and self.keep_softmax_every < 2:
            raise PlanError(f"linear_attention: keep_softmax_every={self.keep_softmax_every} must be at least 2")
        if not (self.min_length in (None, "auto") or (isinstance(self.min_length, int) and self.min_length >= 0)):
            raise PlanError(f"linear_attention: min_length={self.min_length!r} must be a length, 'auto' or None")

    @property
    def _is_mixture(self) -> bool:
        return self.gate == "key" or self.rule == "delta"

    def _check_window(self) -> None:
        if self.window is not None and self.window < 1:
            raise PlanError(f"linear_attention: window={self.window} must be at least 1 key, or None for no window")
        if self.window is None and (self.sinks or self.block != "sliding" or self.anchor != "none"):
            raise PlanError("linear_attention: sinks, block and anchor are options of the window, and there is none")
        if self.sinks < 0:
            raise PlanError(f"linear_attention: sinks={self.sinks} must be at least 0")

    def _check_mixture(self) -> None:
        if self.gate == "key" and self.rule == "delta":
            raise PlanError("linear_attention: gates of the keys belong to the additive rule; delta takes gate='fixed'")
        if self._is_mixture and self.calibrate:
            raise PlanError(
                "linear_attention: key gates and the delta rule have no closed form and start untrained; say so with "
                "calibrate=False"
            )
        if self._is_mixture and (self.anchor != "none" or self.feature_map != "landmark"):
            raise PlanError(
                "linear_attention: key gates and the delta rule have no feature map and no anchor to choose"
            )

    def _check_map(self) -> None:
        chosen, name = MAPS[self.feature_map], self.feature_map
        if chosen.positional and (self.horizon is None or self.horizon < 1):
            raise PlanError(f"linear_attention: the map {name!r} needs horizon=, the tokens of the longest sequence")
        if not chosen.positional and self.horizon is not None:
            raise PlanError(f"linear_attention: horizon= is of maps with positions, and {name!r} has none")
        if not chosen.positive and self.window is not None:
            raise PlanError(
                f"linear_attention: the weights of the map {name!r} may be negative, so that it has no normaliser to share "
                "with a window; give window=None"
            )
        if not chosen.causal and (self.gate or self.sinks or self.block != "sliding" or self.anchor != "none"):
            raise PlanError(
                f"linear_attention: the map {name!r} is of bidirectional attention, which has neither gate, sinks, block "
                "nor anchor to choose"
            )

    def rules(self) -> tuple[Rule, ...]:
        return (LinearAttentionRule(self) if self.calibrate else UntrainedRule(self),)
