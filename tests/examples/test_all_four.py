# SPDX-License-Identifier: Apache-2.0
"""All four families on the embedded model at once: who gets which site, and that the result is a model like any other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import rewriter
from rewriter.passes import LinearAttention, ShiftAdd, Tversky, VQLogits

LM = Path(__file__).resolve().parents[2] / "examples" / "tiny_lm"
LAYERS = 4


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, torch.Tensor]]:
    tokens = load_file(LM / "calibration.safetensors")["input_ids"][:24].long()
    return [{"input_ids": part} for part in tokens.split(8)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(LM, dtype="float32").eval()


@pytest.fixture(scope="module")
def opt(model: nn.Module, calibration: list[dict[str, torch.Tensor]]) -> rewriter.Optimized:
    return rewriter.optimize(
        model,
        ["fuse", VQLogits(structure="product"), LinearAttention(min_length=0), ShiftAdd(embeddings=True), Tversky(features=96)],
        select={"re:.*o_proj": "tversky"},  # the other linear layers go to whoever is listed first
        calibration=calibration,
    )


def family(rule: str) -> str:
    return rule.partition(".")[0]


def test_each_family_gets_its_sites(opt: rewriter.Optimized) -> None:
    found = Counter(family(s.rule) for s in opt.report.sites)
    assert found["vq_logits"] == 1 and found["linear_attention"] == LAYERS and found["tversky"] == LAYERS
    assert found["shift_add"] == 1 + LAYERS * 3  # embedding, and per layer q/k/v, gate/up and down
    for site in opt.report.sites:
        if family(site.rule) == "tversky":
            assert site.paths[0].endswith("o_proj")


def test_it_is_still_the_language_model_and_trains(model: nn.Module, opt: rewriter.Optimized) -> None:
    tokens = load_file(LM / "held_out.safetensors")["input_ids"][:2, :96].long()
    found = rewriter.evaluate(opt, tokens, reference=model)
    assert found.kl is not None and found.kl < 0.4  # measured 0.2 with this little calibration
    trained = opt.train()
    before = {n: p.detach().clone() for n, p in trained.named_parameters()}
    loss = trained(input_ids=tokens, labels=tokens).loss
    loss.backward()
    missing = [n for n, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    torch.optim.SGD(trained.parameters(), lr=1e-3).step()
    assert any(not torch.equal(before[n], p) for n, p in trained.named_parameters())
    trained.zero_grad()
    opt.eval()


def test_onnx_runtime_agrees(opt: rewriter.Optimized, tmp_path: Path) -> None:
    path = tmp_path / "four.onnx"
    rewriter.export_onnx(opt, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tokens = load_file(LM / "held_out.safetensors")["input_ids"][:2, :80].long()
    mask = torch.ones_like(tokens)
    names = [i.name for i in session.get_inputs()]
    feeds = {n: {"input_ids": tokens, "attention_mask": mask}[n].numpy() for n in names}
    expected = opt(input_ids=tokens, attention_mask=mask).logits
    found = torch.from_numpy(session.run(None, feeds)[0])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
