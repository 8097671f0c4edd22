# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of linear attention, interpreted on the CPU in poisoned memory, against the reference in float64.

An error is judged by root mean square: at most twice that of the reference in the same dtype, and one unit in the last
place. A running sum of decays b is rounded too, so that e^b is off by |b| units; the reference adds them up in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attention_cases import after, case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.linear_attention import additive_op, delta_op, features_op, hybrid, hybrid_op, launch, layout, op
from rewriter.kernels.spec import REGISTRY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Values = list[Any]


def few(count: int) -> Callable[..., Any]:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def wide(values: Sequence[Any]) -> Values:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def check(
    got: Sequence[Tensor],
    reference: Callable[..., Sequence[Tensor]],
    values: Values,
    dtype: torch.dtype,
    units: float = 1,
    terms: Sequence[Tensor] | None = None,
) -> None:
    """``got`` is the reference's result for ``values`` up to what the dtype loses.

    Units are of the result, or of the ``terms`` it is the sum of where these are larger.
    """
    want, own = reference(*wide(values)), reference(*values)
    assert len(got) == len(own)
    for index, (x, narrow, golden) in enumerate(zip(got, own, want, strict=True)):
        assert x.shape == narrow.shape and x.dtype == narrow.dtype, index
        assert not x.numel() or x.is_contiguous(), index
        if not x.is_floating_point():
            assert torch.equal(x, narrow), index
            continue
        assert bool(x.isfinite().all()), index
        size = rms(golden) if terms is None else max(rms(golden), rms(terms[index]))
        allowed = 2 * rms(narrow.double() - golden) + units * torch.finfo(dtype).eps * size
        assert rms(x.double() - golden) <= allowed, f"result {index}: {rms(x.double() - golden)} > {allowed}"


