# SPDX-License-Identifier: Apache-2.0
"""Laws of linear attention in float64: forms agree, states hand over, limits are what they should be."""

from __future__ import annotations

from typing import Any

import attention_cases as cases
import pytest
import torch
from attention_cases import after, call, case, forms, near, real, take
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**31 - 1)
LENGTHS = st.integers(1, 21)
DECAYS = {"additive": [None, 1, 3, 4], "delta": [None, 1, 3], "hybrid": [None, 1]}
SETTINGS = {"deadline": None, "max_examples": 12}


@st.composite
def calls(draw: Any, rule: str, padding: tuple[str, ...] = ("none", "left", "any"), **fixed: Any) -> cases.Args:
    """Any call of a rule."""
    options: dict[str, Any] = {
        "decay": draw(st.sampled_from(DECAYS[rule])),
        "padding": draw(st.sampled_from(padding)),
        "chunk": draw(st.integers(1, 9)),
    }
    if rule == "additive":
        options |= {"normalise": draw(st.sampled_from(["sum", "none"]))}
    if rule == "hybrid":
        options |= {
            "window": draw(st.integers(1, 6)),
            "block": draw(st.sampled_from(["sliding", "terrace"])),
            "sinks": draw(st.integers(0, 2)),
            "anchor": draw(st.sampled_from(["max", "none"])),
        }
    return case(rule, draw(LENGTHS), draw(SEEDS), **options | fixed)


