# SPDX-License-Identifier: Apache-2.0
"""Applying a plan: weights become new parameters, edits go through the journal.

Two ways to apply: :func:`rewrite` computes new parameters from the old ones; :func:`replay` edits the graph of another
program of the same model (another signature, mode or dtype) on parameters that are in the store already.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter import store
from rewriter.editing import Edit, Editor, adopt
from rewriter.errors import LegalityError, PlanError
from rewriter.matcher import Miss
from rewriter.modes import neutral
from rewriter.narrow import all_finite
from rewriter.planner import Plan, PlannedSite, declare, generator_for, stages
from rewriter.program import Program
from rewriter.rewriting import disjoint
from rewriter.rules import Refusals, Rule, Site, full_names, locate, module_path
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
    based_on: tuple[str, ...] = ()  # addresses of the sites whose nodes it rewrote in turn


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
    return rewrite(program.fork(store.shared(program.root), compile=False), plan, statistics).program


@neutral()
def rewrite(
    program: Program, plan: Plan, statistics: Statistics | None = None, progress: Progress | None = None
) -> Application:
    """Apply ``plan`` to ``program`` and its store, in place. Raises PlanError, LegalityError."""
    _check(program, plan, statistics)
    editor = Editor(program)
    results: list[SiteResult] = []
    originals: dict[str, Tensor] = {}
    for rule, stage in stages(plan):
        for planned, site in _assign(_located(rule, program, stage).sites, stage):
            if site is None:
                raise PlanError(f"{planned.rule}: site {planned.address} is not in this program; make a plan for it")
            if progress is not None:
                progress(f"rewrite {planned.address.path}", len(results), len(plan.sites))
            tensors, result = _initialise(editor, planned, site, statistics)
            edit = editor.rewrite(site, tensors, planned.choice)
            results.append(dataclasses.replace(result, based_on=edit.based_on))
            # A head's new bias goes by the name of the one it replaces; of several in turn the first is the original.
            remade = {name: store.get(program.root, name) for name in result.replaced if name in tensors}
            originals = remade | originals
            adopt(program.root, tensors)
            for name in editor.unread(tuple(n for n in result.replaced if n not in tensors)):
                originals.setdefault(name, store.get(program.root, name))
                for known_as in program.aliases.get(name, (name,)):
                    store.remove(program.root, known_as)
        editor.finish(compile=False)
    program.graph.lint()
    program.rebind()
    if progress is not None:
        progress("rewrite", len(results), len(plan.sites))
    return Application(program, tuple(results), originals, tuple(editor.journal))


@neutral()
def replay(program: Program, plan: Plan) -> Program:
    """The same edits on a program whose store holds the new parameters already.

    A site without parameters that this program does not have (an attention that drops out in training mode) is left
    as it is: the program computes the same function. Raises PlanError for a site whose parameters were replaced.
    """
    _replay(program, plan)
    program.graph.lint()
    program.rebind()
    return program


@neutral()
def missing(program: Program, plan: Plan) -> list[PlannedSite]:
    """Sites of a plan that are not found when it is replayed on ``program``, which is used up by trying.

    Parameters of exact rules are described only: the store may hold those of another plan, or in another dtype. For
    approximate rules, which come last and cannot be described without values, it is tried whether they find their sites.
    """
    return _replay(program, plan, trial=True)


def _replay(program: Program, plan: Plan, trial: bool = False) -> list[PlannedSite]:
    """Edit, without compiling; returns the sites that were left as they are."""
    left: list[PlannedSite] = []
    editor = Editor(program)
    for rule, stage in stages(plan):
        found = _located(rule, program, stage)
        assigned = _assign(found.sites, stage)
        apart = {id(site) for site in disjoint(site for _, site in assigned if site is not None)}
        for planned, site in assigned:
            if site is None and rule.parametric and not trial:
                site = _recall(rule, program, planned, found.misses)
            elif site is not None and not rule.parametric:
                site = site if id(site) in apart and _settles(program, planned, site) else None
            if site is None:
                left.append(planned)
            elif rule.contract.exact or not trial:
                tensors = declare(editor, planned, site) if trial else _present(editor, plan, planned, site)
                editor.rewrite(site, tensors, planned.choice)
        editor.finish(compile=False)
    return left


def _located(rule: Rule, program: Program, stage: Sequence[PlannedSite]) -> Refusals:
    """The sites of a stage; misses only where a site that must be there is not, to say why."""
    number = stage[0].address.round
    found = locate(rule, program, round=number, explain=False)
    known = {site.address for site in found.sites}
    if all(planned.address in known for planned in stage):
        return found
    return locate(rule, program, round=number)


def _settles(program: Program, planned: PlannedSite, site: Site) -> bool:
    """Whether the rule would choose the same at this site as where it was planned: addresses of sites without
    parameters are counted, and another program may count differently."""
    choice = site.rule.settle(site, program, None, generator_for(planned))
    return json.dumps(choice, sort_keys=True) == json.dumps(dict(planned.choice), sort_keys=True)


def _present(editor: Editor, plan: Plan, planned: PlannedSite, site: Site) -> dict[str, Tensor]:
    """The site's parameters from the store; as descriptions where a later site has replaced them in turn."""
    root = editor.program.root
    names = full_names(site.rule, site, planned.choice)
    if not names:
        return {}
    again = any(s.stage > planned.stage and s.address.path == planned.address.path for s in plan.sites)
    if again and site.rule.contract.exact:  # maybe under the same names, and in other shapes
        return declare(editor, planned, site)
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
    runs = not rule.contract.exact and _runs(program, planned.address.path)
    if runs or _reads(program, (*planned.paths, planned.address.path)):
        raise PlanError(_lost(planned, misses))
    return None


def _reads(program: Program, paths: Sequence[str]) -> bool:
    """Whether a tensor of one of the modules is read, under any of its names."""
    names = (known_as for name in program.parameter_nodes() for known_as in program.aliases.get(name, (name,)))
    return any(name.rpartition(".")[0] in paths for name in names)


def _runs(program: Program, path: str) -> bool:
    """Whether the program computes anything in the module at ``path``."""
    return bool(path) and any(module_path(node) == path for node in program.graph.nodes if node.op == "call_function")


def _lost(planned: PlannedSite, misses: Sequence[Miss]) -> str:
    near = [str(m) for m in misses if set(m.site.split(".")) & set(planned.address.path.split("."))]
    reasons = "".join(f"\n  {m}" for m in near[:3])
    return (
        f"{planned.rule}: {planned.address.path} is not found in the program captured for this call, but was "
        f"rewritten; undo the site (opt.undo({planned.address.path!r})) or protect it with select={reasons}"
    )


def _initialise(
    editor: Editor, planned: PlannedSite, site: Site, statistics: Statistics | None
) -> tuple[dict[str, Tensor], SiteResult]:
    program, rule, match = editor.program, site.rule, site.match
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
    before = sum(stored_bytes(program.tensor(name)) for name in replaced if _only_here(editor, name, site))
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


def _only_here(editor: Editor, name: str, site: Site) -> bool:
    node = editor.readers.get(name)
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
