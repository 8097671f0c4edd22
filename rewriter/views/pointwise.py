# SPDX-License-Identifier: Apache-2.0
"""The Pointwise view: y[n, o, …] = Σ_i W[o, i] · x[n, i, …] + b[o], a convolution with kernel 1: a linear over channels.

Captures:
    x        node [n, in, …]: one, two or three spatial dimensions
    weight   parameter [out, in, 1, …]
    bias     parameter [out] or None
    stride   tuple of ints, one per spatial dimension: only every so many places are computed

Grouped convolutions are several linears, padded ones surround their result with the bias: both are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rewriter.expressions import Operator
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss, explain, find
from rewriter.pattern import Const, Optional, Var, pattern
from rewriter.predicates import Predicate, has_rank, parameter
from rewriter.views.base import View, with_captures

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding,
)  # fmt: skip
convolution = Operator("convolution", CONVOLUTIONS, ("x", "weight", "bias", "stride", "padding", "dilation", "groups"))


def _kernel_is_one(facts: Facts, weight: Any) -> bool:
    shape = facts.shape(weight)
    return shape is not None and len(shape) > 2 and all(size == 1 for size in shape[2:])


def _nothing(facts: Facts, padding: Any) -> bool:
    """Padding to the "same" size adds nothing either, for a kernel of 1."""
    return padding in ("valid", "same") or not any(padding if isinstance(padding, list | tuple) else [padding])


def _batched(facts: Facts, captures: Mapping[str, Any]) -> bool:
    """An unbatched input has one dimension less than the weight."""
    x, weight = facts.shape(captures["x"]), facts.shape(captures["weight"])
    return x is not None and weight is not None and len(x) == len(weight)


_weight = Var("weight", (parameter, Predicate("a kernel of 1", _kernel_is_one, "has a larger kernel")))
_padding = Const("padding", Predicate("no padding", _nothing, "pads its input"))
_groups = Const("groups", Predicate("one group", lambda facts, groups: groups == 1, "makes it several linears"))

POINTWISE_CONVOLUTION = pattern(
    "pointwise",
    convolution(
        Var("x"),
        _weight,
        Optional(Var("bias", (parameter, has_rank(1)))),
        stride=Const("stride"),
        padding=_padding,
        dilation=Const("dilation"),
        groups=_groups,
    ),
    where=(Predicate("an input with a batch dimension", _batched),),
)


def _find(facts: Facts) -> list[Match]:
    return [_in_view_terms(facts, match) for match in find(facts, POINTWISE_CONVOLUTION)]


def _in_view_terms(facts: Facts, match: Match) -> Match:
    spatial = len(facts.shape(match["weight"]) or ()) - 2
    stride = match["stride"]
    every = tuple(stride) if isinstance(stride, list | tuple) else (stride,)
    captures = {name: match.captures.get(name) for name in ("x", "weight", "bias")}
    return with_captures(match, captures | {"stride": every * spatial if len(every) == 1 else every})


def _explain(facts: Facts) -> list[Miss]:
    return [miss for miss in explain(facts, POINTWISE_CONVOLUTION) if miss.node is not None]


POINTWISE = View("pointwise", _find, _explain)
