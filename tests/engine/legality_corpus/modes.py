# SPDX-License-Identifier: Apache-2.0
"""Random numbers, training mode, autocast, detached and gradient-free parts"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Refused, Rewritten, case, matrices, numbers
from .rules import ATTENTION, DROPPED, FACTOR, SILU, SQUARE

heads = lambda: tuple(numbers(1, 2, 5, 4, seed=i).requires_grad_() for i in range(3))  # noqa: E731


@case(DROPPED, Rewritten())
def dropout_in_evaluation(x: Tensor) -> Tensor:
    """It draws nothing."""
    return F.dropout(x, 0.5, False) * 0


@case(DROPPED, Refused("random", "draws random numbers"))
def dropout_in_training(x: Tensor) -> Tensor:
    """The value is the same without it; every random number after it is not."""
    return F.dropout(x, 0.5, True) * 0 + torch.rand_like(x)


@case(ATTENTION, Rewritten(), heads)
def attention_dropout_in_evaluation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dropout that drops nothing is looked through."""
    p = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1)
    return F.dropout(p, 0.5, False) @ v


@case(ATTENTION, Refused("guard", "drops out"), heads)
def attention_dropout_in_training(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused operator would draw other numbers."""
    p = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1)
    return F.dropout(p, 0.5, True) @ v


@case(SQUARE, Refused("pattern", "two different values"))
def two_random_draws(x: Tensor) -> Tensor:
    """Two calls of one random operator are two values."""
    return torch.rand_like(x) * torch.rand_like(x)


@case(SQUARE, Rewritten())
def one_random_draw_read_twice(x: Tensor) -> Tensor:
    """One call is one value, drawn outside the match."""
    r = torch.rand_like(x)
    return r * r + x


@case(SILU, Rewritten())
def random_operator_between(x: Tensor) -> Tensor:
    """Drawn in the same order as before."""
    s = torch.sigmoid(x)
    noise = torch.randn_like(x)
    return x * s + noise + torch.rand_like(x)


@case(SILU, Refused("pattern", "detach"))
def detached_gate(x: Tensor) -> Tensor:
    """x·σ(x) with a gate that hands no gradient back: the same values, half the gradient."""
    return x * torch.sigmoid(x).detach()


@case(SILU, Refused("pattern", "two different values"))
def detached_input_of_the_gate(x: Tensor) -> Tensor:
    """The same, cut one step earlier."""
    return x * torch.sigmoid(x.detach())


@case(SILU, Refused("pattern", ""))
def gate_without_grad(x: Tensor) -> Tensor:
    """The gate is computed under no_grad."""
    with torch.no_grad():
        s = torch.sigmoid(x)
    return x * s


@case(SILU, Rewritten())
def match_inside_no_grad(x: Tensor) -> Tensor:
    """The whole of it lies inside no_grad, and nothing of it gets a gradient."""
    with torch.no_grad():
        r = x * torch.sigmoid(x)
    return r + x


@case(SILU, Rewritten())
def match_inside_a_gradient_island(x: Tensor) -> Tensor:
    """enable_grad inside no_grad."""
    with torch.no_grad():
        y = x.sin()
        with torch.enable_grad():
            r = y * torch.sigmoid(y)
    return r + x


@case(SILU, Refused("region", "inside a body of", possible=True), matrices(1, dtype=torch.float32))
def match_inside_autocast(x: Tensor) -> Tensor:
    """The region is a graph of its own."""
    with torch.autocast("cpu", torch.bfloat16):
        r = x * torch.sigmoid(x)
    return r + x


@case(SILU, Refused("pattern", "different"), matrices(1, dtype=torch.float32))
def match_across_the_edge_of_autocast(x: Tensor) -> Tensor:
    """σ inside, the product outside."""
    with torch.autocast("cpu", torch.bfloat16):
        s = torch.sigmoid(x)
    return x * s


@case(FACTOR, Rewritten(), lambda: (numbers(3, 4).requires_grad_(), numbers(3, 4, seed=1), numbers(3, 4, seed=2).requires_grad_()))
def inputs_of_which_some_require_grad(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Gradients flow to x and z, none to y."""
    return x * y + x * z


@case(SILU, Rewritten(), train=True)
class Training_mode(nn.Module):
    """Dropout after the match really drops, and drops the same elements."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x * torch.sigmoid(x))
