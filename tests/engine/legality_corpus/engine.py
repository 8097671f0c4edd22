# SPDX-License-Identifier: Apache-2.0
"""This engine on one case: capture, plan, apply, and compare with the model as its caller sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import rewriter
from rewriter import legality
from rewriter.matcher import Miss
from rewriter.program import Program

from .behaviour import Behaviour, difference, observe
from .case import Case, tensors


@dataclass(frozen=True)
class Attempt:
    """What came of a case.

    Attributes:
        sites: how many were rewritten; changed: how a caller could tell, None if not at all.
        kinds: of the legality reasons against matches, and the steps of misses; misses: everything that was said.
    """

    sites: int
    changed: str | None
    kinds: frozenset[str]
    misses: tuple[Miss, ...]


def attempt(case: Case) -> Attempt:
    """Plan and apply the case's rewrite."""
    program = captured(case)
    expected = by_model(case)
    if (moved := difference(expected, by_program(program, case))) is not None:
        raise AssertionError(f"capturing alone changes {case.name}: {moved}")
    program = captured(case)  # a run may have written to buffers
    plan = rewriter.plan(program, [case.rewrite.ours])
    after = rewriter.apply(program, plan)
    changed = difference(expected, by_program(after, case))
    return Attempt(len(plan.sites), changed, frozenset(_kinds(program, case, plan.misses)), plan.misses)


def captured(case: Case) -> Program:
    return rewriter.capture(case.build(), case.inputs(), dynamic_shapes="auto" if case.dynamic else "static")


def rewritten(program: Program, case: Case) -> Program:
    return rewriter.apply(program, rewriter.plan(program, [case.rewrite.ours]))


def by_model(case: Case) -> Behaviour:
    """The model itself."""
    model = case.build()
    return observe(model, case.inputs(), tensors(model))


def by_program(program: Program, case: Case) -> Behaviour:
    return observe(program.run, case.inputs(), program.tensors())


def _kinds(program: Program, case: Case, misses: Sequence[Miss]) -> Iterator[str]:
    yield from (miss.step for miss in misses)
    for rule in case.rewrite.ours.rules():
        for match in rule.find(program)[0]:
            reason = legality.refusal(program.facts, match)
            if reason is not None:
                yield reason.kind
