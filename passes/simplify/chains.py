# SPDX-License-Identifier: Apache-2.0
"""Chains of one kind of operator collapse:

    (xᵖ)^q  =  x^(p∘q)                  transposes and permutations
    reshape(reshape(x, a), b)  =  reshape(x, b)
    cast(cast(x, a), b)  =  cast(x, b)   where dtype a holds every value of x: float16 → float32 → float16, not the reverse

and where the chain comes back to where it was, nothing of it is left.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import Facts, same_shape, same_size
from rewriter.matcher import Match, Miss
from rewriter.operators import cast, reshape
from rewriter.passes.simplify.sites import calls, chain_above, near, sharing_shows, site, sole_user
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.schemas import describe

aten = torch.ops.aten


class Collapse(Rule):
    """A chain of one kind. Nodes inside may be used elsewhere only where the chain is the identity: else nothing is won."""

    contract: ClassVar[Contract] = EXACT
    targets: ClassVar[frozenset[Any]]

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts = program.facts
        matches: list[Match] = []
        misses: list[Miss] = []
        inside: set[Node] = set()
        for root in reversed(calls(facts, self.targets)):
            if root in inside:
                continue
            links = self._links(facts, root)
            if (match := self._inverse(facts, links) or self._run(facts, links)) is not None:
                inside.update(match.nodes)
                matches.append(match)
            elif (miss := self.near_miss(facts, links)) is not None:
                misses.append(miss)
        return matches[::-1], misses[::-1]

    def refusal(self, program: Program, match: Match) -> str | None:
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        if match["value"] is None or program.facts.alias_roots(match["value"]) & program.facts.alias_roots(match.root):
            return None
        return sharing_shows(program.facts, match.root, match["value"])

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        if match["value"] is not None:
            return {match.root: match["value"]}
        target, *arguments = match["call"]
        return {match.root: edit.call(target, match["x"], *arguments)}

    def _links(self, facts: Facts, root: Node) -> list[Node]:
        """The chain above a root, itself first."""
        return [node for node in chain_above(facts, root, self.targets) if self.is_link(facts, node)]

    def _inverse(self, facts: Facts, links: Sequence[Node]) -> Match | None:
        """The farthest value the chain comes back to."""
        for count in range(len(links), 0, -1):
            nodes = links[:count]
            value = nodes[-1].all_input_nodes[0]
            if self.is_identity(facts, value, nodes) and (count > 1 or self.alone):
                gone, kept = _escaping(facts, nodes)
                return site(self.role, gone[::-1], {"x": None, "value": value, "call": None, "kept": kept}, casts=gone)
        return None

    def _run(self, facts: Facts, links: Sequence[Node]) -> Match | None:
        """The longest chain that one call replaces, nothing of it used elsewhere."""
        nodes = list(links[:1])
        for node in links[1:]:
            if sole_user(facts, node) is not nodes[-1] or len(node.users) > 1:
                break
            nodes.append(node)
        while len(nodes) > 1:
            x = nodes[-1].all_input_nodes[0]
            if (call := self.single(facts, x, nodes)) is not None:
                return site(self.role, nodes[::-1], {"x": x, "value": None, "call": call}, casts=nodes)
            nodes.pop()
        return None

    alone: ClassVar[bool] = False  # whether one link alone may be an identity that `RemoveIdentity` does not see

    def is_link(self, facts: Facts, node: Node) -> bool:
        return True

    @abstractmethod
    def is_identity(self, facts: Facts, x: Node, nodes: Sequence[Node]) -> bool:
        """Whether the links (last one first) applied to ``x`` give x."""

    @abstractmethod
    def single(self, facts: Facts, x: Node, nodes: Sequence[Node]) -> tuple[Any, ...] | None:
        """(operator, further arguments) of the one call that stands for the links; None if there is none."""

    def near_miss(self, facts: Facts, links: Sequence[Node]) -> Miss | None:
        return None


class CollapseTransposes(Collapse):
    """Transposes and permutations."""

    name: ClassVar[str] = "simplify.transpose"
    role: ClassVar[str] = "transpose"
    targets: ClassVar[frozenset[Any]] = frozenset(
        {aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.numpy_T.default}
    )
    alone: ClassVar[bool] = True

    def is_link(self, facts: Facts, node: Node) -> bool:
        return facts.shape(node) is not None

    def is_identity(self, facts: Facts, x: Node, nodes: Sequence[Node]) -> bool:
        order = _composed(facts, nodes)
        return order == sorted(order)

    def single(self, facts: Facts, x: Node, nodes: Sequence[Node]) -> tuple[Any, ...] | None:
        order = _composed(facts, nodes)
        moved = [i for i, d in enumerate(order) if i != d]
        if len(moved) == 2:
            return aten.transpose.int, moved[0], moved[1]
        if _swaps_last(facts, nodes[0]):
            return None  # how products read their second operand; one permutation instead would hide it from them
        return aten.permute.default, order


class CollapseReshapes(Collapse):
    """Reshapes, and what only adds or drops dimensions of size one."""

    name: ClassVar[str] = "simplify.reshape"
    role: ClassVar[str] = "reshape"
    targets: ClassVar[frozenset[Any]] = frozenset(
        {
            *reshape.targets, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints,
            aten.unflatten.int,
        }
    )  # fmt: skip

    def is_identity(self, facts: Facts, x: Node, nodes: Sequence[Node]) -> bool:
        return same_shape(facts.shape(x), facts.shape(nodes[0])) and _only_views(facts, x, nodes)

    def single(self, facts: Facts, x: Node, nodes: Sequence[Node]) -> tuple[Any, ...] | None:
        if nodes[0].target not in reshape.targets or not _only_views(facts, x, nodes):
            return None
        arguments = facts.arguments(nodes[0])
        return aten.reshape.default, arguments["size" if "size" in arguments else "shape"]


class CollapseCasts(Collapse):
    """Casts, where the ones in between lose nothing."""

    name: ClassVar[str] = "simplify.cast"
    role: ClassVar[str] = "cast"
    targets: ClassVar[frozenset[Any]] = frozenset(cast.targets)

    def is_link(self, facts: Facts, node: Node) -> bool:
        return cast.read is not None and not isinstance(cast.read(facts, node), str)

    def _links(self, facts: Facts, root: Node) -> list[Node]:
        links: list[Node] = []
        for node in chain_above(facts, root, self.targets):
            if not self.is_link(facts, node):
                break
            links.append(node)
        return links

    def is_identity(self, facts: Facts, x: Node, nodes: Sequence[Node]) -> bool:
        return facts.dtype(nodes[0]) == facts.dtype(x) and _lossless(facts, x, nodes[1:])

    def single(self, facts: Facts, x: Node, nodes: Sequence[Node]) -> tuple[Any, ...] | None:
        return (aten.to.dtype, facts.dtype(nodes[0])) if _lossless(facts, x, nodes[1:]) else None

    def near_miss(self, facts: Facts, links: Sequence[Node]) -> Miss | None:
        if len(links) < 2:
            return None
        inner, x = links[1], links[1].all_input_nodes[0]
        if _lossless(facts, x, [inner]):
            return None
        reason = f"{describe(inner)} rounds {_word(facts, x)} to {_word(facts, inner)}, and casting back does not undo that"
        return near(facts, self.name, inner, "inner cast", reason, f"a dtype that holds every {_word(facts, x)}")


def holds(outer: torch.dtype, inner: torch.dtype) -> bool:
    """Whether every value of dtype ``inner`` is one of ``outer``."""
    if outer == inner or inner == torch.bool:
        return True
    if outer == torch.bool or inner.is_complex or outer.is_complex:
        return outer.is_complex and inner.is_floating_point and holds(outer.to_real(), inner)
    if inner.is_floating_point:
        if not outer.is_floating_point:
            return False
        wide, narrow = torch.finfo(outer), torch.finfo(inner)
        finer = wide.eps <= narrow.eps and wide.tiny * wide.eps <= narrow.tiny * narrow.eps
        return finer and wide.max >= narrow.max
    span = torch.iinfo(inner)
    if outer.is_floating_point:
        return max(-span.min, span.max) <= 2 / torch.finfo(outer).eps
    return torch.iinfo(outer).min <= span.min and torch.iinfo(outer).max >= span.max


def _lossless(facts: Facts, x: Node, between: Sequence[Node]) -> bool:
    given = facts.dtype(x)
    return given is not None and all((d := facts.dtype(n)) is not None and holds(d, given) for n in between)


def _escaping(facts: Facts, nodes: Sequence[Node]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Of a chain (last one first), what goes with its root, and what stays because something outside reads it."""
    for count, (reader, node) in enumerate(pairwise(nodes), 1):
        if sole_user(facts, node) is not reader:
            return tuple(nodes[:count]), tuple(nodes[count:])
    return tuple(nodes), ()


