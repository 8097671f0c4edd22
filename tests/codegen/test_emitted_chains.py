# SPDX-License-Identifier: Apache-2.0
"""Gate 1 of emitted kernels: random prologues and epilogues, against the fused nodes in aten, under the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from emitted_chains import DTYPES, Built, Case, arguments_of, aten, chain, complaint, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.codegen.emitting import emit
from rewriter.kernels.shift_add import codec
from rewriter.kernels.shift_add.op import bcq_linear
from rewriter.program import Program


def check(program: Program, folder: Path, which: int = 0) -> None:
    emission = emit(program, folder=folder, dense=True, expensive=True)
    if not emission.sites:  # a chain of casts and views alone
        assert [miss.reason for miss in emission.misses]
        return
    (site,) = emission.sites
    (args,) = arguments_of(emission.program, site.emitted, *program.example)
    assert (reason := complaint(site.emitted, args, which)) is None, reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emitted")


@st.composite
def cases(draw: st.DrawFn, operator: str) -> Case:
    """chain(operator(chain(x)))"""
    dtype = draw(st.sampled_from(DTYPES))
    lead = draw(st.sampled_from([(3,), (17,), (2, 5), (1,), (2, 2, 3), (1, 1)]))
    features, columns = draw(st.sampled_from([(70, 40), (7, 5), (64, 67), (130, 16), (1, 1)]))
    built = Built()
    x: Any = built.input(normal(draw, (*lead, features), dtype))
    x = chain(draw, built, x, (*lead, features), dtype, costly=True, length=draw(st.integers(0, 3)))
    x = built.graph.call_function(aten.to.dtype, (x, dtype))
    bias = built.input(normal(draw, (columns,), dtype)) if draw(st.booleans()) else None
    weight = normal(draw, (columns, features), torch.float32) / features**0.5
    if operator == "linear":
        y = built.graph.call_function(aten.linear.default, (x, built.input(weight.to(dtype)), bias))
    else:
        group = draw(st.sampled_from([features, 8, 3]))
        codes, scale = quantised(weight, group)
        packed = built.input(codes), built.input(scale)
        y = built.graph.call_function(bcq_linear, (x, *packed, None, bias, group, features))
    length = draw(st.integers(1, 6))
    return built.case(chain(draw, built, y, (*lead, columns), dtype, costly=True, length=length))


def quantised(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Two random planes with scales of the weight's size: any codes will do."""
    out, width = weight.shape
    generator = torch.Generator().manual_seed(out * width)
    signs = torch.randint(0, 2, (out, 2, width), generator=generator)
    groups = -(-width // group)
    scale = weight.abs().mean() * (0.5 + torch.rand((out, groups, 2), generator=generator))
    return codec.pack_bits(signs.bool()), scale


@settings(max_examples=20)
@given(cases("linear"), st.integers(0, 1))
def test_dense_chains(folder: Path, case: Case, which: int) -> None:
    check(case.program, folder, which)


@settings(max_examples=10)
@given(cases("bcq_linear"), st.integers(0, 1))
def test_packed_chains(folder: Path, case: Case, which: int) -> None:
    check(case.program, folder, which)


def test_what_a_prologue_makes_of_zero_stays_out(folder: Path) -> None:
    """Past the last feature a tile is filled with zeros, of which 1/x makes infinities: times a weight of zero, NaN."""
    built = Built()
    x = built.graph.call_function(aten.reciprocal.default, (built.input(torch.rand(3, 70) + 0.5),))
    y = built.graph.call_function(aten.linear.default, (x, built.input(torch.randn(5, 70))))
    case = built.case(y)
    assert [site.fused for site in emit(case.program, folder=folder, dense=True).sites] == [("reciprocal.default",)]
    check(case.program, folder)


def test_what_is_no_number_stays_none(folder: Path) -> None:
    x, residual = torch.ones(4, 8), torch.zeros(4, 6)
    x[1, 2], x[2, 0], residual[3, 4] = float("nan"), float("inf"), float("nan")
    built = Built()
    y = built.graph.call_function(aten.linear.default, (built.input(x), built.input(torch.ones(6, 8))))
    y = built.graph.call_function(aten.add.Tensor, (y, built.input(residual)))
    program = built.case(built.graph.call_function(aten.relu.default, (y,))).program
    emission = emit(program, folder=folder, dense=True)
    (site,) = emission.sites
    (args,) = arguments_of(emission.program, site.emitted, *program.example)
    with interpreting():
        got = site.emitted.module.run(*args)
    want = site.emitted.module.reference(*args)
    assert torch.equal(got.nan_to_num(-1.0, 7.0), want.nan_to_num(-1.0, 7.0)) and got.isnan().sum() == 7


def test_no_rows(folder: Path) -> None:
    built = Built()
    y = built.graph.call_function(aten.linear.default, (built.input(torch.ones(0, 8)), built.input(torch.ones(6, 8))))
    check(built.case(built.graph.call_function(aten.relu.default, (y,))).program, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("packed", [False, True])
def test_activations_that_are_wider_in_memory(folder: Path, dtype: torch.dtype, rows: int, packed: bool) -> None:
    """A norm in float32, cast for the product: the kernel reads float32, and multiplies what the cast leaves."""
    built, weight = Built(), torch.randn(24, 70)
    x = built.graph.call_function(
        aten.mul.Tensor, (built.input(torch.randn(rows, 70)), built.input(torch.rand(rows, 1)))
    )
    x = built.graph.call_function(aten.to.dtype, (x, dtype))
    if packed:
        codes, scale = quantised(weight, 8)
        y = built.graph.call_function(bcq_linear, (x, built.input(codes), built.input(scale), None, None, 8, 70))
    else:
        y = built.graph.call_function(aten.linear.default, (x, built.input(weight.to(dtype))))
    program = built.case(y).program
    (site,) = emit(program, folder=folder, dense=True).sites
    assert site.fused == ("mul.Tensor", "to.dtype") and "standing_in" in site.emitted.path.read_text()
    check(program, folder)
