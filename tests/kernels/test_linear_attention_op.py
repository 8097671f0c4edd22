# SPDX-License-Identifier: Apache-2.0
"""The operators of linear attention as torch operators: opcheck, gradients, vmap, dtypes, decomposition, refusals."""

from __future__ import annotations

from typing import Any

import attention_cases as cases
import pytest
import torch
from attention_cases import OPERATORS, STATES, after, call, case, near
from torch import Tensor

from rewriter.kernels.spec import REGISTRY, decompositions

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "additive": ("additive", {}),
    "additive_fixed": ("additive", {"decay": 1, "normalise": "none"}),
    "additive_step": ("additive", {"decay": 3}),
    "additive_feature": ("additive", {"decay": 4, "padding": "any"}),
    "bidirectional": ("additive", {"causal": False}),
    "delta": ("delta", {"padding": "any"}),
    "gated_delta": ("delta", {"decay": 3}),
    "hybrid": ("hybrid", {"decay": 1, "sinks": 1}),
    "hybrid_absolute": ("hybrid", {"anchor": "none", "block": "terrace", "window": 2}),
    "window": ("hybrid", {"q_map": None, "k_map": None, "map_scale": None, "with_state": False}),
}
WITH_STATE = [name for name, (_, options) in VARIANTS.items() if options.get("with_state", True)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """All operators are called through one code object of torch's, whose recompilations are limited."""
    torch._dynamo.reset()


def arguments(name: str, length: int = 5, *, state: bool = False, **options: Any) -> tuple[str, cases.Args]:
    """Arguments of a variant, from the start or in the middle of a sequence."""
    rule, own = VARIANTS[name]
    args = case(rule, length, 3, **{**own, "chunk": 2, **options})
    if state:
        before = case(rule, 7, 4, **{**own, "chunk": 2, **options})
        args = after(rule, args, call(rule, before))
    return rule, args


def trainable(args: cases.Args) -> list[Any]:
    return [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args.values()
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck(name: str) -> None:
    rule, args = arguments(name, dtype=torch.float32, state=name in WITH_STATE)
    torch.library.opcheck(OPERATORS[rule], trainable(args))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_all_inputs_and_of_the_states_that_are_returned(name: str) -> None:
    rule, args = arguments(name, 4, batch=1, state=name in WITH_STATE)

    def floating(*values: Any) -> tuple[Tensor, ...]:
        return tuple(r for r in OPERATORS[rule](*values) if r.requires_grad and r.numel())

    assert torch.autograd.gradcheck(floating, trainable(args), fast_mode=True)


@pytest.mark.parametrize("name", ["additive_feature", "gated_delta", "hybrid", "hybrid_absolute"])
def test_gradients_equal_those_of_the_recurrent_form(name: str) -> None:
    rule, args = arguments(name, 9)
    inputs = trainable(args)
    wanted = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
    outputs = (
        call(rule, dict(zip(args, inputs, strict=True)))[0],
        cases.forms(rule)["recurrent"](dict(zip(args, inputs, strict=True)))[0],
    )
    seed = torch.randn(outputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, want = (torch.autograd.grad(out, wanted, seed) for out in outputs)
    for a, b in zip(got, want, strict=True):
        near(a, b, 1e-10)


@pytest.mark.parametrize("name", ["additive_step", "delta", "hybrid"])
def test_vmap_over_activations_and_over_parameters(name: str) -> None:
    rule, args = arguments(name, batch=3)
    values = list(args.values())
    stacked = [torch.stack([a, a.flip(0)]) if i < 3 else a for i, a in enumerate(values)]
    dims = tuple(0 if i < 3 else None for i in range(len(values)))
    got = torch.vmap(OPERATORS[rule], in_dims=dims)(*stacked)
    want = [OPERATORS[rule](*[a[n] if i < 3 else a for i, a in enumerate(stacked)]) for n in range(2)]
    for result, parts in zip(got, zip(*want, strict=True), strict=True):
        near(result, torch.stack(parts))
    if rule == "hybrid":
        gates = torch.stack([args["gate"], 2 * args["gate"]], dim=1)
        out = torch.vmap(lambda gate: call(rule, args | {"gate": gate}), in_dims=1)(gates)[0]
        near(out, torch.stack([call(rule, args | {"gate": g})[0] for g in gates.unbind(1)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["additive", "delta", "hybrid"])
def test_outputs_take_the_dtype_of_q_and_states_are_wide(name: str, dtype: torch.dtype) -> None:
    rule, args = arguments(name, dtype=dtype)
    values = list(args.values())
    real = OPERATORS[rule](*values)
    compiled = torch.compile(OPERATORS[rule], backend="aot_eager", fullgraph=True)(*values)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPERATORS[rule](*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in values))
    for results in zip(real, fake, compiled, strict=True):
        assert len({(r.dtype, r.shape, r.stride()) for r in results}) == 1
    assert real[0].dtype is dtype
    assert real[-1].dtype is torch.promote_types(dtype, torch.float32)


def test_features_may_be_wider_than_the_activations() -> None:
    rule, args = arguments("hybrid", dtype=torch.float32)
    narrow = args | {n: args[n].bfloat16() for n in ("q", "k", "v")}
    results = call(rule, narrow | {"q_map": 1e30 * args["q_map"], "k_map": 1e-30 * args["k_map"]})
    want = call(rule, narrow)
    assert results[0].dtype is torch.bfloat16 and results[3].dtype is torch.float32
    torch.testing.assert_close(results[0], want[0])


@pytest.mark.parametrize("name", ["additive", "delta", "hybrid"])
def test_autocast_in_eager_fake_and_compiled_execution(name: str) -> None:
    rule, args = arguments(name, dtype=torch.float32)
    values, cast = list(args.values()), () if rule == "additive" else ("q", "k", "v")
    by_hand = call(rule, args | {n: args[n].bfloat16() for n in cast})
    compiled = torch.compile(OPERATORS[rule], backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real, through_compile = OPERATORS[rule](*values), compiled(*values)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = OPERATORS[rule](*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in values))
    for results in zip(real, by_hand, through_compile, fake, strict=True):
        assert len({r.dtype for r in results}) == 1
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        torch.testing.assert_close(results[2], results[1])


@pytest.mark.parametrize("name", ["additive_feature", "delta", "hybrid"])
def test_one_compilation_serves_all_lengths_forward_and_backward(name: str) -> None:
    compilations = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        compilations.append(graph)
        return graph.forward

    rule, _ = arguments(name)
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=count)
    compiled = torch.compile(OPERATORS[rule], backend=backend, fullgraph=True, dynamic=True)
    for length in (6, 9, 23):
        inputs = trainable(arguments(name, length)[1])
        got = torch.autograd.grad(compiled(*inputs)[0].sum(), inputs[:3])
        want = torch.autograd.grad(OPERATORS[rule](*inputs)[0].sum(), inputs[:3])
        for a, b in zip(got, want, strict=True):
            near(a, b)
    assert len(compilations) == 2  # forward and backward


@pytest.mark.parametrize(
    "name",
    [
        "additive_feature",
        pytest.param("gated_delta", marks=pytest.mark.slow),
        pytest.param("hybrid", marks=pytest.mark.slow),
    ],
)
def test_the_decomposition_is_aten_for_every_length(name: str) -> None:
    rule, args = arguments(name, 6, chunk=4)
    free = [n for n, a in args.items() if isinstance(a, Tensor) and a.dim() >= 2]

    class Site(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return call(rule, args | dict(zip(free, tensors, strict=True)))

    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", max=4096)
    dynamic = tuple({0: batch, 1 if n == "keep" else 2: time} for n in free)
    exported = torch.export.export(
        Site(), tuple(args[n] for n in free), dynamic_shapes=(dynamic,), strict=False
    ).run_decompositions(decompositions())
    calls = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert calls and all(str(t).startswith(("aten", "<built-in", "<function sym_")) for t in calls), calls
    for length in (2, 3, 4, 5, 17):
        other = arguments(name, length, chunk=4, batch=3)[1]
        other = args | {n: other[n] for n in free}
        results = exported.module()(*(other[n] for n in free))
        for a, b in zip(results, call(rule, other), strict=True):
            near(a, b)


def test_the_cost_of_a_step_does_not_depend_on_what_was_read_before() -> None:
    for name in ("additive_step", "gated_delta", "hybrid"):
        rule, args = arguments(name, 1, state=True)
        step = REGISTRY[OPERATORS[rule]].cost(*args.values())
        assert step == REGISTRY[OPERATORS[rule]].cost(*arguments(name, 1, state=True)[1].values())
        long = [REGISTRY[OPERATORS[rule]].cost(*arguments(name, n, chunk=8)[1].values()).flops for n in (64, 128, 256)]
        assert long[2] - long[1] == 2 * (long[1] - long[0]) > 0  # linear in the length
        assert 0 < step.flops < long[0] and step.bytes_read > 0 and step.bytes_written > 0


def test_cost_counts_states_and_activations() -> None:
    _, args = arguments("additive", 8, dtype=torch.float32, chunk=4)
    cost = REGISTRY[OPERATORS["additive"]].cost(*args.values())
    b, h, hk, f, dv = cases.B, cases.H, cases.HK, cases.F, cases.DV
    assert cost.bytes_read == 4 * 8 * b * (h * f + hk * f + hk * dv)
    assert cost.bytes_written == 4 * b * (8 * h * dv + hk * f * (dv + 1))
    assert cost.flops == 2 * b * 8 * ((h + hk) * f * (dv + 1) + h * 4 * (f + dv + 1))


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "three_dims": ("additive", {"q": torch.zeros(2, 4, 3)}, r"q must be \[batch, heads"),
    "integers": ("additive", {"q": torch.zeros(2, 4, 5, 3, dtype=torch.int64)}, "q must be floating"),
    "features": ("additive", {"q": torch.zeros(2, 4, 5, 2)}, "k has features 3, expected 2"),
    "heads": ("additive", {"q": torch.zeros(2, 3, 5, 3)}, "2 states cannot be shared by 3 heads"),
    "lengths": ("additive", {"q": torch.zeros(2, 4, 6, 3)}, "k has length 5, expected 6"),
    "two_way_decay": ("additive", {"causal": False, "log_decay": torch.zeros(4)}, "log_decay needs causal"),
    "decay": ("additive", {"log_decay": torch.zeros(2, 2)}, "log_decay must be"),
    "decay_by_feature": ("delta", {"log_decay": torch.zeros(2, 2, 5, 3)}, r"log_decay must be \[heads\] or"),
    "keep": ("delta", {"keep": torch.ones(2, 5)}, "keep must be bool"),
    "half_a_state": ("additive", {"state": torch.zeros(2, 2, 3, 2)}, "state and normaliser come together"),
    "state": ("delta", {"state": torch.zeros(2, 2, 3, 3)}, "state must be"),
    "normalise": ("additive", {"normalise": "mean"}, "normalise must be one of sum, none, not 'mean'"),
    "chunk": ("delta", {"chunk": 0}, "chunk must be at least 1"),
    "beta": ("delta", {"beta": torch.zeros(2, 2, 5, 1)}, "beta must be"),
    "one_map": ("hybrid", {"q_map": None}, "q_map and k_map come together"),
    "scale_of_nothing": ("hybrid", {"q_map": None, "k_map": None}, "map_scale and log_decay need q_map"),
    "gate": ("hybrid", {"gate": torch.ones(2)}, "gate must be"),
    "block": ("hybrid", {"block": "round"}, "block must be one of sliding, terrace, not 'round'"),
    "anchor": ("hybrid", {"anchor": "min"}, "anchor must be one of max, none"),
    "window": ("hybrid", {"window": 0}, "window must be at least 1"),
    "sinks": ("hybrid", {"sinks": -1}, "sinks must not be negative"),
    "some_caches": ("hybrid", {"past_k": torch.zeros(2, 2, 2, 4)}, "come together"),
    "gated_hybrid": ("hybrid", {"log_decay": torch.zeros(2, 4, 5)}, r"log_decay must be \[heads\]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_arguments_are_refused_the_same_way_real_and_fake(name: str) -> None:
    variant, bad, message = BROKEN[name]
    rule, args = arguments(variant, dtype=torch.float32)
    values = list((args | bad).values())
    with pytest.raises(ValueError, match=message):
        OPERATORS[rule](*values)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        OPERATORS[rule](*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in values))


def test_caches_of_another_window_are_refused() -> None:
    rule, args = arguments("hybrid", state=True)
    with pytest.raises(ValueError, match="past_k must be"):
        call(rule, args | {"window": 4})


@pytest.mark.parametrize("rule", cases.RULES)
def test_a_piece_without_tokens_hands_on_what_it_got(rule: str) -> None:
    results = call(rule, case(rule, 5))
    nothing = call(rule, after(rule, case(rule, 0), results))
    assert nothing[0].shape == (cases.B, cases.H, 0, cases.DV)
    assert all(torch.equal(a, b) for a, b in zip(nothing[1:], results[1:], strict=True))
    assert len(nothing) == 1 + len(STATES[rule])
