# SPDX-License-Identifier: Apache-2.0
"""A head about to be rewritten, together with what follows it: one site, so that its logits need not be made at all."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from torch.fx import Node

from rewriter import legality
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.passes.after_head.following import Follower, followers
from rewriter.passes.after_head.rules import with_follower, worthwhile
from rewriter.schemas import describe


def joined(facts: Facts, match: Match, head: Any, rule: str) -> tuple[Match, list[Miss]]:
    """The match with the capture ``followers``: what of all that follows it can be had without its logits.

    Args:
        facts: of the graph.
        match: a head; ``x`` its hidden states, its root the logits.
        head: the operator that will make the logits.
        rule: whose misses these are.

    Returns:
        The match, and for everything that stays on the logits a miss that says why.
    """
    dtype = facts.dtype(match["x"])
    if dtype is None:
        return _with(match, ()), []
    found, reasons = worthwhile(facts, match.root, head, *followers(facts, match.root, dtype))
    kept = []
    for one in found:
        reason = legality.refusal(facts, with_follower(match, (one,)))
        if reason is None:
            kept.append(one)
        else:
            reasons.append((one.roots[-1], str(reason)))
    together = with_follower(match, kept)
    early = _read_early(facts, together, kept)
    if early is not None:
        reasons += [(one.roots[-1], f"{describe(early)} comes before all it needs is there") for one in kept]
        together, kept = match, []
    misses = [Miss(rule, facts.path(n), "after the head", why, source=facts.source(n), node=n) for n, why in reasons]
    return _with(together, tuple(kept)), misses


def _with(match: Match, found: tuple[Follower, ...]) -> Match:
    return dataclasses.replace(match, captures=MappingProxyType({**match.captures, "followers": found}))


def _read_early(facts: Facts, match: Match, found: list[Follower]) -> Node | None:
    """Something outside that reads the logits, or a value on the way, before everything the followers read exists."""
    inside = set(match.nodes)
    latest = max((n for node in match.nodes for n in node.all_input_nodes if n not in inside), default=None)
    if latest is None or latest < match.root:
        return None
    way = {node for one in found for node in one.way}
    for value in (match.root, *sorted(way)):
        for user in value.users:
            if user not in inside and (user < latest or (value is not match.root and value < latest)):
                return user
    return None
