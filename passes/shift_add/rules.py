# SPDX-License-Identifier: Apache-2.0
"""y = x Wᵀ + b  ≈  x (Σ_b 2^-k_b · s · c_b)ᵀ + b,  c_b ∈ {-1, +1};  and the same for W[ids]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.kernels.shift_add import op as operators
from rewriter.matcher import Match, Miss
from rewriter.passes.shift_add import bcq, measures, modules, pot
from rewriter.program import Program
from rewriter.rules import CALIBRATED, Contract, Rule, Site, module_path
from rewriter.views import EMBEDDING, LINEAR, View, router

if TYPE_CHECKING:
    from rewriter.passes.shift_add import ShiftAdd

Codes = bcq.BCQCodes | pot.PotCodes


class _ShiftAddRule(Rule):
    """What the linear and the embedding share: how a weight becomes codes."""

    contract: ClassVar[Contract] = CALIBRATED("closed form from the weights")
    parametric: ClassVar[bool] = True
    view: ClassVar[View]

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

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return ("weight_codes", "weight_scale", *(["weight_shift"] if self._has_shift else []))

    def fit(self, weight: Tensor) -> Codes:
        o = self.options
        if o.mode == "pot":
            return pot.fit(weight, bits=o.bits, terms=o.terms, group=o.group)
        return bcq.fit(weight, bits=o.bits, group=o.group, scale="pot" if o.scale == "pot" else "fp16")

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weight = _as_rows(site.match, read)
        fitted = self.fit(weight.detach())
        made = {
            "weight_codes": fitted.codes,
            "weight_scale": nn.Parameter(fitted.scale, requires_grad=weight.requires_grad),
        }
        if isinstance(fitted, bcq.BCQCodes) and fitted.shift is not None:
            made["weight_shift"] = fitted.shift
        return made

    def measure(
        self,
        site: Site,
        before: Callable[[str], Tensor],
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        weight = _as_rows(site.match, before)
        moment = statistics.get("second_moment", site.paths) if statistics is not None else None
        figures = measures.errors(weight, self._codes(after, choice["in_features"]), moment)
        stored = measures.bits_per_weight(
            after["weight_codes"], after["weight_scale"], after.get("weight_shift"), weights=weight.numel()
        )
        return figures | {"bits": stored}

    @property
    def _has_shift(self) -> bool:
        return self.options.mode == "bcq" and self.options.scale == "pot"

    def _codes(self, tensors: Mapping[str, Tensor], in_features: int) -> Codes:
        o = self.options
        codes, scale = tensors["weight_codes"], tensors["weight_scale"]
        if o.mode == "pot":
            return pot.PotCodes(
                codes=codes, scale=scale, bits=o.bits, terms=o.terms, group=o.group, in_features=in_features
            )
        return bcq.BCQCodes(
            codes=codes, scale=scale, shift=tensors.get("weight_shift"), group=o.group, in_features=in_features
        )

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        rows, columns = (int(s) for s in site.match["weight"].meta["val"].shape)
        return {"in_features": rows if site.match.captures.get("transposed") else columns}


class LinearRule(_ShiftAddRule):
    name: ClassVar[str] = "shift_add.linear"
    role: ClassVar[str] = "linear"
    view: ClassVar[View] = LINEAR

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        o, p = self.options, parameters
        if o.mode == "pot":
            new = edit.call(
                operators.pot_linear,
                match["x"],
                p["weight_codes"],
                p["weight_scale"],
                match["bias"],
                o.bits,
                o.terms,
                o.group,
                choice["in_features"],
            )
        else:
            new = edit.call(
                operators.bcq_linear,
                match["x"],
                p["weight_codes"],
                p["weight_scale"],
                p.get("weight_shift"),
                match["bias"],
                o.group,
                choice["in_features"],
            )
        return {match.root: new}

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {"second_moment": match["x"]}

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        bias = tensors.get("bias")
        return modules.ShiftAddLinear(self._codes(tensors, choice["in_features"]), bias)


class EmbeddingRule(_ShiftAddRule):
    name: ClassVar[str] = "shift_add.embedding"
    role: ClassVar[str] = "embedding"
    view: ClassVar[View] = EMBEDDING

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        o, p = self.options, parameters
        if o.mode == "pot":
            new = edit.call(
                operators.pot_embedding,
                match["ids"],
                p["weight_codes"],
                p["weight_scale"],
                o.bits,
                o.terms,
                o.group,
                choice["in_features"],
            )
        else:
            new = edit.call(
                operators.bcq_embedding,
                match["ids"],
                p["weight_codes"],
                p["weight_scale"],
                p.get("weight_shift"),
                o.group,
                choice["in_features"],
            )
        return {match.root: new}

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        return modules.ShiftAddEmbedding(self._codes(tensors, choice["in_features"]))


def _as_rows(match: Match, read: Callable[[str], Tensor]) -> Tensor:
    """The weight as [out, in]; transformers' Conv1D stores it the other way round."""
    weight = read(str(match["weight"].target))
    return weight.t() if match.captures.get("transposed") else weight
