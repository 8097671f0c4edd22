# SPDX-License-Identifier: Apache-2.0
"""Applying a plan: weights become new parameters, edits go through the journal.

Two ways to apply: :func:`rewrite` computes new parameters from the old ones; :func:`replay` edits the graph of another
program of the same model (another signature, mode or dtype) on parameters that are in the store already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter import store
from rewriter.editing import Edit, Editor, adopt
from rewriter.errors import LegalityError, PlanError
from rewriter.matcher import Miss
from rewriter.modes import neutral
from rewriter.narrow import all_finite
from rewriter.planner import Plan, PlannedSite, declare, generator_for, rule_of
from rewriter.program import Program
from rewriter.rules import Rule, Site, full_names, locate
from rewriter.sizes import stored_bytes

if TYPE_CHECKING:
    from rewriter.calibration import Statistics

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SiteResult:
    """What one site became."""

    address: str
    paths: tuple[str, ...]
    pass_name: str
    rule: str
    contract: str
    bytes_before: int
    bytes_after: int
    figures: Mapping[str, float]
    choice: Mapping[str, Any]
    created: tuple[str, ...]
    replaced: tuple[str, ...]


@dataclass(frozen=True)
class Application:
    """A rewritten program, what its sites became, and the tensors that were replaced."""

    program: Program
    results: tuple[SiteResult, ...]
    originals: dict[str, Tensor]
    journal: tuple[Edit, ...]


@store.outside_inference_mode
def apply(program: Program, plan: Plan, statistics: Statistics | None = None) -> Program:
    """A new program with every site of ``plan`` rewritten; the old one is untouched.

    Raises:
        PlanError: the plan was made for another structure, or needs statistics that were not given.
    """
    return rewrite(program.fork(store.shared(program.root)), plan, statistics).program


@neutral()
def rewrite(
    program: Program, plan: Plan, statistics: Statistics | None = None, progress: Progress | None = None
) -> Application:
    """Apply ``plan`` to ``program`` and its store, in place. Raises PlanError, LegalityError."""
    _check(program, plan, statistics)
    editor = Editor(program)
    results: list[SiteResult] = []
    originals: dict[str, Tensor] = {}
    done = 0
    for rule, stage in _stages(plan):
        for planned, site in _assign(locate(rule, program).sites, stage):
            if site is None:
                raise PlanError(f"{planned.rule}: site {planned.address} is not in this program; make a plan for it")
            if progress is not None:
                progress(f"rewrite {planned.address.path}", done, len(plan.sites))
            tensors, result = _initialise(program, planned, site, statistics)
            results.append(result)
            editor.rewrite(site, tensors, planned.choice)
            # A head's new bias goes by the name of the one it replaces.
            originals |= {name: store.get(program.root, name) for name in result.replaced if name in tensors}
            adopt(program.root, tensors)
            for name in editor.unread(result.replaced):
                originals[name] = store.get(program.root, name)
                for known_as in program.aliases.get(name, (name,)):
                    store.remove(program.root, known_as)
            done += 1
        editor.finish()
    program.graph.lint()
    if progress is not None:
        progress("rewrite", done, len(plan.sites))
    return Application(program, tuple(results), originals, tuple(editor.journal))


@neutral()
def replay(program: Program, plan: Plan) -> Program:
    """The same edits on a program whose store holds the new parameters already.

    A site without parameters that this program does not have (an attention that drops out in training mode) is left
    as it is: the program computes the same function. Raises PlanError for a site whose parameters were replaced.
    """
    editor = Editor(program)
    for rule, stage in _stages(plan):
        found = locate(rule, program)
        for planned, site in _assign(found.sites, stage):
            if site is None and rule.parametric:
                site = _recall(rule, program, planned, found.misses)
            if site is not None:
                editor.rewrite(site, _present(editor, planned, site), planned.choice)
        editor.finish()
    program.graph.lint()
    return program


def _stages(plan: Plan) -> Iterator[tuple[Rule, Sequence[PlannedSite]]]:
    """Sites in plan order, grouped by the rule (with its settings) that takes them."""
    for _, group in groupby(plan.sites, key=lambda s: (s.pass_name, s.rule, repr(sorted(s.settings.items())))):
        sites = list(group)
        yield rule_of(sites[0]), sites


def _present(editor: Editor, planned: PlannedSite, site: Site) -> dict[str, Tensor]:
    """The site's parameters from the store; as descriptions where a later site has replaced them in turn."""
    root = editor.program.root
    names = full_names(site.rule, site, planned.choice)
    if all(store.has(root, name) for name in names):
        return {name: store.get(root, name) for name in names}
    declared = declare(editor, planned, site)
    return {name: store.get(root, name) if store.has(root, name) else declared[name] for name in names}


