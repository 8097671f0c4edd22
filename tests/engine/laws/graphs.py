# SPDX-License-Identifier: Apache-2.0
"""Random well-typed graphs in the dialect of the training IR, small enough that a test makes thousands of them.

Every node is typed by running its operator on the small tensors its operands stand for, so that shapes, dtypes and
broadcasting are what torch does and not what a generator believes. A call that torch refuses is not in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.node import map_arg

from rewriter.facts import Facts

aten = torch.ops.aten
T = TypeVar("T")

UNARY = tuple(
    getattr(aten, name).default for name in ("relu", "sigmoid", "tanh", "exp", "neg", "gelu", "silu", "rsqrt")
)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)
COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)
# Operators that hand their operand on, as patterns may be told; the last stops gradients.
PASSING: tuple[Callable[[Tensor], tuple[Any, ...]], ...] = (
    lambda x: (aten.clone.default,),
    lambda x: (aten.contiguous.default,),
    lambda x: (aten.to.dtype, x.dtype),
    lambda x: (aten.dropout.default, 0.5, False),
    lambda x: (aten.reshape.default, list(x.shape)),
    lambda x: (aten.alias.default,),
    lambda x: (aten.detach.default,),
)
DTYPES = (torch.float32, torch.float16, torch.float64)
NUMBERS = (2, 0.5, -1.0)


@cache
def _below(n: int) -> st.SearchStrategy[int]:
    return st.integers(0, n - 1)


@dataclass(frozen=True)
class Chance:
    """Draws, in the few forms the generators need; zero is the simplest choice, towards which examples shrink."""

    draw: Callable[[st.SearchStrategy[int]], int]

    def among(self, options: Sequence[T]) -> T:
        return options[self.draw(_below(len(options)))] if len(options) > 1 else options[0]

    def one_in(self, n: int) -> bool:
        return self.draw(_below(n)) == n - 1

    def upto(self, n: int) -> int:
        return self.draw(_below(n + 1))


class IllTypedError(Exception):
    """Torch does not compute this call."""


@dataclass
class Builder:
    """A graph under construction; `values` are the tensors that later calls may read."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    values: list[Node] = field(default_factory=list)
    given: dict[str, Tensor] = field(default_factory=dict)  # the inputs; those in `values` may be written to

    def placeholder(self, name: str, value: Tensor) -> Node:
        self.given[name] = value.clone()
        return self._typed(self.graph.placeholder(name), value)

    def parameter(self, name: str, value: Tensor) -> Node:
        self.root.register_parameter(name, nn.Parameter(value))
        return self._typed(self.graph.create_node("get_attr", name), value)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A node that calls `target`. Raises IllTypedError where torch does."""
        given, named = map_arg((args, kwargs), lambda node: node.meta["val"])
        try:
            with torch.no_grad():
                value = target(*given, **named)
        except (RuntimeError, IndexError, TypeError, NotImplementedError, ValueError) as error:
            raise IllTypedError(str(error)) from None
        return self._typed(self.graph.create_node("call_function", target, args, kwargs), value)

    def check(self, node: Node) -> None:
        """An assertion about the node, which computes nothing."""
        self.graph.create_node("call_function", aten._assert_tensor_metadata.default, (node,))

    def _typed(self, node: Node, value: Any) -> Node:
        node.meta["val"] = value
        if isinstance(value, Tensor):
            self.values.append(node)
        return node

    def facts(self) -> Facts:
        """Facts of the graph as it is. (A GraphModule would compile the graph each time.)"""
        self.root.graph = self.graph  # type: ignore[assignment]
        return Facts(self.root)  # type: ignore[arg-type]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Positive numbers, different ones, so that no operator of the generator leaves its domain."""
    count = 1
    for size in shape:
        count *= size
    return (torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)).reshape(shape).to(dtype)


def start() -> Builder:
    """A graph with inputs of several shapes and dtypes, and three parameters."""
    made = Builder()
    made.parameter("p", tensor(3, 3))
    made.parameter("q", tensor(3, 3))
    made.parameter("r", tensor(3))
    made.placeholder("a", tensor(3, 3))
    made.placeholder("b", tensor(3, 3))
    made.placeholder("c", tensor(3))
    made.placeholder("d", tensor(3, 3, dtype=torch.float16))
    made.placeholder("e", tensor(2, 1, 3))
    made.placeholder("f", tensor())
    made.placeholder("i", torch.arange(9).reshape(3, 3))
    return made


def some_value(made: Builder, chance: Chance) -> Node:
    """A value to read: mostly a recent one, so that graphs are deep, or a square float input."""
    recent, squares = made.values[-4:], made.values[3:5]
    return chance.among([*squares, *recent]) if chance.upto(3) else chance.among(made.values)


def add_noise(made: Builder, chance: Chance) -> None:
    """One random call, where torch accepts it."""
    x, y = some_value(made, chance), some_value(made, chance)
    try:
        chance.among(_NOISE)(made, chance, x, y)
    except IllTypedError:
        return


