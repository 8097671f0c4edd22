# SPDX-License-Identifier: Apache-2.0
"""What stands in the place of a follower: the same from hidden states and the head's tensors, without its logits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from rewriter.editing import Editor
from rewriter.kernels.after_head import op as after
from rewriter.kernels.after_head.reference import CHUNK
from rewriter.kernels.cross_entropy.op import linear_cross_entropy
from rewriter.kernels.vq_logits import op as heads
from rewriter.passes.after_head.following import Follower, is_soft
from rewriter.passes.after_head.rows import decoded
from rewriter.schemas import base_name

aten = torch.ops.aten
_IGNORED = -100  # of the operators that have no ignore_index


def build(edit: Editor, head: Any, h: Node, tensors: Sequence[Node | None], follower: Follower) -> Mapping[Node, Node]:
    """Replacements of the follower's roots.

    Args:
        edit: the editor.
        head: the operator that makes logits of ``h`` and ``tensors``.
        h: hidden states.
        tensors: the other arguments of the operator.
        follower: what to replace.
    """
    x = move_rows(edit, h, follower.way)
    if head is heads.vq_logits_tiers:
        return _TIERS[follower.kind](edit, x, tuple(tensors), follower)
    return _DECODED[follower.kind](edit, x, decoded(edit, head, h, tensors), follower)


def move_rows(edit: Editor, h: Node, way: Sequence[Node]) -> Node:
    """What happened to the rows of the logits on the way to a follower, done to those of ``h``."""
    facts, x = edit.program.facts, h
    width = int(h.meta["val"].shape[-1])
    for node in way:
        target: Any = node.target
        name, arguments = base_name(target), facts.arguments(node)
        rank = len(x.meta["val"].shape)
        match name:
            case "view" | "reshape" | "_unsafe_view":
                shape = arguments["size"] if "size" in arguments else arguments["shape"]
                x = edit.call(aten.reshape.default, x, [*shape[:-1], width])
            case "flatten":
                x = edit.call(target, x, arguments["start_dim"], arguments["end_dim"])
            case "unsqueeze":
                x = edit.call(target, x, arguments["dim"] % (rank + 1))
            case "squeeze":
                x = edit.call(target, x, arguments["dim"] % rank)
            case "slice":
                ends = arguments["start"], arguments["end"], arguments["step"]
                x = edit.call(target, x, arguments["dim"] % rank, *ends)
            case "select":
                x = edit.call(target, x, arguments["dim"] % rank, arguments["index"])
    return x  # casts, copies, and classes moved to where a loss wants them: nothing to do


# -- losses ------------------------------------------------------------------------------------------------------


def _tiers_loss(edit: Editor, x: Node, tensors: tuple[Node | None, ...], follower: Follower) -> Mapping[Node, Node]:
    c = follower.captures
    target, weight, smoothing, ignored = c["target"], c["weight"], c["label_smoothing"], _ignored(follower)
    if is_soft(target):
        if len(target.meta["val"].shape) == 3:  # [B, V, T], as the loss operator wants it
            target = edit.call(aten.transpose.int, target, 1, 2)
        loss = edit.call(after.vq_tiers_soft_cross_entropy, x, *tensors, target, weight, smoothing)
    elif weight is None and not smoothing and ignored == _IGNORED:
        loss = edit.call(heads.vq_tiers_nll, x, *tensors, target)
    else:
        loss = edit.call(after.vq_tiers_cross_entropy, x, *tensors, target, weight, smoothing, ignored)
    return reduced(edit, loss, follower)


def _row_loss(edit: Editor, x: Node, tensors: tuple[Node | None, ...], follower: Follower) -> Mapping[Node, Node]:
    c = follower.captures
    rows, bias = tensors
    options = c["weight"], _ignored(follower), c["label_smoothing"], None, CHUNK
    both = edit.call(linear_cross_entropy, x, rows, bias, c["target"], *options)
    return reduced(edit, edit.call(operator.getitem, both, 0), follower)


def reduced(edit: Editor, loss: Node, follower: Follower) -> Mapping[Node, Node]:
    c, root = follower.captures, follower.roots[0]
    if c["reduction"] == "sum":
        loss = edit.call(aten.sum.default, loss)
    elif c["reduction"] == "mean":
        target, weight = c["target"], c["weight"]
        if is_soft(target) or c["ignore_index"] is None:
            loss = edit.call(aten.mean.default, loss)
        else:
            counted = edit.call(aten.ne.Scalar, target, c["ignore_index"])
            if weight is not None:
                token = edit.call(aten.where.ScalarOther, counted, target, 0)
                own = _of_token(edit, weight, token, loss.meta["val"].dtype)
                counted = edit.call(aten.where.ScalarOther, counted, own, 0.0)
            number = edit.call(aten.sum.default, counted)
            loss = edit.call(aten.div.Tensor, edit.call(aten.sum.default, loss), number)
    return {root: _to(edit, loss, root.meta["val"].dtype)}


# -- softmax, and the largest ------------------------------------------------------------------------------------


def _tiers_log_softmax(
    edit: Editor, x: Node, tensors: tuple[Node | None, ...], follower: Follower
) -> Mapping[Node, Node]:
    return _as_root(edit, edit.call(after.vq_tiers_log_softmax, x, *tensors), follower)


def _tiers_softmax(edit: Editor, x: Node, tensors: tuple[Node | None, ...], follower: Follower) -> Mapping[Node, Node]:
    return _as_root(edit, edit.call(after.vq_tiers_softmax, x, *tensors), follower)


def _as_root(edit: Editor, value: Node, follower: Follower) -> Mapping[Node, Node]:
    root = follower.roots[0]
    return {root: _to(edit, value, root.meta["val"].dtype)}


def _tiers_largest(edit: Editor, x: Node, tensors: tuple[Node | None, ...], follower: Follower) -> Mapping[Node, Node]:
    return _parts(edit, edit.call(after.vq_tiers_topk, x, *tensors, follower.captures["k"]), follower)


def _row_largest(edit: Editor, x: Node, tensors: tuple[Node | None, ...], follower: Follower) -> Mapping[Node, Node]:
    return _parts(edit, edit.call(after.linear_topk, x, *tensors, follower.captures["k"]), follower)


def _parts(edit: Editor, pair: Node, follower: Follower) -> Mapping[Node, Node]:
    c = follower.captures
    made = {}
    for root in follower.roots:
        place = 1 if c["target"] is aten.argmax.default else root.args[1]
        part = edit.call(operator.getitem, pair, place)
        if not c["keepdim"]:
            part = edit.call(aten.squeeze.dim, part, -1)
        made[root] = _to(edit, part, root.meta["val"].dtype)
    return made


# -- parts -------------------------------------------------------------------------------------------------------


def _ignored(follower: Follower) -> int:
    ignored = follower.captures["ignore_index"]
    return _IGNORED if ignored is None else int(ignored)


def _of_token(edit: Editor, values: Node, token: Node, dtype: torch.dtype) -> Node:
    """values[token], of a parameter ``[V]``."""
    column = edit.call(aten.unsqueeze.default, _to(edit, values, dtype), -1)
    return edit.call(aten.squeeze.dim, edit.call(aten.embedding.default, column, token), -1)


def _to(edit: Editor, node: Node, dtype: torch.dtype) -> Node:
    return node if node.meta["val"].dtype == dtype else edit.call(aten.to.dtype, node, dtype)


Builder = Callable[[Editor, Node, tuple[Node | None, ...], Follower], Mapping[Node, Node]]

_TIERS: Mapping[str, Builder] = MappingProxyType(
    {
        "cross_entropy": _tiers_loss,
        "log_softmax": _tiers_log_softmax,
        "softmax": _tiers_softmax,
        "largest": _tiers_largest,
    }
)
_DECODED: Mapping[str, Builder] = MappingProxyType({"cross_entropy": _row_loss, "largest": _row_largest})
