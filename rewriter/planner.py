# SPDX-License-Identifier: Apache-2.0
"""Planning: which rule takes which site. A plan is decisions, never tensors, and can be read before anything changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter import registry, store
from rewriter.editing import Edit, Editor
from rewriter.errors import LegalityError, PlanError
from rewriter.fixpoint import to_fixpoint
from rewriter.matcher import Miss
from rewriter.modes import neutral
from rewriter.program import Program
from rewriter.rewriting import Session, disjoint, generator, unfit
from rewriter.rules import Address, Kept, Pass, Refusals, Rule, Site, full_names, locate, near_misses
from rewriter.selecting import Selection, Selector

if TYPE_CHECKING:
    from rewriter.calibration import Statistics

SCHEMA = 2  # 1 had no stages: neighbours of one rule were one
_WEIGHTS = "weights"  # the step of a miss whose weights cannot be rewritten


@dataclass(frozen=True)
class PlannedSite:
    """One decision: this rule, with these settings and choices, at this address.

    Sites of one stage are located together, on the program that the stages before it left, and commute.
    """

    address: Address
    paths: tuple[str, ...]
    pass_name: str
    rule: str
    version: int
    settings: Mapping[str, Any]
    choice: Mapping[str, Any]
    seed: int
    stage: int = 0


@dataclass(frozen=True)
class Plan:
    """All decisions, in the order they apply, and (not stored) what was left alone and why."""

    structure: str
    sites: tuple[PlannedSite, ...] = ()
    statistics_digest: str | None = None
    misses: tuple[Miss, ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "structure": self.structure,
            "statistics": self.statistics_digest,
            "sites": [_site_to_json(s) for s in self.sites],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises PlanError for a plan of a newer schema or with unknown passes or rules."""
        if data.get("schema") not in (1, SCHEMA):
            raise PlanError(f"plan schema {data.get('schema')!r} is not one this version reads (1 to {SCHEMA})")
        try:
            sites = [_site_from_json(s) for s in data["sites"]]
            sites = _staged(sites) if data["schema"] == 1 else sites
            plan = cls(str(data["structure"]), tuple(sites), data.get("statistics"))
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan: {error!r} is missing or of the wrong kind") from error
        for site in plan.sites:
            rule_of(site)
        return plan

    def __rich__(self) -> Any:
        from rewriter.rendering import plan_table

        return plan_table(self)


@neutral()
def plan(
    program: Program,
    passes: Sequence[str | Pass],
    *,
    select: Selection | None = None,
    expect: Mapping[str, int] | None = None,
    statistics: Statistics | None = None,
    seed: int = 0,
    allow_untrained: bool = True,
) -> Plan:
    """Decide which site gets which rule.

    EXACT passes come first and are applied to a scratch copy, round after round until none of their rules applies;
    approximate passes then match that one program, and a site wanted by two goes to: ``select``, then the more
    specific view, then list order. The loser is a miss.

    Args:
        program: what to rewrite; not changed.
        passes: names, instances, or a mixture.
        select: module path, or ``re:`` and a regular expression, -> pass name, or None to protect. An exact path beats
            a regular expression, the first expression wins.
        expect: pass or rule name -> number of sites; any other number is an error.
        statistics: what :func:`rewriter.calibrate` collected.
        seed: seeds every random draw together with the site's address and the rule.

    Raises:
        PlanError: unknown pass or option, ``expect`` or an exact ``select`` not met, rules that never come to an end
            or do not do what they claim.
        LegalityError: a site that ``select`` names exactly would be unsound to rewrite, or weights that ``expect``
            counts on cannot be rewritten.
    """
    resolved = registry.resolve(passes)
    chosen = Selector(select or {}, [p.name for p in resolved])
    _refuse_untrained(resolved, allow_untrained)
    scratch = program.fork(_copy_of_store(program), compile=False)
    sites, misses = _exact(scratch, [p for p in resolved if p.contract.exact], chosen, statistics, seed)
    rest = [(p, rule) for p in resolved if not p.contract.exact for rule in p.rules()]
    taken, missed = _take(rest, [locate(rule, scratch) for _, rule in rest], scratch, chosen, statistics, seed)
    sites += _staged([planned for planned, _ in taken], after=sites)
    misses += missed
    chosen.check(sites, misses)
    _check_expected(expect or {}, sites, misses, resolved)
    used = statistics is not None and any(not p.contract.exact for p in resolved)
    return Plan(
        program.digest(), tuple(sites), statistics.digest() if used and statistics else None, _without_nodes(misses)
    )


def _without_nodes(misses: Iterable[Miss]) -> tuple[Miss, ...]:
    """What a plan keeps of its misses: text. A node would keep the scratch graph alive, and cannot be pickled."""
    return tuple(dict.fromkeys(dataclasses.replace(m, node=None) for m in misses))


