# SPDX-License-Identifier: Apache-2.0
"""Feature maps and decays: their formulas, sign, widths, gradients, and where conventions differ."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels.linear_attention import decays, op
from rewriter.kernels.linear_attention import feature_maps as maps

H, D = 3, 8


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Initial parameters, moved away from their special values."""
    start = maps.MAPS[name].init(H, D, torch.Generator().manual_seed(1))
    return tuple(p.to(dtype) + 0.1 * randn(*p.shape, seed=2, dtype=dtype) for p in start)


@pytest.mark.parametrize("name", maps.MAPS)
def test_widths_roles_and_dtypes(name: str) -> None:
    entry = maps.MAPS[name]
    start = entry.init(H, D, torch.Generator().manual_seed(1))
    assert len(start) == len(entry.roles) and all(p.shape[0] == H for p in start)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        for side in (entry.query, entry.key):
            features = side(randn(2, H, 5, D, dtype=dtype), *start)
            assert features.shape == (2, H, 5, entry.width(D)) and features.dtype is wide


@pytest.mark.parametrize("name", maps.MAPS)
def test_maps_work_on_one_token_at_a_time(name: str) -> None:
    entry, x, given_ = maps.MAPS[name], randn(2, H, 5, D), parameters(name)
    for side in (entry.query, entry.key):
        torch.testing.assert_close(side(x[:, :, 2:3], *given_), side(x, *given_)[:, :, 2:3], rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), size=st.sampled_from([0.0, 1e-3, 1.0, 5.0]))
def test_positive_maps_give_no_negative_weight_and_all_are_finite(seed: int, size: float) -> None:
    x = size * randn(2, H, 5, D, seed=seed)
    for name, entry in maps.MAPS.items():
        for side in (entry.query, entry.key):
            features = side(x, *parameters(name))
            assert features.isfinite().all()
            assert not entry.positive or (features >= 0).all()


@pytest.mark.parametrize("name", maps.MAPS)
def test_gradients(name: str) -> None:
    entry = maps.MAPS[name]
    inputs = [t.requires_grad_() for t in (randn(1, H, 2, D, seed=4), *parameters(name))]
    for side in (entry.query, entry.key):
        assert torch.autograd.gradcheck(side, inputs, fast_mode=True)


