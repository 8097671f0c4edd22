# SPDX-License-Identifier: Apache-2.0
"""softmax(scale · q kᵀ) v  →  gain · normalise(½ v + 1/π · b(q) b(k)ᵀ v) + conv(v),   b(x) = 1[x > mean x]

ShiftAddViT's attention by additions (You et al. 2023; `rewriter.kernels.shift_attention`). It keeps which direction a
query looks in, one bit a dimension, and drops how sharply: it does not approximate a softmax and needs fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.errors import PlanError
from rewriter.facts import same_size
from rewriter.kernels.shift_attention.op import additive_attention
from rewriter.masks import MaskKind, classify
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.registry import register
from rewriter.rules import LEARNED, Contract, Pass, Rule, Site
from rewriter.views import ATTENTION

aten = torch.ops.aten
_RECIPE = "fine-tuning of the whole model (ShiftAddViT: 100 epochs at 5e-5)"


class AdditiveAttention(Rule):
    """Self-attention that looks both ways, over everything or everything but padding.

    Dropout of attention weights ends with the weights: a model in training mode draws no numbers there any more.
    """

    name: ClassVar[str] = "shift_attention.attention"
    role: ClassVar[str] = "attention"
    contract: ClassVar[Contract] = LEARNED(_RECIPE)
    parametric: ClassVar[bool] = True
    specificity: ClassVar[int] = 1

    def __init__(self, options: ShiftAttention) -> None:
        self.options = options

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return ATTENTION.find(program), [m for m in ATTENTION.explain(program) if m.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        if match["is_causal"]:
            return "it is causal: the sums of additive attention run over all tokens"
        if match["softcap"] is not None or match["bias"] is not None:
            return "its scores are changed between product and softmax, and additive attention has none"
        shapes = [program.facts.shape(match[name]) for name in "qkv"]
        if any(shape is None or len(shape) != 4 for shape in shapes):
            return "q, k and v are not [batch, heads, tokens, head dim]"
        q, k, v = (shape or () for shape in shapes)
        if not (same_size(q[2], k[2]) and same_size(q[1], k[1]) and same_size(q[2], v[2])):
            return "queries and keys are not the same tokens: ½ v of a token is its own"
        if (kind := _mask_kind(program, match)).kind not in ("full", "padding"):
            return f"the mask is {kind}"
        reason = legality.refusal(program.facts, match, besides=("random",))  # dropped weights: there will be none
        return None if reason is None else str(reason)

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {"second_moment": match.root}

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        heads = program.facts.shape(site.match["q"])
        return {"heads": int(heads[1]) if heads is not None else 0}

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return ("gain", "conv") if self.options.taps else ("gain",)

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Outputs as large as the softmax's were: gain² = E‖o‖² over tokens and heads; no convolution yet."""
        moment = statistics.get("second_moment", site.paths) if statistics is not None else None
        gain = 1.0 if moment is None else float(moment.trace().sqrt())
        dtype = site.match.root.meta["val"].dtype
        made = {"gain": torch.full((choice["heads"],), gain, dtype=dtype)}
        if self.options.taps:
            made["conv"] = torch.zeros((choice["heads"], self.options.taps), dtype=dtype)
        return {role: nn.Parameter(tensor) for role, tensor in made.items()}

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        padding = _mask_kind(edit.program, match).padding
        keep = None if padding is None else edit.call(aten.ne.Scalar, padding, 0)
        gain, conv = parameters["gain"], parameters.get("conv")
        return {match.root: edit.call(additive_attention, match["q"], match["k"], match["v"], keep, gain, conv)}


def _mask_kind(program: Program, match: Match) -> MaskKind:
    if match["mask"] is None:
        return MaskKind("full")
    return classify(program.facts, match["mask"], match["mask_form"], at=match.root)


@register
@dataclass(frozen=True)
class ShiftAttention(Pass):
    """Attention with binary queries and keys, whose products are additions (ShiftAddViT); needs fine-tuning.

    Attributes:
        taps: tokens a depthwise convolution of the values spans, added to the result as in ShiftAddViT; odd. It starts
            at zero. 0: none.
    """

    name: ClassVar[str] = "shift_attention"
    contract: ClassVar[Contract] = LEARNED(_RECIPE)
    taps: int = 9

    def __post_init__(self) -> None:
        if not isinstance(self.taps, int) or self.taps < 0 or (self.taps and self.taps % 2 == 0):
            raise PlanError(
                f"shift_attention: taps={self.taps!r} must be 0 (no convolution) or an odd number of tokens"
            )

    def rules(self) -> tuple[Rule, ...]:
        return (AdditiveAttention(self),)
