# SPDX-License-Identifier: Apache-2.0
"""Runs a part of a graph that computes on positions, at sizes of one's choice.

A mask is a function of sizes, of positions made from them (``arange``), and of the padding input. `Positions` is such
a part: it can be evaluated on the CPU with symbolic sizes bound to numbers, without the model around it. Only operators
of the list below are run; they draw no random numbers and read no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from rewriter.facts import Facts
from rewriter.modes import neutral
from rewriter.schemas import base_name, describe
from rewriter.slices import Region, is_size, slice_of

_MAKE = "arange full ones zeros scalar_tensor lift_fresh lift_fresh_copy"
_LIKE = "zeros_like ones_like full_like new_zeros new_ones new_full"
_MOVE = (
    "to _to_copy type_as alias detach clone contiguous view reshape _unsafe_view view_as flatten unflatten squeeze"
    " unsqueeze expand expand_as broadcast_to permute transpose t mT movedim swapaxes repeat slice select index gather"
    " index_select narrow cat stack getitem split unbind chunk tril triu diagonal flip"
)
_COMPARE = "eq ne lt le gt ge minimum maximum min max clamp clamp_min clamp_max isinf isneginf"
_LOGIC = "logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor any all"
_PYTHON_LOGIC = "__and__ __or__ __xor__ __iand__ __ior__ __ixor__"
_ARITHMETIC = "add sub rsub mul div floor_divide remainder neg abs diff cumsum sum where masked_fill"
_IN_PLACE = "add_ sub_ mul_ logical_and_ logical_or_ masked_fill_ fill_ copy_ zero_ triu_ tril_ index_put_"
ALLOWED = frozenset(
    " ".join((_MAKE, _LIKE, _MOVE, _COMPARE, _LOGIC, _PYTHON_LOGIC, _ARITHMETIC, _IN_PLACE)).split()
)

# Operators that read only the shape and dtype of their first operand, or of their second.
_SHAPE_OF_FIRST = frozenset(_LIKE.split())
_SHAPE_OF_SECOND = frozenset(("type_as", "view_as", "expand_as"))

# Where a number next to positions is a distance or a length, and not the value a masked score gets.
_ON_POSITIONS = frozenset(
    "eq ne lt le gt ge add sub rsub div floor_divide remainder minimum maximum min max clamp clamp_min clamp_max tril"
    " triu add_ sub_ tril_ triu_".split()
)


_KEEPING = frozenset("lift_fresh lift_fresh_copy detach alias clone to _to_copy contiguous view reshape unsqueeze".split())
_TINY = 1 / 16  # factors below this could turn a large length into a small number


@dataclass(frozen=True)
class Positions:
    """A value computed from sizes, constants and at most a few inputs.

    Attributes:
        facts: of the graph.
        region: the nodes that compute it.
        inputs: the placeholders whose values (not only sizes) it reads.
    """

    facts: Facts
    region: Region
    inputs: tuple[Node, ...]

    @classmethod
    def of(cls, facts: Facts, node: Node, at: Node | None = None) -> Positions | str:
        """The part that computes `node` (as `at` reads it), or one sentence on what else it reads or does."""
        region = slice_of(facts, node, ALLOWED, values_read, at)
        if isinstance(region, str):
            return region
        for multiplied in region.nodes:
            if base_name(multiplied.target) in ("mul", "mul_") and (factor := _tiny_factor(multiplied)) is not None:
                return f"{describe(multiplied)} scales by {factor:g}: lengths beyond every size tried may matter"
        for entry in region.entries:
            if entry.op != "get_attr":
                continue
            tensor = facts.tensor(entry)
            if tensor is None or tensor.device.type == "meta":
                return f"the value of {describe(entry)} is not known"
            if isinstance(tensor, nn.Parameter):
                return f"reads {describe(entry)}"
        return cls(facts, region, tuple(n for n in region.entries if n.op == "placeholder"))

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Integers the positions are compared with or moved by, as literals or scalar constants; sorted, distinct."""
        found: set[int] = set()
        for node in self.region.nodes:
            if base_name(node.target) in _ON_POSITIONS:
                found |= {int(v) for v in _scalars((node.args, node.kwargs))}
        for entry in self.region.entries:
            tensor = self.facts.tensor(entry)
            if tensor is not None and tensor.numel() == 1 and self._is_length(entry):
                found |= set(_scalars(tensor.flatten().tolist()))
        return tuple(sorted(found))

    def _is_length(self, scalar: Node) -> bool:
        """Whether a constant number meets positions; else it is what hidden scores get, say."""
        names = [(user, base_name(user.target)) for user in self.facts.users(scalar) if user in self.region.nodes]
        return any(name in _ON_POSITIONS or (name in _KEEPING and self._is_length(user)) for user, name in names)

    @cached_property
    def extent(self) -> int:
        """The largest dimension of a constant that is read: what it holds shows only at sizes up to there."""
        tensors = (self.facts.tensor(entry) for entry in self.region.entries)
        return max((size for tensor in tensors if tensor is not None for size in tensor.shape), default=0)

    @cached_property
    def symbols(self) -> frozenset[sympy.Symbol]:
        """The symbolic sizes of the value, its inputs and everything in between, or read for its shape."""
        read = {operand for node in self.region.nodes for operand in (node, *node.all_input_nodes)} | {*self.inputs}
        sizes = [n.meta["val"] for n in read if is_size(n)]
        sizes += [d for n in read for d in self.facts.shape(n) or ()]
        return frozenset(symbol for size in sizes for symbol in symbols_of(size))

    @neutral()
    @torch.no_grad()
    def evaluate(
        self, sizes: Mapping[sympy.Symbol, int], inputs: Mapping[Node, Tensor], moved: Mapping[int, int] | None = None
    ) -> Tensor:
        """The value at these sizes, on the CPU.

        Args:
            sizes: a number for every one of `symbols`.
            inputs: a tensor for every one of `inputs`.
            moved: numbers (see `numbers`) to be replaced by others, to see what depends on them.

        Raises:
            Exception: whatever an operator raises, where the graph cannot run at these sizes.
        """
        moved = moved or {}
        values: dict[Node, Any] = dict(inputs)
        for entry in self.region.entries:
            if entry.op == "get_attr":
                values[entry] = _moved_tensor(self.facts.tensor(entry), moved if self._is_length(entry) else {})
        lookup = _Lookup(self.facts, values, sizes)
        for node in self.region.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), lookup)
            if moved and base_name(node.target) in _ON_POSITIONS:
                args, kwargs = _replaced((args, kwargs), moved)
            args, kwargs = _on_cpu((args, kwargs))
            target: Any = node.target
            values[node] = target(*args, **kwargs)
        result: Tensor = values[self.region.exit]
        return result


