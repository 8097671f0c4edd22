# SPDX-License-Identifier: Apache-2.0
"""The Router view: a linear that scores the experts of a mixture, and the choice of the best of them.

    p = softmax(x Wᵀ),  (weights, experts) = topk(p, k)      or sigmoid(x Wᵀ), or topk first and softmax of the chosen;
    a bias may be added for the choice; the best one alone is argmax or max

It is recognised so that it can be left alone: the choice is not continuous, so the smallest error of a score may send a
token to another expert. A head whose best tokens are merely returned is no router: what is chosen must be used inside.

Captures: `linear` its match; `logits` node, what the linear computes; `choice` node, the top-k, argmax or max; `count`
how many are chosen; `experts` how many there are; `activation` ``"softmax"``, ``"sigmoid"`` or None, before the choice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.schemas import base_name
from rewriter.views.base import View, with_captures
from rewriter.views.linear import LINEAR, features

aten = torch.ops.aten

_CHOICES = frozenset(("topk", "argmax", "max", "sort", "argsort"))
_ACTIVATIONS = {"softmax": "softmax", "_softmax": "softmax", "sigmoid": "sigmoid"}
# What may stand between the scores and the choice, by operator name: shapes, casts, noise, a bias, a temperature.
_BETWEEN = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute contiguous clone alias detach to"
    " _to_copy type_as float add sub mul div masked_fill where log_softmax dropout".split()
)
_REACH = 24  # no choice is farther from its linear than this many nodes

MISS = "it is a mixture-of-experts router: a small error of a score may send a token to another expert"


def is_router(facts: Facts, match: Match) -> bool:
    """Whether a match (of a linear, or anything else that computes scores) decides which expert is asked.

    Rules that approximate must leave such a match alone and say `MISS`.
    """
    return _choice(facts, match.root) is not None


def _find(facts: Facts) -> list[Match]:
    return [router for linear in LINEAR.find(facts) if (router := _router(facts, linear)) is not None]


def _explain(facts: Facts) -> list[Miss]:
    return []  # no rule looks for routers, so there is nobody to whom a near miss would mean anything


def _router(facts: Facts, linear: Match) -> Match | None:
    way = _choice(facts, linear.root)
    if way is None:
        return None
    *between, choice = way
    activations = [_ACTIVATIONS[name] for node in between if (name := base_name(node.target)) in _ACTIVATIONS]
    captures = {
        "linear": linear,
        "logits": linear.root,
        "choice": choice,
        "count": facts.arguments(choice).get("k", 1),
        "experts": features(facts, linear)[1],
        "activation": activations[0] if activations else None,
    }
    return replace(with_captures(linear, captures, "router"), nodes=tuple(sorted({*linear.nodes, *way})))


def _choice(facts: Facts, scores: Node) -> tuple[Node, ...] | None:
    """The nodes from the scores to a choice among their last dimension that is used in what follows."""
    came: dict[Node, Node | None] = {scores: None}
    pending = [scores]
    while pending and len(came) <= _REACH:
        node = pending.pop(0)
        for user in facts.users(node):
            if user in came or user.op != "call_function":
                continue
            name = base_name(user.target)
            if name in _CHOICES:
                if _chooses(facts, user, node) and _is_used(facts, user):
                    return (*_way(came, node), user)
            elif name in _BETWEEN or name in _ACTIVATIONS:
                came[user] = node
                pending.append(user)
    return None


def _chooses(facts: Facts, choice: Node, scores: Node) -> bool:
    """Whether the choice is along the last dimension, among one score per expert."""
    rank = len(facts.shape(scores) or ())
    dim = facts.arguments(choice).get("dim", -1 if base_name(choice.target) == "topk" else None)
    return rank > 0 and isinstance(dim, int) and dim % rank == rank - 1


def _is_used(facts: Facts, chosen: Node) -> bool:
    """Whether something is computed from what was chosen, so that it is not merely returned."""
    for user in facts.users(chosen):
        passes = base_name(user.target) == "getitem" or base_name(user.target) in _BETWEEN
        if user.op != "output" and (not passes or _is_used(facts, user)):
            return True
    return False


def _way(came: dict[Node, Node | None], node: Node | None) -> tuple[Node, ...]:
    way: list[Node] = []
    while node is not None:
        way.append(node)
        node = came[node]
    return tuple(reversed(way))


ROUTER = View("router", _find, _explain)