def same(rule: str, args: cases.Args, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    near(real(args, got[0]), real(args, want[0]))
    for a, b in zip(got[1:], want[1:], strict=False):
        near(a, b)


@pytest.mark.parametrize("rule", cases.RULES)
@settings(**SETTINGS)
@given(data=st.data())
def test_parallel_chunked_recurrent_and_traced_forms_are_equal(rule: str, data: st.DataObject) -> None:
    args = data.draw(calls(rule))
    want = call(rule, args)
    for form in forms(rule).values():
        same(rule, args, form(args), want)


@pytest.mark.parametrize("rule", cases.RULES)
@settings(**SETTINGS)
@given(data=st.data())
def test_a_sequence_in_pieces_is_the_sequence(rule: str, data: st.DataObject) -> None:
    args = data.draw(calls(rule))
    length = args["q"].shape[2]
    first, second = sorted((data.draw(st.integers(0, length)), data.draw(st.integers(0, length))))
    pieces, outputs = (slice(0, first), slice(first, second), slice(second, length)), []
    going_on = args
    for piece in pieces:
        results = call(rule, take(going_on, piece))
        outputs.append(results[0])
        going_on = after(rule, args, results)
    same(rule, args, (torch.cat(outputs, dim=2), *results[1:]), call(rule, args))


@pytest.mark.parametrize("form", ["operator", "parallel", "recurrent", "decomposition"])
@pytest.mark.parametrize("rule", ["additive", "delta"])
def test_forms_agree_from_a_given_state(rule: str, form: str) -> None:
    args = case(rule, 11, 3, decay=3)
    args = after(rule, args, call(rule, case(rule, 7, 4, decay=3)))
    got = call(rule, args) if form == "operator" else forms(rule)[form](args)
    same(rule, args, got, forms(rule)["recurrent"](args))


def test_the_bidirectional_forms_are_equal_and_need_not_have_equal_lengths() -> None:
    args = case("additive", 9, 1, padding="any", causal=False)
    args["q"] = case("additive", 5, 2)["q"]
    for form in forms("additive").values():
        for a, b in zip(form(args), call("additive", args), strict=True):
            near(a, b)
    weight = torch.where(args["keep"][:, None, None], args["q"] @ args["k"].repeat_interleave(2, 1).mT, 0.0)
    near(call("additive", args)[0], (weight / weight.sum(-1, keepdim=True)) @ args["v"].repeat_interleave(2, 1))


@pytest.mark.parametrize("rule", cases.RULES)
@settings(**SETTINGS)
@given(data=st.data())
def test_nothing_looks_ahead(rule: str, data: st.DataObject) -> None:
    args = data.draw(calls(rule))
    at = data.draw(st.integers(0, args["q"].shape[2] - 1))
    other = dict(args)
    for name in ("q", "k", "v", "q_map", "k_map", "beta"):
        if name in args:
            other[name] = args[name].clone()
            other[name][:, :, at:] = other[name][:, :, at:] * 0.3 + 0.1
    near(call(rule, other)[0][:, :, :at], call(rule, args)[0][:, :, :at])


@pytest.mark.parametrize("rule", cases.RULES)
@settings(**SETTINGS)
@given(data=st.data())
def test_padding_is_as_if_it_were_not_there(rule: str, data: st.DataObject) -> None:
    padding = ("left",) if rule == "hybrid" else ("left", "any")
    args = data.draw(calls(rule, padding, batch=1, **({"decay": None} if rule == "hybrid" else {})))
    keep = args["keep"][0]
    for name in ("q", "k", "v", "q_map", "k_map", "beta", "log_decay"):
        if args.get(name) is not None and args[name].dim() > 2:
            args[name][:, :, ~keep] = torch.nan
    results = call(rule, args)
    if not keep.any():
        assert not results[-1].any()
        return
    removed = take(args, keep.nonzero().flatten()) | {"keep": None}
    want = call(rule, removed)
    near(results[0][:, :, keep], want[0])
    for a, b in zip(
        results[-2:] if rule != "delta" else results[1:], want[-2:] if rule != "delta" else want[1:], strict=True
    ):
        near(a, b)


@pytest.mark.parametrize("rule", cases.RULES)
@settings(**SETTINGS)
@given(data=st.data())
def test_outputs_are_linear_in_the_values(rule: str, data: st.DataObject) -> None:
    args = data.draw(calls(rule))
    other = torch.randn(args["v"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = call(rule, args | {"v": 2 * args["v"] - other})[0]
    near(total, 2 * call(rule, args)[0] - call(rule, args | {"v": other})[0])


@pytest.mark.parametrize("rule", ["additive", "hybrid"])
@settings(**SETTINGS)
@given(data=st.data())
def test_normalised_outputs_lie_between_the_values(rule: str, data: st.DataObject) -> None:
    args = data.draw(calls(rule, ("none",), **({"normalise": "sum"} if rule == "additive" else {})))
    values = args["v"].repeat_interleave(2, dim=1)
    out, slack = call(rule, args)[0], 1e-12
    assert (out <= values.cummax(2).values + slack).all() and (out >= values.cummin(2).values - slack).all()


# -- limits of gates and rates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", cases.RULES)
def test_a_gate_of_one_is_no_gate(rule: str) -> None:
    want = call(rule, case(rule, 13, 5))
    for dims in DECAYS[rule][1:]:
        args = case(rule, 13, 5)
        args["log_decay"] = torch.zeros_like(case(rule, 13, 5, decay=dims)["log_decay"])
        near(call(rule, args)[0], want[0])


def test_the_three_kinds_of_decay_are_one() -> None:
    fixed = case("additive", 13, 5, decay=1)
    per_step = fixed | {"log_decay": fixed["log_decay"][None, :, None].expand(cases.B, -1, 13)}
    per_feature = fixed | {"log_decay": per_step["log_decay"][..., None].expand(-1, -1, -1, cases.F)}
    want = call("additive", fixed)
    for args in (per_step, per_feature):
        for a, b in zip(call("additive", args), want, strict=True):
            near(a, b)


@pytest.mark.parametrize("dims", [1, 3, 4])
def test_full_forgetting_leaves_the_current_token(dims: int) -> None:
    args = case("additive", 13, 5, decay=dims, normalise="none")
    args["log_decay"] = torch.full_like(args["log_decay"], -torch.inf)
    k, v = (args[name].repeat_interleave(2, 1) for name in ("k", "v"))
    near(call("additive", args)[0], 0.7 * (args["q"] * k).sum(-1, keepdim=True) * v)


def test_rate_zero_changes_nothing() -> None:
    args = case("delta", 9, 2, beta=torch.zeros(cases.B, cases.HK, 9, dtype=torch.float64))
    args["state"] = torch.rand(cases.B, cases.HK, cases.F, cases.DV, dtype=torch.float64)
    out, state = call("delta", args)
    near(state, args["state"])
    near(out, 0.7 * args["q"] @ args["state"].repeat_interleave(2, 1))


def test_orthonormal_keys_at_rate_one_are_recalled_exactly_and_overwritten() -> None:
    keys = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    keys = torch.cat([keys, keys[:2]])[None, None]  # the first two are written twice
    values, rate = torch.arange(16.0, dtype=torch.float64).view(1, 1, 8, 2), torch.ones(1, 1, 8, dtype=torch.float64)
    state = torch.ops.rewriter.delta_attention(keys, keys, values, rate, None, None, None, 1.0, 4)[1]
    near(keys @ state, torch.cat([values[:, :, 6:], values[:, :, 2:]], dim=2))


def test_a_bidirectional_result_does_not_depend_on_the_order_of_keys() -> None:
    args = case("additive", 12, 6, causal=False)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    other = args | {name: args[name][:, :, order] for name in ("k", "v")}
    near(call("additive", other)[0], call("additive", args)[0])


# -- the window --------------------------------------------------------------------------------------------------


def softmax_attention(args: cases.Args, visible: Tensor) -> Tensor:
    """Softmax attention over the pairs ``visible`` ``[T, T]``."""
    return torch.nn.functional.scaled_dot_product_attention(
        args["q"], args["k"], args["v"], attn_mask=visible, scale=args["scale"], enable_gqa=True
    )


@settings(**SETTINGS)
@given(data=st.data())
def test_a_window_as_long_as_the_text_is_exactly_softmax(data: st.DataObject) -> None:
    args = data.draw(calls("hybrid", ("none",)))
    length = args["q"].shape[2]
    args["window"] = length + data.draw(st.integers(0, 3))
    near(call("hybrid", args)[0], softmax_attention(args, torch.ones(length, length, dtype=torch.bool).tril()))


@settings(**SETTINGS)
@given(data=st.data())
def test_rows_within_the_first_window_are_always_softmax(data: st.DataObject) -> None:
    args = data.draw(calls("hybrid", ("none",)))
    length, window = args["q"].shape[2], args["window"]
    want = softmax_attention(args, torch.ones(length, length, dtype=torch.bool).tril())
    near(call("hybrid", args)[0][:, :, :window], want[:, :, :window])


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("block", ["sliding", "terrace"])
def test_without_maps_it_is_softmax_over_the_window(block: str, sinks: int) -> None:
    args = case("hybrid", 14, 8, q_map=None, k_map=None, map_scale=None, block=block, sinks=sinks)
    n, j = torch.arange(14)[:, None], torch.arange(14)
    near_by = n - j < 3 if block == "sliding" else j // 3 >= n // 3 - 1
    near(call("hybrid", args)[0], softmax_attention(args, (n >= j) & (near_by | (j < sinks))))


@settings(**SETTINGS)
@given(data=st.data())
def test_an_exact_map_on_the_absolute_scale_is_full_softmax(data: st.DataObject) -> None:
    # Queries take one of F values c; φ_q is which, φ_k(k)_c = e^(scale c·k): linear terms are the exponentials.
    args = data.draw(calls("hybrid", ("none",), anchor="none", decay=None, map_scale=None))
    length = args["q"].shape[2]
    g = torch.Generator().manual_seed(length)
    values = 2 * torch.randn(cases.F, cases.D, dtype=torch.float64, generator=g)
    which = torch.randint(0, cases.F, (cases.B, cases.H, length), generator=g)
    args |= {"q": values[which], "gate": torch.ones(cases.H, dtype=torch.float64)}
    args["q_map"] = torch.nn.functional.one_hot(which, cases.F).double()
    args["k_map"] = (args["scale"] * args["k"] @ values.t()).exp()
    near(call("hybrid", args)[0], softmax_attention(args, torch.ones(length, length, dtype=torch.bool).tril()))


@pytest.mark.parametrize("block", ["sliding", "terrace"])
def test_memory_of_decoding_does_not_grow(block: str) -> None:
    sizes = [[r.shape for r in call("hybrid", case("hybrid", n, block=block, sinks=2))[1:]] for n in (1, 5, 40)]
    assert sizes[0] == sizes[1] == sizes[2]


# -- the edges of the number range -------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["max", "none"])
@pytest.mark.parametrize("factor", [1e3, -1e3, 0.0])
def test_huge_scores_stay_finite(anchor: str, factor: float) -> None:
    args = case("hybrid", 17, 9, dtype=torch.float32, anchor=anchor)
    args["q"], args["k"] = torch.full_like(args["q"], factor), args["k"].abs() + 1
    args["q_map"] = args["q_map"] * 1e30
    assert call("hybrid", args)[0].isfinite().all()


@pytest.mark.parametrize("rule", cases.RULES)
def test_gates_of_zero_and_rows_without_keys_have_finite_gradients(rule: str) -> None:
    args = case(rule, 9, 2, decay=DECAYS[rule][-1])
    args["log_decay"] = args["log_decay"].clone()
    args["log_decay"].view(-1)[0] = -torch.inf
    args["keep"] = torch.ones(cases.B, 9, dtype=torch.bool)
    args["keep"][0] = False
    floating = [a.requires_grad_() for a in args.values() if isinstance(a, Tensor) and a.is_floating_point()]
    out = call(rule, args)[0]
    assert not out[0].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), floating))