def values_read(facts: Facts, node: Node) -> tuple[Node, ...]:
    """The operands whose values count: ``zeros_like(x)`` needs the shape of x only."""
    name = base_name(node.target)
    if name in _SHAPE_OF_FIRST:
        return tuple(node.all_input_nodes[1:]) if _first(node) else tuple(node.all_input_nodes)
    if name in _SHAPE_OF_SECOND:
        return tuple(node.all_input_nodes[:1])
    return tuple(node.all_input_nodes)


def symbols_of(size: int | torch.SymInt) -> frozenset[sympy.Symbol]:
    """The symbols of a size; none of a fixed one."""
    return frozenset(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else frozenset()


def bound(size: int | torch.SymInt, sizes: Mapping[sympy.Symbol, int]) -> int:
    """A size as a number."""
    return int(size.node.expr.xreplace(dict(sizes))) if isinstance(size, torch.SymInt) else size


@dataclass(frozen=True)
class _Lookup:
    """Node -> value: computed, a size, or (where only the shape is read) any tensor of its shape and dtype."""

    facts: Facts
    values: Mapping[Node, Any]
    sizes: Mapping[sympy.Symbol, int]

    def __call__(self, node: Node) -> Any:
        if node in self.values:
            return self.values[node]
        if is_size(node):
            return bound(node.meta["val"], self.sizes)
        shape = [bound(size, self.sizes) for size in self.facts.shape(node) or ()]
        return torch.zeros((), dtype=self.facts.dtype(node)).expand(shape)


def _tiny_factor(node: Node) -> float | None:
    """A literal factor of that kind."""
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float))]
    return next((n for n in numbers if 0 < abs(n) < _TINY), None)


def _first(node: Node) -> bool:
    return bool(node.all_input_nodes) and node.args[:1] == (node.all_input_nodes[0],)


def _scalars(value: Any) -> Iterator[int]:
    """Whole numbers inside arguments that may be lengths: not the bounds that stand for "to the end"."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _scalars(item)
    elif isinstance(value, dict):
        yield from _scalars(tuple(value.values()))
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**31 and value == int(value):
        yield int(value)


def _replaced(value: Any, moved: Mapping[int, int]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(item, moved) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, moved) for key, item in value.items()}
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value in moved:
        return type(value)(moved[int(value)])
    return value


def _moved_tensor(tensor: Tensor | None, moved: Mapping[int, int]) -> Tensor:
    if tensor is None:
        raise RuntimeError("a constant of the mask is gone")
    value = tensor.detach().cpu().clone()
    if value.numel() == 1 and not value.dtype.is_complex and (number := value.item()) in moved:
        value.fill_(moved[int(number)])
    return value


def _on_cpu(value: Any) -> Any:
    """Devices are where the model runs; masks are evaluated here."""
    if isinstance(value, (tuple, list)):
        return type(value)(_on_cpu(item) for item in value)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return torch.device("cpu") if isinstance(value, torch.device) else value
