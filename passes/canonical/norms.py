# SPDX-License-Identifier: Apache-2.0
"""x / √(mean(x²) + ε) · w  =  rms_norm(x, w, ε)          (x − μ) / √(σ² + ε) · w + b  =  layer_norm(x, w, b, ε)

The operators compute 16-bit inputs in float32 inside, and round once. The new node computes in

    the widest of: the dtype of x, the dtype of the last product, float64 where the mean was taken in float64

with casts around it where that is another dtype than theirs. So a model that casts to float32 and multiplies by its
weight there (Gemma) keeps its float32 product, and one that casts back first (Llama) is computed in 16 bits, with one
rounding less than before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter.editing import Editor
from rewriter.matcher import Match
from rewriter.passes.canonical.base import ToOperator, as_dtype, aten, dtype_of
from rewriter.program import Program
from rewriter.views import LAYER_NORM, RMS_NORM, View


class _Norm(ToOperator):
    def objection(self, program: Program, match: Match) -> str | None:
        if not isinstance(match["x"].meta["val"].shape[-1], int):
            return "the number of features is not fixed, and the operator's weight has a fixed shape"
        return None


class CanonicalRMSNorm(_Norm):
    """x / √(mean(x²) + ε) · w → ``rms_norm``; also with the factor 1 + w."""

    name: ClassVar[str] = "canonical.rms_norm"
    role: ClassVar[str] = "rms_norm"
    view: ClassVar[View] = RMS_NORM

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        work, x = _work(match), match["x"]
        weight = None if match["weight"] is None else as_dtype(edit, match["weight"], work)
        if match["unit_offset"]:
            weight = edit.call(aten.add.Tensor, weight, 1.0)
        new = edit.call(aten.rms_norm.default, as_dtype(edit, x, work), _features(x), weight, match["eps"])
        return {match.root: as_dtype(edit, new, dtype_of(match.root))}


class CanonicalLayerNorm(_Norm):
    """(x − μ) / √(σ² + ε) · w + b → ``layer_norm``"""

    name: ClassVar[str] = "canonical.layer_norm"
    role: ClassVar[str] = "layer_norm"
    view: ClassVar[View] = LAYER_NORM

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        work, x = _work(match), match["x"]
        weight, bias = (None if match[n] is None else as_dtype(edit, match[n], work) for n in ("weight", "bias"))
        new = edit.call(aten.layer_norm.default, as_dtype(edit, x, work), _features(x), weight, bias, match["eps"])
        return {match.root: as_dtype(edit, new, dtype_of(match.root))}


def _work(match: Match) -> torch.dtype:
    """The dtype of the new operator's operands; see the head of this file."""
    product = torch.promote_types(dtype_of(match["x"]), match["work"])
    return torch.float64 if match["dtype"] == torch.float64 else product


def _features(x: Node) -> list[int]:
    return [int(x.meta["val"].shape[-1])]
