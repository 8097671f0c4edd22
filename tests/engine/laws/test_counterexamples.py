# SPDX-License-Identifier: Apache-2.0
"""Counterexamples that random search found in the matcher and in legality, as they were when they had become small."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from rewriter import operators as ops
from rewriter.legality import refusal
from rewriter.matcher import find
from rewriter.pattern import Const, Pattern, Var, pattern
from rewriter.predicates import parameter

from .graphs import Builder, aten, start
from .test_enumerator import compiled, enumerated, searched

x, y = Var("x"), Var("y")


def values(made: Builder) -> dict[str, Node]:
    return {node.name: node for node in made.graph.nodes}


def agreed(made: Builder, wanted: Pattern, *outputs: Node) -> list[Any]:
    """What all three find."""
    made.graph.output(list(outputs))
    facts = made.facts()
    expected = enumerated(facts, wanted)
    assert compiled(facts, wanted) == expected
    assert searched(facts, wanted) == expected
    return [(root, captures) for root, _, captures, *_ in expected]


def test_conditions_of_every_occurrence_hold() -> None:
    """The second x was compared with the first, and its condition forgotten."""
    made = start()
    p, a = values(made)["p"], values(made)["a"]
    of_input = made.call(aten.add.Tensor, a, a)
    of_parameter = made.call(aten.add.Tensor, p, p)
    found = agreed(made, pattern("p", x + Var("x", where=parameter)), of_input, of_parameter)
    assert found == [(of_parameter, {"x": p})]


def test_conditions_hold_of_the_same_value_behind_a_copy_too() -> None:
    made = start()
    a = values(made)["a"]
    copy = made.call(aten.clone.default, a)
    total = made.call(aten.add.Tensor, copy, a)
    wanted = pattern("p", x + Var("x", where=parameter), transparent=(ops.CONTIGUOUS,))
    assert agreed(made, wanted, total) == []


def test_a_further_output_may_read_the_value_behind_what_was_captured() -> None:
    """x is captured at the copy; the second output reads what was copied."""
    made = start()
    p = values(made)["p"]
    copy = made.call(aten.clone.default, p)
    total, other = made.call(aten.add.Tensor, copy, p), made.call(aten.relu.default, p)
    wanted = pattern("p", x + x, ops.relu(x), transparent=(ops.CONTIGUOUS,))
    assert agreed(made, wanted, total, other) == [(total, {"x": copy})]


def test_a_further_output_may_read_the_other_of_two_alternatives() -> None:
    made = start()
    p = values(made)["p"]
    one, two = made.call(aten.relu.default, p), made.call(aten.relu.default, p)
    outer = made.call(aten.relu.default, two)
    either = ops.relu(x) | ops.relu(x)
    found = agreed(made, pattern("p", either, ops.relu(either)), one, outer)
    assert [root for root, _ in found] == [one, two]


def test_an_option_of_the_root_is_interior_where_another_option_reads_it() -> None:
    """The cast is a root by itself, and an operand that is needed outside."""
    made = start()
    p = values(made)["p"]
    cast = made.call(aten.to.dtype, p, p.meta["val"].dtype)
    total = made.call(aten.add.Tensor, cast, p)
    inner = ops.cast(x, Const("t"))
    found = agreed(made, pattern("p", inner | (inner + y), transparent=ops.VALUE_PRESERVING), total, cast)
    assert [root for root, _ in found] == [cast]


def test_a_part_that_occurs_twice_does_not_capture_twice() -> None:
    """The transposed x is reached by one way only, when x is captured already."""
    made = start()
    p = values(made)["p"]
    difference = made.call(aten.sub.Tensor, p, p)
    swapped = made.call(aten.transpose.int, made.call(aten.clone.default, p), -1, -2)
    total = made.call(aten.add.Tensor, difference, made.call(aten.relu.default, swapped))
    shared = ops.swap_last(x)
    wanted = pattern("p", (shared | (y - x)) + ops.relu(shared), transparent=(ops.CONTIGUOUS,))
    assert agreed(made, wanted, total) == [(total, {"x": p, "y": p})]


def test_an_output_that_shares_storage_with_a_returned_interior_value_is_refused() -> None:
    """`shared()` lets x + 2 be returned as well, and then its view must go on sharing its storage."""
    made = start()
    total = made.call(aten.add.Tensor, values(made)["p"], 2)
    view = made.call(aten.unsqueeze.default, total, 0)
    wanted = pattern("p", ops.unsqueeze((x + Const("c")).shared(), 0))
    assert agreed(made, wanted, view, total) == [(view, {"x": values(made)["p"], "c": 2})]
    facts = made.facts()
    (match,) = find(facts, wanted)
    reason = refusal(facts, match)
    assert reason is not None and reason.kind == "alias" and "add" in reason.message


def test_a_view_of_an_interior_value_that_goes_is_no_reason() -> None:
    made = start()
    view = made.call(aten.unsqueeze.default, made.call(aten.add.Tensor, values(made)["p"], 2), 0)
    wanted = pattern("p", ops.unsqueeze((x + Const("c")).shared(), 0))
    assert agreed(made, wanted, view)
    facts = made.facts()
    assert refusal(facts, find(facts, wanted)[0]) is None
