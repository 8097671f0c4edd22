# SPDX-License-Identifier: Apache-2.0
"""Arguments with defaults, dimensions, overloads and operators of several results"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Refused, Rewritten, case, matrices, numbers
from .rules import ADDMM, BADDBMM, NORMALISE, QUARTER, SILU, SUBTRACT, TRANSPOSED_TWICE

pair = matrices(2)
products = lambda: (numbers(4, seed=1), numbers(3, 4), numbers(4, 4))  # noqa: E731
batches = lambda: tuple(numbers(2, 4, 4, seed=i).requires_grad_() for i in range(3))  # noqa: E731


@case(SUBTRACT, Rewritten(), pair)
def plain_sum(x: Tensor, y: Tensor) -> Tensor:
    """x + (−y)"""
    return x + -y


@case(SUBTRACT, Refused("pattern", "alpha"), pair)
def alpha_of_two(x: Tensor, y: Tensor) -> Tensor:
    """x + 2·(−y) is not x − y."""
    return torch.add(x, -y, alpha=2)


@case(SUBTRACT, Rewritten(), pair)
def alpha_of_one(x: Tensor, y: Tensor) -> Tensor:
    """The default, written out."""
    return torch.add(x, -y, alpha=1)


@case(SUBTRACT, Rewritten(), matrices(1))
def negative_plus_itself(y: Tensor) -> Tensor:
    """(−y) + (−y): one interior value is the other operand as well, and stays needed."""
    n = -y
    return n + n


@case(ADDMM, Rewritten(), products)
def addmm_plain(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """b + x w"""
    return torch.addmm(b, x, w)


@case(ADDMM, Refused("pattern", "beta"), products)
def addmm_beta(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """½ b + x w"""
    return torch.addmm(b, x, w, beta=0.5)


@case(ADDMM, Refused("pattern", "alpha"), products)
def addmm_alpha(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """b + 3 x w"""
    return torch.addmm(b, x, w, alpha=3)


@case(BADDBMM, Rewritten(), batches)
def baddbmm_plain(b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """b + x y"""
    return torch.baddbmm(b, x, y)


@case(BADDBMM, Refused("pattern", "beta"), batches)
def baddbmm_beta_zero(b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """beta = 0 ignores b altogether, as transformers' BLOOM and GPT-NeoX once wrote it."""
    return torch.baddbmm(b, x, y, beta=0, alpha=0.5)


@case(NORMALISE, Rewritten())
def softmax_written_out(x: Tensor) -> Tensor:
    """exp(x) / Σ exp(x) over the last dimension."""
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)


@case(NORMALISE, Rewritten())
def dimension_spelled_positively(x: Tensor) -> Tensor:
    """The last dimension of two is 1."""
    e = torch.exp(x)
    return e / e.sum(1, keepdim=True)


@case(NORMALISE, Refused("pattern", "dim"))
def sum_over_another_dimension(x: Tensor) -> Tensor:
    """Columns instead of rows."""
    e = torch.exp(x)
    return e / e.sum(0, keepdim=True)


@case(NORMALISE, Refused("pattern", "dim"))
def sum_over_all_dimensions(x: Tensor) -> Tensor:
    """Both dimensions at once."""
    e = torch.exp(x)
    return e / e.sum((0, 1), keepdim=True)


@case(NORMALISE, Refused("pattern", ""), lambda: (numbers(4, 4).requires_grad_(),))
def sum_without_keepdim(x: Tensor) -> Tensor:
    """On a square matrix this broadcasts, and divides columns instead of rows."""
    e = torch.exp(x)
    return e / e.sum(-1)


@case(NORMALISE, Refused("pattern", "dtype"), matrices(1, dtype=torch.float32))
def sum_in_another_dtype(x: Tensor) -> Tensor:
    """A sum in float64 makes the quotient float64."""
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True, dtype=torch.float64)


@case(QUARTER, Refused("absent"))
def rounded_division(x: Tensor) -> Tensor:
    """rounding_mode makes it another operator."""
    return torch.div(x, 4, rounding_mode="floor")


@case(QUARTER, Refused("absent"), lambda: (torch.arange(-6, 6).view(3, 4),))
def floor_division_of_integers(x: Tensor) -> Tensor:
    """x // 4"""
    return x // 4


@case(QUARTER, Refused("pattern", "another constant"))
def another_divisor(x: Tensor) -> Tensor:
    """x / 5"""
    return x / 5


@case(TRANSPOSED_TWICE, Rewritten(), matrices(1, (2, 3, 4)))
def negative_dimensions(x: Tensor) -> Tensor:
    """The same two dimensions, counted from either end."""
    return x.transpose(1, 2).transpose(-1, -2).sin()


@case(TRANSPOSED_TWICE, Refused("pattern", "orders the dimensions"), matrices(1, (3, 3, 3)))
def two_different_transposes(x: Tensor) -> Tensor:
    """All sizes equal, so that only the dimension numbers tell."""
    return x.transpose(0, 1).transpose(-1, -2).sin()


@case(SILU, Rewritten(), matrices(1, (3, 6)))
def part_of_a_split(x: Tensor) -> Tensor:
    """The match reads one of several results."""
    a, b, c = x.split(2, -1)
    return a * torch.sigmoid(a) + b * c


@case(SILU, Rewritten(), matrices(1, (3, 6)))
def two_results_of_one_call(x: Tensor) -> Tensor:
    """values · σ(values) of topk, with the indices used beside it."""
    values, indices = x.topk(2, -1)
    return values * torch.sigmoid(values) + indices


@case(SILU, Refused("pattern", "two different values"), matrices(1, (3, 6)))
def different_results_of_one_call(x: Tensor) -> Tensor:
    """σ of the maximum, times the minimum: two results of one aminmax."""
    low, high = torch.aminmax(x, dim=-1)
    return low * torch.sigmoid(high)


@case(SILU, Refused("pattern", "hardsigmoid"))
def other_activation(x: Tensor) -> Tensor:
    """hardsigmoid is not σ."""
    return x * F.hardsigmoid(x)
