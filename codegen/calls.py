# SPDX-License-Identifier: Apache-2.0
"""The calls of our operators in a program, with arguments like those of its example; nothing of the program is run.

Shapes and strides are what the graph says of its values, symbols standing for the sizes of the example. Parameters are
the program's own; integers are zeros, which are ids of any vocabulary, and other activations ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import SymInt, Tensor, fx
from torch._ops import OpOverload

from rewriter.facts import path_of
from rewriter.kernels.emitted.loading import LOADED
from rewriter.kernels.spec import REGISTRY, KernelSpec
from rewriter.program import Program
from rewriter.rules import provenance


@dataclass(frozen=True)
class Call:
    """A node that calls an operator of ours, or an emitted one.

    Attributes:
        program: it stands in.
        node: the call.
    """

    program: Program
    node: fx.Node

    @property
    def spec(self) -> KernelSpec:
        """Of the operator. Raises KeyError for an emitted one."""
        return REGISTRY[cast(OpOverload, self.node.target)]

    @property
    def site(self) -> str:
        """Path of the module it stands for."""
        return str(provenance(self.node).get("site") or path_of(self.node)).partition(":")[0]

    @property
    def rule(self) -> str:
        """What put it there; empty if the program came with it."""
        return str(provenance(self.node).get("rule", ""))

    def arguments(self, device: str) -> tuple[Any, ...]:
        """All arguments in the order of the schema, on a device; "meta" for tensors without data."""
        given: Mapping[str, Any] = self.program.facts.arguments(self.node)
        return tuple(fx.node.map_arg(value, lambda node: self._value(node, device)) for value in given.values())

    def _value(self, node: fx.Node, device: str) -> Any:
        if node.op == "get_attr":
            own = self.program.tensor(str(node.target)).detach()
            return own.to(device) if not own.is_meta else example_of(own, device)
        return example_of(node.meta["val"], device)


def calls(program: Program) -> Iterator[Call]:
    """In graph order; those inside bodies of control flow are not among them."""
    for node in program.graph.nodes:
        if node.op == "call_function" and (node.target in REGISTRY or node.target in LOADED):
            yield Call(program, node)


def hinted(size: int | SymInt) -> int:
    """A size as the example had it; 1 where it depends on data."""
    if not isinstance(size, SymInt):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)


def example_of(value: Any, device: str, known: Callable[[int | SymInt], int] = hinted) -> Any:
    """A tensor of ones (zeros for integers), or a number, for the description of a value.

    Args:
        value: as in ``node.meta["val"]``; sizes may be symbolic.
        device: of the tensor.
        known: what stands for a size.
    """
    if isinstance(value, SymInt):
        return known(value)
    if not isinstance(value, Tensor):
        return value
    shape, strides = [known(size) for size in value.shape], [known(stride) for stride in value.stride()]
    countable = not value.dtype.is_floating_point and not value.dtype.is_complex and value.dtype is not torch.bool
    filled = torch.zeros if countable else torch.ones
    return filled(_extent(shape, strides), dtype=value.dtype, device=device).as_strided(shape, strides)


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of memory a tensor reaches over."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