class Draw:
    """Random tensors ``[B, h, T, width]`` with the strides a model may have."""

    def __init__(self, seed: int, dtype: torch.dtype, strides: str) -> None:
        self.generator, self.dtype, self.strides = torch.Generator().manual_seed(seed), dtype, strides

    def __call__(self, *shape: int, positive: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        make = torch.rand if positive else torch.randn
        batch, heads, *rest = shape
        if self.strides == "transposed" and len(rest) == 2:  # as projections give it: [B, T, h, width]
            x = make(batch, rest[0], heads, rest[1], generator=self.generator).transpose(1, 2)
        elif self.strides == "sliced":
            x = make(batch, heads, *rest[:-1], 2 * rest[-1] + 1, generator=self.generator)[..., 1::2]
        else:
            x = make(*shape, generator=self.generator)
        x = x.to(dtype or self.dtype)
        return x

    def keep(self, batch: int, length: int) -> Tensor:
        return torch.rand(batch, length, generator=self.generator) < 0.7


HEADS = [(1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 2, 1), (4, 2, 1, 1), (2, 2, 2, 2), (2, 1, 1, 2)]


@st.composite
def additive_calls(draw: st.DrawFn) -> tuple[torch.dtype, Values, float]:
    """Arguments of `linear_attention`, and how large the sums of decays become."""
    dtype = draw(st.sampled_from(DTYPES))
    make = Draw(draw(st.integers(0, 2**20)), dtype, draw(st.sampled_from(["dense", "transposed", "sliced"])))
    (heads, of_k, of_v, of_g), batch = draw(st.sampled_from(HEADS)), draw(st.sampled_from([1, 1, 2]))
    length, features = draw(st.sampled_from([1, 3, 9, 17, 33])), draw(st.sampled_from([1, 5, 16, 40]))
    values, decay = draw(st.sampled_from([1, 7, 33])), draw(st.sampled_from([None, 1, 3, 4]))
    causal = decay is not None or draw(st.booleans())
    keys = length if causal else draw(st.sampled_from([length, 12, 20]))
    q = make(batch, heads, length, features, positive=True)
    k = make(batch, of_k, keys, features, positive=True, dtype=draw(st.sampled_from([dtype, dtype, torch.float32])))
    v = make(batch, of_v, keys, values)
    shapes = {1: (of_g,), 3: (batch, of_g, keys), 4: (batch, of_g, keys, features)}
    g = None if decay is None else -2 * torch.rand(shapes[decay], generator=make.generator)
    units = 1.0 if g is None else 16.0
    if g is not None and draw(st.booleans()):
        g.flatten()[0] = -torch.inf
        units -= layout.LOWEST_LOG_DECAY  # which is what -inf is taken for, in the sum
    keep = make.keep(batch, keys) if draw(st.booleans()) else None
    state = normaliser = None
    if draw(st.booleans()):
        states = max(of_k, of_v, of_g if g is not None else 1)
        state = make(batch, states, features, values, dtype=torch.float32)
        normaliser = 1 + make(batch, states, features, positive=True, dtype=torch.float32)
    normalise = draw(st.sampled_from(["sum", "none"]))
    # At least one chunk boundary inside the longer ones.
    call = [q, k, v, g, keep, state, normaliser, 0.7, causal, normalise, 16]
    return dtype, call, units


@pytest.mark.hypothesis
@few(16)
@given(additive_calls())
def test_additive_forward(case: tuple[torch.dtype, Values, float]) -> None:
    dtype, values, units = case
    with interpreting():
        got = launch.linear_attention(*values)
    check(got, additive_op._additive, values, dtype, units)


def gradient(name: str, grads: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The gradient's reference, of inputs and flags."""
    reference = REGISTRY[getattr(torch.ops.rewriter, f"{name}_backward").default].reference
    return lambda *rest: reference([g.double() if rest[0].dtype is torch.float64 else g for g in grads], *rest)


def through_numerator(values: Values, grads: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    """The gradients with the sums of weights taken for constants: what the gradient through these is subtracted from."""
    q, k, v, g, keep, state, normaliser, scale, causal, _, chunk = wide(values)
    before = (None, None) if state is None else (normaliser.unsqueeze(-1), normaliser)
    options = (scale, causal, "none", chunk)
    weight, *_ = additive_op._additive(q, k, torch.ones_like(v[..., :1]), g, keep, *before, *options)
    out, *others = (x.double() for x in grads)
    parts = [out / torch.where(weight == 0, 1.0, weight), *others]
    return gradient("linear_attention", parts)(q, k, v, g, keep, state, normaliser, *options, needs)


@pytest.mark.hypothesis
@few(10)
@given(additive_calls(), st.integers(0, 2**20))
def test_additive_gradients(case: tuple[torch.dtype, Values, float], seed: int) -> None:
    dtype, values, units = case
    outputs = op.linear_attention(*values)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    needs = [isinstance(v, Tensor) and v.is_floating_point() for v in values]
    with interpreting():
        got = launch.linear_attention_backward(grads, *values, needs)
    terms = through_numerator(values, grads, needs) if values[9] == "sum" else None
    check(got, gradient("linear_attention", grads), [*values, needs], dtype, units, terms)


@st.composite
def hybrid_calls(draw: st.DrawFn) -> tuple[torch.dtype, Values, float]:
    """Arguments of `hybrid_attention`, from the start of a sequence or going on, and how large sums of decays become."""
    dtype, length = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 5, 18, 34]))
    options: dict[str, Any] = {
        "decay": draw(st.sampled_from([None, 1])),
        "padding": draw(st.sampled_from(["none", "left", "any"])),
        "block": draw(st.sampled_from(["sliding", "terrace"])),
        "sinks": draw(st.sampled_from([0, 2])),
        "anchor": draw(st.sampled_from(["max", "none"])),
        "window": draw(st.sampled_from([1, 3, 18])),
    }
    if not draw(st.sampled_from([True, True, False])):
        options |= {"q_map": None, "k_map": None, "map_scale": None, "decay": None}
    seed = draw(st.integers(0, 2**20))
    args = case("hybrid", length, seed, dtype=dtype, batch=1, chunk=16, **options)
    if draw(st.booleans()):
        # Of other tokens: equal keys would tie for the largest score, and rounding decide between them.
        past = case("hybrid", draw(st.sampled_from([1, 20])), seed + 1, dtype=dtype, batch=1, chunk=16, **options)
        args = after("hybrid", args, hybrid_op._reference(*past.values()))
    args["with_state"] = draw(st.booleans())
    return dtype, list(args.values()), 1.0 if options["decay"] is None else 40.0


