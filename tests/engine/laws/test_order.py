# SPDX-License-Identifier: Apache-2.0
"""What matches does not depend on how the graph happens to be written down."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.matcher import find

from .graphs import Builder, Chance, commuted, reordered
from .test_enumerator import Example, examples


def roots(made: Builder, example: Example) -> set[str]:
    return {match.root.name for match in find(made.facts(), example.pattern)}


def groups(made: Builder, example: Example) -> set[tuple[str, frozenset[str], str]]:
    found = find(made.facts(), example.pattern)
    return {(m.root.name, frozenset(n.name for n in m.nodes), repr(sorted(m.captures.items()))) for m in found}


@settings(max_examples=150)
@given(examples(), st.data())
def test_matches_do_not_depend_on_node_order(example: Example, data: st.DataObject) -> None:
    """Of several outputs, the further ones are the first that fit: there, only the roots are the same."""
    shuffled = reordered(example.made, Chance(data.draw))
    compare = groups if len(example.pattern.outputs) == 1 else roots
    assert compare(shuffled, example) == compare(example.made, example)


@settings(max_examples=150)
@given(examples(), st.data())
def test_roots_do_not_depend_on_operand_order(example: Example, data: st.DataObject) -> None:
    """The captures may: of x + y, either operand is x."""
    assert roots(commuted(example.made, Chance(data.draw)), example) == roots(example.made, example)
