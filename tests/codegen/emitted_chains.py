# SPDX-License-Identifier: Apache-2.0
"""Random graphs around an operator, and whether an emitted kernel computes what they do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from rewriter.kernels.emitted.loading import Emitted
from rewriter.program import Program

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Continuous functions only: at a jump, one rounding more or less in front of it is no longer small behind it.
CHEAP: Sequence[tuple[Any, tuple[Any, ...]]] = (
    (aten.mul.Tensor, (0.7,)),
    (aten.add.Tensor, (0.3,)),
    (aten.sub.Scalar, (0.2,)),
    (aten.rsub.Scalar, (1.0,)),
    (aten.div.Tensor, (-2.5,)),
    (aten.neg.default, ()),
    (aten.abs.default, ()),
    (aten.relu.default, ()),
    (aten.square.default, ()),
    (aten.pow.Tensor_Scalar, (3,)),
    (aten.leaky_relu.default, (0.1,)),
    (aten.clamp.default, (-1.5, 2.0)),
    (aten.clamp_min.default, (0.1,)),
    (aten.hardtanh.default, ()),
    (aten.to.dtype, (torch.float32,)),
    (aten.dropout.default, (0.5, False)),
)
COSTLY: Sequence[tuple[Any, tuple[Any, ...]]] = (
    (aten.gelu.default, ()),
    (aten.silu.default, ()),
    (aten.sigmoid.default, ()),
    (aten.tanh.default, ()),
    (aten.elu.default, ()),
    (aten.softplus.default, ()),
    (aten.erf.default, ()),
)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.maximum.default, aten.minimum.default)


@dataclass(frozen=True)
class Case:
    """A program of placeholders; shown without its tensors."""

    program: Program

    def __repr__(self) -> str:
        return str(self.program.graph)


@dataclass
class Built:
    """A graph being built, with what to call it with."""

    graph: Graph = field(default_factory=Graph)
    inputs: list[Tensor] = field(default_factory=list)

    def input(self, value: Tensor) -> Node:
        self.inputs.append(value)
        return self.graph.placeholder(f"input_{len(self.inputs)}")

    def case(self, result: Node) -> Case:
        self.graph.output(result)
        module = GraphModule(torch.nn.Module(), self.graph)
        mode = FakeTensorMode()
        FakeTensorProp(module, mode).propagate(*self.inputs)
        return Case(Program.from_graph_module(module, self.inputs))


def normal(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def operand(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that broadcasts over ``shape`` in one of the ways tensors do, dense or a slice of a larger one."""
    lead, columns = tuple(shape[:-1]), shape[-1]
    forms = [(*lead, columns), (columns,), (1, columns), (*lead, 1), (), (1,) * len(shape)]
    if len(lead) > 1:
        forms += [(*lead[1:], columns), (*lead[1:], 1), (1, *lead[1:], columns)]
    form = draw(st.sampled_from(forms))
    if form and draw(st.booleans()):
        return normal(draw, (*form[:-1], 2 * form[-1]), dtype)[..., : form[-1]]
    return normal(draw, form, dtype)


def chain(
    draw: st.DrawFn, built: Built, value: Node, shape: Sequence[int], dtype: torch.dtype, costly: bool, length: int
) -> Node:
    """Up to ``length`` pointwise nodes on top of a value, each on the last one or on an earlier one besides."""
    earlier = [value]
    for _ in range(length):
        kind = draw(st.sampled_from(["one", "one", "operand", "earlier", "mask", "view"]))
        if kind == "one":
            target, args = draw(st.sampled_from([*CHEAP, *(COSTLY if costly else ())]))
            value = built.graph.call_function(target, (value, *args))
        elif kind == "mask":
            mask = built.input(operand(draw, shape, torch.float32) > 0)
            other = built.input(operand(draw, shape, dtype))
            value = built.graph.call_function(aten.where.self, (mask, value, other))
        elif kind == "view" and len(shape) > 2:
            flat = built.graph.call_function(aten.view.default, (value, [-1, shape[-1]]))
            value = built.graph.call_function(aten.view.default, (flat, list(shape)))
        else:
            other = draw(st.sampled_from(earlier)) if kind == "earlier" else built.input(operand(draw, shape, dtype))
            pair = (value, other) if draw(st.booleans()) else (other, value)
            value = built.graph.call_function(draw(st.sampled_from(BINARY)), pair)
        earlier.append(value)
    return value


class _Recorder(Interpreter):
    """Runs a program and keeps the arguments of one operator's calls."""

    def __init__(self, program: Program, operator: Any) -> None:
        super().__init__(program.graph_module)
        self.operator, self.seen = operator, []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is self.operator:
            self.seen.append(args)
        return super().call_function(target, args, kwargs)


def arguments_of(program: Program, emitted: Emitted, *inputs: Tensor) -> list[tuple[Any, ...]]:
    """What an emitted operator is called with in a program, call by call."""
    recorder = _Recorder(program, emitted.operator)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder.seen


def rewritten(emitted: Emitted, pattern: str, instead: str) -> Callable[..., Tensor]:
    """The reference of a file with something else in its text."""
    space = dict(vars(emitted.module))
    exec(re.sub(pattern, instead, inspect.getsource(emitted.module.reference)), space)  # our own text
    return space["reference"]


def exact(emitted: Emitted) -> Callable[..., Tensor]:
    """The reference of a file with float64 for every floating dtype it names."""
    return rewritten(emitted, r"torch\.(float32|float16|bfloat16)", "torch.float64")


def unfused(emitted: Emitted) -> Callable[..., Tensor]:
    """The operator's own kernel, and the other nodes in aten: what the product itself loses by its order of summing."""
    return rewritten(emitted, r"torch\.ops\.(rewriter\.\w+|aten\.linear)\.default", "implementation")


def complaint(emitted: Emitted, args: Sequence[Any], which: int = 0) -> str | None:
    """Why the kernel of a file is worse than its reference; None if it is not.

    It may lose twice what the reference loses in its dtypes, and one unit in the last place; or, where the sums of the
    product alone lose more than that, twice what its operator's kernel with the other nodes behind it loses.
    """
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    with interpreting(which):
        got = emitted.module.run(*args)
    eager = emitted.module.reference(*args)
    if got.shape != eager.shape or got.dtype != eager.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {eager.dtype} {list(eager.shape)}"
    if not eager.numel():
        return None
    gold = exact(emitted)(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    ulp = torch.finfo(eager.dtype).eps * float(gold.abs().max())
    lost, allowed = _loss(got, gold), _loss(eager, gold)
    if lost <= 2 * allowed + ulp:
        return None
    with interpreting(which):
        apart = _loss(unfused(emitted)(*args), gold)
    if lost <= 2 * apart + ulp:
        return None
    text = emitted.path.read_text()
    return f"loses {lost:.3g}, eager {allowed:.3g}, unfused {apart:.3g}, a unit in the last place is {ulp:.3g}:\n{text}"


def _loss(value: Tensor, gold: Tensor) -> float:
    """The largest error; infinite where the value is none."""
    return float((value - gold).abs().nan_to_num(nan=float("inf")).max())
