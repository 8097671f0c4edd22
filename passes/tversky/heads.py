# SPDX-License-Identifier: Apache-2.0
"""A head behind a norm as one Tversky pass with all features shared: exact because its inputs are bounded.

Behind an RMSNorm or LayerNorm |x_k| ≤ √d |γ_k| + |β_k|. With a constant coordinate more, x̃ = [x; 1], π̃ = [w; c], and
features f_k = e_k + R_k e_const, R_k ≥ |x_k| and c R_k ≥ |w_k|, every input and every prototype has every feature. Then

    S(x̃, π̃) = Σ_k (x_k + R_k)(w_k + c R_k) = x·w + c Σ R_k x_k + Σ R_k w_k + c Σ R_k²

and what is too much is the similarity to the neutral prototype π̃₀ = [0; c] and that of the neutral input x̃₀ = [0; 1]:

    y = S(x̃, π̃) − S(x̃, π̃₀) − S(x̃₀, π̃) + S(x̃₀, π̃₀) = x·w

A softmax would not see the second term, which every prototype has; subtracted, the logits are right for any reader.
Nothing distinctive is left at the start, so α and β may be anything: they start at 1/2, as the authors' do. Terms of the
size c Σ R_k² cancel, so the head is computed in float64 (float32 would lose up to a tenth of a logit in a large model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.facts import Facts
from rewriter.kernels.tversky.op import tversky
from rewriter.matcher import Match, Miss
from rewriter.passes.fold.linears import works_on_rows
from rewriter.passes.tversky.fits import Fit, scalar
from rewriter.passes.tversky.rules import SAVES_NOTHING, TverskyRule
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Site
from rewriter.views import HEAD, LAYER_NORM, RMS_NORM
from rewriter.views.linear import features as sizes

aten = torch.ops.aten

_MARGIN = 1.02  # of the bounds, for the rounding of a norm's output in half precision
_NAMES = ("product", "paper", "ignorematch", "contrast", False, False)


class BoundedHeadRule(TverskyRule):
    """y = S(x̃, Π̃) centred on the neutral input and the neutral prototype."""

    name: ClassVar[str] = "tversky.bounded_head"
    role: ClassVar[str] = "head"
    contract: ClassVar[Contract] = EXACT
    specificity: ClassVar[int] = 1
    terms: ClassVar[tuple[str, ...]] = ("features", "prototypes", "theta", "alpha", "beta", "neutral")

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return HEAD.find(program), [m for m in HEAD.explain(program) if m.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        if norm_before(program.facts, match["x"]) is None:
            return "its input comes from no RMSNorm or LayerNorm, so that nothing bounds it"
        return super().refusal(program, match)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        norm = norm_before(program.facts, site.match["x"])
        assert norm is not None  # noqa: S101 - refusal has seen to it
        named = {k: _stored(norm, k) for k in ("weight", "bias")}
        common = super().settle(site, program, statistics, generator)
        known = {"norm": named, "unit_offset": bool(norm.captures.get("unit_offset")), "saves": SAVES_NOTHING}
        return common | {"out_features": sizes(program.facts, site.match)[1]} | known

    def fit(
        self,
        weight: Tensor,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> Fit:
        named = choice["norm"]
        gamma = None if named["weight"] is None else read(named["weight"]).detach()
        shift = None if named["bias"] is None else read(named["bias"]).detach()
        return bounded(weight, gamma, shift, choice["unit_offset"])

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        p, outputs = parameters, choice["out_features"]
        dtype = match.root.meta["val"].dtype
        weights = (p["theta"], p["alpha"], p["beta"], None)
        wide = edit.call(aten.to.dtype, match["x"], torch.float64)
        one = edit.call(aten.ones_like.default, edit.call(aten.slice.Tensor, wide, -1, 0, 1))
        x = edit.call(aten.cat.default, [wide, one], -1)  # constant_pad_nd would fix the sizes it was traced with
        neutral_x = edit.call(aten.to.dtype, edit.call(aten.select.int, p["neutral"], 0, 0), torch.float64)
        neutral_p = edit.call(aten.slice.Tensor, p["neutral"], 0, 1, 2)
        all_p = edit.call(aten.cat.default, [p["prototypes"], neutral_p])
        offset = edit.call(aten.neg.default, edit.call(tversky, neutral_x, p["features"], all_p, *weights, None, *_NAMES))
        y = edit.call(tversky, x, p["features"], all_p, *weights, offset, *_NAMES)
        kept = edit.call(aten.slice.Tensor, y, -1, 0, outputs)
        y = edit.call(aten.sub.Tensor, kept, edit.call(aten.slice.Tensor, y, -1, outputs, outputs + 1))
        if match["bias"] is not None:
            y = edit.call(aten.add.Tensor, y, match["bias"])
        return {match.root: edit.call(aten.to.dtype, y, dtype)}

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        return BoundedHead(tensors)


class BoundedHead(nn.Module):
    """The centred projection as a module: logits ``[..., P]`` of bounded inputs ``[..., d]``, computed in float64.

    Args:
        tensors: ``features`` ``[d, d + 1]``, ``prototypes`` ``[P, d + 1]``, ``theta``, ``alpha``, ``beta`` ``[]``,
            ``neutral`` ``[2, d + 1]`` (an input, a prototype), and maybe ``bias`` ``[P]``.
    """

    features: nn.Parameter
    prototypes: nn.Parameter
    theta: nn.Parameter
    alpha: nn.Parameter
    beta: nn.Parameter
    bias: nn.Parameter | None
    neutral: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("features", "prototypes", "theta", "alpha", "beta", "bias"):
            tensor = tensors.get(name)
            parameter = tensor if isinstance(tensor, nn.Parameter) or tensor is None else nn.Parameter(tensor)
            self.register_parameter(name, parameter)
        self.register_buffer("neutral", tensors["neutral"])

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.theta, self.alpha, self.beta, None)
        everyone = torch.cat((self.prototypes, self.neutral[1:]))
        offset: Tensor = -tversky(self.neutral[0].double(), self.features, everyone, *weights, None, *_NAMES)
        wide = torch.cat((x.double(), x.new_ones((*x.shape[:-1], 1), dtype=torch.float64)), -1)
        y: Tensor = tversky(wide, self.features, everyone, *weights, offset, *_NAMES)
        y = y[..., :-1] - y[..., -1:]
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def bounded(weight: Tensor, gamma: Tensor | None, shift: Tensor | None, unit_offset: bool) -> Fit:
    """Features ``[d, d + 1]`` and prototypes ``[P, d + 1]`` of a head whose inputs a norm bounds.

    Args:
        weight: ``[P, d]``.
        gamma, shift: the norm's weight and bias ``[d]``, or None.
        unit_offset: the norm multiplies by 1 + gamma.
    """
    width = weight.shape[1]
    factor = torch.ones_like(weight[0], dtype=torch.float64) if gamma is None else gamma.double()
    bound = math.sqrt(width) * (factor + 1.0 if unit_offset else factor).abs()
    bound = bound if shift is None else bound + shift.double().abs()
    # Powers of two survive a cast to any dtype. A dead input's R must not be so small that c has to be huge.
    radius = _power_of_two(bound.clamp_min(bound.amax() / 16).clamp_min(2.0**-6))
    constant = _power_of_two((weight.double().abs().amax(0) / radius).amax().clamp_min(2.0**-20))
    features = torch.cat((torch.eye(width, dtype=weight.dtype, device=weight.device), radius.to(weight).unsqueeze(1)), 1)
    column, one, half = constant.to(weight).expand(weight.shape[0], 1), scalar(1.0, weight), scalar(0.5, weight)
    neutral = torch.stack((one, constant.to(weight))).unsqueeze(1)
    return Fit(
        features=features, prototypes=torch.cat((weight, column), 1), theta=one, alpha=half, beta=half.clone(),
        neutral=torch.cat((weight.new_zeros(2, width), neutral), 1),
    )  # fmt: skip


def _power_of_two(bound: Tensor) -> Tensor:
    """The next power of two above a bound and its margin."""
    return torch.exp2((bound * _MARGIN).log2().ceil())


def norm_before(facts: Facts, x: Node) -> Match | None:
    """The norm whose output x is, perhaps with other rows chosen or arranged."""
    norms = {match.root: match for view in (RMS_NORM, LAYER_NORM) for match in view.find(facts)}
    while x not in norms:
        if not x.all_input_nodes or not works_on_rows(facts, x, x.all_input_nodes[0]):
            return None
        x = x.all_input_nodes[0]
    found = norms[x]
    stored = all(isinstance(_stored(found, k), str) or found.captures.get(k) is None for k in ("weight", "bias"))
    return found if stored else None


def _stored(norm: Match, name: str) -> str | None:
    """The name of a norm's tensor, if it has one and it is stored."""
    node = norm.captures.get(name)
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None
