# SPDX-License-Identifier: Apache-2.0
"""`find` and `explain`: where a pattern, view or rule applies to a program, and why it does not elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from rewriter import matcher
from rewriter.matcher import Match, Miss
from rewriter.pattern import Pattern
from rewriter.program import Program
from rewriter.regions import inside_bodies
from rewriter.rules import Pass, Rule, locate
from rewriter.views import View


def find(program: Program, rule: Pattern | View | Rule | Pass) -> list[Match]:
    """Every place where ``rule`` applies, in graph order; of a rule or pass, those its guards let through."""
    if isinstance(rule, Pass):
        return [match for one in rule.rules() for match in find(program, one)]
    if isinstance(rule, Rule):
        return [match for site in locate(rule, program).sites for match in site.matches]
    return rule.find(program) if isinstance(rule, View) else matcher.find(program, rule)


def explain(program: Program, rule: Pattern | View | Rule | Pass, site: str | None = None) -> list[Miss]:
    """Best partial matches at or below the module path ``site`` (default: everywhere), with step, reason and line.

    A place inside a control-flow body that would match in the main graph comes first.
    """
    if isinstance(rule, Pass):
        return [miss for one in rule.rules() for miss in explain(program, one, site)]
    if isinstance(rule, Rule):
        return _below(site, locate(rule, program).misses)
    explained = rule.explain(program, site) if isinstance(rule, View) else matcher.explain(program, rule, site)
    inside = _below(site, inside_bodies(rule.name, program, lambda body: find(body, rule)))
    return [*inside, *(miss for miss in explained if miss.node is not None)] if inside else explained


def _below(site: str | None, misses: Iterable[Miss]) -> list[Miss]:
    return [m for m in misses if site is None or m.site == site or m.site.startswith(site + ".")]