def _composed(facts: Facts, nodes: Sequence[Node]) -> list[int]:
    """The permutation a chain (last one first) amounts to: dimension i of the result is dimension order[i] of x."""
    order = list(range(len(facts.shape(nodes[0]) or ())))
    for node in nodes:
        one = _order(facts, node)
        order = [one[d] for d in order]
    return order


def _order(facts: Facts, node: Node) -> list[int]:
    arguments = facts.arguments(node)
    rank = len(facts.shape(node) or ())
    order = list(range(rank))
    if node.target is aten.transpose.int:
        first, second = (arguments[d] % rank if rank else 0 for d in ("dim0", "dim1"))
        if rank:
            order[first], order[second] = order[second], order[first]
    elif node.target is aten.permute.default:
        order = [d % rank for d in arguments["dims"]]
    elif node.target is aten.mT.default:
        order[-2:] = order[-1], order[-2]
    else:  # t and numpy_T
        order.reverse()
    return order


def _swaps_last(facts: Facts, node: Node) -> bool:
    """Whether a node is written as a transpose of its last two dimensions."""
    order = _order(facts, node)
    return node.target is not aten.permute.default and order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]


def _only_views(facts: Facts, x: Node, nodes: Sequence[Node]) -> bool:
    """Whether no link copies: else strides, on which a later view may depend, come out otherwise."""
    may_copy = any(n.target in (aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default) for n in nodes)
    return not may_copy or _row_major(facts, x)


def _row_major(facts: Facts, node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and all(
        same_size(stride, expected) or same_size(size, 1)
        for size, stride, expected in zip(value.shape, value.stride(), _strides(value.shape), strict=True)
    )


def _strides(shape: Sequence[Any]) -> Iterator[Any]:
    strides: list[Any] = []
    running: Any = 1
    for size in reversed(shape):
        strides.append(running)
        running = running * size
    return reversed(strides)


def _word(facts: Facts, node: Node) -> str:
    return str(facts.dtype(node)).removeprefix("torch.")
