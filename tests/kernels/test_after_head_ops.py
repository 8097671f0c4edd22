# SPDX-License-Identifier: Apache-2.0
"""The operators after a head as torch operators: opcheck, gradients, vmap, dtypes, refusals, cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.kernels.after_head import op, reference
from rewriter.kernels.spec import REGISTRY, decompositions
from rewriter.kernels.vq_logits import codec

V, D, K = 13, 6, 5
OPS = {
    "log_softmax": op.vq_tiers_log_softmax,
    "softmax": op.vq_tiers_softmax,
    "cross_entropy": op.vq_tiers_cross_entropy,
    "soft": op.vq_tiers_soft_cross_entropy,
    "topk": op.vq_tiers_topk,
    "linear_logsumexp": op.linear_logsumexp,
    "linear_topk": op.linear_topk,
}
LOSSES = ("cross_entropy", "soft", "linear_logsumexp")
VARIANTS = [*OPS, "cross_entropy_plain", "soft_plain", "topk_all"]  # without bias, weights and smoothing; k near V


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one ragged. All operators are called through one code object of torch's, whose
    recompilations are limited."""
    torch._dynamo.reset()
    monkeypatch.setattr(reference, "CHUNK", 5)


def arguments(variant: str, *, dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (2, 3)) -> list[Any]:
    """Small inputs; code 4 of the tiers is used by no token."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    name, plain = variant.removesuffix("_plain").removesuffix("_all"), variant.endswith("_plain")
    h, bias = normal(*lead, D), None if plain else normal(V)
    if name.startswith("linear"):
        return [h, normal(V, D), bias, *([3] if name == "linear_topk" else [])]
    code_of = codec.pack_codes(torch.randint(0, K - 1, (V,), generator=g), K)
    head = [h, normal(K, D), code_of, bias]
    weight = None if plain else torch.rand(V, generator=g, dtype=torch.float64).to(dtype)
    smoothing = 0.0 if plain else 0.1
    if name == "cross_entropy":
        target = torch.randint(0, V, lead, generator=g)
        if target.numel():
            target.view(-1)[0] = 3
        return [*head, target, weight, smoothing, 3]
    if name == "soft":
        return [*head, torch.softmax(normal(*lead, V).float(), -1).to(dtype), weight, smoothing]
    return [*head, *([11 if variant == "topk_all" else 2] if name == "topk" else [])]


def op_of(variant: str) -> Any:
    return OPS[variant.removesuffix("_plain").removesuffix("_all")]


def first(variant: str) -> Callable[..., Tensor]:
    """The operator's differentiable result."""
    function = op_of(variant)
    return (lambda *args: function(*args)[0]) if "topk" in variant else function


def learnt(args: list[Any]) -> list[Tensor]:
    """h, parameters of the head, and probabilities as targets; class weights have no gradient."""
    return [a for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and i != 5]


