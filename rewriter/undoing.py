# SPDX-License-Identifier: Apache-2.0
"""Undo: a new `Optimized` from the same base program and a plan without the undone sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from rewriter import registry, store
from rewriter.applying import SiteResult
from rewriter.errors import PlanError
from rewriter.optimized import Optimized
from rewriter.planner import Plan, PlannedSite, rule_of
from rewriter.sizes import model_bytes


@store.outside_inference_mode
def undo(opt: Optimized, what: str, *, cascade: bool = False) -> Optimized:
    """Without the sites that ``what`` names: an address, an original module path, a rule or a pass.

    The undone sites get their original tensors back (a merged layer that was trained since is split instead, so that
    nothing learnt is lost); everything else keeps its present values.

    Raises:
        PlanError: nothing is called so, the originals were freed, or other sites build on these and ``cascade`` is off.
    """
    originals = opt.originals()
    if opt.report is None or not opt._bases:
        raise PlanError("a loaded model has no original program; undo before saving, or optimise again")
    results = {r.address: r for r in opt.report.sites}
    chosen = _named(opt.plan, what)
    while True:
        gone = {str(opt.plan.sites[i].address) for i in chosen}
        dependants = _dependants(opt.plan, results, gone) - chosen
        if not dependants:
            break
        if not cascade:
            names = ", ".join(
                f"{opt.plan.sites[i].rule} at {opt.plan.sites[i].address.path}" for i in sorted(dependants)
            )
            raise PlanError(
                f"{what!r} cannot be undone alone: {names} build on it; undo those first, or pass cascade=True"
            )
        chosen |= dependants
    kept = tuple(s for i, s in enumerate(opt.plan.sites) if i not in chosen)
    undone = [results[str(opt.plan.sites[i].address)] for i in sorted(chosen)]
    root = _store_without(opt, undone, originals, [opt.plan.sites[i] for i in sorted(chosen)])
    return _rebuild(opt, dataclasses.replace(opt.plan, sites=kept), root, undone)


def _named(plan: Plan, what: str) -> set[int]:
    """Positions of the sites called ``what``."""
    found = {
        i for i, s in enumerate(plan.sites) if what in (str(s.address), s.address.path, s.rule, s.pass_name, *s.paths)
    }
    if not found:
        known = {n for s in plan.sites for n in (s.address.path, s.rule, s.pass_name)}
        raise PlanError(f"no rewritten site, rule or pass is called {what!r}{registry.nearest(what, known)}")
    return found


def _dependants(plan: Plan, results: Mapping[str, SiteResult], gone: set[str]) -> set[int]:
    """Sites that replaced parameters which the undone sites made."""
    made = {name for address in gone for name in results[address].created}
    return {i for i, s in enumerate(plan.sites) if made & set(results[str(s.address)].replaced)}


def _store_without(
    opt: Optimized, undone: Sequence[SiteResult], originals: Mapping[str, Tensor], planned: Sequence[PlannedSite]
) -> nn.Module:
    root = store.Namespace()
    dropped = {name for result in undone for name in result.created}
    back = {  # not what another undone site had made
        name
        for result in undone
        for name in result.replaced
        if name in originals and not any(name in other.created for other in undone if other is not result)
    }
    own: dict[int, Tensor] = {}
    for name, tensor in store.tensors(opt):
        if name not in dropped:
            store.put(
                root, name, own.setdefault(id(tensor), store.share(tensor)), persistent=store.is_persistent(opt, name)
            )
    present = opt.present_originals()
    for name in sorted(back):
        for known_as in opt.original.aliases.get(name, (name,)):
            store.put(root, known_as, present[name])
    for result, site in zip(undone, planned, strict=True):
        for name, part in split_rows(opt, result, site).items():
            store.put(root, name, nn.Parameter(part.detach().clone(), requires_grad=part.requires_grad))
    root.train(opt.training)
    return root


def split_rows(opt: Optimized, result: SiteResult, site: PlannedSite) -> dict[str, Tensor]:
    """For a site that merged weights by rows and still holds them as tensors: the present parts by original name."""
    rule = rule_of(site)
    parts: dict[str, Tensor] = {}
    for created in result.created:
        if not store.has(opt, created):
            continue
        merged = store.get(opt, created)
        leaf = created.rpartition(".")[2]
        names = [n for n in result.replaced if n.rpartition(".")[2] == leaf]
        parts |= rule.restore(rows_of(merged), names, site.choice) or {}
    return parts


def rows_of(tensor: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, end: tensor[start:end]


def _rebuild(opt: Optimized, plan: Plan, root: nn.Module, undone: Sequence[SiteResult]) -> Optimized:
    base = opt.present_base().fork(root)
    back = {name for result in undone for name in result.replaced}
    originals = {name: t for name, t in opt.originals().items() if name not in back or not store.has(root, name)}
    new = Optimized(
        base,
        plan,
        skeleton=opt._skeleton and opt._skeleton.copy(),
        originals=originals,
        names=opt._names,
        optional=opt._optional,
        original_bytes=opt.original_bytes,
    )
    addresses = {r.address for r in undone}
    assert opt.report is not None  # noqa: S101 - checked by undo
    sites = tuple(r for r in opt.report.sites if r.address not in addresses)
    new.report = dataclasses.replace(opt.report, sites=sites, bytes_after=model_bytes(new), measurements={})
    return new
