# SPDX-License-Identifier: Apache-2.0
"""One's own rule: declared, applied, verified, explained where it misses, undone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.errors import PatternError
from rewriter.pattern import Var, pattern

aten = torch.ops.aten
x, y = Var("x"), Var("y")


@rewriter.rule(pattern("x·y + x", x * y + x), contract=rewriter.EXACT)
def factor(edit, x, y):
    """x·y + x = x·(y + 1)"""
    return edit.call(aten.mul.Tensor, x, edit.call(aten.add.Tensor, y, 1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, a: Tensor) -> Tensor:
        b, c = self.first(a), self.second(a)
        hit = b * c + b
        return hit + torch.add(c * b, c, alpha=2)  # alpha=2 is not c·b + c


def test_declared_rule_applies_once_and_keeps_the_function() -> None:
    model = Model().double()
    a = torch.randn(3, 4, dtype=torch.float64)
    opt = rewriter.optimize(model, [factor], example_inputs=a, expect={"factor": 1})
    assert [s.rule for s in opt.plan.sites] == ["factor"]
    assert any(
        n.target is aten.mul.Tensor and n.meta["custom"]["rewriter"]["rule"] == "factor"
        for n in opt.program.graph.nodes
        if n.meta.get("custom", {}).get("rewriter")
    )
    torch.testing.assert_close(opt(a), model(a), rtol=1e-14, atol=1e-14)
    rewriter.verify(opt.original_program(), opt.program, (a,)).raise_if_failed()


def test_the_near_miss_is_explained_and_named_by_expect() -> None:
    program = rewriter.capture(Model(), torch.randn(3, 4))
    misses = rewriter.explain(program, factor)
    assert any("alpha" in str(m) for m in misses), [str(m) for m in misses]
    with pytest.raises(rewriter.errors.PlanError, match="expected 2 sites of factor, found 1"):
        rewriter.plan(program, ["factor"], expect={"factor": 2})


def test_undo_of_a_declared_rule_gives_the_graph_back() -> None:
    model = Model()
    a = torch.randn(3, 4)
    opt = rewriter.optimize(model, ["factor"], example_inputs=a)
    undone = opt.undo("factor")
    assert not undone.plan.sites
    assert torch.equal(undone(a), model(a))


def test_a_parameter_nobody_captures_is_refused() -> None:
    with pytest.raises(PatternError, match="scale not captured"):

        @rewriter.rule(pattern("product", Var("x") * Var("y")))
        def wrong(edit, x, scale):
            return x
