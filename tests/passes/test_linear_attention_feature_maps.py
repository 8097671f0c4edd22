# SPDX-License-Identifier: Apache-2.0
"""Every feature map as an option of the pass: rewritten, saved and loaded, trained, decoded; and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import UntrainedWarning
from rewriter.errors import PlanError
from rewriter.passes import LinearAttention
from rewriter.passes.linear_attention import fitting
from rewriter.passes.linear_attention.form import Form
from rewriter.passes.linear_attention.maps import MAPS, Tokens
from rewriter.passes.linear_attention.modules import LinearAttentionCore

LENGTH, HEADS, KEY_HEADS, DIM = 16, 4, 2, 8


class Attention(nn.Module):
    """Self-attention on grouped keys."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.project = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (8, 8)).transpose(1, 2)
        q, k, v = heads[:, :4], heads[:, 4:6], heads[:, 6:]
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def inputs(rows: int = 4, length: int = LENGTH, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def settings_of(name: str) -> dict[str, Any]:
    """The options a map needs."""
    fmap = MAPS[name]
    return {"feature_map": name, "window": 4 if fmap.positive else None} | ({"horizon": 32} if fmap.positional else {})


def optimized(name: str, causal: bool, **options: Any) -> rewriter.Optimized:
    torch.manual_seed(0)
    rewrite = LinearAttention(min_length=None, **settings_of(name), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        return rewriter.optimize(
            Attention(causal).eval(), [rewrite], (inputs(),), calibration=[(inputs(),)] if rewrite.calibrate else None
        )


@pytest.mark.parametrize("name", MAPS)
def test_it_is_fitted_saved_and_loaded(name: str, tmp_path: Path) -> None:
    opt = optimized(name, MAPS[name].causal)
    (site,) = opt.report.sites
    assert site.contract == "CALIBRATED"
    assert site.figures["output_error"] < site.figures.get("window_error", 1.0)
    x = inputs(2, 11, seed=1)
    opt.save(tmp_path / "m")
    torch.testing.assert_close(rewriter.load(tmp_path / "m")(x), opt(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["hedgehog_fla", "t2r", "favor", "slab", "identity"])  # the kinds of parameters
def test_untrained_it_has_a_gradient_for_everything_that_trains(name: str) -> None:
    opt = optimized(name, MAPS[name].causal, calibrate=False)
    assert opt.report.sites[0].contract == "LEARNED"
    opt(inputs(2, 9)).square().sum().backward()
    for path, parameter in opt.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), path
    buffers = {path.rpartition(".")[2] for path, _ in opt.named_buffers()}
    assert set(MAPS[name].buffers) <= buffers


@pytest.mark.parametrize("name", [name for name, fmap in MAPS.items() if fmap.causal and not fmap.calibrated])
def test_decoding_equals_the_parallel_form(name: str) -> None:
    """In pieces, the first with padding on the left, in a window and without one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, LENGTH, DIM, generator=g) for h in (HEADS, KEY_HEADS, KEY_HEADS))
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[0, :3] = False
    for window in (3, 0) if MAPS[name].positive else (0,):
        form = Form(name, DIM**-0.5, window, "sliding", 0, "none", True, HEADS, horizon=32)
        tensors = fitting.start(form, KEY_HEADS, DIM, g) | {"window_gate": torch.ones(HEADS)}
        if "key_position" in tensors:
            tensors["key_position"] = torch.randn(tensors["key_position"].shape, generator=g)
        core = LinearAttentionCore(form, tensors)
        whole, state, parts = core(q, k, v, keep), None, []
        for start, end in ((0, 2), (2, 7), (7, 8), (8, LENGTH)):
            piece = (x[:, :, start:end] for x in (q, k, v))
            out, state = core.advance(state, *piece, keep[:, start:end])
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 2)[keep[:, None].expand(-1, HEADS, -1)],
                                   whole[keep[:, None].expand(-1, HEADS, -1)], rtol=0, atol=1e-5)  # fmt: skip


def test_positions_are_those_of_real_tokens() -> None:
    """Padding on the left changes nothing, with a position table too."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, LENGTH, DIM, generator=g) for h in (HEADS, KEY_HEADS, KEY_HEADS))
    form = Form("slab", 0.3, 3, "sliding", 0, "none", True, HEADS, horizon=32)
    tensors = fitting.start(form, KEY_HEADS, DIM, g) | {"window_gate": torch.ones(HEADS)}
    tensors["key_position"] = torch.randn(tensors["key_position"].shape, generator=g)
    core, keep = LinearAttentionCore(form, tensors), torch.arange(LENGTH)[None] >= 5
    alone = core(*(x[:, :, 5:] for x in (q, k, v)))
    torch.testing.assert_close(core(q, k, v, keep)[:, :, 5:], alone, rtol=0, atol=2e-6)
    unplaced = tensors | {"key_position": torch.zeros_like(tensors["key_position"])}
    assert not torch.allclose(LinearAttentionCore(form, unplaced)(q, k, v), core(q, k, v), atol=1e-3)


def test_beyond_the_horizon_positions_stand_still() -> None:
    """No weight of cosFormer turns negative; the last position stays the last."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.rand(1, 1, LENGTH, DIM, generator=g) for _ in range(2))
    form = Form("cosformer", 1.0, 0, "sliding", 0, "none", True, 1, horizon=4)
    count = form._count(k, None, None)
    tokens_ = Tokens(q, k, 1.0, None, (count - 1, count - 1), 4)
    q_map, k_map = MAPS["cosformer"].features(tokens_, {})
    weights = (q_map @ k_map.mT)[0, 0]
    assert bool((weights >= -1e-6).all())
    plain = q[0, 0] @ k[0, 0].T
    torch.testing.assert_close(weights[9, 7], plain[9, 7])  # both at the horizon
    torch.testing.assert_close(weights[2, 0], plain[2, 0] * torch.cos(torch.tensor(torch.pi / 4)))


def test_rala_is_refused_where_keys_cannot_see_all_queries() -> None:
    plan = rewriter.plan(
        rewriter.capture(Attention(True), (inputs(),)),
        [LinearAttention(min_length=None, feature_map="rala", calibrate=False)],
    )
    assert not plan.sites and any("is causal, and the map 'rala'" in miss.reason for miss in plan.misses)


def test_a_horizon_shorter_than_the_inputs_is_refused() -> None:
    with pytest.raises(PlanError, match="horizon=8 is less than the 16 tokens"):
        rewriter.plan(
            rewriter.capture(Attention(True), (inputs(),)),
            [LinearAttention(min_length=None, feature_map="cosformer", horizon=8, calibrate=False)],
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"feature_map": "identity"}, "give window=None"),
        ({"feature_map": "cosformer"}, "needs horizon="),
        ({"feature_map": "slab", "horizon": 0}, "needs horizon="),
        ({"horizon": 64}, "'landmark' has none"),
        ({"feature_map": "rala", "gate": "fixed"}, "bidirectional attention"),
        ({"feature_map": "rala", "anchor": "max"}, "bidirectional attention"),
    ],
)
def test_options_that_no_map_can_have(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        LinearAttention(**options)
