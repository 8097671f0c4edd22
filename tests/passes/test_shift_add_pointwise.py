# SPDX-License-Identifier: Apache-2.0
"""Convolutions with kernel 1 become shift-add products over channels, whatever their stride, rank and memory format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.passes import ShiftAdd
from rewriter.passes.shift_add import modes
from rewriter.passes.shift_add.modules import ShiftAddPointwise
from rewriter.views.pointwise import POINTWISE


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: nn.Conv2d(20, 12, 1), (2, 20, 9, 7)),
    "2d, stride": (lambda: nn.Conv2d(20, 12, 1, stride=(2, 3)), (2, 20, 9, 7)),
    "2d, no bias, valid": (lambda: nn.Conv2d(20, 12, 1, bias=False, padding="valid"), (2, 20, 5, 5)),
    "2d, same": (lambda: nn.Conv2d(20, 12, 1, padding="same"), (2, 20, 5, 5)),
    "2d, dilation": (lambda: nn.Conv2d(20, 12, 1, dilation=3), (2, 20, 5, 5)),
    "1d, stride": (lambda: nn.Conv1d(20, 12, 1, stride=4), (3, 20, 18)),
    "3d, stride": (lambda: nn.Conv3d(20, 12, 1, stride=(1, 2, 1)), (2, 20, 4, 6, 5)),
}


def decoded(layer: nn.Module, options: ShiftAdd) -> nn.Module:
    """The convolution with the weight that `options` decode to."""
    weight = layer.weight
    with torch.no_grad():
        weight.copy_(modes.fit(weight.flatten(1), options.spelling(), group=options.group).decode().view_as(weight))
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_convolution_with_the_decoded_weight(kind: str) -> None:
    build, shape = LAYERS[kind]
    options = ShiftAdd(group=16)
    layer = seeded(build)
    model = nn.Sequential(layer, nn.ReLU())
    opt = rewriter.optimize(model, [options], example_inputs=(image(*shape),), expect={"shift_add": 1})
    reference = nn.Sequential(decoded(seeded(build), options), nn.ReLU())
    module = opt.to_module()
    assert isinstance(module[0], ShiftAddPointwise)
    larger = (shape[0] + 1, shape[1], *(s + 3 for s in shape[2:]))
    for x in (image(*shape), image(*larger, seed=1)):
        torch.testing.assert_close(opt(x), reference(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module(x), reference(x), rtol=1e-5, atol=1e-6)
        assert opt(x).stride() == module(x).stride() == reference(x).stride()


def test_channels_last_stays_channels_last() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 12, 1)))
    x = image(2, 8, 9, 9).to(memory_format=torch.channels_last)
    opt = rewriter.optimize(model.to(memory_format=torch.channels_last), [ShiftAdd(bits=8)], example_inputs=(x,))
    assert opt(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(opt(x), model(x), rtol=0.05, atol=0.05)


def test_other_convolutions_are_left_alone_with_a_reason() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(4, 8, 3)
            self.grouped = nn.Conv2d(8, 8, 1, groups=2)
            self.padded = nn.Conv2d(8, 8, 1, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.padded(self.grouped(self.wide(x)))

    program = rewriter.capture(seeded(Model), (image(2, 4, 9, 9),))
    assert POINTWISE.find(program) == []
    reasons = {miss.site: miss.reason for miss in POINTWISE.explain(program)}
    assert "larger kernel" in reasons["wide"]
    assert "several linears" in reasons["grouped"]
    assert "pads its input" in reasons["padded"]


def test_an_unbatched_input_is_no_match() -> None:
    program = rewriter.capture(seeded(lambda: nn.Conv2d(4, 8, 1)), (image(4, 9, 9),), dynamic_shapes="static")
    assert POINTWISE.find(program) == []
    assert any("batch dimension" in str(miss) for miss in POINTWISE.explain(program))


def test_calibration_sees_channels_and_lowers_the_output_error() -> None:
    # Channels of very different energy, mixed: rounding in their metric pays.
    mixing = image(24, 24, seed=3) * torch.logspace(0, -2, 24)

    def batch(seed: int) -> tuple[Tensor]:
        return (torch.einsum("nchw,dc->ndhw", image(4, 24, 6, 6, seed=seed), mixing),)

    model = seeded(lambda: nn.Sequential(nn.Conv2d(24, 16, 1, stride=2), nn.Tanh()))
    calibration = [batch(seed) for seed in range(4)]
    errors = {}
    for compensate in (False, True):
        options = ShiftAdd(bits=3, group=24, compensate=compensate)
        opt = rewriter.optimize(model, [options], example_inputs=calibration[0], calibration=calibration)
        x = batch(9)[0]
        found = nn.functional.mse_loss(opt.to_module()[0](x), model[0](x)) / model[0](x).square().mean()
        errors[compensate] = float(found.detach()) ** 0.5
        assert opt.report.sites[0].figures["output_error"] == pytest.approx(errors[compensate], rel=0.35)
    assert errors[True] < 0.8 * errors[False]


def test_scaled_inputs_saving_and_training() -> None:
    x = image(4, 24, 6, 6) * torch.logspace(1, -1, 24).view(1, -1, 1, 1)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(24, 16, 1), nn.Tanh()))
    opt = rewriter.optimize(model, [ShiftAdd(bits=8, group=24, awq=True)], example_inputs=(x,), calibration=[(x,)])
    torch.testing.assert_close(opt(x), model(x), atol=0.1, rtol=0)
    torch.testing.assert_close(opt.to_module()(x), opt(x), rtol=1e-5, atol=1e-6)
    opt(x).square().sum().backward()
    scales = dict(opt.named_parameters())["0.weight_scale"]
    assert scales.grad is not None and scales.grad.abs().sum() > 0
