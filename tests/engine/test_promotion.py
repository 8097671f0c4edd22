# SPDX-License-Identifier: Apache-2.0
"""Promotion: every floating value becomes float64, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from rewriter.promotion import duplicate, promote, read_tensors

from .helpers import by_target, capture_graph, trace
from .small_models import KINDS, small_model

aten = torch.ops.aten


def double(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def relative(value: Tensor, golden: Tensor) -> float:
    return float(((value - golden).abs().max() / golden.abs().max()).detach())


class Mixed(nn.Module):
    """A value of every kind that keeps ``.double()`` at float32 accuracy, one at a time by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.linspace(0.1, 0.7, 4))
        self.register_buffer("codes", torch.arange(4, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.linear(x), -1, dtype=torch.float32) + self.table.to(torch.float32)
        x = x + torch.arange(4, device=x.device) / 3 + torch.tensor([0.1, 0.2, 0.3, 0.4])
        x = x + torch.where(self.codes > 1, 0.1, 0.7) + self.codes * 0.1
        return x + torch.full((4,), 0.1) + torch.linspace(0, 1, 4)

    def exact(self, x: Tensor) -> Tensor:
        """The same function written in float64 by hand."""
        d = torch.float64
        x = torch.softmax(x.double() @ self.linear.weight.double().T + self.linear.bias.double(), -1)
        x = x + self.table.double() + torch.arange(4, dtype=d) / 3
        x = x + torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
        x = x + torch.where(self.codes > 1, torch.tensor(0.1, dtype=d), torch.tensor(0.7, dtype=d))
        x = x + self.codes.double() * 0.1
        return x + torch.full((4,), 0.1, dtype=d) + torch.linspace(0, 1, 4, dtype=d)


@pytest.mark.parametrize("kind", KINDS)
def test_promoted_eager_and_sdpa_attention_agree_to_float64_rounding(kind: str) -> None:
    eager, inputs = small_model(kind, "eager")
    sdpa, _ = small_model(kind, "sdpa")
    sdpa.load_state_dict(eager.state_dict())
    flat = double(tuple(v for v in inputs.values() if isinstance(v, Tensor)))
    runs = [promote(capture_graph(m, (), inputs))(*flat)[0] for m in (eager, sdpa)]
    assert runs[0].dtype == runs[1].dtype == torch.float64
    assert relative(runs[1], runs[0]) < 64 * torch.finfo(torch.float64).eps  # rounding of a few layers


def test_literals_constants_and_default_dtypes_are_computed_in_float64() -> None:
    model, x = Mixed().eval(), torch.randn(3, 4)
    graph = capture_graph(model, (x,))
    golden = model.exact(x)
    assert relative(promote(graph)(x.double())[0], golden) < 1e-15
    assert relative(model(x), golden) > 1e-9  # so the line above tests something


def test_the_original_is_untouched_and_shares_nothing() -> None:
    model, x = Mixed().eval(), torch.randn(3, 4)
    graph = capture_graph(model, (x,))
    before, code = {k: v.clone() for k, v in read_tensors(graph)}, graph.code
    metas = [str(node.meta.get("val")) for node in graph.graph.nodes]
    for copied in (promote(graph), duplicate(graph)):
        with torch.no_grad():
            for _, tensor in read_tensors(copied):
                tensor.zero_()
    assert graph.code == code
    assert [str(node.meta.get("val")) for node in graph.graph.nodes] == metas
    for name, tensor in read_tensors(graph):
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name


def test_kinds_of_tensors_are_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.a.weight.requires_grad_(False)
            self.register_buffer("codes", torch.arange(4, dtype=torch.uint8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.codes)

    module = torch.export.export(Tied(), (torch.randn(2, 4),)).module(check_guards=False)
    tensors = dict(read_tensors(promote(module)))
    weights = [t for name, t in tensors.items() if name.endswith("weight")]
    assert all(w is weights[0] for w in weights)
    assert isinstance(weights[0], nn.Parameter) and not weights[0].requires_grad
    assert weights[0].dtype is torch.float64
    assert tensors["codes"].dtype is torch.uint8 and not isinstance(tensors["codes"], nn.Parameter)


def test_autocast_is_off_and_control_flow_bodies_are_promoted() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.linear(x)
            y = y.float()
            return torch.cond(y.sum() > 0, lambda t: t.float() / 3, lambda t: t.half().float() / 3, (y,))

    model, x = Regions().eval(), torch.randn(3, 4)
    graph = capture_graph(model, (x,))
    assert any(n.target is torch.ops.higher_order.wrap_with_autocast for n in graph.graph.nodes)
    branches = set()
    for shift in (-9, 9):
        moved = shift * model.linear.weight.sum(0).double() + x.double()
        value = promote(graph)(moved)[0]
        exact = (moved @ model.linear.weight.double().T + model.linear.bias.double()) / 3
        branches.add(bool(exact.sum() > 0))
        assert relative(value, exact) < 1e-15
    assert branches == {True, False}


def test_assertions_are_dropped() -> None:
    def function(x: Tensor) -> Tensor:
        torch._assert(x.shape[0] == 2, "two rows")
        return x.to(torch.float32) * 2

    module = torch.export.export(trace(function, torch.randn(2, 3)), (torch.randn(2, 3),), strict=False).module()
    assert any("_assert" in str(n.target) or n.target == "_guards_fn" for n in module.graph.nodes)
    promoted = promote(module)
    assert not any("assert" in str(n.target) or n.op == "call_module" for n in promoted.graph.nodes)
    assert promoted(torch.ones(2, 3, dtype=torch.float64))[0].dtype is torch.float64


def test_numbers_stay_what_they_are() -> None:
    lowest = torch.finfo(torch.float32).min
    graph = trace(lambda x: x.masked_fill(x > 0, lowest) + torch.full((2, 2), lowest), torch.randn(2, 2))
    value = promote(graph)(torch.ones(2, 2, dtype=torch.float64))[0]
    assert torch.equal(value, torch.full((2, 2), 2 * lowest, dtype=torch.float64))  # -6.8e38, not -inf


def test_bit_casts_read_the_programs_own_bits() -> None:
    def function(x: Tensor) -> Tensor:
        exponent = (x.view(torch.int32) >> 23) & 255
        return (exponent << 23).view(torch.float32) * 0.1  # the power of two below |x|

    x = torch.tensor([0.3, 5.0, -1000.0])
    graph = trace(function, x)
    promoted = promote(graph)
    expected = torch.tensor([0.25, 4.0, 512.0], dtype=torch.float64) * 0.1
    assert torch.equal(promoted(x.double())[0], expected)
    assert torch.equal(promote(promoted)(x.double())[0], expected)


def test_a_bit_cast_of_unknown_dtype_is_refused() -> None:
    graph = fx.Graph()
    cast = graph.call_function(aten.view.dtype, (graph.placeholder("x"), torch.int32))
    graph.output(cast)
    with pytest.raises(ValueError, match="bit cast"):
        promote(fx.GraphModule(nn.Module(), graph))


def test_hand_made_graphs_with_leaf_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    traced = fx.symbolic_trace(nn.Sequential(model, nn.Flatten()))
    x = torch.randn(3, 4)
    value = promote(traced)(x.double())
    exact = (x.double() @ model[0].weight.double().T + model[0].bias.double()).relu()
    assert relative(value, exact) < 1e-15
    assert model[0].weight.dtype is torch.float32


MASKS = st.sampled_from(["none", "causal", "bool", "bool with an empty row", "additive", "lowest"])


@given(MASKS, st.sampled_from([1, 2]), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_attention_is_its_definition(mask: str, group: int, seed: int) -> None:
    """Forward as the operator; gradients as mathematics, also for a row that sees no key."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, 5, 4, generator=g) for heads in (2 * group, 2, 2))
    seen = torch.rand(5, 5, generator=g) > 0.4
    seen[:, 0] = True
    if mask in ("bool with an empty row", "lowest"):
        seen[1] = False
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(5, 5).masked_fill(~seen, lowest)
    value = {"additive": torch.randn(5, 5, generator=g), "lowest": additive}
    bias = None if mask in ("none", "causal") else value.get(mask, seen)
    options = {"is_causal": mask == "causal", "scale": 0.3, "enable_gqa": group > 1}
    extra = () if bias is None else (bias,)
    attention = torch.nn.functional.scaled_dot_product_attention
    graph = promote(trace(lambda q, k, v, *m: attention(q, k, v, *m, **options), q, k, v, *extra))
    assert not by_target(graph, aten.scaled_dot_product_attention)
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    out = graph(*inputs, *(double(extra)))[0]
    exact = _attention(*inputs, bias, mask == "causal")
    assert torch.allclose(out, exact, rtol=0, atol=1e-14)
    c = torch.randn(out.shape, generator=g).double()
    for found, right in zip(*(torch.autograd.grad((o * c).sum(), inputs) for o in (out, exact)), strict=True):
        assert torch.allclose(found, right, rtol=0, atol=1e-13)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = 0.3 * q @ k.transpose(-1, -2)
    mask = torch.ones(5, 5).tril().bool() if causal else mask
    if mask is None:
        return torch.softmax(scores, -1) @ v
    if mask.dtype is not torch.bool:
        return torch.softmax(scores + mask.double(), -1) @ v
    weights = torch.where(mask, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-300) @ v


STEPS = {
    "to_f32": lambda x: x.to(torch.float32),
    "to_f16": lambda x: x.to(torch.float16),
    "softmax": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "third": lambda x: x + torch.arange(3) / 3,
    "where": lambda x: x + torch.where(torch.arange(3) > 1, 0.1, 0.2),
    "count": lambda x: x + torch.arange(3) * 0.1,
    "zeros": lambda x: x + torch.zeros(3),
    "rounded": lambda x: x + x.to(torch.int32),
    "bits": lambda x: x + x.float().view(torch.int32).view(torch.float32),
    "sdpa": lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
}


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_promoting_twice_is_promoting_once(steps: list[str], seed: int) -> None:
    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = STEPS[step](x)
        return x

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    once = promote(trace(function, x))
    again = promote(copy.deepcopy(once))
    assert again.code == once.code
    value = once(x.double())[0]
    assert value.dtype is torch.float64 and torch.equal(again(x.double())[0], value)


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=15)
def test_metadata_says_what_is_computed(steps: list[str]) -> None:
    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = STEPS[step](x)
        return x

    promoted = promote(trace(function, torch.randn(2, 3)))

    class Check(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor) and isinstance(n.meta.get("val"), Tensor):
                said = n.meta["val"]
                assert (value.dtype, value.shape) == (said.dtype, said.shape), n.format_node()
            return value

    Check(promoted).run(torch.randn(2, 3, dtype=torch.float64))


def test_grouped_products_are_promoted_to_their_definition() -> None:
    """The kernel of mixtures of experts takes 16-bit values only."""
    rows, weights = torch.rand(7, 16, dtype=torch.bfloat16), torch.rand(3, 16, 8, dtype=torch.bfloat16)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)  # the second group is empty
    module = trace(lambda a, b: aten._grouped_mm(a, b, ends), rows, weights)
    (golden,) = promote(module)(rows.double(), weights.double())
    expected = torch.cat((rows[:2].double() @ weights[0].double(), rows[2:].double() @ weights[2].double()))
    assert golden.dtype is torch.float64 and relative(golden, expected) < 1e-15
    (own,) = module(rows, weights)
    assert relative(own.double(), golden) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_implicit_epsilon_stays_that_of_its_dtype(dtype: torch.dtype) -> None:
    x = (torch.rand(2, 8) * 1e-4).to(dtype)  # small enough for the epsilon to matter
    module = trace(lambda a: torch.rms_norm(a, (8,)), x)
    (golden,) = promote(module)(x.double())
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    assert relative(golden, exact) < 1e-14
    (own,) = module(x)
    assert relative(own.double(), golden) < 1e-2
