# SPDX-License-Identifier: Apache-2.0
"""Calibration: statistics are those of the data, whatever the batches, and nothing of the model moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import calibration
from rewriter.calibration import Statistics, calibrate
from rewriter.errors import LoadError, PlanError
from rewriter.passes import ShiftAdd, VQLogits

from . import kinds
from .kinds import tokens


def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """What reaches the head: [rows, d]."""
    with torch.no_grad():
        return model.model(ids).last_hidden_state.flatten(0, 1)


def test_statistics_are_those_of_the_data() -> None:
    model, ids = kinds.build("llama"), tokens(4, 10)
    found = calibrate(rewriter.capture(model), ["vq_logits"], [ids])
    x = hidden(model, ids)
    torch.testing.assert_close(
        found.values["second_moment", "lm_head"], x.double().T @ x.double() / len(x), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.values["sample", "lm_head"], x, rtol=1e-4, atol=1e-5)
    counts = torch.bincount(ids.flatten(), minlength=512)
    assert torch.equal(torch.nn.functional.pad(found.values["counts", "lm_head"], (0, 512))[:512], counts)
    assert found.inputs == 1


def test_batches_do_not_matter() -> None:
    program, ids = rewriter.capture(kinds.build("llama")), tokens(4, 10)
    passes = ["vq_logits", ShiftAdd(group=32)]
    together = calibrate(program, passes, [ids])
    apart = calibrate(program, passes, list(ids.split(1)))
    assert together.values.keys() == apart.values.keys() and len(together.values) > 10
    for key, value in together.values.items():
        torch.testing.assert_close(apart.values[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "batch",
    [
        tokens(2, 6),
        (tokens(2, 6),),
        {"input_ids": tokens(2, 6)},
        {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)},
    ],
    ids=["tensor", "tuple", "dict", "with mask"],
)
def test_spellings_of_an_input(batch: object) -> None:
    program = rewriter.capture(kinds.build("llama"))
    found = calibrate(program, ["vq_logits"], [batch])
    expected = calibrate(program, ["vq_logits"], [tokens(2, 6)])
    assert found.digest() == expected.digest()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration data is empty"),
        ([{"attention_mask": torch.ones(2, 6)}], "lacks input_ids; give a dict with"),
    ],
)
def test_data_that_does_not_fit(data: list[object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        calibrate(rewriter.capture(kinds.build("llama")), ["vq_logits"], data)


def test_a_sample_is_bounded_and_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SAMPLE_ROWS", 64)
    for size in (1, 7, 100, 333):
        one = calibration._Sample()
        for chunk in torch.arange(1000.0).unsqueeze(-1).split(size):
            one.add(chunk)
        rows = one.result().flatten()
        assert 32 <= len(rows) <= 64
        assert torch.equal(rows.diff(), torch.full_like(rows.diff(), float(rows[1] - rows[0]))) and rows[0] == 0


def test_save_and_load(tmp_path: Path) -> None:
    found = calibrate(rewriter.capture(kinds.build("llama")), ["vq_logits"], [tokens(2, 6)])
    path = tmp_path / "statistics.safetensors"
    found.save(path)
    again = Statistics.load(path)
    assert again.digest() == found.digest() and again.inputs == found.inputs
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LoadError, match="not a file of calibration statistics"):
        Statistics.load(path)


def test_a_training_model_is_not_moved_by_calibrating() -> None:
    """Batch statistics of the copy would drift, random numbers of the caller would be used up."""
    model = kinds.build("sequential").train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    state = torch.get_rng_state()
    opt = rewriter.optimize(
        model,
        [VQLogits(structure="product")],
        calibration=[torch.randn(8, 40, generator=torch.Generator().manual_seed(0))],
    )
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in before.items():
        assert torch.equal(opt.get_buffer(name), buffer) and torch.equal(model.get_buffer(name), buffer)


def test_statistics_given_are_used_as_they_are() -> None:
    model = kinds.build("llama")
    found = calibrate(rewriter.capture(model), ["vq_logits"], [tokens(4, 10)])
    one = rewriter.optimize(model, ["vq_logits"], calibration=found)
    other = rewriter.optimize(model, ["vq_logits"], calibration=[tokens(4, 10)])
    assert one.plan == other.plan and one.report.calibrated
    assert torch.equal(one.get_parameter("lm_head.codebook"), other.get_parameter("lm_head.codebook"))
    assert not rewriter.optimize(model, ["vq_logits"]).report.calibrated


def test_a_site_that_fuse_merges_finds_the_statistics_of_its_parts() -> None:
    """Calibration runs on the original program, where q, k and v are three."""
    opt = rewriter.optimize(kinds.build("llama"), ["fuse", ShiftAdd(group=32)], calibration=[tokens(4, 10)])
    merged = [s for s in opt.report.sites if s.rule == "shift_add.linear" and "qkv_proj" in s.address]
    assert len(merged) == 2 and all(0 < s.figures["output_error"] < 1 for s in merged)
