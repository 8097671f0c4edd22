# SPDX-License-Identifier: Apache-2.0
"""The matcher finds exactly what the written meaning of patterns says: on random graphs, for random patterns."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.facts import Facts
from rewriter.matcher import find
from rewriter.pattern import Pattern
from rewriter.solver import Solver

from .enumerator import Meaning
from .graphs import Builder, Chance, add_noise, finish, start
from .patterns import Writer, say
from .planting import EDITS, Planter


class Example:
    """A graph, and a pattern that was planted in it. (No dataclass: its repr is what a counterexample shows.)"""

    def __init__(self, made: Builder, pattern: Pattern) -> None:
        self.made, self.pattern = made, pattern

    def __repr__(self) -> str:
        outputs = "; ".join(map(say, self.pattern.outputs))
        through = ", ".join(kind.name for kind in self.pattern.transparent)
        return f"{self.made.graph}\n  pattern {outputs}\n  through {through or 'nothing'}"


@st.composite
def examples(
    draw: st.DrawFn, plain: bool = False, exact: bool = False, plants: int = 1, edits: tuple[str, ...] = EDITS
) -> Example:
    """A graph with noise, faithful occurrences of a random pattern (`plants` and more), and near misses of it."""
    chance = Chance(draw)
    wanted = Writer(chance, plain=plain, exact=exact).pattern()
    made = start()
    for _ in range(plants + chance.upto(2)):
        for _ in range(chance.upto(3)):
            add_noise(made, chance)
        edit = chance.among(edits) if len(edits) < len(EDITS) or not chance.upto(1) else None
        Planter(made, chance, edit, 1 + chance.upto(3) if edit else -1).plant(wanted)
    finish(made, chance)
    return Example(made, wanted)


def compiled(facts: Facts, wanted: Pattern) -> list[Any]:
    return [(m.root, m.outputs, dict(m.captures), set(m.nodes), m.casts, m.shared) for m in find(facts, wanted)]


def searched(facts: Facts, wanted: Pattern) -> list[Any]:
    """What the search alone finds, which decides where the compiled pattern does not."""
    found = []
    for node in facts.graph.nodes:
        solver = Solver(facts, wanted)
        if node.target in wanted.root_targets and solver.solve(node):
            captures = {name: solver.captures.get(name) for name in wanted.names}
            found.append(
                (node, tuple(solver.outputs), captures, set(solver.nodes), set(solver.casts), set(solver.shared))
            )
    return found


def enumerated(facts: Facts, wanted: Pattern) -> list[Any]:
    found = []
    for s in Meaning(facts, wanted).matches():
        casts = {node for call, node in s.bound.items() if call.operator.casts}
        marked = {node for call, node in s.bound.items() if call.may_escape}
        found.append((s.outputs[0], s.outputs, s.captures, set(s.nodes), casts, marked | s.past))
    return found


@settings(max_examples=300)
@given(examples())
def test_matches_are_those_of_the_enumeration(example: Example) -> None:
    facts = example.made.facts()
    assert compiled(facts, example.pattern) == enumerated(facts, example.pattern)


@settings(max_examples=200)
@given(examples())
def test_the_solver_alone_finds_them_too(example: Example) -> None:
    facts = example.made.facts()
    assert searched(facts, example.pattern) == enumerated(facts, example.pattern)
