# SPDX-License-Identifier: Apache-2.0
"""torch.fx's and Inductor's rewriters on rewrites given as pairs of Python functions (`benchmarks/legality.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import PatternMatcherPass, register_replacement
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.subgraph_rewriter import replace_pattern as fx_replace_pattern


class Traced(Protocol):
    """A pattern and its replacement as Python functions of the same tensors, and examples of those."""

    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    examples: tuple[Tensor, ...]


class Rewrite(Protocol):
    traced: tuple[Traced, ...]


class Case(Protocol):
    rewrite: Rewrite


def replace_pattern(module: GraphModule, case: Case) -> int:
    """Every spelling in turn; returns the number of matches replaced."""
    count = 0
    for one in case.rewrite.traced:
        count += len(fx_replace_pattern(module, trace(one.pattern, one.examples), trace(one.replacement, one.examples)))
    return count


def inductor(module: GraphModule, case: Case) -> int:
    """All spellings in one pass; returns the number of matches replaced."""
    made = PatternMatcherPass()
    for one in case.rewrite.traced:
        register_replacement(one.pattern, one.replacement, one.examples, trace, made, skip_duplicates=True)
    return made.apply(module)


def trace(function: Callable[..., Any], examples: Sequence[Tensor], **_: Any) -> GraphModule:
    """The function's operators as the training IR has them: not decomposed."""
    with torch.enable_grad():
        traced = make_fx(function, pre_dispatch=True)(*examples)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced
