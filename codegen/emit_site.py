# SPDX-License-Identifier: Apache-2.0
"""What is known of a site before its file is written: its kernels, the names in it, how its operands lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.codegen.emit_expressions import Unfit, formula, name_of
from rewriter.codegen.emit_regions import Operand, Region
from rewriter.codegen.emit_templates import ROWS, Template, hooked, names_in
from rewriter.facts import Facts, same_size

# What every emitted kernel or file has names for already.
_RESERVED = frozenset("x acc rows columns features inside tl torch triton functions implementation".split())


class Site:
    """A region with the kernels of its operator, and names that do not collide.

    Attributes:
        facts, region, template: what it was made from.
        given: arguments of the operator by their own names.
        activations: the value whose rows are the rows of the result; dtype and features: its own.
        columns: of the result.
        main: the operand a prologue computes the activations from; None without one.
        kernels: of the operator, as the site would start them.
        arguments: values the emitted operator takes -> their names, in order.
        values: nodes of the region -> names of their results.
        locals: operands -> their names in the kernel.

    Raises:
        Unfit: the operator's kernel cannot be specialised to it.
    """

    def __init__(self, facts: Facts, region: Region, template: Template) -> None:
        self.facts, self.region, self.template = facts, region, template
        self.given = facts.arguments(region.anchor)
        self.activations: Node = self.given[template.activations]
        self.dtype: torch.dtype = self.activations.meta["val"].dtype
        self.features = self._features()
        self.columns = _static(region.anchor.meta["val"].shape[-1], "the number of columns")
        self.main = region.before[0] if region.before else None
        self.kernels = hooked(template, self.given, self._rows(), self.features, self.dtype)
        self._taken = _RESERVED.union(*(names_in(kernel.kernel) for kernel in self.kernels))
        self.arguments = self._named_arguments()
        self.values = self._named_values()
        own = {value for value in self.given.values() if isinstance(value, Node)}
        operands = [operand for operand in (*region.before, *region.after) if operand is not self.main]
        # In the kernel, operands that are also arguments of the operator have a name besides.
        self.locals = {o.node: self.fresh(o.form) if o.node in own else self.arguments[o.node] for o in operands}

    def _features(self) -> int:
        """Where the program leaves their number open, that of the example; kernels refuse calls with another."""
        size = self.activations.meta["val"].shape[-1]
        if isinstance(size, int):
            return size
        if self.region.prologue or size.node.hint is None:
            raise Unfit("the number of features is only known when the program runs")
        return int(size.node.hint)

    def _rows(self) -> Sequence[int]:
        """Numbers of rows the site may have: the one it has, or some of all."""
        sizes = self.activations.meta["val"].shape[:-1]
        if not all(isinstance(size, int) for size in sizes):
            return ROWS
        count = 1
        for size in sizes:
            count *= size
        return (count,)

    # -- names

    def fresh(self, base: str) -> str:
        """A name like ``base`` that nothing has, nor what is derived from it; taken from now on."""
        name, number = base, 0
        suffixes = ("", "_ptr", "_rows", "_stride", "_at", "_inside")
        while any(name + suffix in self._taken for suffix in suffixes):
            number += 1
            name = f"{base}_{number}"
        self._taken |= {name + suffix for suffix in suffixes}
        return name

    def _named_arguments(self) -> dict[Node, str]:
        """The operator's tensors under its own names, then the operands, then sizes that views name."""
        names: dict[Node, str] = {}
        for name, value in self.given.items():
            if isinstance(value, Node):
                read = self.main.node if self.main and name == self.template.activations else value
                names.setdefault(read, "x" if name == "input" else name)
        self._taken |= set(names.values())
        for operand in (*self.region.before, *self.region.after):
            if operand.node not in names:
                names[operand.node] = self.fresh(operand.form)
        for node in (*self.region.prologue, *self.region.epilogue):
            for value in node.all_input_nodes:
                if not isinstance(value.meta.get("val"), Tensor) and value not in names:
                    names[value] = self.fresh("size")
        return names

    def _named_values(self) -> dict[Node, str]:
        nodes = (*self.region.prologue, self.region.anchor, *self.region.epilogue)
        return {node: self.fresh(name_of(node)) for node in nodes}

    def formula(self, node: Node, names: Mapping[Node, str]) -> str:
        """A value in terms of the arguments and of what has a name in ``names``."""
        named = {**{n: name for n, name in self.arguments.items() if n not in self.values}, **names}
        return formula(node, named, self.facts.arguments)

    # -- operands

    def is_dense(self, operand: Operand) -> bool:
        """Whether its rows follow each other in memory, as those of the result do: then both have one address."""
        value = operand.node.meta["val"]
        return value.dim() > 1 and same_size(value.stride(-1), 1) and same_size(value.stride(-2), value.shape[-1])

    def operand(self, node: Node) -> Operand:
        """The operand that is a node's value."""
        return next(o for o in (*self.region.before, *self.region.after) if o.node is node)

    def is_limited(self, operand: Operand) -> bool:
        """Whether the kernel needs to know how many rows it has: the tile's own mask does not guard it."""
        tile_before = operand.form == "tile" and operand in self.region.before
        return operand.repeats or operand.form == "row" or tile_before


def _static(size: Any, what: str) -> int:
    if not isinstance(size, int):
        raise Unfit(f"{what} is only known when the program runs")
    return size
