# SPDX-License-Identifier: Apache-2.0
"""y = x Wᵀ + b  ≈  x Ŵᵀ + b with Ŵ made of shifts and adds (`rewriter.passes.shift_add.modes`);  and Ŵ[ids]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.errors import PlanError
from rewriter.matcher import Match, Miss
from rewriter.passes.shift_add import calibrated, energy, measures, modules
from rewriter.passes.shift_add.codes import AnyCodes
from rewriter.passes.shift_add.layout import Layout
from rewriter.passes.shift_add.modes import Mode
from rewriter.program import Program
from rewriter.rules import CALIBRATED, Contract, Rule, Site, module_path
from rewriter.views import EMBEDDING, LINEAR, View, router

if TYPE_CHECKING:
    from rewriter.passes.shift_add import ShiftAdd


class ShiftAddRule(Rule):
    """What linear layers, embeddings and pointwise convolutions share: how a weight becomes codes."""

    contract: ClassVar[Contract] = CALIBRATED("closed form from the weights")
    parametric: ClassVar[bool] = True
    view: ClassVar[View]
    metric: ClassVar[str] = ""  # kind of statistics that says what errors of the weight's rows cost
    inputs: ClassVar[str] = ""  # kind of statistics that is E[x xᵀ] of what the weight multiplies

    def __init__(self, options: ShiftAdd) -> None:
        self.options = options

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        return self.view.find(program), [m for m in self.view.explain(program) if m.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        if router.is_router(program.facts, match):
            return router.MISS
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def prefix(self, match: Match) -> str:
        """The module's path; for a weight not called "weight", its own name, so that two of one module stay apart."""
        owner, _, leaf = str(match["weight"].target).rpartition(".")
        return module_path(match.root) if leaf == "weight" else f"{owner}.{leaf}" if owner else leaf

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        return (str(match["weight"].target),)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        rows, columns = (int(s) for s in site.match["weight"].meta["val"].shape[:2])
        width = rows if site.match.captures.get("transposed") else columns
        return {"in_features": width} | calibrated.settle(self.options, self.metric, site, statistics)

    def mode(self, choice: Mapping[str, Any]) -> Mode:
        """How this site's weight is spelled."""
        return self.options.spelling(choice.get("bits"))

    def layout(self, choice: Mapping[str, Any]) -> Layout:
        """How this site's weight is stored."""
        return Layout.planned(self.mode(choice), self.options.group, choice["in_features"])

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return (*self.layout(choice).roles, *([calibrated.INPUT_SCALE] if choice.get("scaled") else []))

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weight = as_rows(site.match, read)
        mode = self.mode(choice)
        made = dict(calibrated.fit(self.options, mode, self.metric, site, weight.detach(), choice, statistics))
        made["weight_scale"] = nn.Parameter(made["weight_scale"], requires_grad=weight.requires_grad)
        return made

    def measure(
        self,
        site: Site,
        before: Callable[[str], Tensor],
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        """Relative errors of the weight and (with calibration) of the outputs, stored bits per weight, energy."""
        weight = as_rows(site.match, before)
        moment = statistics.get(self.inputs, site.paths) if statistics is not None and self.inputs else None
        layout = self.layout(choice)
        codes = layout.codes(after)
        scale = after.get(calibrated.INPUT_SCALE)
        figures = measures.errors(weight, codes if scale is None else calibrated.Scaled(codes, scale), moment)
        stored = (after[role] for role in self.roles(site.match, choice))
        bits = measures.bits_per_weight(*stored, weights=weight.numel())
        return figures | {"bits": bits} | self.energy(weight, choice, bits)

    def energy(self, weight: Tensor, choice: Mapping[str, Any], bits: float) -> dict[str, float]:
        """Energy per token, see `rewriter.passes.shift_add.energy`."""
        return energy.linear(self.mode(choice), weight.shape[0], weight.shape[1], self.options.group, bits)


class LinearRule(ShiftAddRule):
    name: ClassVar[str] = "shift_add.linear"
    role: ClassVar[str] = "linear"
    view: ClassVar[View] = LINEAR
    metric: ClassVar[str] = "second_moment"
    inputs: ClassVar[str] = "second_moment"

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        x = match["x"]
        if choice.get("scaled"):
            x = edit.call(torch.ops.aten.mul.Tensor, x, parameters[calibrated.INPUT_SCALE])
        operator, arguments = self.layout(choice).linear(x, parameters, match["bias"])
        return {match.root: edit.call(operator, *arguments)}

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {"second_moment": match["x"]}

    def settle_all(
        self,
        sites: Sequence[Site],
        choices: Sequence[dict[str, Any]],
        program: Program,
        statistics: Statistics | None,
    ) -> Sequence[dict[str, Any]]:
        """Share out ``mean_bits``."""
        mean = self.options.mean_bits
        if mean is None:
            return choices
        weights = [(site, as_rows(site.match, program.tensor)) for site in sites]
        if merged := [site for site, weight in weights if isinstance(weight, FakeTensor)]:
            raise PlanError(
                f"{self.name} at {merged[0].address.path}: mean_bits={mean:g} compares the layers' weights while planning, and "
                "this one is only being made by an exact pass of the same plan; leave that pass out, or give bits"
            )
        bits = calibrated.share_bits(self.options, mean, self.metric, weights, statistics)
        return [{**choice, "bits": b} for choice, b in zip(choices, bits, strict=True)]

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        scale = tensors.get(calibrated.INPUT_SCALE)
        return modules.ShiftAddLinear(self._codes(tensors, choice), tensors.get("bias"), scale)

    def _codes(self, tensors: Mapping[str, Tensor], choice: Mapping[str, Any]) -> AnyCodes:
        return self.layout(choice).codes(tensors)


class EmbeddingRule(ShiftAddRule):
    name: ClassVar[str] = "shift_add.embedding"
    role: ClassVar[str] = "embedding"
    view: ClassVar[View] = EMBEDDING
    metric: ClassVar[str] = "gradient_moment"

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {} if self.options.compensate is False else {"gradient_moment": match.root}

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        operator, arguments = self.layout(choice).embedding(match["ids"], parameters)
        return {match.root: edit.call(operator, *arguments)}

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        return modules.ShiftAddEmbedding(self.layout(choice).codes(tensors))

    def energy(self, weight: Tensor, choice: Mapping[str, Any], bits: float) -> dict[str, float]:
        return energy.lookup(weight.shape[1], bits)


def as_rows(match: Match, read: Callable[[str], Tensor]) -> Tensor:
    """The weight as [out, in]; transformers' Conv1D stores it the other way round, a convolution with its kernel."""
    weight = read(str(match["weight"].target))
    return weight.t() if match.captures.get("transposed") else weight.flatten(1)
