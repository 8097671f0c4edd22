# SPDX-License-Identifier: Apache-2.0
"""y = x Wᵀ + b  →  E_e(x) (x),  e = argmax router(x),  E_multiply(x) = x Wᵀ + b,  E_shift(x) = x Ŵᵀ + b

ShiftAddViT's mixture of experts {multiply, shift}: tokens that need precision are multiplied, the others are shifted (You et
al. 2023). Both experts come from the one pretrained weight, so whatever the router says the result is that of the
layer, exactly or up to the shift expert's error. It saves arithmetic on hardware that shifts; both weights are stored.

The router starts where the shift expert errs least: a ridge regression of its log relative error on x, cut at the share
of tokens to be shifted. Without calibration every token is multiplied. The published layer multiplies the result by
the router's probability; here the forward value is the chosen expert's and the router learns by the straight-through
term p·(E_shift(x) − E_multiply(x)), so that rewriting alone does not scale outputs by p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.errors import PlanError
from rewriter.matcher import Match
from rewriter.passes.shift_add import ShiftAdd, energy
from rewriter.passes.shift_add.modules import ShiftAddLinear
from rewriter.passes.shift_add.rules import LinearRule, as_rows
from rewriter.registry import register
from rewriter.rules import LEARNED, Contract, Pass, Rule, Site

aten = torch.ops.aten
MULTIPLY, SHIFT = 0, 1  # rows of the router; a tie multiplies
_RIDGE = 1e-2  # of the mean variance of the inputs
_RECIPE = "training with `balance_loss` beside the task's (ShiftAddViT: 100 epochs at 1e-5)"


class ExpertsRule(LinearRule):
    """A linear layer becomes two, and a router."""

    name: ClassVar[str] = "shift_experts.linear"
    contract: ClassVar[Contract] = LEARNED(_RECIPE)

    def __init__(self, options: ShiftExperts) -> None:
        super().__init__(ShiftAdd(mode="pot", bits=options.bits, group=options.group))
        self.share = options.share

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {"sample": match["x"]}

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return ("weight", *super().roles(match, choice), "router_weight", "router_bias")

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weight = as_rows(site.match, read)
        made = super().initialise(site, read, choice, statistics, generator)
        shifted = self.layout(choice).codes(made).decode().to(weight.dtype)
        sample = statistics.get("sample", site.paths) if statistics is not None else None
        router, offset = route(weight.detach(), shifted, sample, self.share)
        trained = weight.requires_grad
        kept = nn.Parameter(weight.detach().contiguous(), requires_grad=trained)
        added = {"router_weight": router, "router_bias": offset}
        return {"weight": kept, **made} | {r: nn.Parameter(t, requires_grad=trained) for r, t in added.items()}

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        p, x, bias = parameters, match["x"], match["bias"]
        operator, arguments = self.layout(choice).linear(x, p, bias)
        multiplied, shifted = edit.call(aten.linear.default, x, p["weight"], bias), edit.call(operator, *arguments)
        scores = edit.call(aten.linear.default, x, p["router_weight"], p["router_bias"])
        each = [edit.call(aten.slice.Tensor, scores, -1, i, i + 1) for i in (MULTIPLY, SHIFT)]
        chosen = edit.call(aten.where.self, edit.call(aten.gt.Tensor, each[SHIFT], each[MULTIPLY]), shifted, multiplied)
        # Straight through: p − p.detach() is 0, its gradient is what shifting instead of multiplying changes.
        probability = edit.call(aten.slice.Tensor, edit.call(aten.softmax.int, scores, -1), -1, SHIFT, SHIFT + 1)
        learns = edit.call(aten.sub.Tensor, probability, edit.call(aten.detach.default, probability))
        change = edit.call(aten.detach.default, edit.call(aten.sub.Tensor, shifted, multiplied))
        return {match.root: edit.call(aten.add.Tensor, chosen, edit.call(aten.mul.Tensor, learns, change))}

    def measure(
        self,
        site: Site,
        before: Callable[[str], Tensor],
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        """Those of the shift expert, and with calibration the share of tokens that take it and the error of all."""
        weight = as_rows(site.match, before)
        figures = super().measure(site, before, after, choice, statistics)
        sample = statistics.get("sample", site.paths) if statistics is not None else None
        share = 0.0
        if sample is not None:
            x, router = sample.to(weight.dtype), after["router_weight"].detach()
            shifts = _shifts(F.linear(x, router, after["router_bias"].detach()))
            share = float(shifts.float().mean())
            change = F.linear(x, self.layout(choice).codes(after).decode().to(weight.dtype) - weight.detach())
            figures["output_error"] = float((change * shifts).norm() / F.linear(x, weight.detach()).norm())
        figures["shifted"] = share
        routing = 2 * weight.shape[1] * (energy.MULTIPLY + energy.ADD)
        for name in ("pj_arithmetic", "pj_weights"):  # a token reads and uses its expert alone
            figures[name] = share * figures[name] + (1 - share) * figures[f"{name}_dense"]
        figures["pj_arithmetic"] += routing
        figures["pj_weights"] += 2 * weight.shape[1] * energy.DENSE_BITS * energy.DRAM_PER_BIT
        return figures

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        shift = ShiftAddLinear(self._codes(tensors, choice), tensors.get("bias"))
        return ShiftExpertsLinear(tensors["weight"], shift, tensors["router_weight"], tensors["router_bias"])


class ShiftExpertsLinear(nn.Module):
    """The two experts and their router as a module, ``[..., in] -> [..., out]``.

    Args:
        weight: of the multiplying expert ``[out, in]``.
        shift: the shifting expert, with the bias both share.
        router_weight, router_bias: ``[2, in]`` and ``[2]``, rows multiply and shift.
    """

    def __init__(self, weight: Tensor, shift: ShiftAddLinear, router_weight: Tensor, router_bias: Tensor) -> None:
        super().__init__()
        self.weight, self.router_weight, self.router_bias = (
            t if isinstance(t, nn.Parameter) else nn.Parameter(t) for t in (weight, router_weight, router_bias)
        )
        self.shift = shift

    def probabilities(self, x: Tensor) -> Tensor:
        """The router's, ``[..., 2]``: what `balance_loss` takes."""
        return F.linear(x, self.router_weight, self.router_bias).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.router_weight, self.router_bias)
        multiplied, shifted = F.linear(x, self.weight, self.shift.bias), self.shift(x)
        probability = scores.softmax(-1)[..., SHIFT:]
        chosen = torch.where(_shifts(scores), shifted, multiplied)
        return chosen + (probability - probability.detach()) * (shifted - multiplied).detach()


