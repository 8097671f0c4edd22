# SPDX-License-Identifier: Apache-2.0
"""A replacement that is built is compared with what it replaces: types, storage, strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from rewriter import capture, replacing
from rewriter.errors import LegalityError
from rewriter.propagation import Propagation

from .legality_corpus import CASES, Rewritten
from .legality_corpus.engine import captured, rewritten

aten = torch.ops.aten
Build = Callable[[Callable[..., fx.Node], fx.Node], fx.Node]


class Model(torch.nn.Module):
    """``after(x·1)``"""

    def __init__(self, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(x * 1)


def compare(after: Callable[[Tensor], Any], build: Build) -> dict[str, tuple[int, ...]]:
    """Try ``build(call, x)`` for x·1 in ``after(x·1)``, x: float32 [3, 4]; returns new strides of what follows."""
    program = capture(Model(after), torch.randn(3, 4), dynamic_shapes="static")
    (x,) = program.graph.find_nodes(op="placeholder")
    old = next(iter(x.users))
    mode = detect_fake_mode([x.meta["val"]])
    assert mode is not None
    values, added = Propagation(mode), []

    def call(target: Any, *args: Any) -> fx.Node:
        with program.graph.inserting_before(old):
            added.append(program.graph.call_function(target, args))
        added[-1].meta["val"] = values.value(target, args, {})
        return added[-1]

    changed = replacing.check(program.facts, old, build(call, x), added, mode)
    return {node.name: value.stride() for node, value in changed.items()}


def negated(call: Callable[..., fx.Node], x: fx.Node) -> fx.Node:
    return call(aten.neg.default, x)


def columns_first(call: Callable[..., fx.Node], x: fx.Node) -> fx.Node:
    """−x, its columns next to each other."""
    rows = call(aten.contiguous.default, call(aten.t.default, call(aten.neg.default, x)))
    return call(aten.t.default, rows)


def itself(call: Callable[..., fx.Node], x: fx.Node) -> fx.Node:
    return x


@pytest.mark.parametrize("after", [torch.sin, lambda y: y, lambda y: y.add_(1), lambda y: y.view(-1)])
def test_a_new_value_of_the_same_kind_passes_whatever_follows(after: Callable[[Tensor], Any]) -> None:
    assert compare(after, negated) == {}


@pytest.mark.parametrize(
    ("target", "args", "words"),
    [
        (aten.to.dtype, (torch.float64,), "has dtype float64 instead of float32"),
        (aten.sum.dim_IntList, ([0], True), r"has shape \[1, 4\] instead of \[3, 4\]"),
        (aten.unsqueeze.default, (0,), r"has shape \[1, 3, 4\] instead of \[3, 4\]"),
        (aten.to.device, ("meta", torch.float32), "is on meta instead of cpu"),
    ],
)
def test_another_type_or_shape_is_refused(target: Any, args: tuple[Any, ...], words: str) -> None:
    with pytest.raises(LegalityError, match=words):
        compare(torch.sin, lambda call, x: call(target, x, *args))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (lambda y: y, "and it is returned"),
        (lambda y: y.t(), "and it is returned"),
        (lambda y: y.add_(1).sin(), "is written by add_"),
        (lambda y: y.view(-1).mul_(2).sin(), "is written by mul_"),
    ],
)
def test_storage_that_comes_to_be_shared_is_refused_where_it_shows(after: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(LegalityError, match=words):
        compare(after, itself)


def test_storage_that_nobody_can_notice_may_be_shared() -> None:
    assert compare(lambda y: y.view(-1).sin(), itself) == {}


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (lambda y: y, "the caller sees them"),
        (lambda y: y.sin().relu(), "the caller sees them"),
        (lambda y: (y @ y.t(), y.sin()), "the caller sees them"),
        (lambda y: y.sin().view(12).relu(), r"view \(view\) does not take"),
        (lambda y: y.add_(1) @ y.t(), "it is written in place"),
        (lambda y: torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)) @ y.t(), "cond .* reads it"),
    ],
)
def test_strides_that_show_are_refused(after: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(LegalityError, match=words):
        compare(after, columns_first)


def test_strides_that_nobody_sees_are_followed_as_far_as_they_go() -> None:
    changed = compare(lambda y: torch.relu((y.sin() + 1).clone(memory_format=torch.contiguous_format)), columns_first)
    assert changed == {"sin": (1, 3), "add": (1, 3)}


def test_a_reshape_that_copies_ends_them() -> None:
    assert compare(lambda y: y.reshape(12).sin(), columns_first) == {}


def test_strides_of_dimensions_of_one_element_mean_nothing() -> None:
    a, b = torch.empty(1, 4), torch.empty_strided((1, 4), (7, 1))
    assert replacing._same_strides(a, b)
    assert not replacing._same_strides(torch.empty(2, 4), torch.empty_strided((2, 4), (7, 1)))


@pytest.mark.parametrize(
    ("target", "shapes"),
    [
        (aten.addmm.default, ((2, 3, 4), (3, 4), (4, 4))),
        (aten.addmm.default, ((5,), (3, 4), (4, 1))),
        (aten.linear.default, ((1, 4), (1, 4), (5,))),
        (aten.baddbmm.default, ((2, 3, 5), (1, 3, 4), (1, 4, 5))),
    ],
)
def test_addends_that_the_real_operator_refuses_are_refused_on_fake_tensors(target: Any, shapes: Any) -> None:
    """torch's fake kernels broadcast them; found by the corpus."""
    real = [torch.randn(s) for s in shapes]
    with pytest.raises(RuntimeError):
        target(*real)
    mode = torch._subclasses.FakeTensorMode()
    graph = fx.Graph()
    nodes = [graph.placeholder("operand") for _ in real]
    for node, tensor in zip(nodes, real, strict=True):
        node.meta["val"] = mode.from_tensor(tensor)
    with pytest.raises(LegalityError, match="does not take these operands"):
        Propagation(mode).value(target, tuple(nodes), {})


class Comparing(fx.Interpreter):
    """Runs a graph and compares every tensor with what its node says of it."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        said = n.meta.get("val")
        if isinstance(result, Tensor) and isinstance(said, Tensor) and all(isinstance(s, int) for s in said.shape):
            assert (result.dtype, result.shape, result.device) == (said.dtype, said.shape, said.device), n
            assert replacing._same_strides(said, result), f"{n}: {result.stride()} instead of {said.stride()}"
        return result


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if isinstance(c.expect, Rewritten) and not c.dynamic])
def test_after_a_rewrite_every_node_still_says_what_comes_out(name: str) -> None:
    program = rewritten(captured(CASES[name]), CASES[name])
    Comparing(program.graph_module).run(*CASES[name].inputs())
