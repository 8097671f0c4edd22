# SPDX-License-Identifier: Apache-2.0
"""The matcher against networkx's VF2, on the part of the pattern language that VF2 can express."""

from __future__ import annotations

from hypothesis import assume, given, settings

from rewriter.matcher import find
from rewriter.pattern import Call, Var, walk

from .test_enumerator import Example, examples
from .vf2 import vf2_matches

_PARTS = 6  # of a pattern; the number of ways to identify them is Bell's: 203


@settings(max_examples=100)
@given(examples(plain=True))
def test_roots_and_nodes_are_those_of_vf2(example: Example) -> None:
    objects = list(walk(*example.pattern.outputs))
    assume(sum(isinstance(e, Call) for e in objects) + len({e.name for e in objects if isinstance(e, Var)}) <= _PARTS)
    found = {(match.root, frozenset(match.nodes)) for match in find(example.made.facts(), example.pattern)}
    expected = vf2_matches(example.made.graph, example.pattern)
    assert {root for root, _ in found} == {root for root, _ in expected}
    assert found <= expected  # where a root has several, the first is reported
