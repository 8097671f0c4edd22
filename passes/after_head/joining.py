# SPDX-License-Identifier: Apache-2.0
"""A head about to be rewritten, together with what follows it: one site, so that its logits need not be made at all."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from rewriter import legality
from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.passes.after_head.following import Follower, followers
from rewriter.passes.after_head.rules import with_follower, worthwhile


def joined(facts: Facts, match: Match, head: Any, rule: str) -> tuple[Match, list[Miss]]:
    """The match with the capture ``followers``: what of all that follows it can be had without its logits.

    Args:
        facts: of the graph.
        match: a head; ``x`` its hidden states, its root the logits.
        head: the operator that will make the logits.
        rule: whose misses these are.

    Returns:
        The match, its capture ``head`` what it was, and for everything that stays on the logits a miss that says why.
    """
    dtype = facts.dtype(match["x"])
    if dtype is None:
        return _with(match, ()), []
    found, reasons = worthwhile(facts, match.root, head, *followers(facts, match.root, dtype))
    kept = []
    for one in found:
        alone = with_follower(Match(match.name, one.roots[-1], {"h": match["x"]}, (), ()), (one,))
        reason = legality.refusal(facts, alone)
        if reason is None:
            kept.append(one)
        else:
            reasons.append((one.roots[-1], str(reason)))
    misses = [Miss(rule, facts.path(n), "after the head", why, source=facts.source(n), node=n) for n, why in reasons]
    return _with(match, tuple(kept)), misses


def _with(match: Match, found: tuple[Follower, ...]) -> Match:
    captures = {**match.captures, "head": match, "followers": found}
    return dataclasses.replace(with_follower(match, found), captures=MappingProxyType(captures))
