# SPDX-License-Identifier: Apache-2.0
"""The gradient moment is the Gauss-Newton metric of the outputs: of KL for logits, of squared error for others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import rewriter
from rewriter import calibration, curvature
from rewriter.calibration import calibrate
from rewriter.matcher import Match
from rewriter.program import Program
from rewriter.rules import CALIBRATED, Contract, Pass, Rule
from rewriter.views import EMBEDDING

from . import kinds
from .kinds import tokens


class _Watch(Rule):
    """Asks for the gradient moment at every embedding and changes nothing."""

    name: ClassVar[str] = "watch"
    role: ClassVar[str] = "embedding"
    contract: ClassVar[Contract] = CALIBRATED("none")

    def find(self, program: Program):
        return EMBEDDING.find(program), []

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {"gradient_moment": match.root, "second_moment": match.root}

    def rewrite(self, edit, match, parameters, choice):
        return {}


class Watch(Pass):
    name: ClassVar[str] = "watch"
    contract: ClassVar[Contract] = CALIBRATED("none")

    def rules(self) -> tuple[Rule, ...]:
        return (_Watch(),)


class Rows(nn.Module):
    """ids -> (E[ids]) Wᵀ: the Jacobian at the embedding is W."""

    def __init__(self, ids: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(ids, width)
        self.head = nn.Linear(width, outputs, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def gradient_moment(model: nn.Module, ids: Tensor, parts: int = 1) -> Tensor:
    program = rewriter.capture(model, (ids[:2],))
    return calibrate(program, [Watch()], list(ids.split(len(ids) // parts))).values["gradient_moment", "embed"]


def test_squared_error_of_outputs_that_are_no_logits() -> None:
    torch.manual_seed(0)
    model, ids = Rows(7, 4, 5), torch.randint(0, 7, (400, 50))
    expected = (model.head.weight.T @ model.head.weight).double().detach()
    found = gradient_moment(model, ids)
    # 20 000 independent draws: entries are right to about one percent of the largest
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_divergence_of_logits() -> None:
    torch.manual_seed(0)
    model, ids = Rows(7, 4, 512), torch.randint(0, 7, (100, 50))
    weight, rows = model.head.weight.double().detach(), model.embed(ids).flatten(0, 1).double().detach()
    p = (rows @ weight.T).softmax(-1)
    mean = p @ weight
    expected = (weight.T * p.mean(0)) @ weight - mean.T @ mean / len(mean)
    found = gradient_moment(model, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_batches_do_not_matter() -> None:
    torch.manual_seed(0)
    model, ids = Rows(7, 4, 512), torch.randint(0, 7, (12, 10))
    torch.testing.assert_close(gradient_moment(model, ids, 4), gradient_moment(model, ids))


@pytest.mark.parametrize("kind", ["llama"])
def test_the_model_is_left_alone(kind: str) -> None:
    model = kinds.build(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found = calibrate(rewriter.capture(model), [Watch()], [tokens(4, 10)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moments = [value for (name, _), value in found.values.items() if name == "gradient_moment"]
    assert moments and all(bool((m.diagonal() > 0).all()) for m in moments)


def test_values_are_those_of_a_run_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    program, ids = rewriter.capture(kinds.build("llama")), tokens(4, 10)
    found = calibrate(program, [Watch(), "vq_logits"], [ids]).values["second_moment", "lm_head"]
    assert torch.equal(found, calibrate(program, ["vq_logits"], [ids]).values["second_moment", "lm_head"])


def test_outputs_without_gradient_probe_nothing() -> None:
    assert curvature.probe([torch.ones(3)], None, torch.Generator()) is None
    assert "gradient_moment" in calibration.KINDS
