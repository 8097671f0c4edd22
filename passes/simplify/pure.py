# SPDX-License-Identifier: Apache-2.0
"""Pure calls: what they return is all they do."""

from __future__ import annotations

import math
import operator

import torch
from torch._ops import OpOverload
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.schemas import MODE_SWITCHES

_ARITHMETIC = frozenset(
    {id(f) for module in (operator, math) for f in vars(module).values() if callable(f)}
    | {id(f) for f in (torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_sum)}
)
_ITEM_WRITERS = frozenset({id(f) for f in (operator.setitem, operator.delitem)})


def is_pure(facts: Facts, node: Node) -> bool:
    """Whether a node is a call that writes nothing, checks nothing and switches no mode; drawing numbers is allowed."""
    if node.op != "call_function" or node.target in MODE_SWITCHES or facts.is_assertion(node):
        return False
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.returns) and not facts.written(node)
    target = id(node.target)
    return target in _ARITHMETIC and target not in _ITEM_WRITERS and not _in_place(node)


def _in_place(node: Node) -> bool:
    """operator.iadd and its kin write to a tensor."""
    name = getattr(node.target, "__name__", "")
    return name.startswith("i") and hasattr(operator, f"__{name}__") and name not in ("inv", "invert", "index", "is_")
