# SPDX-License-Identifier: Apache-2.0
"""Which code runs at each site, and what it takes: here, and on GPUs that are not here."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import rewriter
from rewriter.codegen import roofline
from rewriter.codegen.calls import Call, calls
from rewriter.codegen.implementations import Implementation, Kernel, implementations
from rewriter.codegen.lowering import lower
from rewriter.errors import PlanError
from rewriter.kernels.spec import REGISTRY, Cost
from rewriter.reports import SiteCode


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def call_cost(call: Call) -> Cost:
    return REGISTRY[call.node.target].cost(*call.arguments("meta"))


def optimized(dtype: torch.dtype = torch.float32, **options: Any) -> rewriter.Optimized:
    model = Two().eval().to(dtype)
    return rewriter.optimize(model, ["shift_add"], (torch.randn(3, 64).to(dtype),), **options)


def test_this_processor_runs_native_code_and_is_timed() -> None:
    found = implementations(optimized().program, "cpu")
    assert [one.runs.site for one in found] == ["up", "down"]
    assert all(one.runs.code == "native" and one.seconds and one.share and one.bound_by == "memory" for one in found)
    assert all(one.runs.source == "shift_add/native.py" and one.rule == "shift_add.linear" for one in found)
    json.dumps([one.to_json() for one in found])


def test_a_gpu_that_is_not_here_compiles_what_it_would_start() -> None:
    [up, down] = implementations(optimized().program, "gfx942")
    assert (up.runs.code, up.runs.fused, down.runs.code) == ("emitted", ("relu.default",), "Triton")
    for one in (up, down):
        assert one.kernels and all(k.registers > 0 and k.spills == 0 and k.programs > 0 for k in one.kernels)
        # Three rows are one program on 304 units: the least time is spread over one of them.
        assert one.seconds is not None and one.seconds > 50 * one.bound and one.share == one.bound / one.seconds


def test_what_is_fused_costs_its_operands() -> None:
    """A residual is read besides; pointwise arithmetic is free."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 96)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.up(x)) + y

    opt = rewriter.optimize(Residual().eval(), ["shift_add"], (torch.randn(3, 64), torch.randn(3, 96)))
    [plain] = [call_cost(call) for call in calls(opt.program)]
    [site] = lower(opt.program, "cuda").emission.sites
    assert (site.cost.flops, site.cost.bytes_written) == (plain.flops, plain.bytes_written)
    assert site.cost.bytes_read == plain.bytes_read + 3 * 96 * 4


def test_what_the_kernels_do_not_do_is_said() -> None:
    for target in ("cpu", "sm_90"):
        found = implementations(optimized(torch.float64).program, target)
        assert all(one.runs.code == "reference" and "float64" in one.runs.why for one in found)


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


def test_a_grid_that_does_not_fill_the_chip_takes_longer() -> None:
    chip = roofline.Chip("toy", "toy", 1.0, 1.0, units=10)
    assert roofline.predicted(1.0, [(10, 5), (40, 5)], chip) == 1.0
    assert roofline.predicted(1.0, [(1, 7)], chip) == 10.0  # one unit does it all
    assert roofline.predicted(1.0, [(15, 7)], chip) == pytest.approx(20 / 15)  # two rounds, the second half idle
    assert roofline.predicted(1.0, [(1, 25), (10, 75)], chip) == pytest.approx(0.25 * 10 + 0.75)
    assert roofline.predicted(1.0, [], chip) == 1.0


def test_the_listing_folds_equal_sites_and_names_reasons() -> None:
    from rewriter.cli.kernels import listing

    kernel = Kernel("matmul", "BM=16, 4 warps, 2 stages", 7, 99, 0, 4096)

    def site(name: str, code: str, why: str = "", fused: tuple[str, ...] = ()) -> Implementation:
        kernels = () if code == "reference" else (kernel,)
        runs = SiteCode(name, "op", code, "f/native.py", fused, why)
        return Implementation(runs, "r", "sm_90", kernels, 1e-6, "memory", None if code == "reference" else 2e-6)

    found = [
        site(f"layers.{i}.q", "emitted", f"split of layers.{i}.q is not pointwise", ("add.Tensor",)) for i in range(4)
    ]
    found.append(site("head", "reference", "no compiler"))
    screen = Console(width=100)
    with screen.capture() as shown:
        screen.print(listing(found, "sm_90"))
    text = " ".join(shown.get().split())
    assert "5 sites" in text and "layers.{0…3}.q ×4" in text and "op + add" in text and "50%" in text
    assert "matmul 7 99 0 4096 B BM=16, 4 warps, 2 stages" in text
    assert "op fuses no more: split of layers.*.q is not pointwise (layers.{0…3}.q ×4)" in text
    assert "op runs its reference: no compiler (head)" in text
