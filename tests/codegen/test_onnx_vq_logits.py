# SPDX-License-Identifier: Apache-2.0
"""Codebook heads with exact rows, stages and projections in ONNX: ONNX Runtime agrees with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx_sites import half_values, ops, relative_error, run, session
from torch import Tensor, nn

import rewriter
from rewriter.codegen.onnx_operator import DOMAIN
from rewriter.kernels.vq_logits.codec import pack_codes
from rewriter.passes import VQLogits

TOKENS, WIDTH = 300, 21  # token numbers of two bytes, a last group that is padded


class ExactHead(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.codebook = nn.Parameter(half_values(6, 16, 4))
        self.register_buffer("codes", torch.randint(0, 16, (TOKENS, 6), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.randn(TOKENS)) if bias else None
        self.exact = nn.Parameter(torch.randn(5, WIDTH))  # no half-precision numbers: nothing may round them
        self.register_buffer("exact_of", pack_codes(torch.tensor([299, 0, 256, 7, 100]), TOKENS))

    def forward(self, h: Tensor) -> Tensor:
        return ops.vq_logits_product_exact(h, self.codebook, self.codes, self.bias, self.exact, self.exact_of)


class ResidualHead(nn.Module):
    def __init__(self, *, bias: bool, stages: int = 3, codes: int = 280) -> None:
        super().__init__()
        self.codebook = nn.Parameter(half_values(stages, codes, WIDTH))
        self.register_buffer("codes", pack_codes(torch.randint(0, codes, (TOKENS, stages)), codes))
        self.bias = nn.Parameter(torch.randn(TOKENS)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        return ops.vq_logits_residual(h, self.codebook, self.codes, self.bias)


HEADS = {"VqLogitsProductExact": ExactHead, "VqLogitsResidual": ResidualHead}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", HEADS)
def test_functions_compute_what_their_operators_compute(name: str, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = HEADS[name](bias=bias).eval()
    for opset in (20, 24, 25):
        program = rewriter.capture(module, (torch.randn(2, 5, WIDTH),))
        result = rewriter.export_onnx(program, tmp_path / f"{opset}.onnx", opset=opset)
        calls = [(n.op_type, n.overload) for n in onnx.load(str(result.path)).graph.node if n.domain == DOMAIN]
        assert calls == [(name, "bias" if bias else "")]
        loaded = session(result.path)
        (feed,) = [i.name for i in loaded.get_inputs()]
        for lead in ((2, 5), (4, 9), (1, 1)):
            h = torch.randn(*lead, WIDTH)
            (found,) = run(loaded, **{feed: h})
            assert relative_error(found, module(h), floor=1.0) <= 2e-6


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, 16)
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 600)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))


SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"structure": "product", "codes": 32, "exact_rows": 12},
    "rotated": {"structure": "product", "codes": 32, "rotate": True},
    "lowrank": {"structure": "lowrank", "codes": 32, "rank": 8},
    "residual": {"structure": "residual", "codes": 32},
    "pure": {"structure": "pure"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_rewritten_heads_agree_with_onnx_runtime(setting: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 600, (3, 7))
    opt = rewriter.optimize(Small().eval(), [VQLogits(**SETTINGS[setting])], example_inputs=(ids,))
    result = opt.export_onnx(tmp_path / "head.onnx")
    other = torch.randint(0, 600, (2, 5))
    (found,) = run(result.path, ids=other)
    assert relative_error(found, opt(other)) <= 2e-6