def _assign(sites: Sequence[Site], stage: Sequence[PlannedSite]) -> list[tuple[PlannedSite, Site | None]]:
    found = {site.address: site for site in sites}
    return [(planned, found.get(planned.address)) for planned in stage]


def _recall(rule: Rule, program: Program, planned: PlannedSite, misses: Sequence[Miss]) -> Site | None:
    """A site whose parameters were replaced, by what it reads; None if this program has no use for it.

    Raises:
        PlanError: the program computes with the site's modules in a way the rule cannot take.
    """
    matches = rule.recall(program, planned.address, planned.choice)
    if matches and all(rule.refusal(program, m) is None for m in matches):
        return Site(rule, planned.address, tuple(matches), planned.paths)
    if _reads(program, (*planned.paths, planned.address.path)):
        raise PlanError(_lost(planned, misses))
    return None


def _reads(program: Program, paths: Sequence[str]) -> bool:
    """Whether a tensor of one of the modules is read, under any of its names."""
    names = (known_as for name in program.parameter_nodes() for known_as in program.aliases.get(name, (name,)))
    return any(name.rpartition(".")[0] in paths for name in names)


def _lost(planned: PlannedSite, misses: Sequence[Miss]) -> str:
    near = [str(m) for m in misses if set(m.site.split(".")) & set(planned.address.path.split("."))]
    reasons = "".join(f"\n  {m}" for m in near[:3])
    return (
        f"{planned.rule}: {planned.address.path} is not found in the program captured for this call, but its parameters "
        f"were replaced; undo the site (opt.undo({planned.address.path!r})) or protect it with select={reasons}"
    )


def _initialise(
    program: Program, planned: PlannedSite, site: Site, statistics: Statistics | None
) -> tuple[dict[str, Tensor], SiteResult]:
    rule, match = site.rule, site.match
    replaced = rule.replaced_tensors(match)
    roles = rule.initialise(site, program.tensor, planned.choice, statistics, generator_for(planned))
    tensors = dict(
        zip(full_names(rule, site, planned.choice), (roles[r] for r in rule.roles(match, planned.choice)), strict=True)
    )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise LegalityError(f"{rule.name} at {site.address}: {name} came out with NaN or infinite values")
    with torch.no_grad():
        figures = rule.measure(site, program.tensor, roles, planned.choice, statistics)
    # A tensor that something else still reads (a tied embedding) is not saved by this site.
    before = sum(stored_bytes(program.tensor(name)) for name in replaced if _only_here(program, name, site))
    after = sum(stored_bytes(t) for t in tensors.values())
    result = SiteResult(
        str(site.address),
        site.paths,
        planned.pass_name,
        rule.name,
        str(rule.contract),
        before,
        after,
        figures,
        dict(planned.choice),
        tuple(tensors),
        replaced,
    )
    return tensors, result


def _only_here(program: Program, name: str, site: Site) -> bool:
    node = program.parameter_nodes().get(name)
    inside = {n for m in site.matches for n in m.nodes}
    return node is None or all(user in inside for user in node.users)


def _check(program: Program, plan: Plan, statistics: Statistics | None) -> None:
    if plan.structure != program.digest():
        raise PlanError(
            f"the plan was made for a program of structure {plan.structure}, this one is {program.digest()}; "
            "a plan fits checkpoints of the same architecture, call and versions: make it again with rewriter.plan"
        )
    if plan.statistics_digest is None:
        return
    if statistics is None:
        raise PlanError(
            "the plan was made with calibration statistics; pass statistics= (rewriter.calibrate makes them)"
        )