@pytest.mark.parametrize("dims", [3, 4])
def test_strong_decay_over_a_long_chunk_does_not_overflow(dims: int) -> None:
    args = case("additive", 64, 5, decay=dims, dtype=torch.float32, chunk=64)
    args["log_decay"] = args["log_decay"] * 20 - 10  # e^(64 · 20) is far outside float32
    golden = call("additive", {n: a.double() if isinstance(a, Tensor) else a for n, a in args.items()})
    for got, want in zip(call("additive", args), golden, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=1e-5)


# -- low precision -----------------------------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", cases.RULES)
def test_low_precision_loses_no_more_than_eager_does(rule: str, dtype: torch.dtype) -> None:
    """Golden: the definition in float64 on the same rounded inputs. Eager: the all-pairs formula in the dtype."""
    args = case(rule, 96, 7, dtype=dtype, chunk=16, **({"window": 200} if rule == "hybrid" else {}))
    golden = forms(rule)["parallel"]({n: a.double() if isinstance(a, Tensor) else a for n, a in args.items()})[0]
    q, k, v = args["q"], args["k"].repeat_interleave(2, 1), args["v"].repeat_interleave(2, 1)
    if rule == "hybrid":
        eager = softmax_attention(args, torch.ones(96, 96, dtype=torch.bool).tril())
    elif rule == "additive":
        weight = (q @ k.mT * args["scale"]).tril()
        eager = (weight @ v) / weight.sum(-1, keepdim=True)
    else:
        state, steps = torch.zeros(*v.shape[:2], cases.F, cases.DV, dtype=dtype), []
        for t in range(96):
            key = k[:, :, t : t + 1]
            written = args["beta"].repeat_interleave(2, 1)[:, :, t, None, None] * (v[:, :, t : t + 1] - key @ state)
            state = state + key.mT @ written
            steps.append(args["scale"] * q[:, :, t : t + 1] @ state)
        eager = torch.cat(steps, dim=2)
    lost, got = rms(eager.double() - golden), rms(call(rule, args)[0].double() - golden)
    assert got <= 1.5 * lost + torch.finfo(dtype).eps * rms(golden)
    assert got <= 0.006 * rms(golden)
