# SPDX-License-Identifier: Apache-2.0
"""The comparison of heads is fair: no Tversky model has more parameters, and its head is the projection it claims to be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter.passes.tversky.modules import TverskyProjection

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tversky"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import train_head
    finally:
        sys.path.remove(str(FOLDER))
    return train_head


def test_no_tversky_model_has_more_parameters_than_the_dense_one(script: Any) -> None:
    def size(head: str) -> int:
        return sum(w.numel() for w in script.Model(script.Run(head, 1e-3, 1)).parameters())

    for head in script.HEADS:
        dense = size("dense_tied" if head.endswith("tied") else "dense")
        assert 0.999 * dense < size(head) <= dense


@pytest.mark.parametrize("head", ["tversky_centred_tied", "tversky_uniform"])
def test_the_heads_logits_are_the_projections(script: Any, head: str) -> None:
    model = script.Model(script.Run(head, 1e-3, 1, features=16))
    with torch.no_grad():
        model.alpha.fill_(0.3)
        model.beta.fill_(0.2)
        rows = model.backbone.embed_tokens.weight if model.tied else model.rows
        x = torch.randn(5, script.WIDTH, generator=torch.Generator().manual_seed(0))
        left, right = model.operands(x)
        wanted = TverskyProjection(model.features, rows, model.theta, model.alpha, model.beta)(x)
        torch.testing.assert_close(left @ right.T, wanted, rtol=1e-4, atol=1e-4)


def test_the_recorded_runs_are_those_of_the_script(script: Any) -> None:
    kept = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    for run in kept["runs"]:
        assert run["steps"] == script.STEPS and run["head"] in script.HEADS and run["rate"] in script.RATES
        tried = [t for t in kept["trials"] if t["head"] == run["head"]]
        assert sorted(t["rate"] for t in tried) == sorted(script.RATES)
        assert min(tried, key=lambda t: t["calibration_loss"])["rate"] == run["rate"]
        assert all("held_out_loss" not in t for t in tried)
