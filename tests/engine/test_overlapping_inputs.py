# SPDX-License-Identifier: Apache-2.0
"""Callers may pass one tensor twice, or tensors that overlap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rewriter
from rewriter.facts import Facts

from .helpers import by_target, trace

aten = torch.ops.aten


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


def test_a_model_captured_with_one_tensor_twice_still_has_two_inputs() -> None:
    """``input_ids=ids, labels=ids`` is the usual call; the next one has other labels."""
    a = torch.randn(3)
    opt = rewriter.optimize(Product(), [], example_inputs=(a, a))
    assert torch.equal(opt(a, 2 * a), a * (2 * a))
    assert torch.equal(opt(2 * a, a), a * (2 * a))
    (product,) = by_target(opt.program.graph_module, aten.mul)
    assert len(product.all_input_nodes) == 2


def test_a_first_call_with_one_tensor_twice_does_not_tie_the_inputs() -> None:
    """Programs for further signatures are captured from the call at hand."""

    class Scaled(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return a.sin() if b is None else a * b

    a = torch.randn(3)
    opt = rewriter.optimize(Scaled(), [], example_inputs=(a,))
    assert torch.equal(opt(a, a), a * a)
    assert torch.equal(opt(a, 2 * a), a * (2 * a))


def test_example_gradients_survive_the_separation() -> None:
    a = torch.randn(3, requires_grad=True)
    program = rewriter.capture(Product(), (a, a))
    assert [n.meta["val"].requires_grad for n in program.graph.find_nodes(op="placeholder")] == [True, True]


def test_a_write_to_one_input_may_be_a_write_to_any() -> None:
    def forward(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        s = a.sin()
        b.add_(1)
        return s * a + w

    facts = Facts(trace(forward, torch.randn(3), torch.randn(3), w=torch.randn(3)))
    a, b = facts.graph.find_nodes(op="placeholder")
    (writer,) = by_target(facts.graph_module, aten.add_)
    assert facts.writers(a) == facts.writers(b) == [writer]
    (sine,) = by_target(facts.graph_module, aten.sin)
    assert facts.writers(sine) == []  # what is computed lies elsewhere
    (parameter,) = facts.graph.find_nodes(op="get_attr")
    assert facts.writers(parameter) == []
