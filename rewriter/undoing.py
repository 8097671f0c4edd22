# SPDX-License-Identifier: Apache-2.0
"""Undo: a new `Optimized` from the same base program and a plan without the undone sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor, nn

from rewriter import registry, store
from rewriter.applying import SiteResult, missing
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
        dependants = _dependants(opt, results, chosen)
        if not dependants:
            break
        if not cascade:
            names = ", ".join(_called(opt.plan.sites[i], why) for i, why in sorted(dependants.items()))
            raise PlanError(f"{what!r} cannot be undone alone: {names}; undo those first, or pass cascade=True")
        chosen |= dependants.keys()
    kept = tuple(s for i, s in enumerate(opt.plan.sites) if i not in chosen)
    undone = [results[str(opt.plan.sites[i].address)] for i in sorted(chosen)]
    root = _store_without(opt, undone, originals, [opt.plan.sites[i] for i in sorted(chosen)])
    return _rebuild(opt, dataclasses.replace(opt.plan, sites=kept), root, undone)


def _called(site: PlannedSite, why: str) -> str:
    return f"{site.rule} at {site.address.path} {why}"


def _named(plan: Plan, what: str) -> set[int]:
    """Positions of the sites called ``what``."""
    found = {
        i for i, s in enumerate(plan.sites) if what in (str(s.address), s.address.path, s.rule, s.pass_name, *s.paths)
    }
    if not found:
        known = {n for s in plan.sites for n in (s.address.path, s.rule, s.pass_name)}
        raise PlanError(f"no rewritten site, rule or pass is called {what!r}{registry.nearest(what, known)}")
    return found


def _dependants(opt: Optimized, results: Mapping[str, SiteResult], chosen: Collection[int]) -> dict[int, str]:
    """Sites that cannot stay without the chosen ones, each with what ties it to them.

    Some rewrote what an undone site had made: its nodes, or its parameters. Others are only found, as planned, on a
    program that the undone site had been rewritten in: that is tried. And the values between two rewrites of one
    parameter, under one name, are nobody's to give back.
    """
    sites = opt.plan.sites
    of = [results[str(site.address)] for site in sites]
    gone = {str(sites[i].address) for i in chosen}
    found: dict[int, str] = {}
    for i, result in enumerate(of):
        made = {name for k in chosen if k < i for name in of[k].created}
        if made & set(result.replaced) or gone & set(result.based_on):
            found[i] = "builds on it"
        elif any(_made_before(of[:k], of[k]) & set(result.created) for k in chosen if i < k):
            found[i] = "made the tensors it replaced, whose values were not kept"
    kept = tuple(site for i, site in enumerate(sites) if i not in chosen and i not in found)
    lost = _missing(opt, kept)
    if lost:  # not those that this program never had: attention that drops out in training mode
        lost -= _missing(opt, sites)
    found |= {i: "is found only after it" for i, site in enumerate(sites) if str(site.address) in lost}
    return {i: why for i, why in found.items() if i not in chosen}


def _missing(opt: Optimized, sites: tuple[PlannedSite, ...]) -> set[str]:
    found = missing(opt.original.fork(compile=False), dataclasses.replace(opt.plan, sites=sites))
    return {str(site.address) for site in found}


def _made_before(earlier: Sequence[SiteResult], result: SiteResult) -> set[str]:
    """Tensors a site replaced that an earlier one had replaced under the same name: values in between are not kept."""
    return {name for name in result.replaced if any(name in r.replaced and name in r.created for r in earlier)}


def _store_without(
    opt: Optimized, undone: Sequence[SiteResult], originals: Mapping[str, Tensor], planned: Sequence[PlannedSite]
) -> nn.Module:
    root = store.Namespace()
    dropped = {name for result in undone for name in result.created}
    back = {  # not what an earlier undone site had made
        name
        for position, result in enumerate(undone)
        for name in result.replaced
        if name in originals and not any(name in other.created for other in undone[:position])
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
        target=opt.target,
    )
    addresses = {r.address for r in undone}
    assert opt.report is not None  # noqa: S101 - checked by undo
    sites = tuple(r for r in opt.report.sites if r.address not in addresses)
    new.report = dataclasses.replace(
        opt.report, sites=sites, bytes_after=model_bytes(new), measurements={}, code=new.lowered.code()
    )
    return new
