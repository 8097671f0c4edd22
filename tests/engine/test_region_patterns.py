# SPDX-License-Identifier: Apache-2.0
"""`RegionOf` in patterns: a value by what may compute it, not by how."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewriter.errors import PatternError
from rewriter.expressions import RegionOf, Var
from rewriter.facts import Facts
from rewriter.matcher import explain, find
from rewriter.operators import relu, softmax
from rewriter.pattern import pattern

from .helpers import trace

A = torch.rand(3, 3)
MASKING = frozenset("add sub mul abs neg".split())


def masked(x: Tensor, y: Tensor) -> Tensor:
    bias = (y * 2.0 - 1.0).abs().neg()
    return torch.softmax(x.relu() + bias, -1)


def test_a_region_from_the_inputs_is_captured_whole() -> None:
    facts = Facts(trace(masked, A, A))
    (match,) = find(facts, pattern("masked", softmax(relu(Var("x")) + RegionOf("bias", MASKING), -1)))
    region = match["bias"]
    assert [node.target._schema.name for node in region.nodes] == ["aten::mul", "aten::sub", "aten::abs", "aten::neg"]
    assert region.exit is region.nodes[-1] and [node.op for node in region.entries] == ["placeholder"]
    assert not set(region.nodes) & set(match.nodes)  # an input of the match, as a variable's value is


def test_an_operator_that_is_not_allowed_is_named() -> None:
    facts = Facts(trace(lambda x, y: torch.softmax(x.relu() + y.sin().neg(), -1), A, A))
    wanted = pattern("masked", softmax(relu(Var("x")) + RegionOf("bias", MASKING), -1))
    assert not find(facts, wanted)
    (miss,) = explain(facts, wanted)
    assert miss.reason == "sin (sin) is not among the operators allowed here"


def test_a_region_with_an_entry_is_part_of_the_match() -> None:
    def branches(x: Tensor) -> Tensor:
        y = x.relu()
        return torch.softmax((y * 2.0).neg() + (y - 1.0).abs(), -1)

    facts = Facts(trace(branches, A))
    wanted = pattern("diamond", softmax(RegionOf("inner", MASKING, entry=relu(Var("x"))), -1))
    (match,) = find(facts, wanted)
    assert len(match["inner"].nodes) == 5 and set(match["inner"].nodes) < set(match.nodes) and len(match.nodes) == 7


def test_a_value_that_leaves_the_region_elsewhere_makes_it_none() -> None:
    def leaking(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.relu()
        middle = y * 2.0
        return torch.softmax(middle.neg() + (y - 1.0).abs(), -1), middle

    facts = Facts(trace(leaking, A))
    wanted = pattern("diamond", softmax(RegionOf("inner", MASKING, entry=relu(Var("x"))), -1))
    assert not find(facts, wanted)


def test_a_region_beside_an_alternative() -> None:
    wanted = pattern("either", softmax(relu(Var("x")) | RegionOf("rest", MASKING), -1))
    (plain,) = find(Facts(trace(lambda x: torch.softmax(x.relu(), -1), A)), wanted)
    assert plain["rest"] is None
    (other,) = find(Facts(trace(lambda x: torch.softmax(x.abs().neg(), -1), A)), wanted)
    assert other["x"] is None and len(other["rest"].nodes) == 2


def test_impossible_regions_are_refused_when_written() -> None:
    with pytest.raises(PatternError, match="allows no operator"):
        pattern("empty", softmax(RegionOf("r", frozenset()), -1))
    with pytest.raises(PatternError, match="'r' is RegionOf"):
        pattern("twice", softmax(RegionOf("r", MASKING) + RegionOf("r", MASKING), -1))
