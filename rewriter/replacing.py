# SPDX-License-Identifier: Apache-2.0
"""Whether a replacement, once built, may take a value's place: the part of legality that needs to see both.

:mod:`rewriter.legality` judges a match before anything is built. A rule may still build something else than it
promises: ``x·1 = x`` is wrong for a boolean x (the product is an integer), and hands out the caller's own tensor where
a new one was. So old and new are compared:

    dtype, device, shape    the same
    storage                 what the new value shares with others beyond what the old one did, nobody can notice
    strides                 the same, or nothing that reads the value, directly or not, can tell
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from rewriter.errors import LegalityError
from rewriter.facts import Facts
from rewriter.schemas import ASSERTIONS, describe

Values = dict[Node, Any]


def check(facts: Facts, old: Node, new: Node, added: Collection[Node], mode: FakeTensorMode) -> Values:
    """Compare a replacement with what it stands for, before anything is rewired.

    Args:
        facts: of the graph both stand in.
        old, new: the value to be replaced and the one that takes its place.
        added: the nodes the rule made.
        mode: the fake mode their values belong to.

    Returns:
        New values (``meta["val"]``) of nodes after ``old`` whose strides change, none of which can be told from the
        old ones; empty where the strides agree.

    Raises:
        LegalityError: somebody could tell the two apart; the message says how.
    """
    before, after = old.meta.get("val"), new.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return {}
    for difference in _differences(before, after):
        raise LegalityError(f"the replacement of {describe(old)} {difference}")
    for consequence in _shared(facts, old, new, added):
        raise LegalityError(f"the replacement of {describe(old)} shares storage with {consequence}")
    return _restrided(facts, old, after, mode)


def _differences(before: Tensor, after: Tensor) -> Iterator[str]:
    if before.dtype != after.dtype:
        yield f"has dtype {_word(after.dtype)} instead of {_word(before.dtype)}"
    if before.device != after.device:
        yield f"is on {after.device} instead of {before.device}"
    if before.dim() != after.dim() or not all(known_equal(a, b) for a, b in zip(before.shape, after.shape, strict=True)):
        yield f"has shape {list(after.shape)} instead of {list(before.shape)}"


def _shared(facts: Facts, old: Node, new: Node, added: Collection[Node]) -> Iterator[str]:
    """Storage that comes to be shared, and by what it shows."""
    own = facts.alias_roots(old)
    for root in sorted(facts.alias_roots(new) - own - frozenset(added)):
        writers = facts.writers(old)
        later = [writer for writer in facts.writers(root) if old < writer]
        if writers:
            yield f"{describe(root)}, and it is written by {describe(writers[0])}"
        elif later:
            yield f"{describe(root)}, which {describe(later[0])} writes later"
        elif _both_held(facts, own, root):
            yield f"{describe(root)}, and it is returned"


def _both_held(facts: Facts, own: frozenset[Node], root: Node) -> bool:
    """Whether a value is returned, and somebody outside the program (its caller, its owner) holds the root as well."""
    returned = [facts.alias_roots(value) for value in facts.graph.output_node().all_input_nodes]
    return any(own & roots for roots in returned) and (root.op != "call_function" or any(root in r for r in returned))


def _restrided(facts: Facts, old: Node, after: Tensor, mode: FakeTensorMode) -> Values:
    """Values of the nodes after ``old`` that come out in other strides, followed as far as there are any.

    Operators between (elementwise ones) hand strides on; `view` may refuse them, and the caller sees those of outputs.
    """
    if _same_strides(old.meta["val"], after):
        return {}
    if facts.writers(old):  # a reshape that was a view would now be a copy, which the write does not reach
        raise LegalityError(f"the replacement of {describe(old)} has other strides, and it is written in place")
    values: Values = {old: after}
    pending = sorted(facts.users(old))
    waiting = set(pending)
    while pending:
        node = heapq.heappop(pending)
        if node.op == "output":
            raise LegalityError(f"the replacement of {describe(old)} has other strides, and the caller sees them")
        if node.target in ASSERTIONS or not _hands_on(node):
            continue
        value = _rerun(old, node, values, mode)
        if _all_same_strides(node.meta.get("val"), value):
            continue
        values[node] = value
        for user in node.users:
            if user not in waiting:
                waiting.add(user)
                heapq.heappush(pending, user)
    del values[old]
    return values


def _rerun(old: Node, node: Node, values: Values, mode: FakeTensorMode) -> Any:
    if isinstance(node.target, HigherOrderOperator):
        raise LegalityError(f"the replacement of {describe(old)} has other strides, and {describe(node)} reads it")
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values.get(n, n.meta.get("val")))
    try:
        with mode, torch.enable_grad():
            function: Any = node.target
            return function(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LegalityError(
            f"the replacement of {describe(old)} has other strides, which {describe(node)} does not take: {reason}"
        ) from error


def _hands_on(node: Node) -> bool:
    """Whether the strides of the node's result can depend on those of its operands."""
    if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return False  # a size or a number
    return not (isinstance(node.target, OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags)


def _all_same_strides(before: Any, after: Any) -> bool:
    if isinstance(before, (tuple, list)) and isinstance(after, (tuple, list)):
        return len(before) == len(after) and all(map(_all_same_strides, before, after))
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return _same_strides(before, after)
    return True


def _same_strides(before: Tensor, after: Tensor) -> bool:
    """Strides of dimensions of size 1 say nothing."""
    sizes = zip(before.shape, before.stride(), after.stride(), strict=True)
    return all(known_equal(a, b) or known_equal(size, 1) for size, a, b in sizes)


def known_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equal for every input; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
