# SPDX-License-Identifier: Apache-2.0
"""f(logits(h, C))  =  f'(h, C)   for f a loss, a softmax or the largest logits; f' needs no logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import Facts
from rewriter.kernels.vq_logits import op as heads
from rewriter.matcher import Match, Miss
from rewriter.passes.after_head.building import build
from rewriter.passes.after_head.following import Follower, followers, is_soft, needed
from rewriter.passes.after_head.rows import has_rows
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.schemas import describe


class AfterHeadRule(Rule):
    """Followers of one kind, of logits that a codebook operator makes."""

    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts, matches, misses = program.facts, [], []
        for head in sorted(facts.calls([op for op in heads_known() if facts.count([op])])):
            dtype = facts.dtype(head)
            if dtype is None:
                continue
            found, reasons = worthwhile(facts, head, head.target, *followers(facts, head, dtype))
            matches += [self._match(facts, head, one) for one in found if one.kind == self.role]
            misses += [Miss(self.name, facts.path(n), "", why, source=facts.source(n), node=n) for n, why in reasons]
        return sorted(matches, key=lambda match: facts.position(match.root)), misses

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def replaced_nodes(self, match: Match) -> tuple[Node, ...]:
        roots: tuple[Node, ...] = match["follower"].roots
        return roots

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        return build(edit, match["operator"], match["h"], match["tensors"], match["follower"])

    def _match(self, facts: Facts, head: Node, one: Follower) -> Match:
        h, *tensors = facts.arguments(head).values()
        captures = {"follower": one, "operator": head.target, "h": h, "tensors": tuple(tensors)}
        return with_follower(Match(self.role, one.roots[-1], captures, (head,), (), shared=frozenset({head})), (one,))


class CrossEntropyAfterHead(AfterHeadRule):
    """log Z from K codes, or chunk by chunk."""

    name: ClassVar[str] = "after_head.cross_entropy"
    role: ClassVar[str] = "cross_entropy"


class LogSoftmaxAfterHead(AfterHeadRule):
    """log Z from K codes; the V results are written once."""

    name: ClassVar[str] = "after_head.log_softmax"
    role: ClassVar[str] = "log_softmax"


class SoftmaxAfterHead(AfterHeadRule):
    """K posteriors times probabilities within codes."""

    name: ClassVar[str] = "after_head.softmax"
    role: ClassVar[str] = "softmax"


class LargestAfterHead(AfterHeadRule):
    """argmax, max and topk from the best tokens of the best codes, or chunk by chunk."""

    name: ClassVar[str] = "after_head.largest"
    role: ClassVar[str] = "largest"


def heads_known() -> tuple[Any, ...]:
    """Operators whose followers are known."""
    known = (heads.vq_logits_product, heads.vq_logits_product_exact, heads.vq_logits_residual)
    return (heads.vq_logits_tiers, *known)


def worthwhile(
    facts: Facts, logits: Node, head: Any, found: list[Follower], reasons: list[tuple[Node, str]]
) -> tuple[list[Follower], list[tuple[Node, str]]]:
    """The followers that need less without logits.

    Tiers always do. A head with rows would compute its logits a second time where somebody else needs them, and its
    softmax needs them by nature.
    """
    if head is heads.vq_logits_tiers:
        return found, reasons
    left = [(one.roots[-1], why) for one in found if (why := _not_by_rows(one)) is not None] if has_rows(head) else []
    dropped = {node for node, _ in left}
    kept = [one for one in found if one.roots[-1] not in dropped]
    reader = next((one.roots[-1] for one in found if one.roots[-1] in dropped), None) or needed(facts, logits, kept)
    if reader is None or not kept:
        return kept, [*reasons, *left]
    why = f"{describe(reader)} needs the logits as well: they are computed once, and read"
    return [], [*reasons, *left, *((one.roots[-1], why) for one in kept)]


def with_follower(match: Match, found: Sequence[Follower]) -> Match:
    """The match, and those that follow what it computes."""
    own = [node for one in found for node in one.nodes]
    way = [node for one in found for node in one.way]
    nodes = tuple(sorted({*match.nodes, *own, *way}))
    captures = {**match.captures, "followed": tuple(_read(one) for one in found)}
    return Match(
        match.name,
        match.root,
        captures,
        nodes,
        (*match.outputs, *(root for one in found for root in one.roots)),
        match.casts | frozenset((*own, *way)),
        match.shared | frozenset(way),
        match.location,
    )


def _read(one: Follower) -> tuple[Node, ...]:
    """Nodes a follower reads besides the logits."""
    return tuple(value for name in ("target", "weight") if isinstance(value := one.captures.get(name), Node))


def _not_by_rows(one: Follower) -> str | None:
    if one.kind in ("softmax", "log_softmax"):
        return "its result is as large as the logits, and this head has no smaller form of them"
    if one.kind == "cross_entropy" and is_soft(one.captures["target"]):
        return "its targets are as large as the logits; the module's nll takes them without"
    return None
