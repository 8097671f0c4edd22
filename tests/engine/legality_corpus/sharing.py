# SPDX-License-Identifier: Apache-2.0
"""Shared modules, tied weights, repeated and overlapping matches"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Refused, Rewritten, case, matrices, numbers
from .rules import BIAS, FACTOR, QKV, RELU_TWICE, SILU, SQUARE, SUBTRACT

sequences = matrices(1, (2, 5, 4))


@case(SQUARE, Rewritten())
def repeated_capture(x: Tensor) -> Tensor:
    """x·x: one value twice."""
    return x * x


@case(SQUARE, Refused("pattern", "two different values"), matrices(2))
def two_values_where_one_is_meant(x: Tensor, y: Tensor) -> Tensor:
    """x·y is not x·x."""
    return x * y


@case(SQUARE, Rewritten(), lambda: ((x := numbers(3, 4)), x))
def same_tensor_given_twice(x: Tensor, y: Tensor) -> Tensor:
    """A caller may pass one tensor as both; x·y stays general, x·x is rewritten."""
    return x * y + x * x


@case(SILU, Refused("pattern", "two different values"))
def equal_but_not_the_same(x: Tensor) -> Tensor:
    """σ of another value of the same shape."""
    return x * torch.sigmoid(x.sin())


@case(FACTOR, Rewritten(), matrices(3))
def commuted_operands(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """y·x + x·z"""
    return y * x + x * z


@case(SILU, Rewritten())
def commuted_product(x: Tensor) -> Tensor:
    """σ(x)·x"""
    return torch.sigmoid(x) * x


@case(RELU_TWICE, Rewritten(2))
def overlapping_matches(x: Tensor) -> Tensor:
    """Three in a row hold two overlapping pairs: one after the other, since either takes a part of both."""
    return torch.relu(torch.relu(torch.relu(x)))


@case(SILU, Rewritten(6))
def chain_of_matches(x: Tensor) -> Tensor:
    """Each match reads the one before."""
    for _ in range(6):
        x = x * torch.sigmoid(x)
    return x


@case(FACTOR, Rewritten(2), matrices(4))
def nested_matches(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """One match is an operand of the next."""
    inner = x * y + x * z
    return inner * w + inner * x


@case(SUBTRACT, Refused("pattern", "outside the match", possible=True), matrices(2))
def interior_shared_by_two_matches(x: Tensor, y: Tensor) -> Tensor:
    """−y serves two sums: both may become subtractions only if it goes in both."""
    negative = -y
    return (x + negative) * (x.sin() + negative)


@case(SILU, Rewritten(2))
def one_input_of_two_matches(x: Tensor) -> Tensor:
    """Two matches share their captures and nothing else."""
    return x * torch.sigmoid(x) - torch.sigmoid(x) * x.sin() + x * torch.sigmoid(x)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def attend(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


@case(QKV, Rewritten(), sequences)
class Plain_projections(Projections):
    """q, k and v of one input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


@case(QKV, Rewritten(), sequences)
class Shared_layer(Projections):
    """One module called three times (ALBERT) is one site, whose calls are all rewritten."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.attend(self.attend(x)))


@case(QKV, Refused("guard", "same weight", possible=True), sequences)
class Tied_projections(Projections):
    """q and k are one parameter: merged they would part when trained."""

    def __init__(self) -> None:
        super().__init__()
        self.k.weight = self.q.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


@case(QKV, Refused("guard", "read outside", possible=True), sequences)
class Weight_read_elsewhere(Projections):
    """A weight is also regularised: merged it would be two parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x) + self.q.weight.square().sum()


@case(QKV, Refused("guard", "frozen", possible=True), sequences)
class One_projection_frozen(Projections):
    """requires_grad differs: one merged parameter cannot be both."""

    def __init__(self) -> None:
        super().__init__()
        self.k.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


@case(BIAS, Rewritten(), lambda: (torch.tensor([[1, 2, 0]]),))
class Tied_embedding(nn.Module):
    """The head's weight is the embedding's; the rewrite reads it and leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.embed(ids), self.embed.weight) + self.bias