def rule_of(site: PlannedSite) -> Rule:
    """The rule a planned site names, configured. Raises PlanError."""
    one = registry.make(site.pass_name, site.settings)
    for rule in one.rules():
        if rule.name == site.rule:
            if rule.version != site.version:
                raise PlanError(
                    f"rule {site.rule} is version {rule.version} here, {site.version} in the plan; plan again"
                )
            return rule
    raise PlanError(f"pass {site.pass_name!r} has no rule {site.rule!r} with settings {dict(site.settings)}")


def generator_for(site: PlannedSite) -> torch.Generator:
    """The site's own random stream: a function of (seed, address, rule) and nothing else."""
    return generator(site.seed, site.address, site.rule)


def stages(plan: Plan) -> list[tuple[Rule, list[PlannedSite]]]:
    """The plan's stages in order, each with its rule."""
    ordered = sorted(plan.sites, key=lambda site: site.stage)
    grouped = [list(group) for _, group in groupby(ordered, key=lambda site: (site.stage, _rule_key(site)))]
    return [(rule_of(sites[0]), sites) for sites in grouped]


def _rule_key(site: PlannedSite) -> tuple[str, str, str]:
    return site.pass_name, site.rule, repr(sorted(site.settings.items()))


def _staged(sites: Sequence[PlannedSite], after: Sequence[PlannedSite] = ()) -> list[PlannedSite]:
    """One stage for each run of sites of one rule, numbered on from those of ``after``."""
    first = max((site.stage for site in after), default=-1) + 1
    runs = groupby(sites, key=_rule_key)
    return [dataclasses.replace(site, stage=first + number) for number, (_, run) in enumerate(runs) for site in run]


# ------------------------------------------------------------------------------------------------- who gets what


def _exact(
    scratch: Program, passes: Sequence[Pass], chosen: Selector, statistics: Statistics | None, seed: int
) -> tuple[list[PlannedSite], list[Miss]]:
    """Run exact rules on the scratch program to the end, and note what they did and, at the end, why not more."""
    rules = [(one, rule) for one in passes for rule in one.rules()]
    session = Session(scratch)
    sites: list[PlannedSite] = []
    misses: list[list[Miss]] = [[] for _ in rules]  # of the last time each rule was asked
    number = 0

    def stage(index: int) -> list[Edit]:
        nonlocal number
        rule = rules[index][1]
        found = locate(rule, scratch, round=session.round(rule), explain=False)
        found = dataclasses.replace(found, sites=tuple(session.open_sites(rule, found.sites)))
        taken, misses[index] = _take([rules[index]], [found], scratch, chosen, statistics, seed)
        kept = {id(site) for site in disjoint(site for _, site in taken)}
        taken = [(planned, site) for planned, site in taken if id(site) in kept]
        edits = session.carry_out(
            rule, [(site, planned.choice, declare(session.editor, planned, site)) for planned, site in taken]
        )
        done = [planned for (planned, _), edit in zip(taken, edits, strict=True) if edit is not None]
        sites.extend(dataclasses.replace(planned, stage=number) for planned in done)
        number += bool(done)
        return [edit for edit in edits if edit is not None]

    to_fixpoint(session.editor, [rule for _, rule in rules], stage)
    explained = [miss for (_, rule), known in zip(rules, misses, strict=True) for miss in (*known, *near_misses(rule, scratch))]
    return sites, [*explained, *session.misses]


def _take(
    rules: Sequence[tuple[Pass, Rule]],
    located: Sequence[Refusals],
    program: Program,
    chosen: Selector,
    statistics: Statistics | None,
    seed: int,
) -> tuple[list[tuple[PlannedSite, Site]], list[Miss]]:
    """Sites of several rules on one program, conflicts settled; in rule order, then graph order."""
    candidates: list[tuple[Pass, Rule, Site]] = []
    misses: list[Miss] = []
    for (one, rule), found in zip(rules, located, strict=True):
        misses += found.misses
        for site in found.sites:
            protected = chosen.forbids(one.name, site)
            reason = protected or unfit(program, site)
            if reason is not None:
                misses.append(_miss(program, site, reason, "plan" if protected else _WEIGHTS))
                continue
            candidates.append((one, rule, site))
    owner: dict[Any, tuple[Pass, Rule, Site]] = {}
    ranked = sorted(
        candidates, key=lambda c: (not chosen.names(c[0].name, c[2]), -c[1].specificity)
    )  # stable: list order
    choices: dict[int, dict[str, Any]] = {}  # of the winners
    for candidate in ranked:
        _, rule, site = candidate
        taken_by = next((owner[n] for n in site.roots if n in owner), None)
        if taken_by is not None:
            misses.append(_miss(program, site, f"taken by {taken_by[1].name}"))
            continue
        try:
            choices[id(candidate)] = rule.settle(site, program, statistics, generator(seed, site.address, rule.name))
        except Kept as kept:
            misses.append(_miss(program, site, str(kept)))
            continue
        owner |= dict.fromkeys(site.roots, candidate)
    for _, rule in rules:
        together = [c for c in candidates if c[1] is rule and id(c) in choices]
        if not together:
            continue
        settled = rule.settle_all([c[2] for c in together], [choices[id(c)] for c in together], program, statistics)
        choices |= {id(c): dict(choice) for c, choice in zip(together, settled, strict=True)}
    taken = []
    for candidate in candidates:
        if id(candidate) not in choices:
            continue
        one, rule, site = candidate
        choice = choices[id(candidate)]
        planned = PlannedSite(site.address, site.paths, one.name, rule.name, rule.version, one.settings(), choice, seed)
        taken.append((planned, site))
    return taken, misses


