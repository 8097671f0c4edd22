# SPDX-License-Identifier: Apache-2.0
"""Where a region ends: what is needed elsewhere, written, random, cast, of another shape, or in another kernel."""

from __future__ import annotations

import pytest
import torch
from emitted_chains import Built, Case, aten
from torch.fx import Node

from rewriter.codegen.emit_regions import Region, Search

ROWS, WIDTH = 6, 8


class Around(Built):
    """A graph with a linear layer in it."""

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        return self.input(torch.ones(shape, dtype=dtype))

    def call(self, target: object, *args: object) -> Node:
        return self.graph.call_function(target, args)  # type: ignore[arg-type]

    def linear(self, x: Node | None = None) -> Node:
        return self.call(aten.linear.default, x or self.tensor(ROWS, WIDTH), self.tensor(WIDTH, WIDTH))


def regions(case: Case, expensive: bool = False) -> list[Region]:
    return Search(case.program.facts, {aten.linear.default: "input"}, expensive).regions()


def fused(case: Case, expensive: bool = False) -> list[list[str]]:
    """Names of the fused operators, region by region."""
    found = regions(case, expensive)
    return [[str(node.target).split(".")[1] for node in region.fused] for region in found]


def test_a_chain() -> None:
    built = Around()
    y = built.call(aten.mul.Tensor, built.call(aten.gelu.default, built.linear()), 2.0)
    assert fused(built.case(y)) == [["gelu", "mul"]]


def test_a_value_that_is_needed_elsewhere_is_the_last() -> None:
    built = Around()
    half = built.call(aten.mul.Tensor, built.linear(), 0.5)
    rest = built.call(aten.relu.default, half)
    both = built.call(aten.cat.default, [half, rest])
    (region,) = regions(built.case(both))
    assert [n.target for n in region.fused] == [aten.mul.Tensor]
    assert "is also needed by" in region.miss


def test_paths_that_meet_again_are_one_region() -> None:
    built = Around()
    y = built.linear()
    z = built.call(aten.mul.Tensor, y, built.call(aten.sigmoid.default, y))
    assert fused(built.case(z)) == [["sigmoid", "mul"]]


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.sum.dim_IntList, ([-1],)),
        (aten.transpose.int, (0, 1)),
        (aten.softmax.int, (-1,)),
        (aten.dropout.default, (0.5, True)),
    ],
)
def test_not_pointwise(target: object, args: tuple[object, ...]) -> None:
    built = Around()
    y = built.call(target, built.call(aten.relu.default, built.linear()), *args)
    assert fused(built.case(built.call(aten.neg.default, y))) == [["relu"]]


def test_two_layers_share_what_stands_between() -> None:
    built = Around()
    gate = built.linear()
    up = built.linear()
    y = built.call(aten.mul.Tensor, built.call(aten.silu.default, gate), up)
    assert fused(built.case(y)) == [["silu", "mul"], []]


def test_a_write_between_is_a_reason() -> None:
    """Computed at the end, the product would read what was written meanwhile."""
    built = Around()
    x = built.tensor(ROWS, WIDTH)
    copy = built.call(aten.mul.Tensor, x, 1.5)
    y = built.linear(copy)
    built.call(aten.add_.Tensor, copy, 1.0)
    z = built.call(aten.relu.default, y)
    (region,) = regions(built.case(z))
    assert region.fused == () and region.root is region.anchor
    assert "is written by" in region.miss


def test_double_and_integers_are_left() -> None:
    built = Around()
    y = built.call(aten.to.dtype, built.call(aten.relu.default, built.linear()), torch.float64)
    assert fused(built.case(built.call(aten.mul.Tensor, y, 2.0))) == [["relu"]]


@pytest.mark.parametrize(
    ("shape", "form", "repeats"),
    [
        ((3, 2, WIDTH), "tile", False),
        ((2, WIDTH), "tile", True),
        ((1, 2, WIDTH), "tile", True),
        ((WIDTH,), "column", False),
        ((1, 1, WIDTH), "column", False),
        ((3, 2, 1), "row", False),
        ((2, 1), "row", True),
        ((), "scalar", False),
        ((1, 1), "scalar", False),
    ],
)
def test_forms_of_operands(shape: tuple[int, ...], form: str, repeats: bool) -> None:
    built = Around()
    y = built.linear(built.tensor(3, 2, WIDTH))
    (region,) = regions(built.case(built.call(aten.add.Tensor, y, built.tensor(*shape))))
    (operand,) = region.after
    assert (operand.form, operand.repeats) == (form, repeats)


def test_an_operand_over_the_middle_is_left() -> None:
    built = Around()
    y = built.linear(built.tensor(3, 2, WIDTH))
    (region,) = regions(built.case(built.call(aten.add.Tensor, y, built.tensor(3, 1, WIDTH))))
    assert region.fused == ()
    assert "lies neither over rows nor over columns" in region.miss


def test_a_prologue_takes_cheap_functions_of_one_tensor() -> None:
    built = Around()
    x = built.call(aten.mul.Tensor, built.tensor(ROWS, WIDTH), built.tensor(WIDTH))
    assert fused(built.case(built.linear(x))) == [["mul"]]
    costly = Around()
    x = costly.call(aten.gelu.default, costly.tensor(ROWS, WIDTH))
    case = costly.case(costly.linear(x))
    assert fused(case) == [[]] and fused(case, expensive=True) == [["gelu"]]
    two = Around()
    x = two.call(aten.mul.Tensor, two.tensor(ROWS, WIDTH), two.tensor(ROWS, WIDTH))
    case = two.case(two.linear(x))
    assert fused(case) == [[]] and fused(case, expensive=True) == [["mul"]]


def test_a_prologue_that_others_read_is_left() -> None:
    built = Around()
    x = built.call(aten.mul.Tensor, built.tensor(ROWS, WIDTH), 2.0)
    both = built.call(aten.cat.default, [built.linear(x), x])
    assert fused(built.case(both)) == [[]]


def test_inputs_stay_inputs() -> None:
    """A graph whose result is the product itself has nothing to fuse, and says so."""
    built = Around()
    (region,) = regions(built.case(built.linear()))
    assert region.fused == () and region.miss == "it is a result of the program"
