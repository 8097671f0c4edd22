# SPDX-License-Identifier: Apache-2.0
"""Views, shared storage and values that others can see"""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Refused, Rewritten, case, matrices, numbers
from .rules import ATTENTION, DOUBLE, ONE, SILU, TRANSPOSED_TWICE

still = matrices(1, grad=False)


@case(SILU, Refused("pattern", "outside the match"))
def interior_escapes(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ(x) is returned as well; one call cannot give both."""
    s = torch.sigmoid(x)
    return x * s, s


@case(SILU, Refused("pattern", "outside the match"))
def interior_read_elsewhere(x: Tensor) -> Tensor:
    """σ(x) is read by another product."""
    s = torch.sigmoid(x)
    return x * s + s.sin()


@case(SILU, Refused("pattern", "outside the match"))
def interior_escapes_as_a_view(x: Tensor) -> tuple[Tensor, Tensor]:
    """A view of σ(x) is returned."""
    s = torch.sigmoid(x)
    return x * s, s.view(-1)


@case(ONE, Refused("replacement", "shares storage"), still)
def fresh_value_replaced_by_an_input_and_returned(x: Tensor) -> Tensor:
    """x·1 is a new tensor; x itself would let the caller write through the result."""
    return x * 1


@case(ONE, Refused("replacement", "shares storage"), still)
def fresh_value_replaced_by_an_input_and_written(x: Tensor) -> Tensor:
    """A write to x·1 is not a write to x."""
    y = x * 1
    y.add_(1)
    return y.sin()


@case(ONE, Refused("replacement", "shares storage"), still)
def source_of_a_fresh_value_written_later(x: Tensor) -> Tensor:
    """x·1 keeps the value x had."""
    x = x.clone()
    y = x * 1
    x.add_(1)
    return y.sin() + x


@case(ONE, Refused("replacement", "shares storage"), still)
def fresh_value_replaced_by_an_input_and_returned_as_a_view(x: Tensor) -> Tensor:
    """The same through a transpose."""
    return (x * 1).t()


@case(ONE, Rewritten(1))
def two_fresh_values_of_one_source_returned(x: Tensor) -> tuple[Tensor, Tensor]:
    """One of the two may be the source itself, not both: they would be one tensor."""
    h = x.sin()
    return h * 1, (h * 1).t()


@case(ONE, Rewritten())
def fresh_value_that_nobody_can_tell(x: Tensor) -> Tensor:
    """x·1 read by arithmetic only."""
    return (x * 1).sin()


@case(TRANSPOSED_TWICE, Refused("alias", "shares storage", possible=True), still)
def output_that_is_an_input(x: Tensor) -> Tensor:
    """(xᵀ)ᵀ is returned: it must stay a view of x."""
    return x.t().t()


@case(TRANSPOSED_TWICE, Refused("alias", "shares storage", possible=True), still)
def view_then_mutation(x: Tensor) -> Tensor:
    """A write through the view must reach x."""
    v = x.t().t()
    v.mul_(2)
    return x.sin()


@case(TRANSPOSED_TWICE, Rewritten())
def view_that_nobody_writes(x: Tensor) -> Tensor:
    """Read only: x does."""
    return x.t().t().sin()


@case(SILU, Rewritten())
def views_returned_beside_the_match(x: Tensor) -> tuple[Tensor, ...]:
    """chunk and slice of a clone are returned as views of one storage, whatever happens to the rest."""
    base = x.clone()
    first, second = base.chunk(2, -1)
    return x * torch.sigmoid(x), first, second, base[1:]


@case(SILU, Rewritten())
def result_returned_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """One value under two outputs, and a view of it as a third."""
    r = x * torch.sigmoid(x)
    return r, r.t()


@case(SILU, Rewritten(), still)
def input_returned_as_it_is(x: Tensor) -> tuple[Tensor, Tensor]:
    """An output that is an input, beside a match on it."""
    return x, x * torch.sigmoid(x)


@case(SILU, Rewritten(), lambda: (numbers(4, 3).t().requires_grad_(),))
def strides_of_a_transposed_input(x: Tensor) -> Tensor:
    """Elementwise results keep the input's strides, and so must the replacement's."""
    return x * torch.sigmoid(x)


@case(DOUBLE, Rewritten(), lambda: (numbers(4, 1).expand(4, 3),))
def expanded_input(x: Tensor) -> Tensor:
    """Stride 0: reading is fine."""
    return x + x


@case(SILU, Rewritten(), lambda: (numbers(8, 8)[::2, 1::2].requires_grad_(),))
def input_with_gaps(x: Tensor) -> Tensor:
    """Every second row and column of something larger."""
    return x * torch.sigmoid(x)


@case(ONE, Refused("replacement", "strides"), lambda: (numbers(4, 3).t()[:, ::2],))
def strides_of_a_copy(x: Tensor) -> Tensor:
    """x·1 has no gaps, x has; `view` can tell."""
    return (x * 1).t().view(-1).sin()


def split_heads(count: int) -> tuple[Tensor, ...]:
    return tuple(numbers(2, 5, 12, seed=i).requires_grad_() for i in range(count))


@case(ATTENTION, Refused("replacement", "strides", possible=True), lambda: split_heads(3))
def attention_of_split_heads_viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """p v is contiguous, the fused operator's result has the strides of q; `view` needs the former."""
    q, k, v = (t.view(2, 5, 3, 4).transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v).view(6, 5, 4)


@case(ATTENTION, Rewritten(), lambda: split_heads(3))
def attention_of_split_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The usual way back, through reshape, works with either strides."""
    q, k, v = (t.view(2, 5, 3, 4).transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v).transpose(1, 2).reshape(2, 5, 12).sin()
