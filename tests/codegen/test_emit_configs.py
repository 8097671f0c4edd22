# SPDX-License-Identifier: Apache-2.0
"""The model of shared memory and registers against what the compiler reports."""

from __future__ import annotations

import pytest
import torch
from emitted_chains import Built, aten

from rewriter.codegen import emit_configs
from rewriter.codegen.ahead_of_time import TARGETS, Compiled, compile
from rewriter.codegen.emitting import emit
from rewriter.kernels.launching import Config, Request

HOPPER = {"sm_90", "sm_100"}  # matrix instructions read shared memory
SMALL = Config({"BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=3)
CROWDED = Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=4, num_stages=2)


@pytest.fixture(scope="module")
def request_with_tiles(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A dense layer whose epilogue reads two tensors as large as the result."""
    built = Built()
    x, weight = (built.input(torch.zeros(512, 512, dtype=torch.bfloat16)) for _ in range(2))
    first, second = (built.input(torch.zeros(512, 512, dtype=torch.bfloat16)) for _ in range(2))
    y = built.graph.call_function(aten.linear.default, (x, weight))
    y = built.graph.call_function(aten.mul.Tensor, (y, first))
    case = built.case(built.graph.call_function(aten.add.Tensor, (y, second)))
    (site,) = emit(case.program, folder=tmp_path_factory.mktemp("configs"), dense=True).sites
    (request,) = site.requests(1)
    return request


def compiled(request: Request, config: Config, target: str) -> Compiled:
    return compile(request.start(config), target)


def test_emitted_configurations_are_those_that_fit(request_with_tiles: Request) -> None:
    assert request_with_tiles.configs
    for config in request_with_tiles.configs:
        need = emit_configs.need(config, 2, tiles=2)
        assert need.shared <= emit_configs.SHARED and need.registers <= emit_configs.REGISTERS


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory(request_with_tiles: Request, target: str) -> None:
    backend = TARGETS[target].gpu.backend
    need = emit_configs.need(SMALL, 2, 2, backend, reads_shared=target in HOPPER)
    barriers = 64  # bytes
    assert 0 <= compiled(request_with_tiles, SMALL, target).shared - need.shared <= barriers


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_what_is_left_out_would_spill(request_with_tiles: Request, target: str) -> None:
    assert emit_configs.need(CROWDED, 2, tiles=2).registers > emit_configs.REGISTERS
    assert compiled(request_with_tiles, CROWDED, target).spills > 0


@pytest.mark.parametrize("target", TARGETS)
def test_what_fits_does_not_spill(request_with_tiles: Request, target: str) -> None:
    for config in request_with_tiles.choices(TARGETS[target].gpu.backend):
        assert not compiled(request_with_tiles, config, target).faults()


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (SMALL, True),
        (Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=4), False),  # 96 KiB: not on gfx942
        (Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=4, only="cuda"), True),
        (
            Config({"BM": 128, "BN": 256, "BK": 64}, num_warps=8, num_stages=5, only="cuda"),
            False,
        ),  # 192 KiB: not on sm_80
        (Config({"BN": 32, "BK": 256}), True),  # no rows of its own
    ],
)
def test_limits(config: Config, kept: bool) -> None:
    assert emit_configs.fits(config, 2, tiles=0) is kept
