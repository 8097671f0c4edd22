# SPDX-License-Identifier: Apache-2.0
"""Broadcasting, empty and 0-d tensors, sizes that depend on data"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Refused, Rewritten, case, matrices, numbers
from .rules import ATTENTION, BIAS, FACTOR, MERGE, NORMALISE, SILU, SUBTRACT

grown = lambda *shapes: tuple(numbers(*s, seed=i).requires_grad_() for i, s in enumerate(shapes))  # noqa: E731


@case(SILU, Rewritten(), lambda: (numbers(0, 4).requires_grad_(),))
def no_rows(x: Tensor) -> Tensor:
    """A dimension of size zero."""
    return x * torch.sigmoid(x)


@case(NORMALISE, Rewritten(), lambda: (numbers(3, 0).requires_grad_(),))
def softmax_over_nothing(x: Tensor) -> Tensor:
    """A sum over no elements."""
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)


@case(ATTENTION, Rewritten(), lambda: grown((1, 2, 0, 4), (1, 2, 3, 4), (1, 2, 3, 4)))
def attention_without_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No queries, some keys."""
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v


@case(SILU, Rewritten(), lambda: (numbers().requires_grad_(),))
def zero_dimensions(x: Tensor) -> Tensor:
    """A 0-d tensor."""
    return x * torch.sigmoid(x)


@case(SUBTRACT, Rewritten(), lambda: grown((3, 1), (1, 4)))
def both_operands_broadcast(x: Tensor, y: Tensor) -> Tensor:
    """[3, 1] + [1, 4]; gradients sum over what was repeated."""
    return x + -y


@case(FACTOR, Rewritten(), lambda: grown((3, 4), (4,), (3, 1)))
def factors_broadcast(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """[3, 4]·[4] + [3, 4]·[3, 1]"""
    return x * y + x * z


@case(BIAS, Rewritten(), lambda: grown((3, 4), (4, 4), (3, 1)))
def bias_that_broadcasts_along_columns(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """One b per row: the operator broadcasts it as the sum does."""
    return F.linear(x, w) + b


@case(MERGE, Rewritten(), lambda: grown((3, 4), (4, 5), (5,)))
def product_of_matrices(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x w + b, as addmm takes it."""
    return x @ w + b


@case(MERGE, Refused("replacement", "addmm"), lambda: grown((2, 3, 4), (4, 5), (5,)))
def product_of_three_dimensions(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """addmm takes matrices only."""
    return x @ w + b


@case(MERGE, Refused("replacement", "addmm does not take"), lambda: grown((3, 4), (4, 5), (2, 3, 5)))
def sum_that_adds_a_dimension(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The sum has a dimension more than the product."""
    return x @ w + b


@case(MERGE, Refused("replacement", "addmm does not take"), lambda: grown((3, 4), (4, 1), (5,)))
def sum_larger_than_the_product(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """One column, five summands."""
    return x @ w + b


@case(SILU, Rewritten(), matrices(1), dynamic=True)
def free_sizes(x: Tensor) -> Tensor:
    """Sizes captured as symbols."""
    return x * torch.sigmoid(x)


@case(FACTOR, Rewritten(), matrices(3), dynamic=True)
def free_sizes_that_must_agree(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Three inputs whose sizes the program itself ties together."""
    return x * y + x * z


@case(SILU, Rewritten(), lambda: (numbers(3, 4).requires_grad_(),), dynamic=True)
def size_used_as_a_number(x: Tensor) -> Tensor:
    """A size computed from the input's shape stands beside the match."""
    return (x * torch.sigmoid(x)).reshape(x.shape[0] * x.shape[1]) / x.shape[0]


@case(SILU, Rewritten(), lambda: (numbers(4, 4),))
def size_that_depends_on_data(x: Tensor) -> Tensor:
    """The number of rows is known when it runs, not before."""
    rows = torch.nonzero(x[:, 0] > 0)
    picked = x[rows[:, 0]]
    return picked * torch.sigmoid(picked)


@case(SILU, Rewritten(), lambda: (numbers(4, 4), torch.tensor(3)))
def size_read_from_a_tensor(x: Tensor, n: Tensor) -> Tensor:
    """An unbacked size with the checks that make it usable."""
    count = n.item()
    torch._check(count >= 1)
    torch._check(count <= 4)
    picked = x[:count]
    return picked * torch.sigmoid(picked)


@case(SILU, Rewritten(), lambda: (numbers(),))
def assertion_on_an_interior_value(x: Tensor) -> Tensor:
    """An assertion reads σ(x): no user that forbids the rewrite, but it must still be made."""
    s = torch.sigmoid(x)
    torch._assert_async(s)
    return x * s


@case(SILU, Refused("pattern", "outside the match"))
def assertion_on_a_computed_condition(x: Tensor) -> Tensor:
    """Here the assertion reads something computed from σ(x), which is a use."""
    s = torch.sigmoid(x)
    torch._assert_async((s >= 0).all())
    return x * s


@case(SILU, Refused("pattern", "outside the match"))
def size_zero_sum(x: Tensor) -> Tensor:
    """σ(x) is read by a sum over an empty slice: still a read."""
    s = torch.sigmoid(x)
    return x * s + s[:0].sum()