def _miss(program: Program, site: Site, reason: str, step: str = "plan") -> Miss:
    return Miss(
        rule=site.rule.name,
        site=site.address.path,
        step=step,
        reason=reason,
        expected="",
        found="",
        source=program.facts.source(site.match.root),
    )


def declare(editor: Editor, planned: PlannedSite, site: Site) -> dict[str, Tensor]:
    """The new parameters of an exact site as fake tensors, by full name: shapes and dtypes without values."""

    def read(name: str) -> Tensor:
        value: Tensor = editor.readers[name].meta["val"]
        return value

    with editor.fake_mode:
        roles = site.rule.initialise(site, read, planned.choice, None, generator_for(planned))
    names = full_names(site.rule, site, planned.choice)
    return dict(zip(names, (roles[r] for r in site.rule.roles(site.match, planned.choice)), strict=True))


def _copy_of_store(program: Program) -> torch.nn.Module:
    root = store.Namespace()
    for name, tensor in store.tensors(program.root):
        store.put(root, name, tensor)
    return root


def _check_expected(
    expect: Mapping[str, int], sites: Sequence[PlannedSite], misses: Sequence[Miss], passes: Sequence[Pass]
) -> None:
    rules = {rule.name: p.name for p in passes for rule in p.rules()}
    for name, count in expect.items():
        if name not in rules and name not in rules.values():
            raise PlanError(
                f"expect names {name!r}, which is neither pass nor rule{registry.nearest(name, [*rules, *rules.values()])}"
            )
        found = sum(name in (s.pass_name, s.rule) for s in sites)
        if found != count:
            near = [m for m in misses if m.rule == name or rules.get(m.rule) == name]
            near.sort(
                key=lambda m: (m.step not in ("plan", "guard"), -m.depth)
            )  # matched and refused, then nearly matched
            listed = "".join(f"\n  {m}" for m in near[:5]) or "\n  no near misses"
            unfit = found < count and any(m.step == _WEIGHTS for m in near)
            error = LegalityError if unfit else PlanError
            raise error(f"expected {count} sites of {name}, found {found}; nearest misses:{listed}")


def _refuse_untrained(passes: Iterable[Pass], allowed: bool) -> None:
    if allowed:
        return
    for one in passes:
        if one.contract.kind == "LEARNED":
            raise PlanError(
                f"{one.name} needs training to be good and allow_untrained=False; give recover= or leave it out"
            )


# --------------------------------------------------------------------------------------------------------- JSON


def _site_to_json(site: PlannedSite) -> dict[str, Any]:
    a = site.address
    return {
        "address": {"path": a.path, "role": a.role, "ordinal": a.ordinal, "digest": a.digest, "round": a.round},
        "paths": list(site.paths),
        "pass": site.pass_name,
        "rule": site.rule,
        "version": site.version,
        "settings": dict(site.settings),
        "choice": dict(site.choice),
        "seed": site.seed,
        "stage": site.stage,
    }


def _site_from_json(data: Mapping[str, Any]) -> PlannedSite:
    a = data["address"]
    address = Address(str(a["path"]), str(a["role"]), int(a["ordinal"]), str(a["digest"]), int(a.get("round", 0)))
    return PlannedSite(
        address,
        tuple(data["paths"]),
        str(data["pass"]),
        str(data["rule"]),
        int(data["version"]),
        dict(data["settings"]),
        dict(data["choice"]),
        int(data["seed"]),
        int(data.get("stage", 0)),
    )


def dumps(plan: Plan) -> str:
    """Canonical JSON: the same plan gives the same bytes."""
    return json.dumps(plan.to_json(), indent=1, sort_keys=True)
