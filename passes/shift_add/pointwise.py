# SPDX-License-Identifier: Apache-2.0
"""A convolution with kernel 1 is a linear over channels: y[n, :, s·p] = Ŵ x[n, :, s·p] + b at every place p.

Channels go last for the product and back; with a stride s only the places it keeps are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.matcher import Match
from rewriter.passes.shift_add import calibrated, modules
from rewriter.passes.shift_add.rules import ShiftAddRule
from rewriter.program import Program
from rewriter.rules import Site
from rewriter.views.base import View
from rewriter.views.pointwise import POINTWISE

aten = torch.ops.aten

# Means of single places: every stride-th place as it is, in sizes spelled as a convolution spells its own.
_EVERY = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}


class PointwiseRule(ShiftAddRule):
    """Calibration sees the channels at all places, also those that a stride leaves out."""

    name: ClassVar[str] = "shift_add.pointwise"
    role: ClassVar[str] = "pointwise"
    view: ClassVar[View] = POINTWISE
    metric: ClassVar[str] = "channel_moment"
    inputs: ClassVar[str] = "channel_moment"

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        return super().settle(site, program, statistics, generator) | {"stride": list(site.match["stride"])}

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {"channel_moment": match["x"]}

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        x = match["x"]
        stride = choice["stride"]
        if any(step != 1 for step in stride):
            x = edit.call(_EVERY[len(stride)], x, [1] * len(stride), stride)
        spatial = range(2, 2 + len(stride))
        rows = edit.call(aten.permute.default, x, [0, *spatial, 1])
        if choice.get("scaled"):
            rows = edit.call(aten.mul.Tensor, rows, parameters[calibrated.INPUT_SCALE])
        operator, arguments = self.layout(choice).linear(rows, parameters, match["bias"])
        last = len(spatial) + 1
        out = edit.call(aten.permute.default, edit.call(operator, *arguments), [0, last, *range(1, last)])
        if match.root.meta["val"].is_contiguous():  # a convolution in channels-last format answers in that format
            out = edit.call(aten.contiguous.default, out)
        return {match.root: out}

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        scale = tensors.get(calibrated.INPUT_SCALE)
        return modules.ShiftAddPointwise(
            self.layout(choice).codes(tensors), tensors.get("bias"), scale, stride=tuple(choice["stride"])
        )