def trainable(args: list[Any]) -> list[Any]:
    for tensor in learnt(args):
        tensor.requires_grad_()
    return args


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str) -> None:
    torch.library.opcheck(op_of(variant), tuple(trainable(arguments(variant))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_first_and_second_order(variant: str) -> None:
    args = trainable(arguments(variant, dtype=torch.float64))
    assert torch.autograd.gradcheck(first(variant), args)
    assert torch.autograd.gradgradcheck(first(variant), args)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_the_reference(variant: str) -> None:
    args = trainable(arguments(variant, dtype=torch.float64))
    by_torch = REGISTRY[op_of(variant)].reference(*args)
    by_torch = by_torch[0] if "topk" in variant else by_torch
    seed = torch.randn_like(by_torch)
    got = torch.autograd.grad(first(variant)(*args), learnt(args), seed)
    want = torch.autograd.grad(by_torch, learnt(args), seed)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (1,), (0, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_any_leading_dimensions(name: str, lead: tuple[int, ...]) -> None:
    args = arguments(name, lead=lead)
    out = first(name)(*args)
    last = (args[-1],) if "topk" in name else () if name in LOSSES else (V,)
    assert out.shape == (*lead, *last) and out.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_hidden_states_need_not_be_contiguous(name: str) -> None:
    args = arguments(name, lead=(3, 2))
    want = first(name)(*args)
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not args[0].is_contiguous()
    out = first(name)(*args)
    assert out.is_contiguous()  # as the fake kernel says
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("name", OPS)
def test_vmap_over_hidden_states(name: str) -> None:
    args = arguments(name, lead=(4, 3))
    dims = tuple(0 if i == 0 or (i == 4 and isinstance(a, Tensor)) else None for i, a in enumerate(args))
    torch.testing.assert_close(torch.vmap(op_of(name), in_dims=dims)(*args), op_of(name)(*args))


@pytest.mark.parametrize("name", OPS)
def test_vmap_over_heads(name: str) -> None:
    args = arguments(name, lead=(3,))
    books = torch.stack([args[1], 2 * args[1]], dim=1)
    out = torch.vmap(first(name), in_dims=(None, 1, *(None,) * (len(args) - 2)))(args[0], books, *args[2:])
    want = torch.stack([first(name)(args[0], b, *args[2:]) for b in (args[1], 2 * args[1])])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("weights", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_dtype_of_the_output_follows_the_hidden_states(name: str, hidden: torch.dtype, weights: torch.dtype) -> None:
    args = arguments(name, dtype=weights)
    args[0] = args[0].to(hidden)
    want = hidden if "topk" in name else torch.promote_types(hidden, torch.float32)
    real = first(name)(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = first(name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert real.dtype == fake.dtype == want
    assert real.shape == fake.shape and real.stride() == fake.stride()


@pytest.mark.parametrize("name", OPS)
def test_autocast_in_eager_fake_and_compiled_execution(name: str) -> None:
    args = arguments(name)
    want = torch.bfloat16 if "topk" in name else torch.float32
    by_hand = first(name)(args[0].bfloat16(), *args[1:])
    compiled = torch.compile(first(name), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real, through_compile = first(name)(*args), compiled(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = first(name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert real.dtype == fake.dtype == through_compile.dtype == by_hand.dtype == want
    assert torch.equal(real, by_hand)
    torch.testing.assert_close(through_compile, by_hand)


@pytest.mark.parametrize("name", OPS)
def test_training_under_autocast_gives_gradients_in_the_parameters_dtype(name: str) -> None:
    args = trainable(arguments(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first(name)(*args).float().square().mean().backward()
    for tensor in learnt(args):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_compiled_with_dynamic_shapes_forward_and_backward(name: str) -> None:
    compiled = torch.compile(first(name), backend="aot_eager", fullgraph=True, dynamic=True)
    for lead in ((2, 3), (4, 7)):
        args = trainable(arguments(name, lead=lead))
        want = torch.autograd.grad(first(name)(*args).square().sum(), learnt(args))
        got = torch.autograd.grad(compiled(*args).square().sum(), learnt(args))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decomposition_leaves_aten_only(variant: str) -> None:
    class Head(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return op_of(variant)(*args)

    args = tuple(arguments(variant))
    batch = torch.export.Dim("batch")
    dynamic = [{0: batch} if i == 0 or (i == 4 and isinstance(a, Tensor)) else None for i, a in enumerate(args)]
    exported = torch.export.export(Head(), args, dynamic_shapes=(tuple(dynamic),), strict=False)
    exported = exported.run_decompositions(decompositions())
    calls = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert calls and all(str(t).startswith(("aten", "<built-in", "<function sym_")) for t in calls), calls
    wider = tuple(arguments(variant, lead=(5, 3)))
    torch.testing.assert_close(exported.module()(*wider), op_of(variant)(*wider))


BROKEN: dict[str, tuple[str, int, Any, str]] = {
    "narrow_codebook": ("softmax", 1, torch.zeros(K, D - 1), "width"),
    "codebook_dims": ("topk", 1, torch.zeros(K, D, 1), r"\[K, d\]"),
    "wide_codes": ("log_softmax", 2, torch.zeros(V, 1, dtype=torch.int64), "uint8"),
    "four_bytes": ("soft", 2, torch.zeros(V, 4, dtype=torch.uint8), "1 to 3 bytes"),
    "short_bias": ("cross_entropy", 3, torch.zeros(V - 1), "one per token"),
    "short_weight": ("cross_entropy", 5, torch.zeros(V - 1), "weight must be"),
    "smoothing": ("cross_entropy", 6, 1.5, "label_smoothing"),
    "integer_hidden": ("softmax", 0, torch.zeros(2, D, dtype=torch.int64), "floating"),
    "target_shape": ("cross_entropy", 4, torch.zeros(2, dtype=torch.int64), "target must be"),
    "target_dtype": ("cross_entropy", 4, torch.zeros(2, 3, dtype=torch.int32), "int64"),
    "narrow_probabilities": ("soft", 4, torch.zeros(2, 3, V - 1), "target must be"),
    "integer_probabilities": ("soft", 4, torch.zeros(2, 3, V, dtype=torch.int64), "floating"),
    "no_k": ("topk", 4, 0, "k must lie"),
    "large_k": ("linear_topk", 3, V + 1, "k must lie"),
    "narrow_weight": ("linear_logsumexp", 1, torch.zeros(V, D - 1), "width"),
    "weight_dims": ("linear_topk", 1, torch.zeros(V), r"\[V, d\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_arguments_are_refused_the_same_way_real_and_fake(case: str) -> None:
    name, position, bad, message = BROKEN[case]
    args = arguments(name)
    args[position] = bad
    with pytest.raises(RuntimeError, match=message):
        op_of(name)(*args)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        op_of(name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


@pytest.mark.parametrize("bad", [V, -1], ids=["above", "below"])
def test_a_target_outside_the_vocabulary_is_an_error(bad: int) -> None:
    args = arguments("cross_entropy")
    args[4][1, 1] = bad
    with pytest.raises((IndexError, RuntimeError)):
        op.vq_tiers_cross_entropy(*args)


def test_half_precision_losses_are_summed_in_float32() -> None:
    # 4096 equal logits: log Z = log 4096; a sum of 4096 ones in bf16 would stop at 256.
    h, weight = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(4096, 8)
    torch.testing.assert_close(op.linear_logsumexp(h, weight, None), torch.full((1,), 4096.0).log())
    code_of = torch.zeros(4096, 1, dtype=torch.uint8)
    out = op.vq_tiers_log_softmax(h, torch.zeros(1, 8), code_of, None)
    torch.testing.assert_close(out, torch.full((1, 4096), -4096.0).abs().log().neg())


def test_cost_of_the_loss_does_not_grow_with_positions_times_vocabulary() -> None:
    cost = REGISTRY[op.vq_tiers_cross_entropy].cost
    one, two = (cost(*arguments("cross_entropy_plain", lead=(n,))) for n in (1, 2))
    assert two.flops - one.flops == 2 * D * K + 4 * K + 2
    assert two.bytes_written == 2 * one.bytes_written == 8
    assert two.bytes_read - one.bytes_read == 4 * D + 8


def test_cost_of_topk_counts_candidates() -> None:
    cost = REGISTRY[op.vq_tiers_topk].cost(*arguments("topk", lead=(1,)))
    assert cost.flops == 2 * K * D + K + 2 * 2
    assert cost.bytes_written == 2 * (4 + 8)
    assert REGISTRY[op.vq_tiers_topk].cost(*arguments("topk_all", lead=(1,))).flops == 2 * K * D + K + V


def test_cost_of_rows_reads_every_row_once() -> None:
    for name in ("linear_logsumexp", "linear_topk"):
        cost = REGISTRY[OPS[name]].cost(*arguments(name, lead=(3,)))
        assert cost.bytes_read == 4 * (3 * D + V * D + V)
        assert 2 * 3 * V * D < cost.flops <= 2 * 3 * V * D + 4 * 3 * V


def test_cost_of_softmax_writes_a_row_per_position() -> None:
    for name in ("softmax", "log_softmax"):
        cost = REGISTRY[OPS[name]].cost(*arguments(name, lead=(3,)))
        assert cost.bytes_written == 4 * 3 * V and cost.flops < 2 * 3 * V * D
