# SPDX-License-Identifier: Apache-2.0
"""The compile gate: every shipped configuration, on every target, without spills and within the chip's limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from rewriter.codegen import shipped
from rewriter.codegen.ahead_of_time import TARGETS, Compiled, compile
from rewriter.errors import ExportError
from rewriter.kernels.launching import Config, Request, Shipped, launch

CASES = shipped.cases()


@pytest.fixture(scope="module", autouse=True)
def _cold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cached kernel would not be compiled by this compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_compiles_without_spills(case: Shipped) -> None:
    for target in TARGETS:
        rows = list(shipped.rows(case, target))
        assert rows, f"{case.name} starts no kernel"
        assert not shipped.faults(case, target, rows), target


def test_names_are_unique_and_there_are_enough() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert sum(len(request.configs) for case in CASES for request in case.requests()) >= 25


# ------------------------------------------------------------------------------------------ the gate can fail


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * BN + j[None, :])
    tl.store(c_ptr + i[:, None] * BN + j[None, :], tl.dot(a, b, input_precision="ieee"))


@triton.jit
def _broken(a_ptr, b_ptr, c_ptr, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr):
    tl.store(c_ptr, tl.load(a_ptr + tl.arange(0, BM)))


def _case(kernel: triton.JITFunction, bm: int, bn: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Shipped:
    def start() -> None:
        a, b, c = (torch.empty(4096, dtype=d, device="meta") for d in (dtype, dtype, torch.float32))
        constants = {"BM": bm, "BN": bn, "K": k}
        launch(kernel, lambda c: (1,), {"a_ptr": a, "b_ptr": b, "c_ptr": c}, constants, [Config()])

    return Shipped("case", start, tuple)


@pytest.mark.parametrize("target", TARGETS)
def test_a_small_product_passes(target: str) -> None:
    case = _case(_product, 128, 64, 64)
    assert not shipped.faults(case, target, list(shipped.rows(case, target)))


def test_spills_are_found() -> None:
    case = _case(_product, 128, 512, 32)
    found = shipped.faults(case, "sm_90", list(shipped.rows(case, "sm_90")))
    assert any("spilled" in fault for fault in found)


def test_too_much_shared_memory_is_found() -> None:
    compiled = Compiled("k", "sm_90", registers=128, spills=0, shared=227 * 1024, matrix=(), warps=4)
    assert not compiled.faults()
    assert replace(compiled, target="gfx942").faults() == ["232448 bytes of shared memory, 65536 there are"]


def test_a_product_without_matrix_instructions_is_found() -> None:
    case = _case(_product, 32, 32, 32, torch.float32)
    assert any("assembly" in fault for fault in shipped.faults(case, "sm_90", list(shipped.rows(case, "sm_90"))))


def test_float32_as_tf32_is_found() -> None:
    compiled = Compiled("k", "sm_100", registers=128, spills=0, shared=0, matrix=(), warps=4, narrowed=True)
    assert compiled.faults() == ["float32 is multiplied as TF32"]


def test_what_does_not_compile_is_named() -> None:
    [request] = _case(_broken, 32, 32, 32).requests()
    with pytest.raises(ExportError, match="_broken does not compile for sm_80"):
        compile(request.start(request.configs[0]), "sm_80")


def test_a_configuration_of_one_vendor_is_compiled_for_it_only() -> None:
    configs = [Config(), Config(num_warps=8, only="cuda")]
    request = Request(_product, lambda c: (1,), {}, {}, configs)
    assert request.choices("hip") == configs[:1] and request.choices("cuda") == configs