@pytest.mark.hypothesis
@few(12)
@given(hybrid_calls())
def test_hybrid_forward(case: tuple[torch.dtype, Values, float]) -> None:
    dtype, values, units = case
    with interpreting():
        got = launch.hybrid_attention(*values)
    check(got, hybrid_op._reference, values, dtype, units)


@pytest.mark.hypothesis
@few(6)
@given(hybrid_calls(), st.integers(0, 2**20))
def test_hybrid_gradients(case: tuple[torch.dtype, Values, float], seed: int) -> None:
    dtype, values, units = case
    generator = torch.Generator().manual_seed(seed)
    outputs = [o for o in hybrid_op._reference(*values) if o.is_floating_point()]
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    needs = [isinstance(v, Tensor) and v.is_floating_point() for v in values]
    with interpreting():
        got = launch.hybrid_attention_backward(grads, *values, needs)
    # What the gradient through the sums of weights is subtracted from.
    with pytest.MonkeyPatch.context() as patch:
        ratio = hybrid._ratio
        patch.setattr(hybrid, "_ratio", lambda raw: ratio(torch.cat([raw[..., :-1], raw[..., -1:].detach()], -1)))
        terms = gradient("hybrid_attention", grads)(*wide(values), needs)
    check(got, gradient("hybrid_attention", grads), [*values, needs], dtype, units, terms)


@st.composite
def delta_calls(draw: st.DrawFn) -> tuple[torch.dtype, Values, float]:
    """Arguments of `delta_attention`, and how many units its errors may have."""
    dtype, heads = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([(1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 2, 1)]))
    length, (features, width) = (
        draw(st.sampled_from([1, 9, 18, 33])),
        draw(st.sampled_from([(5, 3), (16, 17), (40, 1)])),
    )
    make = Draw(draw(st.integers(0, 2**20)), dtype, draw(st.sampled_from(["dense", "transposed", "sliced"])))
    of_q, of_k, of_v, of_g = heads
    q, v = make(1, of_q, length, features), make(1, of_v, length, width)
    k = torch.nn.functional.normalize(make(1, of_k, length, features).float(), dim=-1).to(dtype)
    decay = draw(st.sampled_from([None, 1, 3]))
    shapes = {1: (of_g,), 3: (1, of_g, length)}
    g = None if decay is None else -torch.rand(shapes[decay], generator=make.generator)
    beta = make(1, of_k, length, positive=True)
    if draw(st.booleans()):
        beta[..., 0] = 0.0  # writes nothing, and still has a gradient
    keep = make.keep(1, length) if draw(st.booleans()) else None
    state = make(1, max(heads[1:]), features, width, dtype=torch.float32) if draw(st.booleans()) else None
    # What is written is the difference of a value and what the state gives back for it, both rounded.
    return dtype, [q, k, v, beta, g, keep, state, 0.5, 16], 4.0 if g is None else 16.0


@pytest.mark.hypothesis
@few(8)
@given(delta_calls())
def test_delta_forward(case: tuple[torch.dtype, Values, float]) -> None:
    dtype, values, units = case
    with interpreting():
        got = launch.delta_attention(*values)
    check(got, delta_op._reference, values, dtype, units)


