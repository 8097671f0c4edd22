# SPDX-License-Identifier: Apache-2.0
"""Which code runs at each site: here, on GPUs that are not here, and what `strict` makes of the reference."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import rewriter
from rewriter.codegen import roofline
from rewriter.codegen.implementations import Implementation, fallbacks, implementations
from rewriter.errors import PlanError
from rewriter.kernels.spec import Cost


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def optimized(dtype: torch.dtype = torch.float32, **options: Any) -> rewriter.Optimized:
    model = Two().eval().to(dtype)
    return rewriter.optimize(model, ["shift_add"], (torch.randn(3, 64).to(dtype),), **options)


def test_this_processor_runs_native_code_and_is_timed() -> None:
    found = implementations(optimized().program, "cpu")
    assert [one.site for one in found] == ["up", "down"]
    assert all(one.chosen == "native" and one.seconds and one.share and one.bound_by == "memory" for one in found)
    assert all(one.source == "shift_add/native.py" and one.rule == "shift_add.linear" for one in found)
    json.dumps([one.to_json() for one in found])


def test_a_gpu_that_is_not_here_compiles_its_kernels() -> None:
    [up, down] = implementations(optimized().program, "gfx942")
    assert up.chosen == down.chosen == "Triton" and up.seconds is None and up.share is None
    assert up.kernels and all(kernel.registers > 0 and kernel.spills == 0 for kernel in up.kernels)


def test_what_the_kernels_do_not_do_is_said() -> None:
    for target in ("cpu", "sm_90"):
        found = implementations(optimized(torch.float64).program, target)
        assert all(one.chosen == "reference" and "float64" in one.why for one in found)


def test_strict_refuses_the_reference_and_names_the_sites() -> None:
    assert not fallbacks(optimized(strict=True).program, "cpu")
    optimized(strict=True, target="cuda")
    for target in (None, "cuda"):
        with pytest.raises(PlanError, match=r"(?s)2 sites would run.*up: bcq_linear: .*float64.*down"):
            optimized(torch.float64, strict=True, target=target)


@pytest.mark.parametrize("target", ["sm_90 ", "tpu", ""])
def test_unknown_targets(target: str) -> None:
    with pytest.raises(PlanError, match="kernels are made for cpu, sm_80"):
        implementations(optimized().program, target)


def test_mlir_is_an_export() -> None:
    with pytest.raises(PlanError, match="export_mlir"):
        optimized(target="mlir")


def test_the_roofline_is_the_larger_of_two_times() -> None:
    memory = roofline.bound(Cost(10, 600, 400), bandwidth=100.0, flops=1000.0)
    compute = roofline.bound(Cost(10**6, 600, 400), bandwidth=100.0, flops=1000.0)
    assert (memory.seconds, memory.by) == (10.0, "memory") and (compute.seconds, compute.by) == (1000.0, "compute")


def test_the_listing_folds_equal_sites_and_names_reasons() -> None:
    from rewriter.cli.kernels import listing

    def site(name: str, chosen: str, why: str = "") -> Implementation:
        return Implementation(name, "r", "op", "cpu", chosen, why, "f/native.py", (), 1e-6, "memory", 2e-6)

    found = [site(f"layers.{i}.q", "native") for i in range(4)] + [site("head", "reference", "no compiler")]
    screen = Console(width=120)
    with screen.capture() as shown:
        screen.print(listing(found, "cpu"))
    text = shown.get()
    assert "5 sites" in text and "layers.{0…3}.q" in text and "50%" in text
    assert "op runs its reference: no compiler" in text
