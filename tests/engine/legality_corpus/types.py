# SPDX-License-Identifier: Apache-2.0
"""Dtypes, type promotion, special values"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .case import Refused, Rewritten, case, matrices, numbers
from .rules import ATTENTION, DOUBLE, ONE, QUARTER, SILU, SQUARE, SUBTRACT, THERE_AND_BACK

whole = lambda *shape: torch.arange(-5, 7).view(shape or (3, 4))  # noqa: E731
yes_no = lambda: torch.tensor([[True, False], [False, True]])  # noqa: E731
half = matrices(1, dtype=torch.float16)
special = lambda: (torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64),)  # noqa: E731


@case(ONE, Refused("replacement", "int64 instead of float32"), lambda: (whole(),))
def integer_times_float_one(x: Tensor) -> Tensor:
    """An integer tensor times 1.0 is float; x is not."""
    return (x * 1.0).cumsum(0)


@case(ONE, Rewritten(), lambda: (whole(),))
def integer_times_integer_one(x: Tensor) -> Tensor:
    """An integer tensor times 1 is x."""
    return (x * 1).sin()


@case(ONE, Refused("replacement", "bool instead of int64"), lambda: (yes_no(),))
def boolean_times_one(x: Tensor) -> Tensor:
    """True · 1 is the integer 1."""
    return x * 1 + x


@case(DOUBLE, Refused("replacement", "int64 instead of bool"), lambda: (yes_no(),))
def boolean_plus_itself(x: Tensor) -> Tensor:
    """True + True is True; True · 2 is 2."""
    return x + x


@case(DOUBLE, Rewritten(), lambda: (whole(),))
def integer_plus_itself(x: Tensor) -> Tensor:
    """Exact in integers."""
    return x + x


@case(SQUARE, Rewritten(), lambda: (whole(),))
def integer_square(x: Tensor) -> Tensor:
    """Exact in integers."""
    return x * x


@case(SQUARE, Refused("replacement", "int64 instead of bool"), lambda: (yes_no(),))
def boolean_square(x: Tensor) -> Tensor:
    """True · True is bool; True ** 2 is an integer."""
    return x * x


@case(QUARTER, Rewritten(), lambda: (whole(),))
def integer_true_division(x: Tensor) -> Tensor:
    """x / 4 of integers is float, and so is 0.25 x."""
    return x / 4


@case(
    SUBTRACT,
    Refused("dtype", "float16", possible=True),
    lambda: (numbers(3, 4, dtype=torch.float32), numbers(3, 4, dtype=torch.float16)),
)
def undeclared_promotion(x: Tensor, y: Tensor) -> Tensor:
    """float32 + (−float16): promotion that the pattern does not mention is refused, though here it is harmless."""
    return x + -y


@case(SUBTRACT, Rewritten(), lambda: (numbers(3, 4, dtype=torch.float16), torch.tensor(2.0)))
def zero_dimensional_operand(x: Tensor, y: Tensor) -> Tensor:
    """A 0-d float32 tensor does not widen a float16 one."""
    return x + -y


@case(ONE, Refused("replacement", "int64 instead of float32"), lambda: (torch.tensor(3),))
def zero_dimensional_integer(x: Tensor) -> Tensor:
    """A 0-d integer times 1.0 is float32 as well."""
    return x * 1.0 + torch.arange(3)


@case(THERE_AND_BACK, Rewritten(), matrices(1, dtype=torch.float32))
def widened_and_narrowed(x: Tensor) -> Tensor:
    """float32 → float64 → float32 loses nothing."""
    return x.to(torch.float64).to(torch.float32).sin()


@case(THERE_AND_BACK, Refused("replacement", "float16 instead of float32"), half)
def narrower_input(x: Tensor) -> Tensor:
    """The same two casts of a float16 tensor end in float32."""
    return x.to(torch.float64).to(torch.float32).sin()


@case(THERE_AND_BACK, Refused("replacement", "float64 instead of float32"), lambda: (numbers(3, 4).requires_grad_(),))
def wider_input(x: Tensor) -> Tensor:
    """Of a float64 tensor they round."""
    return x.to(torch.float64).to(torch.float32).sin()


@case(THERE_AND_BACK, Refused("pattern", "float16"), matrices(1, dtype=torch.float32))
def narrowed_and_widened(x: Tensor) -> Tensor:
    """float32 → float16 → float32 rounds."""
    return x.to(torch.float16).to(torch.float32).sin()


@case(SILU, Rewritten(), lambda: (numbers(3, 4).to(torch.complex128),))
def complex_numbers(x: Tensor) -> Tensor:
    """x·σ(x) of complex numbers."""
    return x * torch.sigmoid(x)


@case(SUBTRACT, Rewritten(), lambda: (numbers(3, 4).to(torch.complex128) * 1j, numbers(3, 4).to(torch.complex128)))
def complex_difference(x: Tensor, y: Tensor) -> Tensor:
    """Nothing about it is real."""
    return x + -y


@case(SUBTRACT, Rewritten(), lambda: (special()[0][:, None], special()[0]))
def infinite_and_undefined_values(x: Tensor, y: Tensor) -> Tensor:
    """∞ − ∞ and NaN come out as before, every pair of them."""
    return x + -y


@case(ONE, Rewritten(), special)
def one_times_undefined_values(x: Tensor) -> Tensor:
    """1·NaN, 1·∞ and 1·(−0)."""
    return torch.reciprocal(x * 1)


@case(ONE, Refused("pattern", "a computed value"), half)
class Tensor_that_holds_one(nn.Module):
    """A buffer whose value happens to be 1 is no constant: a checkpoint may hold another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def double(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).sin()


@case(ATTENTION, Rewritten(), lambda: tuple(numbers(1, 2, 5, 4, seed=i, dtype=torch.float16) for i in range(3)))
def half_precision_around_a_float_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float16 products, softmax in float32, as transformers writes it: the fused operator is as precise."""
    scores = q @ k.transpose(-2, -1) * 0.5
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


@case(ATTENTION, Refused("pattern", ""), lambda: tuple(numbers(1, 2, 5, 4, seed=i, dtype=torch.float32) for i in range(3)))
def scores_narrowed_before_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float32 scores rounded to float16: the fused operator would not."""
    scores = (q @ k.transpose(-2, -1) * 0.5).to(torch.float16)
    return torch.softmax(scores, -1).to(q.dtype) @ v


@case(THERE_AND_BACK, Refused("pattern", "moves the tensor to meta"), matrices(1, dtype=torch.float32, grad=False))
def moved_on_the_way(x: Tensor) -> Tensor:
    """The same two casts, one of which also changes the device."""
    return x.to("meta", torch.float64).to(torch.float32)


@case(SUBTRACT, Rewritten(), lambda: (numbers(3, 4), torch.tensor(2.0, dtype=torch.float64)))
def zero_dimensional_operand_of_another_device(x: Tensor, y: Tensor) -> Tensor:
    """A 0-d tensor of the CPU joins any device."""
    return x.to("meta") + -y


@case(SUBTRACT, Rewritten(), lambda: (torch.tensor(2.0, dtype=torch.float64), numbers(3, 4)))
def first_operand_of_another_device(x: Tensor, y: Tensor) -> Tensor:
    """The same with the 0-d tensor on the left."""
    return (x + -y.to("meta")).sin()
