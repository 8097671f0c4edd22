# SPDX-License-Identifier: Apache-2.0
"""Products with a number, as they are written: c · x, x · c, x / c."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from rewriter.facts import Facts, same_shape
from rewriter.operators import div, mul

# Exponents of these cannot run out between two factors of ordinary size; float16 ends at 65504 and 6e-8.
WIDE = frozenset({torch.float32, torch.float64, torch.bfloat16})


@dataclass(frozen=True)
class Scaled:
    """``node = factor · x`` with a finite number as factor, in the floating dtype of x."""

    node: Node
    x: Node
    factor: float


def scaled(facts: Facts, node: Node) -> Scaled | None:
    """The node as a product with a number, if it is one."""
    if node.op != "call_function" or not (node.target in mul.targets or node.target in div.targets):
        return None
    arguments = facts.arguments(node)
    x, factor = arguments["self"], arguments["other"]
    if node.target in mul.targets and isinstance(factor, Node):
        x, factor = factor, x
    if not isinstance(x, Node) or isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return None
    dtype = facts.dtype(x)
    if dtype is None or not dtype.is_floating_point or facts.dtype(node) != dtype or not math.isfinite(factor):
        return None
    if node.target in mul.targets:
        return Scaled(node, x, float(factor))
    return Scaled(node, x, 1.0 / factor) if factor else None


def keeps_shape(facts: Facts, scale: Scaled) -> bool:
    """Whether the product has the shape of x, as it has unless x is a number itself."""
    return same_shape(facts.shape(scale.x), facts.shape(scale.node))
