# SPDX-License-Identifier: Apache-2.0
"""In-place writes around and inside a match"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Refused, Rewritten, case, matrices, numbers
from .rules import ATTENTION, BIAS, QKV, SILU, TURN

still = matrices(1, grad=False)


def attend(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1)


@case(SILU, Refused("pattern", "two different values"), still)
def input_written_between(x: Tensor) -> Tensor:
    """x changes between σ(x) and the product."""
    x = x.clone()
    s = torch.sigmoid(x)
    x.add_(1)
    return x * s


@case(SILU, Refused("mutation", "mul_"), still)
def input_written_through_a_view(x: Tensor) -> Tensor:
    """The write goes to a row of x."""
    x = x.clone()
    s = torch.sigmoid(x)
    x[1].mul_(3)
    return x * s


@case(SILU, Refused("mutation", "mul_"), still)
def view_taken_before_base_written(x: Tensor) -> Tensor:
    """The match reads a view; its base is written in between."""
    base = x.clone()
    x = base.view(-1)
    s = torch.sigmoid(x)
    base.mul_(3)
    return x * s


@case(SILU, Rewritten(), still)
def write_before_the_match(x: Tensor) -> Tensor:
    """A write that everything reads."""
    x = x.clone()
    x.add_(1)
    return x * torch.sigmoid(x)


@case(SILU, Rewritten(), still)
def write_after_the_match(x: Tensor) -> Tensor:
    """The replacement still reads x before the write."""
    x = x.clone()
    r = x * torch.sigmoid(x)
    x.add_(1)
    return r + x


@case(SILU, Rewritten(), still)
def write_to_something_else(x: Tensor) -> Tensor:
    """A write between, to a tensor of its own storage."""
    s = torch.sigmoid(x)
    t = x.sin()
    t.add_(1)
    return x * s + t


@case(SILU, Refused("pattern", "two different values"), still)
def program_input_written_between(x: Tensor) -> Tensor:
    """As above, and the caller sees the write."""
    s = torch.sigmoid(x)
    x.add_(1)
    return x * s


@case(SILU, Rewritten(), still)
def program_input_written_afterwards(x: Tensor) -> Tensor:
    """The write must still happen, and after the read."""
    r = x * torch.sigmoid(x)
    x.add_(1)
    return r


@case(SILU, Refused("pattern", "sigmoid"), still)
def interior_written(x: Tensor) -> Tensor:
    """σ(x) is doubled in place before the product."""
    s = torch.sigmoid(x)
    s.mul_(2)
    return x * s


@case(SILU, Rewritten(), still)
def result_written(x: Tensor) -> Tensor:
    """The result is the replacement's own storage as well."""
    r = x * torch.sigmoid(x)
    r.add_(1)
    return r


@case(SILU, Refused("pattern", "two different values"), still)
def copied_into(x: Tensor) -> Tensor:
    """copy_ into x between."""
    y = x.clone()
    s = torch.sigmoid(y)
    y.copy_(x + 1)
    return y * s


@case(SILU, Refused("pattern", "two different values"), still)
def index_put(x: Tensor) -> Tensor:
    """x[[0, 2]] = 0 between."""
    x = x.clone()
    s = torch.sigmoid(x)
    x[torch.tensor([0, 2])] = 0.0
    return x * s


@case(SILU, Refused("pattern", "two different values"), still)
def out_variant(x: Tensor) -> Tensor:
    """out= writes to x between."""
    y = x.detach().clone()
    s = torch.sigmoid(y)
    torch.add(y, 1, out=y)
    return y * s


@case(SILU, Refused("mutation", "mul_"), still)
def written_through_as_strided(x: Tensor) -> Tensor:
    """The alias is made by as_strided."""
    x = x.clone()
    s = torch.sigmoid(x)
    x.as_strided((2,), (1,), 1).mul_(5)
    return x * s


@case(SILU, Refused("mutation", "mul_"), still)
def written_through_a_split(x: Tensor) -> Tensor:
    """The alias is the second part of a split."""
    x = x.clone()
    s = torch.sigmoid(x)
    x.split(2, -1)[1].mul_(5)
    return x * s


@case(SILU, Refused("mutation", "add_"), still)
def written_through_dropout_that_drops_nothing(x: Tensor) -> Tensor:
    """Dropout in evaluation returns its argument, though its schema does not say so."""
    s = torch.sigmoid(x)
    F.dropout(x, 0.5, False).add_(1)
    return x * s