def finish(made: Builder, chance: Chance) -> None:
    """The output: the last value, and some others."""
    others = [some_value(made, chance) for _ in range(chance.upto(2))]
    outputs = dict.fromkeys([made.values[-1], *others])
    made.graph.output(list(outputs))


def _view(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    rank = x.meta["val"].dim()
    shape = list(x.meta["val"].shape)
    kind = chance.upto(5)
    if kind == 0:
        made.call(aten.transpose.int, x, -1, -2)
    elif kind == 1:
        made.call(aten.unsqueeze.default, x, chance.among([0, -1, rank]))
    elif kind == 2:
        made.call(aten.reshape.default, x, chance.among([shape, [-1], [*shape, 1]]))
    elif kind == 3:
        made.call(aten.expand.default, x, chance.among([shape, [2, *shape]]))
    elif kind == 4:
        made.call(aten.slice.Tensor, x, 0, 0, chance.among([1, 9223372036854775807]))
    else:
        made.call(aten.permute.default, x, chance.among([list(range(rank)), list(reversed(range(rank)))]))


def _reduce(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    target = chance.among([aten.mean.dim, aten.sum.dim_IntList, aten.amax.default])
    made.call(target, x, [-1], chance.among([True, False]))


def _contract(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    weight = made.values[chance.upto(1)]
    kind = chance.upto(3)
    if kind == 0:
        made.call(aten.matmul.default, x, y)
    elif kind == 1:
        made.call(aten.linear.default, x, weight, *chance.among([(), (made.values[2],)]))
    elif kind == 2:
        made.call(aten.softmax.int, x, chance.among([-1, x.meta["val"].dim() - 1, 0]))
    else:
        made.call(aten.layer_norm.default, x, [3], *chance.among([(), (made.values[2],)]))


def _list(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    if chance.one_in(3):
        made.call(operator.getitem, made.call(aten.split.Tensor, x, 1, chance.among([0, -1])), 0)
    else:
        made.call(aten.cat.default, [x, y, *([x] if chance.one_in(3) else [])], chance.among([0, -1]))


def write(made: Builder, x: Node) -> None:
    """A write to the value. Raises IllTypedError for what autograd protects."""
    storage = x.meta["val"].untyped_storage().data_ptr()
    if any(storage == parameter.meta["val"].untyped_storage().data_ptr() for parameter in made.values[:3]):
        raise IllTypedError("a parameter that requires gradients")
    made.call(aten.mul_.Tensor, x, 2)


def _in_place(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    write(made, x)


def _binary(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    other = chance.among([y, y, x, chance.among(NUMBERS)])
    target = chance.among(BINARY)
    scaled = target in (aten.add.Tensor, aten.sub.Tensor) and chance.one_in(4)
    made.call(target, x, other, **({"alpha": 2} if scaled else {}))


def _cast(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    target = chance.among([aten.to.dtype, aten._to_copy.default])
    dtype = chance.among(DTYPES)
    made.call(target, x, dtype) if target is aten.to.dtype else made.call(target, x, dtype=dtype)


def _dropout(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    made.call(aten.dropout.default, x, 0.5, chance.among([False, True]))


def _pass(made: Builder, chance: Chance, x: Node, y: Node) -> None:
    target, *rest = chance.among(PASSING)(x.meta["val"])
    made.call(target, x, *rest)


_NOISE: tuple[Callable[[Builder, Chance, Node, Node], None], ...] = (
    lambda made, chance, x, y: made.call(chance.among(UNARY), x),
    _binary, _binary, _contract, _view, _pass, _cast, _reduce, _list, _dropout, _in_place,
    lambda made, chance, x, y: made.check(x),
)  # fmt: skip


def reordered(builder: Builder, chance: Chance) -> Builder:
    """The same graph, its nodes in another order in which every node follows what it reads."""
    made = Builder(root=builder.root, given=builder.given)
    *waiting, output = builder.graph.nodes
    copies: dict[Node, Node] = {}
    while waiting:
        ready = [node for node in waiting if all(operand in copies for operand in node.all_input_nodes)]
        chosen = chance.among(ready)
        waiting.remove(chosen)
        copies[chosen] = made.graph.node_copy(chosen, lambda operand: copies[operand])
        copies[chosen].name = chosen.name
    made.graph.node_copy(output, lambda operand: copies[operand])
    return made


def commuted(builder: Builder, chance: Chance) -> Builder:
    """The same graph with operands of some sums and products exchanged."""
    made = Builder(root=builder.root, given=builder.given)
    copies: dict[Node, Node] = {}
    for node in builder.graph.nodes:
        copy = copies[node] = made.graph.node_copy(node, lambda operand: copies[operand])
        copy.name = node.name
        plain = len(node.args) == 2 and not node.kwargs and all(isinstance(arg, Node) for arg in node.args)
        if node.target in COMMUTATIVE and plain and chance.upto(1):
            copy.args = (copy.args[1], copy.args[0])
    return made
