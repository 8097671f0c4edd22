# SPDX-License-Identifier: Apache-2.0
"""Control flow, higher-order operators, operators that torch knows nothing about"""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Refused, Rewritten, case, numbers
from .rules import SILU


@torch.library.custom_op("legality_corpus::halve_", mutates_args={"x"})
def halve_(x: Tensor) -> None:
    """Halves its argument in place, and says so."""
    x.mul_(0.5)


@torch.library.custom_op("legality_corpus::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operator without any decomposition."""
    return x.sin() + 1


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def gated(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


still = lambda: (numbers(3, 4),)  # noqa: E731


@case(SILU, Refused("region", "inside a body of", possible=True), still)
def match_inside_a_branch(x: Tensor) -> Tensor:
    """A pattern in the body of a cond."""
    return torch.cond(x.sum() > 0, gated, torch.cos, (x,))


@case(SILU, Rewritten(), still)
def match_beside_a_branch(x: Tensor) -> Tensor:
    """The condition is computed from the match."""
    r = gated(x)
    return torch.cond(r.sum() > 0, torch.sin, torch.cos, (r,))


@case(SILU, Refused("pattern", "different"), still)
def half_of_the_match_inside_a_branch(x: Tensor) -> Tensor:
    """σ is computed in one branch only."""
    return x * torch.cond(x.sum() > 0, torch.sigmoid, torch.cos, (x,))


@case(SILU, Refused("pattern", "outside the match"), still)
def interior_read_by_a_branch(x: Tensor) -> Tensor:
    """σ(x) is an operand of a cond."""
    s = torch.sigmoid(x)
    return x * s + torch.cond(x.sum() > 0, torch.sin, torch.cos, (s,))


@case(SILU, Refused("region", "inside a body of", possible=True), still)
def match_inside_a_loop(x: Tensor) -> Tensor:
    """A pattern in the body of a while_loop."""
    from torch._higher_order_ops.while_loop import while_loop

    count, value = while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, gated(v)), (torch.tensor(0), x))
    return value + count


@case(SILU, Refused("region", "inside a body of", possible=True), still)
def match_inside_a_map(x: Tensor) -> Tensor:
    """A pattern in the body of a map over rows."""
    from torch._higher_order_ops.map import map as higher_order_map

    return higher_order_map(gated, x)


@case(SILU, Refused("mutation", "halve_"), still)
def operator_that_writes_between(x: Tensor) -> Tensor:
    """A custom operator writes x between, as its schema says."""
    x = x.clone()
    s = torch.sigmoid(x)
    torch.ops.legality_corpus.halve_(x)
    return x * s


@case(SILU, Rewritten(), still)
def opaque_operator_around(x: Tensor) -> Tensor:
    """An operator nobody can look into, before and after the match."""
    x = torch.ops.legality_corpus.opaque(x)
    return torch.ops.legality_corpus.opaque(gated(x))


@case(SILU, Refused("pattern", "outside the match"), still)
def opaque_operator_reads_the_interior(x: Tensor) -> Tensor:
    """σ(x) goes to it as well."""
    s = torch.sigmoid(x)
    return x * s + torch.ops.legality_corpus.opaque(s)
