# SPDX-License-Identifier: Apache-2.0
"""The Head view: the vocabulary-sized last linear of a model, tied to an embedding or not.

A linear is the head if
    its result reaches a program output only through shape, cast, slice and loss nodes, and through what is done to
    each logit alone: a constant scale, a stored bias, a soft-cap c·tanh(y / c),
    it has at least 512 outputs, and no other linear has more,
    and these are as many as an embedding has rows, or more than four times its inputs.

Captures: those of the linear, and `tied`: whether an embedding reads the same weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.schemas import base_name, describe
from rewriter.views.base import View, miss_at, with_captures
from rewriter.views.embedding import EMBEDDING
from rewriter.views.linear import LINEAR, features

aten = torch.ops.aten

SMALLEST_VOCABULARY = 512

# What may stand between the logits and an output, by operator name: shapes, slices, casts, soft-caps.
_HARMLESS = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute t contiguous clone alias expand"
    " slice select narrow index index_select gather chunk split split_with_sizes unbind to _to_copy type_as detach"
    " dropout constant_pad_nd pad getitem tanh".split()
)
# Times or over a number; plus a parameter or buffer.
_SCALES = frozenset("mul div".split())
_SHIFTS = frozenset("add sub".split())
# Losses and choices of the best consume the logits; what is done with the result is no longer about logits.
_LOSSES = frozenset(
    "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward log_softmax _log_softmax softmax _softmax"
    " logsumexp binary_cross_entropy_with_logits mse_loss kl_div argmax topk max".split()
)


def _find(facts: Facts) -> list[Match]:
    return [found for found in _judge(facts) if isinstance(found, Match)]


def _explain(facts: Facts) -> list[Miss]:
    misses = [found for found in _judge(facts) if isinstance(found, Miss)]
    return sorted(misses, key=lambda miss: -miss.depth)


def _judge(facts: Facts) -> Iterator[Match | Miss]:
    """Every linear that reaches an output, as the head or as the reason why it is none."""
    linears = LINEAR.find(facts)
    largest = max((features(facts, match)[1] for match in linears), default=0)
    embeddings = EMBEDDING.find(facts)
    rows = {int((facts.shape(match["weight"]) or (0,))[0]) for match in embeddings}
    tables = {match["weight"] for match in embeddings}
    for match in linears:
        obstacle = _obstacle(facts, match.root)
        reason = _refusal(facts, match, largest, rows) if obstacle is None else obstacle
        if reason is None:
            tied = match["weight"] in tables
            yield with_captures(match, {**match.captures, "tied": tied}, name="head")
        elif obstacle is None or features(facts, match)[1] == largest:
            # what reaches an output is nearer to being the head than what is merely large
            yield miss_at(facts, "head", match.root, reason, depth=1 + (obstacle is None))


def _refusal(facts: Facts, match: Match, largest: int, rows: set[int]) -> str | None:
    inputs, outputs = features(facts, match)
    if outputs < SMALLEST_VOCABULARY:
        return f"its {outputs} outputs are fewer than {SMALLEST_VOCABULARY}, too few for a vocabulary"
    if outputs < largest:
        return f"another linear has more outputs ({largest}) than its {outputs}"
    if outputs not in rows and outputs <= 4 * inputs:
        return f"no embedding has {outputs} rows, and that is not more than four times its {inputs} inputs"
    return None


def _obstacle(facts: Facts, logits: Node) -> str | None:
    """What keeps a result from being the program's output; None if nothing does."""
    reached = False
    seen: set[Node] = set()
    pending = [logits]
    while pending:
        for user in facts.users(pending.pop()):
            if user.op == "output":
                reached = True
                continue
            name = base_name(user.target)
            if name in _LOSSES:
                reached = True
            elif name not in _HARMLESS and not _acts_on_each(user, name):
                return f"its result goes through {describe(user)}"
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return None if reached else "its result reaches no output"


def _acts_on_each(node: Node, name: str) -> bool:
    """A scale by a number, or a shift by something stored, on the logits as first operand."""
    others = [value for value in (*node.args[1:], *node.kwargs.values()) if isinstance(value, Node)]
    if name in _SCALES:
        return not others
    return name in _SHIFTS and len(node.all_input_nodes) == 2 and all(map(_stored, others))


def _stored(node: Node) -> bool:
    """A parameter or buffer, perhaps cast or reshaped."""
    return node.op == "get_attr" or (
        len(node.all_input_nodes) == 1 and base_name(node.target) in _HARMLESS and _stored(node.all_input_nodes[0])
    )


HEAD = View("head", _find, _explain)
