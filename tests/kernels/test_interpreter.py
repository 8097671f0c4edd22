# SPDX-License-Identifier: Apache-2.0
"""The interpreter wrapper itself: right where the stock one is wrong, and without a trace afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from interpreter import Interpreted, interpreting
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rewriter.kernels.launching import Config, launch


@triton.jit
def _gate(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _swish_rows(x_ptr, y_ptr, sum_ptr, columns, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    inside = lane < columns
    x = tl.load(x_ptr + row * columns + lane, mask=inside, other=0.0).to(tl.float32)
    y = _gate(x)
    tl.store(y_ptr + row * columns + lane, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(sum_ptr + row, tl.sum(y, axis=0))


@triton.jit
def _scale_add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + lane, mask=lane < n), tl.load(y_ptr + lane, mask=lane < n)
    tl.store(out_ptr + lane, x * y + x, mask=lane < n)


@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(c_ptr + at, product.to(c_ptr.dtype.element_ty))


@triton.jit
def _fails(x_ptr):
    tl.static_assert(False, "on purpose")


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_helpers_and_reductions_are_interpreted(dtype: torch.dtype) -> None:
    x = _random(5, 37, dtype=dtype)
    y, total = torch.empty_like(x), torch.empty(5)
    Interpreted(_swish_rows)[(5,)](x, y, total, 37, BLOCK=64)
    expected = torch.nn.functional.silu(x.float())
    torch.testing.assert_close(y, expected.to(dtype))
    torch.testing.assert_close(total, expected.sum(1))


def test_bf16_arithmetic_rounds_as_torch_does() -> None:
    x, y = _random(100, dtype=torch.bfloat16), _random(100, dtype=torch.bfloat16).flip(0)
    out = torch.empty_like(x)
    Interpreted(_scale_add)[(4,)](x, y, out, 100, BLOCK=32)
    assert torch.equal(out, x * y + x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    a, b = _random(32, 32, dtype=dtype), _random(32, 32, dtype=dtype).T.contiguous()
    out = torch.empty(32, 32)
    Interpreted(_matmul)[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float())


def _snapshot() -> dict[str, Any]:
    return {name: getattr(tl, name) for name in ("load", "sum", "range", "reduce")} | {
        "core": tl.core.load,
        "call": triton.JITFunction.__dict__.get("__call__"),
        "index": tl.tensor.__dict__.get("__index__"),
    }


def test_nothing_stays_patched_and_kernels_still_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = _snapshot()
    x = _random(64, dtype=torch.float32)
    Interpreted(_scale_add)[(2,)](x, x, torch.empty_like(x), 64, BLOCK=32)
    with pytest.raises(Exception, match="on purpose"):
        Interpreted(_fails)[(1,)](x)
    assert _snapshot() == before

    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    compiled = triton.compile(ASTSource(_scale_add, signature, {"BLOCK": 32}), target=GPUTarget("cuda", 90, 32))
    assert "ptx" in compiled.asm


# ----------------------------------------------------------------------------------- device code in poisoned memory


def _scaled_sum(x: Tensor, y: Tensor, *, block: int = 32, n: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    args = {"x_ptr": x, "y_ptr": y, "out_ptr": out, "n": x.numel() if n is None else n}
    launch(_scale_add, lambda c: (triton.cdiv(x.numel(), c["BLOCK"]),), args, {}, [Config({"BLOCK": block})])
    return out


def test_device_code_is_interpreted() -> None:
    x, y = _random(2, 50, dtype=torch.float32)
    with interpreting():
        out = _scaled_sum(x, y)
    assert torch.equal(out, x * y + x)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_a_kernel_does_not_write_is_nan() -> None:
    x, y = _random(2, 50, dtype=torch.bfloat16)
    with interpreting():
        assert _scaled_sum(x, y, n=49)[-1].isnan()


@triton.jit
def _copy(x_ptr, out_ptr, read, written, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane, mask=lane < read, other=0.0), mask=lane < written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_an_access_outside_is_found_also_where_no_result_shows_it(dtype: torch.dtype) -> None:
    x, out = torch.ones(50, dtype=dtype), torch.zeros(50, dtype=dtype)
    args = {"x_ptr": x, "out_ptr": out}

    def copy(read: int, written: int) -> None:
        launch(_copy, lambda c: (1,), {**args, "read": read, "written": written}, {}, [Config({"N": 64})])

    with interpreting():
        copy(50, 50)
        assert torch.equal(out, x)
        with pytest.raises(Exception, match="read outside a tensor"):
            copy(51, 50)
        with pytest.raises(Exception, match="wrote outside a tensor"):
            copy(50, 51)
        copy(50, 49)
    Interpreted(_copy)[(1,)](torch.ones(100, dtype=dtype)[:50], torch.zeros(50, dtype=dtype), 64, 50, N=64)


def test_a_grid_of_nothing_starts_nothing() -> None:
    with interpreting():
        assert _scaled_sum(torch.empty(0), torch.empty(0)).numel() == 0