@pytest.mark.hypothesis
@few(6)
@given(delta_calls(), st.integers(0, 2**20))
def test_delta_gradients(case: tuple[torch.dtype, Values, float], seed: int) -> None:
    dtype, values, units = case
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in delta_op._reference(*values)]
    needs = [isinstance(v, Tensor) and v.is_floating_point() for v in values]
    with interpreting():
        got = launch.delta_attention_backward(grads, *values, needs)
    terms = gradient("delta_attention", grads)(*wide(values), needs)
    if values[4] is not None:
        # A decay's gradient is a difference: what queries read of the state, less what is written after the step.
        read = (values[0].double() * terms[0]).sum(-1).abs()
        terms[4] = read if values[4].dim() == 3 else read.sum()
    check(got, gradient("delta_attention", grads), [*values, needs], dtype, units, terms)


@st.composite
def feature_calls(draw: st.DrawFn) -> tuple[torch.dtype, Values, float]:
    """Arguments of `attention_features`, and how large the terms of its exponents are: they lose as much in units."""
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(list(features_op.KINDS)))
    make = Draw(draw(st.integers(0, 2**20)), dtype, draw(st.sampled_from(["dense", "transposed", "sliced"])))
    heads, length, width = 2, draw(st.sampled_from([1, 35, 70])), draw(st.sampled_from([5, 70]))
    columns, of_parameters = draw(st.sampled_from([1, 19])), draw(st.sampled_from([dtype, torch.float32]))
    x = make(draw(st.sampled_from([1, 2])), heads, length, width)
    shapes = ((heads, width, columns), (heads, columns)) * 2
    given = [0.3 * torch.randn(shape, generator=make.generator) for shape in shapes[: features_op.KINDS[kind]]]
    parameters = [p.to(of_parameters) for p in given]
    reach = 1.0
    if dtype is torch.float32 and parameters:
        reach += sum(float((x.abs() @ w.float().abs()).max()) for w in parameters[::2])
    return dtype, [x, *parameters, *(None,) * (4 - len(parameters)), kind, draw(st.sampled_from([1.0, 0.5]))], reach


@pytest.mark.hypothesis
@few(6)
@given(feature_calls(), st.integers(0, 2**20))
def test_features_and_their_gradients(case: tuple[torch.dtype, Values, float], seed: int) -> None:
    dtype, values, units = case
    with interpreting():
        got = launch.attention_features(*values)
    check([got], lambda *arguments: [features_op._features(*arguments)], values, dtype, units)
    grads = [torch.randn(got.shape, generator=torch.Generator().manual_seed(seed))]
    needs = [isinstance(v, Tensor) for v in values]
    with interpreting():
        found = launch.attention_features_backward(grads, *values, needs)
    check(found, gradient("attention_features", grads), [*values, needs], dtype, units)


