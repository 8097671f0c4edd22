# SPDX-License-Identifier: Apache-2.0
"""Feature maps and their calibration: what is claimed of landmarks, of the line search, and of the window."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter import calibration
from rewriter.errors import PlanError
from rewriter.passes.linear_attention import fitting, landmarks
from rewriter.passes.linear_attention.fitting import Sequences, Shape
from rewriter.passes.linear_attention.form import Form
from rewriter.passes.linear_attention.maps import MAPS, Tokens

DIM = 8


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sequences(seed: int, length: int = 40, heads: int = 4, key_heads: int = 2, sharp: float = 1.0) -> Sequences:
    g = draw(seed)
    q = sharp * torch.randn(3, heads, length, DIM, generator=g)
    k, v = (torch.randn(3, key_heads, length, DIM, generator=g) for _ in range(2))
    return Sequences(q, k, v)


# ------------------------------------------------------------------------------------------------------- maps


@settings(max_examples=20)
@given(st.integers(0, 2**20), st.floats(0.05, 2.0))
def test_at_a_landmark_a_sharp_map_is_the_exponential_itself(seed: int, scale: float) -> None:
    """φ_q(c_i) · φ_k(k) = exp(scale · c_i·k) for τ → ∞: the gain is 1 and the choice is certain."""
    g = draw(seed)
    at, k = torch.randn(5, DIM, generator=g).double(), torch.randn(7, DIM, generator=g).double()
    placed = landmarks.Landmarks(
        at, torch.randn(5, generator=g).double(), torch.randn(5, DIM, generator=g).double(), scale
    )
    given_ = {r: x[None] for r, x in {**placed.query_parameters(1e6), **placed.key_parameters()}.items()}
    q_map, k_map = MAPS["landmark"].features(Tokens(at[None, None], k[None, None], scale), given_)
    torch.testing.assert_close(q_map[0, 0] @ k_map[0, 0].T, torch.exp(scale * at @ k.T), rtol=1e-6, atol=0)


def test_the_gradient_of_a_landmark_is_that_of_its_log_mass() -> None:
    """g_i = ∇_c log Σ_j exp(scale · c·k_j) at c_i, and o_i its value but for log n."""
    g = draw(0)
    queries, keys = torch.randn(60, DIM, generator=g).double(), torch.randn(50, DIM, generator=g).double()
    placed = landmarks.place(queries, torch.ones(60).double(), keys, 4, 0.5, draw(1))
    c = placed.at.clone().requires_grad_()
    mass = (0.5 * keys @ c.T).logsumexp(0)
    mass.sum().backward()
    torch.testing.assert_close(placed.gradient, c.grad)
    torch.testing.assert_close(placed.offset, mass.detach() - math.log(50))


def test_there_are_no_more_landmarks_than_queries() -> None:
    placed = landmarks.place(torch.randn(3, DIM), torch.ones(3), torch.randn(9, DIM), 16, 1.0, draw(0))
    assert placed.at.shape == (3, DIM)


def shape_for(name: str, window: int) -> Shape:
    """The shape of a site that can have the map."""
    fmap = MAPS[name]
    window = window if fmap.positive and fmap.causal else 0
    return Shape(0.35, window, causal=fmap.causal, horizon=48 if fmap.positional else 0)


@pytest.mark.parametrize("name", MAPS)
def test_features_are_finite_and_wide_and_no_weight_is_negative_where_it_is_said(name: str) -> None:
    data, fmap, shape = sequences(3, sharp=8.0), MAPS[name], shape_for(name, 8)
    fitted = fitting.fit(data, shape, name, 6, draw(0)).tensors
    at = torch.arange(data.q.shape[2])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        given_ = {role: x.to(dtype) for role, x in fitted.items()}
        tokens = Tokens((30 * data.q).to(dtype), (30 * data.k).to(dtype), 0.4, None, (at, at), shape.horizon)
        for features in fmap.features(tokens, given_):
            assert features.dtype == torch.promote_types(dtype, torch.float32)
            assert bool(torch.isfinite(features).all())
        q_map, k_map = fmap.features(tokens, given_)
        assert not fmap.positive or bool((q_map @ k_map.repeat_interleave(data.groups, 1).mT >= 0).all())


# ---------------------------------------------------------------------------------------------------- fitting


@settings(max_examples=15)
@given(
    st.integers(0, 2**20),
    st.sampled_from(sorted(name for name, fmap in MAPS.items() if fmap.positive and fmap.causal)),
    st.sampled_from(["sliding", "terrace"]),
    st.integers(0, 2),
    st.booleans(),
)
def test_on_calibration_data_the_hybrid_is_never_worse_than_its_window(
    seed: int, name: str, block: str, sinks: int, decays: bool
) -> None:
    shape = Shape(0.35, 6, block, sinks, True, decays, horizon=48)
    figures = fitting.fit(sequences(seed), shape, name, 8, draw(seed)).figures
    assert figures["output_error"] <= figures["window_error"]


@pytest.mark.parametrize(("name", "anchor"), [*((name, "none") for name in MAPS), ("hedgehog", "max")])
def test_the_measured_error_is_that_of_the_operator(name: str, anchor: str) -> None:
    """The figures come from sampled queries and a formula of their own; the operator on all of them says the same."""
    data, shape = sequences(1, length=48), dataclasses.replace(shape_for(name, 8), anchor=anchor)
    found = fitting.fit(data, shape, name, 8, draw(0))
    form = Form(name, shape.scale, shape.window, "sliding", 0, anchor, shape.causal, 4, horizon=shape.horizon)
    out = form.call(data.q, data.k, data.v, None, dict(found.tensors) | {"window_gate": torch.ones(4)})[0]
    exact = torch.nn.functional.scaled_dot_product_attention(
        data.q, data.k, data.v, is_causal=shape.causal, scale=shape.scale, enable_gqa=True
    )
    _, choosing = fitting.positions(shape, data, draw(0))  # the first thing a fit draws
    error = (out - exact)[:, :, choosing].norm() / exact[:, :, choosing].norm()
    assert found.error == pytest.approx(float(error), rel=1e-3)


def test_more_landmarks_are_better_and_as_many_as_queries_nearly_exact() -> None:
    data, shape = sequences(5, length=24, heads=1, key_heads=1), Shape(0.35, 4)
    errors = [fitting.fit(data, shape, "landmark", m, draw(0)).error for m in (1, 4, 24)]
    assert errors[0] > errors[1] > errors[2]


def test_a_head_that_sees_its_window_alone_keeps_it_alone() -> None:
    """Keys that grow with the distance to a query are what a linear branch cannot know; near ones dominate here."""
    length = 40
    position = torch.arange(length).float()
    angle = position * 0.5
    q = 30 * torch.stack([angle.cos(), angle.sin(), *[torch.zeros(length)] * 6], -1).expand(2, 1, -1, -1)
    k = torch.stack([angle.cos(), angle.sin(), *[torch.zeros(length)] * 6], -1).expand(2, 1, -1, -1)
    k = torch.cat([k[..., :2] * (1 + position[:, None]), k[..., 2:]], -1)
    v = torch.randn(2, 1, length, DIM, generator=draw(0))
    found = fitting.fit(Sequences(q, k, v), Shape(1.0, 16), "elu", 8, draw(0))
    assert found.figures["live_heads"] == 0.0
    assert found.figures["output_error"] == found.figures["window_error"]


def test_bidirectional_attention_has_no_window_and_no_weight_against_it() -> None:
    one, found = (fitting.fit(sequences(2), Shape(0.35, 0, causal=False), "landmark", m, draw(0)) for m in (1, 16))
    assert "map_scale" not in found.tensors and "window_error" not in found.figures
    assert found.error < one.error < 1


def test_sequences_within_the_window_say_nothing() -> None:
    with pytest.raises(PlanError, match="never reach beyond the window"):
        fitting.fit(sequences(0, length=16), Shape(0.35, 16), "elu", 8, draw(0))


def test_the_same_draw_gives_the_same_fit() -> None:
    def fitted() -> dict[str, Tensor]:
        return dict(fitting.fit(sequences(0), Shape(0.35, 8), "landmark", 8, draw(7)).tensors)

    for a, b in zip(fitted().values(), fitted().values(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------- the statistics


def test_sequences_are_thinned_evenly_and_alike_at_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole inputs, every stride-th one, whatever the batches they came in and whatever else the value holds."""
    monkeypatch.setattr(calibration, "SEQUENCE_TOKENS", 4 * 10)
    tokens = torch.arange(16 * 10).reshape(16, 10)
    wide = tokens.reshape(16, 1, 10, 1).expand(16, 2, 10, 3).float()
    kept = []
    for sizes in ([16], [4] * 4, [1, 7, 8]):
        ids, states = calibration._Sequences(), calibration._Sequences()
        for a, b in zip(tokens.split(sizes), wide.split(sizes), strict=True):
            ids.add(a)
            states.add(b)
        assert torch.equal(ids.result().float(), states.result()[:, 0, :, 0])
        kept.append(ids.result()[:, 0])
    assert all(torch.equal(rows, torch.tensor([0, 40, 80, 120])) for rows in kept)


def test_sequences_have_one_length() -> None:
    sequences_of = calibration._Sequences()
    sequences_of.add(torch.zeros(1, 2, 10, 3))
    with pytest.raises(PlanError, match="differ in length \\(10 and 9\\)"):
        sequences_of.add(torch.zeros(1, 2, 9, 3))