def test_the_gradient_of_a_zero_query_is_finite() -> None:
    x = torch.zeros(1, 1, 1, 4, requires_grad=True)
    maps.nala_queries(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_the_two_conventions_of_hedgehog() -> None:
    x, weight = randn(2, H, 5, D), torch.eye(D, dtype=torch.float64).expand(H, D, D)
    lolcats = maps.hedgehog(x, weight)
    torch.testing.assert_close(lolcats, torch.cat([torch.softmax(x, -1), torch.softmax(-x, -1)], -1))
    torch.testing.assert_close(lolcats.sum(-1), torch.full((2, H, 5), 2.0, dtype=torch.float64))
    fla = maps.hedgehog_fla(x, weight, torch.zeros(H, D, dtype=torch.float64))
    torch.testing.assert_close(fla, torch.softmax(torch.cat([2 * x, -2 * x], -1), -1))
    torch.testing.assert_close(fla.sum(-1), torch.ones(2, H, 5, dtype=torch.float64))


def test_random_features_are_orthogonal_with_gaussian_lengths() -> None:
    omega = maps.orthogonal_features(400, 4, torch.Generator().manual_seed(0), 6).double()
    assert omega.shape == (400, 4, 6)
    gram = omega.mT @ omega
    first = gram[:, :4, :4] - torch.diag_embed(gram[:, :4, :4].diagonal(dim1=-2, dim2=-1))
    assert first.abs().max() < 1e-5
    assert gram[:, 4:, :4].abs().max() > 0.1  # the second block is drawn anew
    assert omega.square().sum(1).mean() == pytest.approx(4, rel=0.05)  # E ‖ω‖² = D
    torch.testing.assert_close(omega.movedim(1, 2).flatten(0, 1).T.cov(), torch.eye(4).double(), rtol=0, atol=0.1)


def test_random_features_estimate_the_exponential_without_bias() -> None:
    q, k = 0.4 * randn(1, 1, 1, D, seed=5), 0.4 * randn(1, 1, 1, D, seed=6)
    omega = maps.orthogonal_features(4000, D, torch.Generator().manual_seed(0)).double()
    estimates = (maps.favor(q, omega) * maps.favor(k, omega)).sum(-1)
    want = float((q * k).sum().exp())
    error = float(estimates.std()) / math.sqrt(4000)
    assert abs(float(estimates.mean()) - want) < 4 * error < 0.1 * want


def test_cosformer_weights_are_products_of_relu_and_cosine() -> None:
    q, k, position = randn(1, H, 6, D), randn(1, H, 6, D, seed=3), torch.arange(6)
    weights = maps.cosformer(q, position, 9) @ maps.cosformer(k, position, 9).mT
    cosine = torch.cos(math.pi / 2 * (position[:, None] - position) / 9)
    torch.testing.assert_close(weights, (q.relu() @ k.relu().mT) * cosine)
    rows = maps.cosformer(q.expand(2, -1, -1, -1), torch.stack([position, position + 3]), 9)
    torch.testing.assert_close(rows[1], maps.cosformer(q, position + 3, 9)[0])


def test_nala_powers_grow_with_the_query() -> None:
    q = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    power = 3 * (0.5 + math.tanh(5.0))
    want = torch.tensor([[0.6**power, 0, 0, 0.8**power]], dtype=torch.float64)
    torch.testing.assert_close(maps.nala_queries(q), want)
    torch.testing.assert_close(maps.nala_keys(q), torch.tensor([[27.0, 0, 0, 64.0]], dtype=torch.float64))


def test_rala_weighs_keys_by_the_mean_query_and_leaves_padding_out() -> None:
    q, k = maps.elu(randn(2, H, 6, D)), maps.elu(randn(2, H, 6, D, seed=3))
    scores = torch.softmax(0.3 * (k * q.mean(2, keepdim=True)).sum(-1), dim=-1)
    torch.testing.assert_close(maps.rala_keys(q, k, None, 0.3), 6 * scores.unsqueeze(-1) * k)
    torch.testing.assert_close(maps.rala_keys(q, k, None, 0.0), k)  # equal scores: plain linear attention
    keep = torch.tensor([[True] * 4 + [False] * 2] * 2)
    padded = maps.rala_keys(q, k, keep, 0.3)
    torch.testing.assert_close(padded[:, :, :4], maps.rala_keys(q[:, :, :4], k[:, :, :4], None, 0.3))
    assert not padded[:, :, 4:].any()


def test_slab_adds_positions_to_the_keys() -> None:
    k, position = randn(2, H, 5, D), randn(5, D, seed=9)
    torch.testing.assert_close(maps.slab_keys(k, position), torch.relu(k + position))


def test_norms() -> None:
    x = 3 * randn(2, H, 5, D)
    torch.testing.assert_close(maps.unit_norm(x, 0.0).norm(dim=-1), torch.ones(2, H, 5, dtype=torch.float64))
    torch.testing.assert_close(maps.output_norm(x, 0.0).square().mean(-1), torch.ones(2, H, 5, dtype=torch.float64))
    assert maps.unit_norm(torch.zeros(4)).isfinite().all() and maps.output_norm(x.half()).dtype is torch.float16


def test_an_output_norm_does_not_see_the_scale_of_unnormalised_attention() -> None:
    q, k, v = randn(1, H, 7, D), randn(1, H, 7, D, seed=1), randn(1, H, 7, D, seed=2)
    one, ten = (
        op.linear_attention(q, k, v, None, None, None, None, scale, True, "none", 4)[0] for scale in (1.0, 10.0)
    )
    torch.testing.assert_close(maps.output_norm(ten, 0.0), maps.output_norm(one, 0.0))


# -- decays ------------------------------------------------------------------------------------------------------


def test_slopes_of_the_two_lightnings_and_of_retnet() -> None:
    assert decays.lightning(8).tolist() == [-(2.0 ** -(h + 1)) for h in range(8)]
    assert decays.lightning_fla(4, 0, 2).tolist() == [0, -2, -4, -6]
    assert decays.lightning_fla(4, 1, 2).tolist() == [0, -1, -2, -3]
    torch.testing.assert_close(decays.retnet(3).exp(), 1 - 2.0 ** -torch.tensor([5.0, 6, 7], dtype=torch.float64))


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match="is not one of 2 layers"):
        decays.lightning_fla(4, layer, 2)


def test_no_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must be at least 1"):
        decays.retnet(0)


def test_gates_are_slow_and_never_closed() -> None:
    x = torch.tensor([-100.0, 0.0, 100.0], dtype=torch.bfloat16)
    gate = decays.gate(x)
    assert gate.dtype is torch.float32 and (gate <= 0).all()
    torch.testing.assert_close(gate.exp(), (torch.sigmoid(x.double()) ** (1 / 16)).float())
