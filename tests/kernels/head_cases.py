# SPDX-License-Identifier: Apache-2.0
"""Random calls of the operators of heads, and small blocks for their kernels, so that every loop turns more than once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.after_head import launch as after_head
from rewriter.kernels.launching import Config
from rewriter.kernels.vq_logits import codec, loss_launch, product_launch, tiers_launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = ["contiguous", "transposed", "sliced"]


@dataclass(frozen=True)
class Head:
    """A tiers head with hidden states; some codes have no tokens."""

    h: Tensor
    codebook: Tensor
    code_of: Tensor
    bias: Tensor | None
    generator: torch.Generator

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.h, self.codebook, self.code_of, self.bias

    @property
    def lead(self) -> torch.Size:
        return self.h.shape[:-1]

    @property
    def tokens(self) -> int:
        return self.code_of.shape[0]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def targets(self, ignored: int) -> Tensor:
        y = torch.randint(0, self.tokens, self.lead, generator=self.generator)
        y.view(-1)[0] = ignored
        return y


@st.composite
def heads(draw: st.DrawFn, stages: bool = False) -> Head:
    """Any leading dimensions, odd sizes, strides, dtypes; parameters in h's dtype or in float32."""
    lead = draw(st.sampled_from([(1,), (), (5,), (3, 7), (17,)]))
    tokens, width, codes = draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.integers(1, 50))
    dtype = draw(st.sampled_from(DTYPES))
    parameters = draw(st.sampled_from([dtype, torch.float32]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.3, 1.0]))

    def normal(*shape: int, dtype: torch.dtype = parameters) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).mul(scale).to(dtype)

    h = laid_out(draw(st.sampled_from(WAYS)), normal(*lead, width, dtype=dtype))
    leading = (draw(st.integers(1, 3)),) if stages else ()
    # In h's precision even where it is stored in more: all forms round it to that first.
    codebook = laid_out(draw(st.sampled_from(WAYS)), normal(*leading, codes, width, dtype=dtype).to(parameters))
    index = torch.randint(0, codes, (tokens, *leading), generator=g)
    packed = codec.pack_codes(index, draw(st.sampled_from([codes, 300, 70_000])))
    bias = laid_out(draw(st.sampled_from(WAYS[::2])), normal(tokens)) if draw(st.booleans()) else None
    return Head(h, codebook, packed, bias, g)


def laid_out(way: str, t: Tensor) -> Tensor:
    """The same values with other strides, beside numbers that are not theirs."""
    if way == "contiguous" or not t.dim():
        return t
    if way == "transposed":
        return t.transpose(-1, 0).contiguous().transpose(-1, 0)
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def wide(args: Sequence[Any]) -> list[Any]:
    """The same call in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Device code interpreted on the CPU, in blocks smaller than most cases."""
    few = [Config({"ROWS": 2, "PLACES": 8}, 1, 1)]
    dot = ({"ROWS": 16, "COLUMNS": 16}, [Config({"WIDTH": 16}, 1, 1)])
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (tiers_launch, "dot_blocks", lambda positions, dtype: dot),
            (loss_launch, "loss_blocks", lambda positions, dtype: dot),
            (after_head, "loss_blocks", lambda positions, dtype: dot),
            (tiers_launch, "_EXPANSION", [Config({"ROWS": 16, "COLUMNS": 32}, 1, 1)]),
            (tiers_launch, "_EXPANSION_OF_FEW", [Config({"COLUMNS": 32}, 1, 1)]),
            (tiers_launch, "_SUMMING", few),
            (tiers_launch, "PROGRAMS", 4),
            (loss_launch, "_BY_CODE", [Config({"CODES": 16, "TOKENS": 32}, 1, 1)]),
            (loss_launch, "_OVER_TILES", [Config({"ROWS": 8, "TILES": 2}, 1, 1)]),
            (loss_launch, "CHUNK", 30),
            (after_head, "CHUNK", 30),
            (product_launch, "CHUNK", 30),
            (product_launch, "BY_TILE", 16),
            (product_launch, "_TABLES", [Config({"COLUMNS": 32, "GROUPS": 2}, 1, 1)]),
            (product_launch, "tile_blocks", lambda positions, dims: (
                {"ROWS": 16, "COLUMNS": 16, "GROUPS": 16}, [Config({}, 1, 1)])),
        ):  # fmt: skip
            stack.enter_context(patch.object(module, name, value))
        stack.enter_context(interpreting())
        yield


def no_worse(got: Tensor, reference: Tensor, golden: Tensor, rounding: float | None = None) -> None:
    """Errors against float64: at most twice the reference's, and one rounding of the largest magnitude, or the
    ``rounding`` of what is added up to it: of one draw the reference may lose nothing by luck."""
    assert got.shape == reference.shape == golden.shape and got.dtype == reference.dtype
    if not golden.numel():
        return
    ours, theirs = (float((t.double() - golden).abs().max()) for t in (got, reference))
    rounding = max(rounding or 0.0, torch.finfo(got.dtype).eps * float(golden.abs().max()))
    assert ours <= 2 * theirs + rounding, f"error {ours}, the reference's {theirs}, one rounding {rounding}"


def rounding_of_losses(case: Head) -> float:
    """A float32 rounding of the largest code logit."""
    products = case.h.double().abs() @ case.codebook.double().abs().t()
    bias = 0.0 if case.bias is None else float(case.bias.double().abs().max())
    return torch.finfo(torch.float32).eps * (float(products.max()) + bias)


def rounding_of_gradients(case: Head, grad: Tensor, largest: float = 1.0) -> list[float]:
    """One rounding of the terms that gradients of losses are made of, for h, codebook and bias: the gradient at a logit
    is a difference of numbers up to |grad| · ``largest``, rounded to h's dtype before the products."""
    eps, total = torch.finfo(case.h.dtype).eps * largest, float(grad.abs().sum())
    of_h = float(grad.abs().max() * case.codebook.abs().max())
    return [eps * of_h, eps * total * float(case.h.abs().max()), torch.finfo(torch.float32).eps * largest * total]


def as_the_reference(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    blocks: bool = True,
    rounding: Sequence[float] | None = None,
) -> None:
    """The interpreted device implementation's results are none worse than the reference's in the same dtypes."""
    with small_blocks() if blocks else interpreting():
        got = function(*args)
    got, plain, golden = (r if isinstance(r, tuple) else (r,) for r in (got, reference(*args), reference(*wide(args))))
    for ours, theirs, true, unit in zip(got, plain, golden, rounding or [None] * len(got), strict=True):
        no_worse(ours, theirs, true, unit)
