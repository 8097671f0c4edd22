# SPDX-License-Identifier: Apache-2.0
"""W (γ ∘ n + β) + b  =  (W diag(γ)) n + (W β + b)     n = (x − μ)/√(σ² + ε), or x/√(mean x² + ε)

The scale and shift of LayerNorm and RMSNorm go into the linears that read the norm; Gemma's factor 1 + w too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.editing import Editor
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.passes.fold.into_next import FoldIntoNext, Source, in_dtype, once
from rewriter.passes.fold.linears import parameters_among
from rewriter.views import LAYER_NORM, RMS_NORM
from rewriter.views.base import View, miss_at

aten = torch.ops.aten


class FoldLayerNorm(FoldIntoNext):
    """What stays is the LayerNorm without scale and shift."""

    name: ClassVar[str] = "fold.layer_norm"
    role: ClassVar[str] = "layer_norm"

    def sources(self, facts: Facts) -> Sequence[Source | Miss]:
        return _sources(facts, self.name, LAYER_NORM, {"scale": "weight", "shift": "bias"})

    def coefficients(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        shift = tensors.get("shift")
        scale = tensors.get("scale")
        return (torch.ones_like(shift) if scale is None and shift is not None else scale), shift  # type: ignore[return-value]

    def bare(self, edit: Editor, match: Match) -> Node:
        x, size = _input(edit, match)
        normed = once(edit, match, aten.layer_norm.default, x, [size], None, None, match["settings"]["eps"])
        return in_dtype(edit, match, normed, match["result"].meta["val"].dtype)


class FoldRMSNorm(FoldIntoNext):
    """What stays is the RMSNorm without a scale."""

    name: ClassVar[str] = "fold.rms_norm"
    role: ClassVar[str] = "rms_norm"

    def sources(self, facts: Facts) -> Sequence[Source | Miss]:
        return _sources(facts, self.name, RMS_NORM, {"scale": "weight"})

    def coefficients(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        return (1 + tensors["scale"] if settings["unit_offset"] else tensors["scale"]), None

    def bare(self, edit: Editor, match: Match) -> Node:
        x, size = _input(edit, match)
        normed = once(edit, match, aten.rms_norm.default, x, [size], None, match["settings"]["eps"])
        return in_dtype(edit, match, normed, match["result"].meta["val"].dtype)


def _input(edit: Editor, match: Match) -> tuple[Node, int]:
    """What the norm is taken of, in the dtype it is computed in, and how many features it has."""
    x = in_dtype(edit, match, match["u"], getattr(torch, match["settings"]["dtype"] or "", None))
    return x, int(match["result"].meta["val"].shape[-1])


def _sources(facts: Facts, rule: str, view: View, roles: Mapping[str, str]) -> list[Source | Miss]:
    """Norms with parameters of their own."""
    found: list[Source | Miss] = []
    for match in view.find(facts):
        tensors = {role: match[name] for role, name in roles.items() if match[name] is not None}
        if not tensors:
            continue
        if len(list(parameters_among(facts, list(tensors.values())))) < len(tensors):
            found.append(miss_at(facts, rule, match.root, "its scale or shift is computed, not a parameter"))
            continue
        dtype = match["dtype"]
        settings = {
            "eps": match["eps"],
            "unit_offset": match.captures.get("unit_offset", False),
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        }
        found.append(Source(match.root, match.nodes, match["x"], tensors, settings, match.casts, "shift" in tensors))
    return found
