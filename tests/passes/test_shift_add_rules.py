# SPDX-License-Identifier: Apache-2.0
"""Every mode as a pass: linear layers, transposed ones and embeddings; saved, loaded, given back as modules, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rewriter
from rewriter.passes import ShiftAdd
from rewriter.passes.shift_add import modes
from rewriter.passes.shift_add.modules import ShiftAddEmbedding, ShiftAddLinear

OPTIONS: dict[str, dict[str, Any]] = {
    "bcq": {},
    "bcq free": {"scale": "fp16"},
    "uniform": {"mode": "uniform", "bits": 3},
    "pot": {"mode": "pot", "scale": "pot"},
    "pot sums": {"mode": "pot", "bits": 6, "terms": 2},
    "apot": {"mode": "apot", "bits": 5},
    "dense": {"mode": "dense", "bits": 3},
}
OPERATOR = {"bcq": "bcq", "bcq free": "bcq", "uniform": "bcq", "pot": "pot"}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 40)
        self.up = nn.Linear(40, 24)
        self.down = Conv1D(16, 24)  # transformers' linear with its weight stored [in, out]

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(self.embed(ids))))
        return out


def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().eval()


def rounded(options: ShiftAdd) -> Model:
    """The model with the weights that the options decode to."""
    made = model()
    with torch.no_grad():
        for weight, transposed in ((made.embed.weight, False), (made.up.weight, False), (made.down.weight, True)):
            dense = weight.t() if transposed else weight
            decoded = modes.fit(dense, options.spelling(), group=options.group).decode()
            weight.copy_(decoded.t() if transposed else decoded)
    return made


@pytest.mark.parametrize("name", OPTIONS)
def test_every_mode_is_the_model_with_the_decoded_weights(name: str, tmp_path: Path) -> None:
    options = ShiftAdd(group=16, embeddings=True, **OPTIONS[name])
    ids = torch.arange(30).view(3, 10)
    opt = rewriter.optimize(model(), [options], example_inputs=(ids,), expect={"shift_add": 3})
    expected = rounded(options)(ids)
    torch.testing.assert_close(opt(ids), expected, rtol=1e-5, atol=1e-6)
    family = OPERATOR.get(name, "level")
    called = [str(n.target) for n in opt.program.graph.nodes if "rewriter" in str(n.target)]
    assert called == [f"rewriter.{family}_{kind}.default" for kind in ("embedding", "linear", "linear")]

    module = opt.to_module()
    assert isinstance(module.embed, ShiftAddEmbedding) and isinstance(module.up, ShiftAddLinear)
    torch.testing.assert_close(module(ids), expected, rtol=1e-5, atol=1e-6)
    opt.save(tmp_path / "saved")
    assert torch.equal(rewriter.load(tmp_path / "saved")(ids), opt(ids))


@pytest.mark.parametrize("name", OPTIONS)
def test_sites_report_bits_errors_and_energy(name: str) -> None:
    options = ShiftAdd(group=16, embeddings=True, compensate=False, **OPTIONS[name])
    batches = [(torch.randint(0, 30, (4, 10), generator=torch.Generator().manual_seed(s)),) for s in range(3)]
    opt = rewriter.optimize(model(), [options], example_inputs=batches[0], calibration=batches)
    sites = {site.paths[0]: site.figures for site in opt.report.sites}
    original = model()
    h = original.embed(torch.cat([b[0] for b in batches]))
    up = opt.to_module().up
    lost = (h @ (up.weight - original.up.weight).t()).norm() / (h @ original.up.weight.t()).norm()
    assert sites["up"]["output_error"] == pytest.approx(float(lost.detach()), rel=1e-3)
    relative = (up.weight - original.up.weight).norm() / original.up.weight.norm()
    assert sites["up"]["weight_error"] == pytest.approx(float(relative.detach()), rel=1e-4)
    assert sites["up"]["bits"] == pytest.approx(up.codes.bits_per_weight)
    for path, weights in (("up", 40 * 24), ("down", 24 * 16)):
        assert sites[path]["pj_arithmetic_dense"] == pytest.approx(1.5 * weights)
        assert sites[path]["pj_weights"] == pytest.approx(weights * sites[path]["bits"] * 12.5)
    assert "pj_arithmetic" not in sites["embed"]  # a row is read, nothing is multiplied
    assert sites["embed"]["pj_weights_dense"] == pytest.approx(40 * 200)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["apot", "pot sums"])
def test_tables_follow_the_dtype_of_the_model(name: str, dtype: torch.dtype) -> None:
    options = ShiftAdd(group=16, embeddings=True, **OPTIONS[name])
    ids = torch.arange(30).view(3, 10)
    opt = rewriter.optimize(model(), [options], example_inputs=(ids,)).to(dtype)
    found = opt(ids)
    assert found.dtype is dtype
    # The tables hold sums of few powers of two: exact in every dtype, so only the arithmetic rounds.
    golden = rounded(options).double()(ids)
    eager = rounded(options).to(dtype)(ids)
    lost = float((eager.double() - golden).abs().max().detach())
    assert float((found.double() - golden).abs().max().detach()) <= 2 * lost + torch.finfo(dtype).eps + 1e-6
