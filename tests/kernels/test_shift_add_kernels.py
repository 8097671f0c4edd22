# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the ShiftAdd operators against the aten reference in float64, under the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.shift_add import codec, gradients, launch, launch_embedding, launch_gradients, op, reference
from rewriter.kernels.spec import REGISTRY

# numpy warns of what a device computes silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = ("bcq", "pot", "level")
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
def weights(draw: st.DrawFn, format: str) -> Case:
    """Every width, group and dtype of scales; rows that end within tiles, groups and bytes. The simplest is no trivial one."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    out, width = draw(st.sampled_from((33, 5, 1))), draw(st.sampled_from((150, 256, 64, 21, 7, 1)))
    group = draw(st.sampled_from((24, 5, 64, 32, 8, 1000, 1) if width < 100 else (24, 32, 64, 37, 1000)))
    dtype, bits = (
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from((4, 3, 8, 2, 5, 6, 7, *([1] * (format != "pot"))))),
    )
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
def activations(draw: st.DrawFn, width: int, counts: tuple[int, ...] = (3, 1, 17)) -> Tensor:
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


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=8)
@given(st.data(), st.booleans(), st.integers(0, 1))
def test_linear_is_the_reference(format: str, data: st.DataObject, biased: bool, which: int) -> None:
    case = data.draw(weights(format))
    x = data.draw(activations(case.width))
    bias = normal(torch.Generator().manual_seed(1), case.codes.shape[0], dtype=case.scale.dtype) if biased else None
    with interpreting(which):
        found = case.linear(launch, x, bias)
    golden = case.linear(reference, x.double(), None if bias is None else bias.double(), wide=True)
    assert found.is_contiguous()
    judge(found, case.linear(reference, x, bias), golden, total(case, x, bias))


NON_FINITE = (float("inf"), float("-inf"), float("nan"))


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=4)
@given(st.data(), st.sampled_from(NON_FINITE), st.booleans())
def test_what_is_not_finite_goes_where_the_reference_sends_it(
    format: str, data: st.DataObject, value: float, in_scale: bool
) -> None:
    """A table of sums makes NaN of infinite activations under opposite signs, where a decoded weight makes infinity."""
    case = data.draw(weights(format))
    x = data.draw(activations(case.width)).clone()
    if in_scale:
        case.scale.view(-1)[data.draw(st.integers(0, case.scale.numel() - 1))] = value
    else:
        x[..., data.draw(st.integers(0, case.width - 1))] = value
    with interpreting():
        found = case.linear(launch, x, None)
    own = case.linear(reference, x, None)
    assert torch.equal(found.isfinite(), own.isfinite())
    if x.numel() > case.width:
        assert torch.equal(found.isnan(), own.isnan())


@pytest.mark.parametrize("rows", [1, 3], ids=["matvec", "matmul"])
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_lies_beyond_the_width(format: str, rows: int) -> None:
    """Tiles reach beyond the last feature, where a scale or level that is infinite would turn zero activations into NaN."""
    codes = torch.full((3, 1, 2) if format == "bcq" else (3, 5), 0x77, dtype=torch.uint8)
    scale = torch.tensor([[1.0, 1.0 if format == "level" else float("inf")]] * 3)
    levels = torch.tensor([float("inf"), *range(1, 16)])  # code word 0 is only what padding reads
    table, bits = (levels, 4) if format == "level" else (None, 1 if format == "bcq" else 4)
    case = Case(format, codes, scale.unsqueeze(-1) if format == "bcq" else scale, table, bits, 1, 8, 9)
    x = torch.arange(1.0, 9 * rows + 1).reshape(rows, 9)
    with interpreting():
        found = case.linear(launch, x, None)
    own = case.linear(reference, x, None)
    assert torch.equal(found, own) and not own.isnan().any()
    assert own.isfinite().all() == (format == "level")


def test_float64_and_wrong_shapes_are_refused() -> None:
    codes, scale = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.ones(3, 1, 2)
    with interpreting(), pytest.raises(Unsupported, match="float64"):
        launch.bcq_linear(torch.ones(2, 16, dtype=torch.float64), codes, scale, None, None, 16, 16)
    with interpreting(), pytest.raises(ValueError, match="in_features=16"):
        launch.bcq_linear(torch.ones(2, 15), codes, scale, None, None, 16, 16)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (16,)])
def test_batches_of_none_and_a_single_vector(shape: tuple[int, ...]) -> None:
    weight = (torch.full((3, 2, 2), 255, dtype=torch.uint8), torch.ones(3, 1, 2), None)
    x, count = torch.ones(shape), torch.Size(shape[:-1]).numel()
    with interpreting():
        found = launch.bcq_linear(x, *weight, None, 16, 16)
        to_x = launch_gradients.bcq_linear_backward_x(found, *weight, 16, 16)
        to_scale = launch_gradients.bcq_linear_backward_scale(found, x, *weight, 16, 16)
    assert torch.equal(found, torch.full((*shape[:-1], 3), 32.0))
    assert torch.equal(to_x, torch.full(shape, 2 * 3 * 32.0))
    assert torch.equal(to_scale, torch.full((3, 1, 2), count * 16 * 32.0))


def test_no_rows_of_a_weight() -> None:
    weight = (torch.empty(0, 2, 2, dtype=torch.uint8), torch.empty(0, 1, 2), None)
    with interpreting():
        assert launch.bcq_linear(torch.ones(4, 16), *weight, None, 16, 16).shape == (4, 0)
        assert not launch_gradients.bcq_linear_backward_x(torch.empty(4, 0), *weight, 16, 16).any()


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=5)
@given(st.data())
def test_the_input_gradient_is_the_reference(format: str, data: st.DataObject) -> None:
    case = data.draw(weights(format))
    grad = data.draw(activations(case.codes.shape[0], (17, 70, 1)))
    tensors, numbers = case.arguments()
    with interpreting():
        found = getattr(launch_gradients, f"{case.format}_linear_backward_x")(grad, *tensors, *numbers)
    own = formula(f"{case.format}_x")(grad, *tensors, *numbers)
    tensors, numbers = case.arguments(wide=True)
    golden = formula(f"{case.format}_x")(grad.double(), *tensors, *numbers)
    judge(found, own, golden, grad.double().abs() @ case.dense().abs())


@pytest.mark.parametrize(("format", "wanted"), [*((format, "scale") for format in FORMATS), ("level", "levels")])
@settings(deadline=None, max_examples=5)
@given(st.data())
def test_gradients_of_scales_and_levels_are_the_reference(format: str, wanted: str, data: st.DataObject) -> None:
    case = data.draw(weights(format))
    x = data.draw(activations(case.width, (17, 70, 1)))
    grad = normal(torch.Generator().manual_seed(3), *x.shape[:-1], case.codes.shape[0], dtype=x.dtype)
    tensors, numbers = case.arguments()
    with interpreting():
        found = getattr(launch_gradients, f"{case.format}_linear_backward_{wanted}")(grad, x, *tensors, *numbers)
    name = f"{case.format}_{wanted}"
    own = formula(name)(grad, x, *tensors, *numbers)
    tensors, numbers = case.arguments(wide=True)
    golden = formula(name)(grad.double(), x.double(), *tensors, *numbers)
    rows = x.reshape(-1, case.width).double().abs()
    largest = case.scale.double().abs().max() if wanted == "levels" else unit_size(case)
    summed = grad.reshape(len(rows), case.codes.shape[0]).double().abs().t() @ rows * largest
    judge(found, own, golden, summed.sum() if wanted == "levels" else summed.sum(-1).max())


def formula(name: str) -> Callable[..., Tensor]:
    reference: Callable[..., Tensor] = REGISTRY[getattr(gradients, name)].reference
    return reference


def unit_size(case: Case) -> float:
    """An upper bound of ∂w/∂scale."""
    if case.format == "level":
        assert case.table is not None
        return float(case.table.double().abs().max())
    return float(case.bits)


@pytest.mark.parametrize("format", FORMATS)
def test_training_on_a_gpu_uses_the_kernels(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward calls the gradient operators there, and their kernels give what autograd gives here."""
    case = weights_of(format)
    x = normal(torch.Generator().manual_seed(1), 3, case.width, dtype=torch.float32).requires_grad_()
    tensors, numbers = case.arguments()
    leaves = [x, *(t.requires_grad_() for t in tensors if t is not None and t.is_floating_point())]

    def train() -> tuple[Tensor, ...]:
        out = getattr(op, f"{format}_linear")(x, *tensors, None, *numbers)
        return torch.autograd.grad(out.square().sum(), leaves)

    expected = train()
    called: list[str] = []
    for name, overload in vars(gradients).items():
        if isinstance(overload, torch._ops.OpOverload):
            monkeypatch.setattr(gradients, name, recording(overload, called))
    monkeypatch.setattr(gradients, "on_gpu", lambda x: True)
    for a, b in zip(train(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(called) == len(leaves)


def recording(overload: torch._ops.OpOverload, called: list[str]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        name = overload.name().split("::")[1]
        called.append(name)
        with interpreting():
            result: Tensor = getattr(launch_gradients, name)(*args)
        return result

    return call


def weights_of(format: str) -> Case:
    g = torch.Generator().manual_seed(0)
    if format == "bcq":
        codes = codec.pack_bits(torch.randint(0, 2, (5, 3, 21), generator=g))
        return Case(format, codes, normal(g, 5, 3, 3, dtype=torch.float32), None, 3, 1, 8, 21)
    codes = codec.pack_stream(torch.randint(0, 16, (5, 21), generator=g), 4)
    table = normal(g, 16, dtype=torch.float32) if format == "level" else None
    return Case(format, codes, normal(g, 5, 3, dtype=torch.float32), table, 4, 1, 8, 21)


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_of_the_gradients(format: str) -> None:
    case = weights_of(format)
    x = normal(torch.Generator().manual_seed(1), 2, 3, case.width, dtype=torch.float32)
    grad = normal(torch.Generator().manual_seed(2), 2, 3, 5, dtype=torch.float32)
    tensors, numbers = case.arguments()
    torch.library.opcheck(getattr(gradients, f"{format}_x"), (grad, *tensors, *numbers))
    for wanted in ("scale", "levels") if format == "level" else ("scale",):
        torch.library.opcheck(getattr(gradients, f"{format}_{wanted}"), (grad, x, *tensors, *numbers))


# ------------------------------------------------------------------------------------------------------------ look-ups


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=4)
@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=2), st.booleans(), st.integers(0, 1))
def test_rows_are_those_of_the_reference_bit_for_bit(
    format: str, data: st.DataObject, shape: list[int], long: bool, which: int
) -> None:
    case = data.draw(weights(format))
    g = torch.Generator().manual_seed(sum(shape))
    ids = torch.randint(0, case.codes.shape[0], [2 * n for n in shape], generator=g)
    ids = (ids if long else ids.int())[..., ::2]
    tensors, numbers = case.arguments()
    with interpreting(which):
        found = getattr(launch_embedding, f"{case.format}_embedding")(ids, *tensors, *numbers)
    assert torch.equal(found, getattr(reference, f"{case.format}_embedding")(ids, *tensors, *numbers))


def test_a_wrong_index_gives_nan_and_reads_nothing() -> None:
    case = weights_of("bcq")
    tensors, numbers = case.arguments()
    with interpreting():
        found = launch_embedding.bcq_embedding(torch.tensor([0, -1, 5, 4]), *tensors, *numbers)
    assert found[1:3].isnan().all() and found[[0, 3]].isfinite().all()
