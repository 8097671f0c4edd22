# SPDX-License-Identifier: Apache-2.0
"""Rewriting with exact rules in place: locate, check, edit, until nothing applies.

:func:`rewrite` is the short way, without plan or undo; the planner runs the same :class:`Session` on a copy whose new
parameters are descriptions, and writes down what happened.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter import claims, store
from rewriter.editing import Edit, Editor, adopt
from rewriter.errors import LegalityError, PlanError
from rewriter.fixpoint import ROUNDS, to_fixpoint
from rewriter.matcher import Miss
from rewriter.modes import neutral
from rewriter.narrow import all_finite
from rewriter.program import Program
from rewriter.rules import Address, Pass, Rule, Site, full_names, locate

Prepared = tuple[Site, Mapping[str, Any], Mapping[str, Tensor]]  # site, choices, new tensors by full name


@store.outside_inference_mode
@neutral()
def rewrite(program: Program, rules: Sequence[Rule | Pass], *, seed: int = 0, rounds: int = ROUNDS) -> tuple[Edit, ...]:
    """Rewrite ``program`` and its store in place until none of ``rules`` applies; returns the journal.

    A place whose replacement could be told from what it replaces is left alone; :func:`rewriter.plan` says why.

    Args:
        program: changed; after an error it is no longer of use.
        rules: EXACT rules, or passes of them, in the order they are tried.
        seed: of random draws, together with address and rule.
        rounds: the bound.

    Raises:
        PlanError: a rule is not EXACT, does not do what it claims, or the rules do not come to an end.
    """
    flat = [rule for one in rules for rule in (one.rules() if isinstance(one, Pass) else (one,))]
    if inexact := [rule.name for rule in flat if not rule.contract.exact]:
        raise PlanError(f"only EXACT rules are applied without a plan; {', '.join(inexact)} is not; use rewriter.plan")
    session = Session(program)

    def stage(index: int) -> list[Edit]:
        rule = flat[index]
        prepared = [_prepared(program, site, seed) for site in session.sites(rule) if unfit(program, site) is None]
        return [edit for edit in session.carry_out(rule, prepared) if edit is not None]

    to_fixpoint(session.editor, flat, stage, rounds)
    program.rebind()
    return tuple(session.editor.journal)


class Session:
    """One program under rules, stage by stage. A stage is one rule, located once, its sites rewritten together."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.editor = Editor(program)
        self.misses: list[Miss] = []  # sites that were refused once their replacement was built
        self._rounds: Counter[str] = Counter()
        self._barred: set[tuple[str, Node]] = set()

    def sites(self, rule: Rule) -> list[Site]:
        """Where the rule applies; of sites that overlap the first, for the others may look different after it."""
        return disjoint(self.open_sites(rule, locate(rule, self.program, round=self.round(rule), explain=False).sites))

    def round(self, rule: Rule) -> int:
        """How many stages of this rule there have been."""
        return self._rounds[rule.name]

    def open_sites(self, rule: Rule, sites: Sequence[Site]) -> list[Site]:
        """Those that have not been refused before."""
        return [site for site in sites if (rule.name, site.match.root) not in self._barred]

    def carry_out(self, rule: Rule, prepared: Sequence[Prepared]) -> list[Edit | None]:
        """Rewrite the sites of one stage; None for a site that is refused, which is then a miss.

        Raises:
            PlanError: the rule does not do what it claims.
        """
        if not prepared:
            return []
        tally = claims.Tally(self.program.graph)
        edits: list[Edit | None] = []
        for site, choice, tensors in prepared:
            try:
                edit = self.editor.rewrite(site, tensors, choice)
            except LegalityError as error:
                self._barred.add((rule.name, site.match.root))
                source = self.program.facts.source(site.match.root)
                self.misses.append(Miss(rule.name, site.address.path, "replacement", str(error), source=source))
                edits.append(None)
                continue
            edits.append(edit)
            adopt(self.program.root, tensors)
            for name in self.editor.unread(tuple(n for n in edit.replaced if n not in tensors)):
                for known_as in self.program.aliases.get(name, (name,)):
                    store.remove(self.program.root, known_as)
        if (changed := tally.changed(self.program.graph, self.editor.rewired)) is not None:
            raise PlanError(
                f"{rule.name}: {changed.name} was changed without being named as replaced; "
                "a rule builds new nodes and returns what they replace"
            )
        if any(edit is not None for edit in edits):
            self._rounds[rule.name] += 1
            self.editor.finish(compile=False)
        return edits


def disjoint(sites: Iterable[Site]) -> list[Site]:
    """The sites, without those that share nodes with an earlier one."""
    taken: set[Node] = set()
    kept = []
    for site in sites:
        nodes = {node for match in site.matches for node in match.nodes if node not in match.shared} | site.roots
        if taken.isdisjoint(nodes):
            taken |= nodes
            kept.append(site)
    return kept


def unfit(program: Program, site: Site) -> str | None:
    """Why no rule can take new parameters from the weights of a site; None if it can."""
    for name in site.rule.replaced_tensors(site.match):
        tensor = program.tensor(name)
        if name.startswith(store.CONSTANTS + "."):
            return "the weight is a constant of the model's code, not a parameter or buffer"
        if tensor.is_complex():
            return f"weight {name!r} is complex ({tensor.dtype}); only real floating weights can be rewritten"
        if not tensor.is_floating_point():
            return f"weight {name!r} is an integer tensor ({tensor.dtype}); only real floating weights can be rewritten"
        if isinstance(tensor, torch._subclasses.FakeTensor):
            continue  # made by an exact rule from tensors that were checked
        if not all_finite(tensor):
            return f"weight {name!r} has NaN or infinite values; repair the checkpoint before it is rewritten"
    return None


def generator(seed: int, address: Address, rule: str) -> torch.Generator:
    """A site's own random stream: a function of (seed, address, rule) and nothing else."""
    digest = hashlib.sha256(f"{seed}/{address}/{rule}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _prepared(program: Program, site: Site, seed: int) -> Prepared:
    rule = site.rule
    if not rule.parametric:
        choice = rule.settle(site, program, None, generator(seed, site.address, rule.name))
        return site, choice, {}
    choice = rule.settle(site, program, None, generator(seed, site.address, rule.name))
    made = rule.initialise(site, program.tensor, choice, None, generator(seed, site.address, rule.name))
    names = full_names(rule, site, choice)
    return site, choice, dict(zip(names, (made[role] for role in rule.roles(site.match, choice)), strict=True))
