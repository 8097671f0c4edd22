# SPDX-License-Identifier: Apache-2.0
"""cross_entropy(x Wᵀ + b, y)  =  linear_cross_entropy(x, W, b, y): the loss of a head without its logits

also where the logits are capped (c tanh(l / c)), cast, cut or flattened on the way. A sum or mean becomes
`linear_cross_entropy_reduced`, which in training needs no product more than the logits would. Only where nobody else reads
them: a model that returns logits beside its loss, as transformers' models do, makes them anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import Facts
from rewriter.kernels.cross_entropy.op import linear_cross_entropy, linear_cross_entropy_reduced
from rewriter.matcher import Match, Miss
from rewriter.passes.after_head.building import move_rows, reduced
from rewriter.passes.after_head.following import Follower, followers, is_soft, needed
from rewriter.passes.after_head.rules import with_follower
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.schemas import describe
from rewriter.views import CROSS_ENTROPY, LINEAR
from rewriter.views.linear import features

aten = torch.ops.aten
CHUNK = 2048  # classes whose logits exist at a time
_IGNORED = -100  # of losses that ignore nothing: no class has this number


class FuseLoss(Rule):
    """A linear whose results only a loss reads; forward and backward walk its classes CHUNK at a time."""

    name: ClassVar[str] = "fuse.loss"
    role: ClassVar[str] = "loss"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts, matches, misses = program.facts, [], []
        for linear in LINEAR.find(program):
            found = _with_loss(facts, linear)
            if isinstance(found, Match):
                matches.append(found)
            elif found is not None:
                misses += [Miss(self.name, facts.path(n), "", why, source=facts.source(n), node=n) for n, why in found]
        return sorted(matches, key=lambda match: facts.position(match.root)), misses

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        one: Follower = match["follower"]
        c, weight = one.captures, match["weight"]
        if match["transposed"]:
            weight = edit.call(aten.t.default, weight)
        ignored = _IGNORED if c["ignore_index"] is None else c["ignore_index"]
        x = move_rows(edit, match["x"], one.way)
        arguments = (x, weight, match["bias"], c["target"], c["weight"], ignored, c["label_smoothing"], match["softcap"])
        if c["reduction"] == "none":
            pair = edit.call(linear_cross_entropy, *arguments, CHUNK)
            return reduced(edit, edit.call(operator.getitem, pair, 0), one)
        loss, root = edit.call(linear_cross_entropy_reduced, *arguments, c["reduction"], CHUNK), one.roots[0]
        dtype = root.meta["val"].dtype
        return {root: loss if loss.meta["val"].dtype == dtype else edit.call(aten.to.dtype, loss, dtype)}


Reasons = list[tuple[Node, str]]


def _with_loss(facts: Facts, linear: Match) -> Match | Reasons | None:
    """A linear and the loss of its results as one match; why they are none; None where no loss follows."""
    dtype = facts.dtype(linear["x"])
    if dtype is None:
        return None
    logits, softcap, cap = _capped(facts, linear.root)
    found, others = followers(facts, logits, dtype)
    losses = [one for one in found if one.kind == "cross_entropy"]
    if not losses:
        seen = {node for match in CROSS_ENTROPY.find(facts) for node in match.nodes}
        return [(node, why) for node, why in others if node in seen] or None
    if (reason := _objection(facts, linear, losses)) is not None:
        return [(losses[0].roots[-1], reason)]
    reader = needed(facts, logits, losses)
    if reader is not None:
        return [(losses[0].roots[-1], f"{describe(reader)} reads the logits as well: they are made in any case")]
    captures = {**linear.captures, "softcap": softcap, "follower": losses[0]}
    nodes = tuple(sorted({*linear.nodes, *cap}))
    whole = Match("loss", losses[0].roots[-1], captures, nodes, (), linear.casts | {*cap}, linear.shared)
    return with_follower(whole, losses)


def _objection(facts: Facts, linear: Match, losses: Sequence[Follower]) -> str | None:
    classes = features(facts, linear)[1]
    if classes <= CHUNK:
        return f"its {classes} classes are one chunk: there is nothing to save"
    if len(losses) > 1:
        return f"{len(losses)} losses read the same logits, which would be computed once for each"
    if is_soft(losses[0].captures["target"]):
        return "the target is a probability for each class, as large as the logits"
    return None


def _capped(facts: Facts, logits: Node) -> tuple[Node, float | None, tuple[Node, ...]]:
    """c · tanh(logits / c), c and the nodes between, where the logits go through that alone; else the logits."""
    way, value = [], logits
    for target in (aten.div.Tensor, aten.tanh.default, aten.mul.Tensor):
        users = list(facts.users(value))
        if len(users) != 1 or users[0].target is not target or users[0].args[0] is not value:
            return logits, None, ()
        value = users[0]
        way.append(value)
    below, _, above = way
    c = below.args[1]
    if isinstance(c, (int, float)) and c > 0 and above.args[1] == c:
        return value, float(c), tuple(way)
    return logits, None, ()
