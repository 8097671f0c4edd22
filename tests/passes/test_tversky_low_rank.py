# SPDX-License-Identifier: Apache-2.0
"""The whitened fit by itself: it is the best of its rank, and knows its error before anything is fitted."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.tversky.fits import as_stored, output_error
from rewriter.passes.tversky.low_rank import Directions, Layer, directions, scores

laws = settings(deadline=None, max_examples=25)


@st.composite
def layers(draw: st.DrawFn, count: int = 1) -> list[Layer]:
    """Weights of one input width with second moments of full rank; float64."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = draw(st.integers(2, 8))
    drawn = []
    for _ in range(count):
        weight = torch.randn(draw(st.integers(1, 9)), width, generator=g, dtype=torch.float64)
        x = torch.randn(3 * width, width, generator=g, dtype=torch.float64) * torch.logspace(0, -1, width).double()
        drawn.append(Layer(weight, x.t() @ x / len(x)))
    return drawn


def error(layer: Layer, features: Tensor) -> float:
    return output_error(layer.weight, features, scores(layer, features), layer.moment)


@given(layers())
@laws
def test_the_error_of_every_rank_is_known_beforehand_and_falls(one: list[Layer]) -> None:
    found = directions(one)
    foretold = found.errors()
    assert (foretold.diff() <= 1e-12).all() and foretold[-1] < 1e-6
    for rank in range(1, len(foretold)):
        assert abs(error(one[0], found.features[:rank]) - float(foretold[rank])) < 1e-6
    for bound in (0.5, 0.1, 0.01):
        rank = found.rank_for(bound)
        assert foretold[rank] <= bound and (rank == 0 or foretold[rank - 1] > bound)


@given(layers(), st.integers(0, 2**31))
@laws
def test_no_other_features_of_the_same_number_do_better(one: list[Layer], seed: int) -> None:
    found = directions(one)
    assume(len(found.values) > 1)
    best = error(one[0], found.features[:1])
    g = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 1e-1, 10.0):
        other = found.features[:1] / found.features[:1].norm()
        other = other + scale * torch.randn(other.shape, generator=g, dtype=torch.float64)
        assert error(one[0], other) >= best - 1e-9


@given(layers(count=3))
@laws
def test_layers_on_one_bank_lose_more_than_each_on_its_own(several: list[Layer]) -> None:
    shared = directions(several)
    for layer in several:
        own = directions([layer])
        for rank in range(1, len(own.values)):
            assert error(layer, shared.features[:rank]) >= error(layer, own.features[:rank]) - 1e-7
        assert error(layer, shared.features) < 1e-4  # together they span all there is


def test_a_weight_of_zeros_has_no_directions() -> None:
    found = directions([Layer(torch.zeros(3, 4), None)])
    assert len(found.values) == 0 and found.rank_for(0.1) == 0


def test_values_that_fp16_cannot_hold_stay_as_they_are() -> None:
    like = torch.zeros(1)
    for values in (torch.tensor([1e6, 1.0]), torch.tensor([1e-9, 2e-9])):
        assert torch.equal(as_stored(values, like), values)
    rounded = as_stored(torch.tensor([1 / 3]), like)
    assert rounded == torch.tensor([1 / 3]).half().float() and rounded.dtype == torch.float32


def test_errors_of_a_known_spectrum() -> None:
    found = Directions(torch.tensor([9.0, 4.0, 3.0]).double(), torch.eye(3).double(), 16.0)
    torch.testing.assert_close(found.errors(), torch.tensor([16.0, 7.0, 3.0, 0.0]).double().div(16).sqrt())