@case(SILU, Refused("pattern", "two different values"), still)
def written_through_a_cast_that_casts_nothing(x: Tensor) -> Tensor:
    """x.to(x.dtype) is x itself."""
    s = torch.sigmoid(x)
    x.to(torch.float64).add_(1)
    return x * s


@case(SILU, Refused("mutation", "add_"), lambda: ((x := numbers(3, 4)), x.t()))
def two_inputs_of_one_storage(x: Tensor, y: Tensor) -> Tensor:
    """Inputs may alias in a call; a write to one between reads of the other is not provably elsewhere."""
    s = torch.sigmoid(x)
    y.add_(1)
    return x * s


@case(SILU, Rewritten(2), still)
def written_between_two_matches(x: Tensor) -> Tensor:
    """Two matches, each on its own side of the write."""
    x = x.clone()
    a = x * torch.sigmoid(x)
    x.mul_(2)
    return a + x * torch.sigmoid(x)


@case(ATTENTION, Refused("mutation", "mul_"), lambda: tuple(numbers(2, 3, 5, 4, seed=i) for i in range(3)))
def values_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q is written after q kᵀ: the fused operator would read it later."""
    q = q.clone()
    p = attend(q, k)
    q.mul_(2)
    return p @ v


@case(ATTENTION, Rewritten(), lambda: tuple(numbers(2, 3, 5, 4, seed=i) for i in range(3)))
def values_written_before_their_only_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """v is written between, and read after that only."""
    v = v.clone()
    p = attend(q, k)
    v.mul_(2)
    return p @ v


@case(TURN, Refused("mutation", "add_"), still)
def written_between_two_outputs(x: Tensor) -> Tensor:
    """sin reads x before the write, cos after it."""
    x = x.clone()
    s = x.sin()
    x.view(-1).add_(1)
    return s + x.cos()


@case(TURN, Rewritten(), still)
def two_outputs(x: Tensor) -> Tensor:
    """Two values, one replacement."""
    return x.sin() * x.cos()


class Layer(nn.Module):
    """Frozen: autograd itself refuses to differentiate through what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("seen", torch.ones(4))


@case(BIAS, Refused("mutation", "mul_"), still)
class Buffer_written_between(Layer):
    """A buffer is read as the input, written through a view, and only then is the sum made."""

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(self.seen, self.weight)
        self.seen.view(2, 2).mul_(2)
        return product + self.bias + x


@case(BIAS, Rewritten(1, of=2), still)
class Buffer_written_between_two_calls(Layer):
    """The second linear reads the new value; the first, of a buffer that is written, is left alone to be safe."""

    def forward(self, x: Tensor) -> Tensor:
        first = F.linear(self.seen, self.weight) + self.bias
        self.seen.add_(1)
        return x + first + (F.linear(self.seen, self.weight) + self.bias)


@case(QKV, Rewritten(), matrices(1, (2, 5, 4)))
class Projection_weight_written(Layer):
    """A weight that the forward itself rescales has no value to plan with; the other two are merged."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v"):
            self.register_buffer(name, torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.linear(x, self.q), F.linear(x, self.k)
        self.v.mul_(1.5)
        return F.scaled_dot_product_attention(q, k, F.linear(x, self.v))


@case(QKV, Refused("mutation", "written"), matrices(1, (2, 5, 4)))
class Projection_weights_written(Layer):
    """All three are rescaled: nothing to merge."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v"):
            self.register_buffer(name, torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach()
        q, k, v = F.linear(x, self.q), F.linear(x, self.k), F.linear(x, self.v)
        for weight in (self.q, self.k, self.v):
            weight.mul_(1.5)
        return F.scaled_dot_product_attention(q, k, v)


@case(BIAS, Rewritten(), train=True)
class Batch_statistics_updated(Layer):
    """BatchNorm in training writes its buffers; that is no reason against the linear before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.linear(x, self.weight) + self.bias)


@case(SILU, Refused("mutation", "batch_norm"), train=True)
class Statistics_read_around_their_update(Layer):
    """running_mean is read before and after batch_norm writes it, which no schema says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.norm.running_mean)
        y = self.norm(x + 3)
        return self.norm.running_mean * s + y
