# SPDX-License-Identifier: Apache-2.0
"""Regions: an operator with a kernel to be specialised, and the pointwise nodes around it that can be computed in it.

Forward, the region takes what depends on the operator's result element by element, as far as a single value leaves it;
backward, what produces the activations alone. It ends at reductions, changes of layout, values that are needed elsewhere,
writes in place and random numbers. Whether nobody can tell the fused nodes from the single ones is asked of
:mod:`rewriter.legality`, as for any rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter import legality
from rewriter.codegen.emit_expressions import (
    CASTS,
    DTYPES,
    ELEMENTS,
    EXPENSIVE,
    EXPRESSIONS,
    VIEWS,
    Call,
    Unfit,
    expression_of,
    is_identity,
    name_of,
)
from rewriter.facts import Facts, same_shape, same_size
from rewriter.matcher import Match
from rewriter.rules import module_path

MOST = 32  # nodes on one side; what is longer is no epilogue any more


@dataclass(frozen=True)
class Operand:
    """A tensor a region reads besides the operator's own arguments.

    Attributes:
        node: its value.
        form: how it lies over the tile: "tile" [rows, columns], "column" [columns], "row" [rows, 1], "scalar" [].
        repeats: whether it has fewer rows, which repeat (position embeddings over a batch).
    """

    node: Node
    form: str
    repeats: bool = False


@dataclass(frozen=True)
class Region:
    """What becomes one kernel.

    Attributes:
        anchor: the operator.
        prologue, epilogue: pointwise nodes before and after it, in graph order.
        before, after: their operands; the first of ``before`` takes the place of the activations.
        root: the node whose value leaves the region.
        miss: why the epilogue does not reach further; "" where nothing follows that could be fused.
    """

    anchor: Node
    prologue: tuple[Node, ...]
    epilogue: tuple[Node, ...]
    before: tuple[Operand, ...]
    after: tuple[Operand, ...]
    root: Node
    miss: str = ""

    @property
    def fused(self) -> tuple[Node, ...]:
        """The nodes that compute something."""
        return tuple(n for n in (*self.prologue, *self.epilogue) if not is_identity(n))

    def match(self) -> Match:
        nodes = tuple(sorted((*self.prologue, self.anchor, *self.epilogue)))
        return Match("emit", self.root, {"region": self}, nodes, (self.root,))


@dataclass
class Search:
    """Regions of one graph; every node belongs to one at most.

    Attributes:
        facts: of the graph.
        anchors: operator -> name of its activation argument.
        expensive: before a product, where every block of columns does it again, also fuse functions that cost much and
            more than one operand of the activations' size.
    """

    facts: Facts
    anchors: Mapping[Any, str]
    expensive: bool = False
    _taken: set[Node] = field(default_factory=set)

    def regions(self) -> list[Region]:
        """In graph order. Anchors without anything to fuse are among them."""
        anchors = sorted(self.facts.calls(self.anchors))
        self._taken = set(anchors)
        found = [self._forward(anchor) for anchor in anchors]
        return [self._backward(region) for region in found]

    # -- after the operator

    def _forward(self, anchor: Node) -> Region:
        if _dtype(anchor) not in ELEMENTS:
            return Region(anchor, (), (), (), (), anchor, f"its dtype is {_dtype(anchor)}")
        reached, end = self._reached(anchor)
        refused = ""
        for root in reversed(reached):
            if is_identity(root):
                continue
            inside = _between(anchor, root, reached)
            operands = self._closed(anchor, inside, root)
            if isinstance(operands, str):
                refused = refused or operands
                continue
            self._taken.update(inside)
            return Region(anchor, (), inside, (), operands, root, refused or end)
        return Region(anchor, (), (), (), (), anchor, refused or end)

    def _reached(self, anchor: Node) -> tuple[list[Node], str]:
        """Nodes computed from the operator's result element by element, and why the next one is not."""
        reached: list[Node] = []
        miss = ""
        pending = sorted(self.facts.users(anchor))
        while pending and len(reached) < MOST:
            node = pending.pop(0)
            if node in reached:
                continue
            reason = self._unfit(node, {anchor, *reached}, anchor)
            if reason is not None:
                miss = miss or reason
                continue
            reached.append(node)
            pending = sorted({*pending, *self.facts.users(node)})
        return sorted(reached), miss

    def _unfit(self, node: Node, inside: set[Node], anchor: Node) -> str | None:
        """Why a node cannot be computed tile by tile; None if it can."""
        if node.op == "output":
            return "it is a result of the program"
        if node in self._taken:
            return f"{_called(node)} is in another kernel"
        if node.target not in EXPRESSIONS:
            return f"{_called(node)} is not pointwise"
        try:
            if not _shape(node) or not same_size(_shape(node)[-1], _shape(anchor)[-1]):
                raise Unfit("it has other columns")
            if not same_size(_count(node), _count(anchor)):
                raise Unfit("it has other rows")
            for operand in node.all_input_nodes:
                if operand not in inside and isinstance(operand.meta.get("val"), Tensor):
                    _operand(operand, node)
            self._checked(node)
        except Unfit as reason:
            return f"{_called(node)}: {reason}"
        return None

    def _checked(self, node: Node) -> None:
        """Raises Unfit where the node has no expression."""
        if _dtype(node) not in DTYPES:
            raise Unfit(f"its dtype is {_dtype(node)}")
        arguments = self.facts.arguments(node)
        if node.target in CASTS and arguments.get("device") not in (None, self.facts.device(node.all_input_nodes[0])):
            raise Unfit("it moves to another device")
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        texts, dtypes = dict.fromkeys(tensors, "x"), {n: _dtype(n) for n in tensors}
        expression_of(node)(Call(arguments, texts, dtypes, _dtype(node)))

    def _closed(self, anchor: Node, inside: tuple[Node, ...], root: Node) -> tuple[Operand, ...] | str:
        """The operands of nodes from which only the root's value leaves; else why it is not so."""
        escaped = self.facts.escape((anchor, *inside), (root,))
        if escaped is not None:
            return f"{_called(escaped[0])} is also needed by {_called(escaped[1])}"
        if _dtype(root) not in ELEMENTS:
            return f"{_called(root)} is {_dtype(root)}"
        operands = _operands(inside, (anchor, *inside))
        if isinstance(operands, str):
            return operands
        match = Region(anchor, (), inside, (), operands, root).match()
        reason = legality.refusal(self.facts, match, besides=("dtype",))
        return operands if reason is None else str(reason)

    # -- before the operator

    def _backward(self, region: Region) -> Region:
        activations = self.facts.arguments(region.anchor)[self.anchors[region.anchor.target]]
        inside: list[Node] = []
        pending = [activations]
        while pending and len(inside) < MOST:
            node = pending.pop()
            if node in inside or not self._produces(node, {region.anchor, *inside}, activations):
                continue
            inside.append(node)
            pending += [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        nodes = tuple(sorted(n for n in inside if set(self.facts.users(n)) <= {region.anchor, *inside}))
        while nodes and (operands := self._main_first(nodes, activations)) is None:
            nodes = nodes[1:]
        if not nodes or operands is None or all(map(is_identity, nodes)):
            return region
        grown = Region(region.anchor, nodes, region.epilogue, operands, region.after, region.root, region.miss)
        if legality.refusal(self.facts, grown.match(), besides=("dtype",)) is not None:
            return region
        self._taken.update(nodes)
        return grown

    def _produces(self, node: Node, inside: set[Node], activations: Node) -> bool:
        if node.op != "call_function" or not set(self.facts.users(node)) <= inside:
            return False
        if node.target in EXPENSIVE and not self.expensive:
            return False
        return self._unfit(node, inside | set(node.all_input_nodes), activations) is None

    def _main_first(self, nodes: tuple[Node, ...], activations: Node) -> tuple[Operand, ...] | None:
        """Operands of a prologue: first one of the activations' size, which the kernel reads in their place."""
        operands = _operands(nodes, nodes)
        if isinstance(operands, str) or activations not in nodes:
            return None
        tiles = [o for o in operands if o.form == "tile" and not o.repeats and _dtype(o.node) in ELEMENTS]
        main = next((o for o in tiles if same_size(_count(o.node), _count(activations))), None)
        if main is None or (len(tiles) > 1 and not self.expensive):
            return None
        return (main, *(o for o in operands if o is not main))


def _between(anchor: Node, root: Node, reached: list[Node]) -> tuple[Node, ...]:
    """The root, and those it is computed from."""
    inside: set[Node] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if node in inside or node not in reached:
            continue
        inside.add(node)
        pending += node.all_input_nodes
    return tuple(sorted(inside))


def _operands(nodes: tuple[Node, ...], inside: tuple[Node, ...]) -> tuple[Operand, ...] | str:
    """Tensors read from outside, in graph order of their readers; or why they do not fit together."""
    found: dict[Node, Operand] = {}
    for node, value in _reads(nodes, inside):
        try:
            operand = _operand(value, node)
        except Unfit as reason:
            return f"{_called(node)}: {reason}"
        if found.setdefault(value, operand) != operand:
            return f"{_called(value)} is read in two forms"
    return tuple(found.values())


def _reads(nodes: tuple[Node, ...], inside: tuple[Node, ...]) -> Iterator[tuple[Node, Node]]:
    for node in nodes:
        for value in node.all_input_nodes:
            if value not in inside and isinstance(value.meta.get("val"), Tensor):
                yield node, value


def _operand(value: Node, reader: Node) -> Operand:
    """How a tensor lies over the rows and columns of its reader. Raises Unfit."""
    if _dtype(value) not in DTYPES:
        raise Unfit(f"{_called(value)} is {_dtype(value)}")
    if value.meta["val"].device != reader.meta["val"].device and _shape(value) != ():
        raise Unfit(f"{_called(value)} is on another device")
    shape, whole = _shape(value), _shape(reader)
    if reader.target in VIEWS:
        if not shape or not same_size(shape[-1], whole[-1]):
            raise Unfit(f"{_called(value)} has other rows")
        return Operand(value, "tile")
    while shape and same_size(shape[0], 1) and not same_shape(shape, whole):
        shape = shape[1:]
    if not shape:
        return Operand(value, "scalar")
    tail = whole[len(whole) - len(shape) :]
    repeats = len(shape) < len(whole) and not same_size(math.prod(whole[: len(whole) - len(shape)]), 1)
    if same_shape(shape, tail):
        if len(shape) == 1:
            return Operand(value, "column")
        return Operand(value, "tile", repeats)
    if same_size(shape[-1], 1) and same_shape(shape[:-1], tail[:-1]):
        return Operand(value, "row", repeats)
    raise Unfit(f"{_called(value)} of shape {list(_shape(value))} lies neither over rows nor over columns")


def _called(node: Node) -> str:
    """A node, for people: "add of layers.0.mlp"; a tensor or an input by its name."""
    if node.op != "call_function":
        return str(node.target) if node.op == "get_attr" else node.name
    called = name_of(node) if str(node.target).count(".") == 2 else str(getattr(node.target, "__name__", node.name))
    path = module_path(node)
    return f"{called} of {path}" if path else called


def _shape(node: Node) -> tuple[int | torch.SymInt, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise Unfit("it is no tensor")
    return tuple(value.shape)


def _count(node: Node) -> int | torch.SymInt:
    return math.prod(_shape(node))


def _dtype(node: Node) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else torch.complex64