@pytest.mark.parametrize("kind", ["exp", "landmark"])
def test_exponents_of_features_end_where_the_reference_ends_them(kind: str) -> None:
    x, bias = torch.ones(1, 1, 2, 4), torch.tensor([[61.0, 59.0, 30.0]])
    x[0, 0, 1] = 0.0
    given = [torch.zeros(1, 4, 3), bias - 61 if kind == "landmark" else bias, torch.zeros(1, 4, 3), bias]
    values = [x, *given[: features_op.KINDS[kind]], *(None,) * (4 - features_op.KINDS[kind]), kind, 1.0]
    needs = [isinstance(v, Tensor) for v in values]
    grads = [torch.ones(1, 1, 2, 3)]
    with interpreting():
        got, found = launch.attention_features(*values), launch.attention_features_backward(grads, *values, needs)
    torch.testing.assert_close(got, features_op._features(*values))
    for a, b in zip(found, gradient("attention_features", grads)(*values, needs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", list(features_op.KINDS))
def test_features_hand_nan_on(kind: str) -> None:
    x, parameters = (
        torch.ones(1, 1, 3, 4),
        [torch.ones(1, 4, 2), torch.ones(1, 2), torch.ones(1, 4, 2), torch.ones(1, 2)],
    )
    x[0, 0, 1, 2] = torch.nan
    given = parameters[: features_op.KINDS[kind]]
    values = [x, *given, *(None,) * (4 - len(given)), kind, 1.0]
    with interpreting():
        got = launch.attention_features(*values)
    assert torch.equal(got.isnan(), features_op._features(*values).isnan()) and bool(got.isnan().any())


@pytest.mark.parametrize("normalise", ["sum", "none"])
def test_padding_may_hold_anything(normalise: str) -> None:
    values = list(case("additive", 20, padding="any", dtype=torch.float32, normalise=normalise, chunk=16).values())
    keep = values[4]
    poisoned = [*values]
    poisoned[1], poisoned[2] = (torch.where(keep[:, None, :, None], x, torch.nan) for x in values[1:3])
    with interpreting():
        clean, dirty = launch.linear_attention(*values), launch.linear_attention(*poisoned)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_nan_reaches_what_comes_after_it_and_no_earlier_chunk() -> None:
    values = list(case("additive", 40, dtype=torch.float32, chunk=16).values())
    values[1] = values[1].clone()
    values[1][0, 0, 20] = torch.nan
    with interpreting():
        out, state, _ = launch.linear_attention(*values)
    reads_it = slice(0, values[0].shape[1] // values[1].shape[1])
    assert bool(out[0, reads_it, 20:].isnan().all()) and bool(state[0, 0].isnan().all())
    assert bool(out[0, reads_it, :16].isfinite().all()) and bool(out[1].isfinite().all())


def test_float16_sums_leave_its_range() -> None:
    """Scores of 10⁶ and states beyond 65504, both operands of a product."""
    args = case("additive", 40, dtype=torch.float16, chunk=16)
    args["q"], args["k"], args["v"] = args["q"] * 600, args["k"] * 600, args["v"] * 100
    with interpreting():
        got = launch.linear_attention(*args.values())
    check(got, additive_op._additive, list(args.values()), torch.float16)


def test_a_row_without_weight_is_zero() -> None:
    args = case("additive", 20, dtype=torch.float32, chunk=16)
    args["keep"] = torch.zeros(2, 20, dtype=torch.bool)
    with interpreting():
        out, state, normaliser = launch.linear_attention(*args.values())
    assert not out.any() and not state.any() and not normaliser.any()


@pytest.mark.parametrize(
    ("rule", "change", "reason"),
    [
        ("additive", {"dtype": torch.float64}, "float64"),
        ("delta", {"dtype": torch.float64}, "float64"),
        ("hybrid", {"dtype": torch.float64}, "float64"),
        ("additive", {"q": torch.ones(2, 4, 9, 257), "k": torch.ones(2, 2, 9, 257)}, "257 features"),
        ("hybrid", {"q": torch.ones(2, 4, 9, 129), "k": torch.ones(2, 2, 9, 129)}, "heads of 129"),
        ("additive", {"v": torch.ones(2, 2, 9, 0)}, "without elements"),
        ("delta", {"q": torch.ones(2, 4, 9, 65), "k": torch.ones(2, 2, 9, 65)}, "65 features in float32"),
    ],
)
def test_what_runs_the_reference_says_why(rule: str, change: dict[str, Any], reason: str) -> None:
    args = case(rule, 9, **{"dtype": torch.float32, **change})
    with pytest.raises(Unsupported, match=reason):
        getattr(launch, f"{rule.replace('additive', 'linear')}_attention")(*args.values())


@pytest.mark.parametrize("name", [name for name in launch.__all__ if name != "SHIPPED"])
def test_operators_know_their_kernels(name: str) -> None:
    spec = REGISTRY[getattr(torch.ops.rewriter, name).default]
    assert spec.implementation("cuda") is getattr(launch, name)
