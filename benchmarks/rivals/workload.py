# SPDX-License-Identifier: Apache-2.0
"""The graphs every side is measured on: per ten nodes one hit and two near misses of x·σ(x) + y.

Both near misses fail at the last moment, with every operator in place: one multiplies by another value than the one
under the sigmoid, the other's product is read a second time. Operands stand in the order of the pattern, because not
every side tries both orders. All operators keep values bounded, so that outputs can be compared at any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
PER_HIT = 10
SIZE = 4  # elements of every tensor: what is measured is the graph, not the arithmetic
V = TypeVar("V")
Emit = Callable[..., V]  # emit("add", a, b)

FX = {
    "sigmoid": aten.sigmoid.default,
    "mul": aten.mul.Tensor,
    "add": aten.add.Tensor,
    "minimum": aten.minimum.default,
}
NUMPY: dict[str, Callable[..., Any]] = {
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "mul": np.multiply,
    "add": np.add,
    "minimum": np.minimum,
}

# Unary operators that do not occur in the graph: op(x)·x + y is a pattern whose root is everywhere and that never matches.
ABSENT = (
    "abs acos acosh asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 floor frac "
    "hardsigmoid hardswish i0 lgamma log log10 log1p log2 logit mish neg positive rad2deg reciprocal relu relu6 round "
    "rsqrt selu sgn sign sin sinc sinh sqrt square tan tanh trunc log_sigmoid"
).split()


def blocks(hits: int, emit: Emit[V], x: V, y: V, z: V) -> V:
    """``hits`` blocks of ten nodes, one after another; returns the last value."""
    for _ in range(hits):
        a = emit("add", emit("mul", x, emit("sigmoid", x)), y)  # the hit
        b = emit("add", emit("mul", z, emit("sigmoid", a)), y)  # z is not a
        product = emit("mul", b, emit("sigmoid", b))
        c = emit("add", product, y)
        x = emit("minimum", c, product)  # the product is read a second time
    return x


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x, y, z: float64 [4]."""
    x = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    return x, torch.full_like(x, 0.25), torch.full_like(x, 0.75)


def expected(nodes: int) -> np.ndarray[Any, Any]:
    """The output by NumPy, which shares nothing with any side."""
    x, y, z = (t.numpy() for t in inputs())
    return np.asarray(blocks(nodes // PER_HIT, lambda op, *args: NUMPY[op](*args), x, y, z))


def graph_module(nodes: int) -> GraphModule:
    """The graph as `torch.export` would give it: overloads, fake values, a module path and a source line per node."""
    graph = Graph()
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(t) for t in inputs()]
        placeholders = [graph.placeholder(name) for name in "xyz"]
        for node, value in zip(placeholders, values, strict=True):
            node.meta["val"] = value
        made = 0

        def emit(op: str, *args: Node) -> Node:
            nonlocal made
            block = f"blocks.{made // PER_HIT}"
            made += 1
            node = graph.call_function(FX[op], args)
            node.meta["val"] = torch.empty_like(values[0])
            node.meta["nn_module_stack"] = {"": ("", "Model"), block: (block, "Block")}
            node.meta["stack_trace"] = f'  File "model.py", line {made % PER_HIT}, in forward\n    {op}'
            return node

        graph.output((blocks(nodes // PER_HIT, emit, *placeholders),))
    return GraphModule(torch.nn.Module(), graph)