def _shifts(scores: Tensor) -> Tensor:
    return scores[..., SHIFT:] > scores[..., MULTIPLY : MULTIPLY + 1]


def route(weight: Tensor, shifted: Tensor, sample: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """A router ``[2, in]``, ``[2]`` that shifts the ``share`` of tokens whose outputs suffer least from it.

    With r(x) = log(‖(Ŵ − W) x‖² / ‖W x‖²), the score of multiplying is the ridge regression of r on x, less its
    ``share`` quantile; that of shifting is 0.

    Args:
        weight, shifted: W and Ŵ ``[out, in]``.
        sample: inputs ``[n, in]``, or None: then all tokens are multiplied.
        share: of tokens to shift, 0 to 1.
    """
    router, offset = weight.new_zeros((2, weight.shape[1])), weight.new_zeros(2)
    if sample is None:
        offset[MULTIPLY] = 1.0
        return router, offset
    x, wide = sample.double(), weight.double()
    tiny = torch.finfo(torch.float32).tiny
    lost = F.linear(x, shifted.double() - wide).square().sum(-1)
    ratio = (lost.clamp_min(tiny) / F.linear(x, wide).square().sum(-1).clamp_min(tiny)).log()
    centre, mean = x.mean(0), ratio.mean()
    centred = x - centre
    moment = centred.T @ centred / len(x)
    ridge = _RIDGE * moment.diagonal().mean().clamp_min(tiny) * torch.eye(x.shape[1], dtype=torch.float64)
    direction = torch.linalg.solve(moment + ridge, centred.T @ (ratio - mean) / len(x))
    predicted = x @ direction
    router[MULTIPLY] = direction.to(weight.dtype)
    offset[MULTIPLY] = -torch.quantile(predicted, share).to(weight.dtype)
    return router, offset


def balance_loss(probabilities: Tensor, latency: Tensor) -> Tensor:
    """Squared coefficient of variation of latency · load over experts: least where faster experts get more tokens.

    Args:
        probabilities: of the router, ``[..., experts]``.
        latency: time an expert takes per token, ``[experts]``, any unit.

    Returns:
        A scalar, 0 where every expert's load is inversely proportional to its latency (ShiftAddViT, section 4.3).
    """
    time = probabilities.flatten(0, -2).sum(0) * latency
    return time.var(correction=0) / time.mean().square()


@register
@dataclass(frozen=True)
class ShiftExperts(Pass):
    """Linear layers as a mixture of a multiplying and a shifting expert with a router (ShiftAddViT); for training.

    Attributes:
        bits: of the shifting expert's signed powers of two; ShiftAddViT takes 5.
        group: weights per scale.
        share: of tokens that are shifted to begin with, chosen on calibration data; 0 to 1.
    """

    name: ClassVar[str] = "shift_experts"
    contract: ClassVar[Contract] = LEARNED(_RECIPE)
    bits: int = 5
    group: int = 128
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise PlanError(f"shift_experts: share={self.share} must be 0 to 1 (of the tokens)")
        ShiftAdd(mode="pot", bits=self.bits, group=self.group)  # refuses what it cannot use

    def rules(self) -> tuple[Rule, ...]:
        return (ExpertsRule(self),)
