# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the ShiftAdd operators against the aten reference in float64, under the interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.shift_add import codec, launch, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TERMS = {2: (1,), 3: (1,), 4: (1, 2), 5: (1,), 6: (1, 2, 3), 7: (1,), 8: (1, 2, 4)}


@dataclass(frozen=True)
class Case:
    """A random weight of one format with activations for it."""

    format: str
    codes: Tensor
    scale: Tensor
    table: Tensor | None
    bits: int
    terms: int
    group: int
    width: int

    def arguments(self, wide: bool = False) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """Tensors and numbers of the operators; floating tensors in float64 if ``wide``."""
        scale = self.scale.double() if wide else self.scale
        if self.format == "bcq":
            return (self.codes, scale, self.table), (self.group, self.width)
        if self.format == "pot":
            return (self.codes, scale), (self.bits, self.terms, self.group, self.width)
        assert self.table is not None
        return (self.codes, scale, self.table.double() if wide else self.table), (self.bits, self.group, self.width)

    def linear(self, module: Any, x: Tensor, bias: Tensor | None, wide: bool = False) -> Tensor:
        tensors, numbers = self.arguments(wide)
        result: Tensor = getattr(module, f"{self.format}_linear")(x, *tensors, bias, *numbers)
        return result

    def dense(self) -> Tensor:
        return self.linear(reference, torch.eye(self.width, dtype=torch.float64), None, wide=True).t()


def normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


@st.composite
def weights(draw: st.DrawFn, formats: tuple[str, ...] = ("bcq", "pot", "level")) -> Case:
    """Every format, width, group and dtype of scales; rows that end within tiles, groups and bytes."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    format, out = draw(st.sampled_from(formats)), draw(st.sampled_from((1, 5, 33)))
    width = draw(st.sampled_from((1, 7, 64, 150, 256)))
    group = draw(st.sampled_from((1, 5, 8, 24, 32, 64, 1000)))
    dtype, bits = draw(st.sampled_from(DTYPES)), draw(st.integers(1 if format == "bcq" else 2, 8))
    groups = codec.ceil_div(width, group)
    if format == "bcq":
        codes = codec.pack_bits(torch.randint(0, 2, (out, bits, width), generator=g))
        if draw(st.booleans()):
            scale = normal(g, out, groups, bits, dtype=dtype)
            return Case(format, codes, scale, None, bits, 1, group, width)
        shift = codec.pack_nibbles(torch.randint(0, 16, (out, groups, bits), generator=g))
        return Case(format, codes, normal(g, out, groups, dtype=dtype), shift, bits, 1, group, width)
    codes = codec.pack_stream(torch.randint(0, 1 << bits, (out, width), generator=g), bits)
    scale = normal(g, out, groups, dtype=dtype)
    if format == "level":
        return Case(format, codes, scale, normal(g, 1 << bits, dtype=dtype), bits, 1, group, width)
    return Case(format, codes, scale, None, bits, draw(st.sampled_from(TERMS[bits])), group, width)


@st.composite
def activations(draw: st.DrawFn, width: int, counts: tuple[int, ...] = (1, 3, 17)) -> Tensor:
    """``[..., width]``: rows that are contiguous, transposed, every second feature, or every second row."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    dtype, count = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(counts))
    match draw(st.sampled_from(("contiguous", "transposed", "features", "rows", "nested"))):
        case "transposed":
            return normal(g, width, count, dtype=dtype).t()
        case "features":
            return normal(g, count, 2 * width, dtype=dtype)[:, ::2]
        case "rows":
            return normal(g, 2 * count, width, dtype=dtype)[1::2]
        case "nested":
            return normal(g, 1, count, 1, width, dtype=dtype)
        case _:
            return normal(g, count, width, dtype=dtype)


def judge(found: Tensor, own: Tensor, golden: Tensor, magnitude: Tensor) -> None:
    """No worse than twice what the reference itself loses, an ulp of the result, and one of float32 of what is summed."""
    assert found.dtype is own.dtype and found.shape == golden.shape
    if golden.numel() == 0:
        return
    allowed = 2 * (own.double() - golden).abs().max() + torch.finfo(found.dtype).eps * golden.abs().max()
    allowed += torch.finfo(torch.float32).eps * magnitude.abs().max()
    assert (found.double() - golden).abs().max() <= allowed


def total(case: Case, x: Tensor, bias: Tensor | None) -> Tensor:
    added = 0 if bias is None else bias.double().abs()
    return x.double().abs() @ case.dense().abs().t() + added


@settings(deadline=None, max_examples=24)
@given(st.data(), weights(), st.booleans(), st.integers(0, 1))
def test_linear_is_the_reference(data: st.DataObject, case: Case, biased: bool, which: int) -> None:
    x = data.draw(activations(case.width))
    bias = normal(torch.Generator().manual_seed(1), case.codes.shape[0], dtype=case.scale.dtype) if biased else None
    with interpreting(which):
        found = case.linear(launch, x, bias)
    golden = case.linear(reference, x.double(), None if bias is None else bias.double(), wide=True)
    assert found.is_contiguous()
    judge(found, case.linear(reference, x, bias), golden, total(case, x, bias))
