# SPDX-License-Identifier: Apache-2.0
"""`linear_cross_entropy`: equal to linear and cross_entropy, as a torch operator, and without their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.kernels.cross_entropy import blocked
from rewriter.kernels.cross_entropy.op import linear_cross_entropy
from rewriter.kernels.spec import REGISTRY, decompositions

V, D = 11, 5
IGNORED = -100
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "smoothed": {"bias": True, "smoothing": 0.2},
    "weighted": {"weighted": True},
    "weighted_smoothed": {"weighted": True, "smoothing": 0.3, "bias": True},
    "capped": {"softcap": 1.5, "bias": True, "smoothing": 0.1},
}


def arguments(
    *,
    bias: bool = False,
    weighted: bool = False,
    smoothing: float = 0.0,
    softcap: float | None = None,
    lead: tuple[int, ...] = (2, 3),
    chunk: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Any]:
    """Small inputs; the last chunk of classes is ragged, and the first target is ignored."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x, weight = drawn(*lead, D), drawn(V, D)
    target = torch.randint(0, V, lead, generator=g)
    if target.numel():
        target.view(-1)[0] = IGNORED
    offsets, weights = drawn(V) if bias else None, drawn(V).abs() + 0.1 if weighted else None
    return [x, weight, offsets, target, weights, IGNORED, smoothing, softcap, chunk]


def eager(args: list[Any], reduction: str = "none") -> Tensor:
    """What is replaced: logits, then the loss of torch."""
    x, weight, bias, target, weights, ignored, smoothing, softcap, _ = args
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).flatten(0, -2)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wide = logits.to(torch.promote_types(x.dtype, torch.float32))
    weights = None if weights is None else weights.to(wide.dtype)
    loss = F.cross_entropy(wide, target.flatten(), weights, None, ignored, None, reduction, smoothing)
    return loss.reshape(target.shape) if reduction == "none" else loss


def trainable(args: list[Any]) -> list[Any]:
    return [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def floating(args: list[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("case", CASES)
def test_equals_linear_and_cross_entropy(case: str, chunk: int) -> None:
    args = trainable(arguments(**CASES[case], dtype=torch.float64, chunk=chunk))
    args[4] = None if args[4] is None else args[4].detach()  # torch has no gradient for class weights
    loss, log_z = linear_cross_entropy(*args)
    torch.testing.assert_close(loss, eager(args), rtol=1e-13, atol=1e-13)
    logits = F.linear(args[0], args[1], args[2])
    logits = logits if args[7] is None else args[7] * torch.tanh(logits / args[7])
    torch.testing.assert_close(log_z, torch.logsumexp(logits, -1), rtol=1e-13, atol=1e-13)
    wrt = [a for a in floating(args) if a.requires_grad]
    seed = torch.randn_like(loss)
    for mine, its in zip(
        torch.autograd.grad(loss, wrt, seed), torch.autograd.grad(eager(args), wrt, seed), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(1, 40),
    width=st.integers(1, 6),
    rows=st.integers(1, 5),
    chunk=st.integers(1, 50),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_any_sizes_and_scales(
    classes: int, width: int, rows: int, chunk: int, smoothing: float, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=g, dtype=torch.float64)
    args = [x, weight, None, torch.randint(0, classes, (rows,), generator=g), None, IGNORED, smoothing, None, chunk]
    torch.testing.assert_close(linear_cross_entropy(*args)[0], eager(args), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_low_precision_loses_no_more_than_eager(case: str, dtype: torch.dtype) -> None:
    args = arguments(**CASES[case], lead=(64,), dtype=dtype, seed=3)
    golden = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    trainable(args[:2])
    trainable(golden[:2])
    wanted = _loss_and_gradients(eager(golden), golden)
    before = _loss_and_gradients(eager(args), args)
    after = _loss_and_gradients(linear_cross_entropy(*args)[0], args)
    for want, old, new in zip(wanted, before, after, strict=True):
        one = torch.finfo(new.dtype).eps * float(want.abs().max())
        assert float((new.double() - want).abs().max()) <= 2 * float((old.double() - want).abs().max()) + one


def _loss_and_gradients(loss: Tensor, args: list[Any]) -> list[Tensor]:
    seed = torch.linspace(-1, 1, loss.numel(), dtype=torch.float64).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, [args[0], args[1]], seed)]


def test_a_certain_prediction_has_no_negative_loss() -> None:
    """Numerator and log Z come from the same rounded logits, so they cancel where p(y) = 1."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 64, generator=g).bfloat16()
    weight = torch.cat((8 * x.float(), torch.zeros(50, 64))).bfloat16()
    loss, _ = linear_cross_entropy(x, weight, None, torch.arange(50), None, IGNORED, 0.0, None, 32)
    assert float(loss.min()) >= 0.0 and float(loss.max()) < 1e-6


def test_no_tensor_has_a_row_of_all_classes_per_position() -> None:
    """1000 positions × 3000 classes: nothing of more than a chunk of their product is ever made."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, value.numel() if isinstance(value, Tensor) else 0)
            return out

    x, weight = torch.randn(1000, 4, requires_grad=True), torch.randn(3000, 4, requires_grad=True)
    target = torch.arange(1000)
    with Watch():
        loss, _ = REGISTRY[linear_cross_entropy].reference(x, weight, None, target, None, IGNORED, 0.1, None, 64)
    assert 64_000 <= largest < 70_000
    largest = 0
    loss, _ = linear_cross_entropy(x, weight, None, target, None, IGNORED, 0.1, None, 64)
    with Watch():
        torch.autograd.grad(loss.sum(), (x, weight), create_graph=True)
    assert 64_000 <= largest < 70_000
    largest = 0
    args = (x.detach(), weight.detach(), None, target, None, IGNORED, 0.1, None, 64)
    with Watch():
        loss, log_z = blocked.linear_cross_entropy(*args)
        blocked.linear_cross_entropy_backward(loss, loss, *args[:5], log_z, *args[5:], [True, True, False, False])
    assert 64_000 <= largest < 70_000


# ----------------------------------------------------------------------------------------------------- operator


@pytest.mark.parametrize("case", ["plain", "weighted_smoothed", "capped"])
def test_opcheck(case: str) -> None:
    torch.library.opcheck(linear_cross_entropy, tuple(trainable(arguments(**CASES[case]))))


@pytest.mark.parametrize("case", ["weighted_smoothed", "capped"])
def test_gradients_of_first_and_second_order(case: str) -> None:
    args = trainable(arguments(**CASES[case], lead=(3,), chunk=6, dtype=torch.float64))
    assert torch.autograd.gradcheck(linear_cross_entropy, args)
    assert torch.autograd.gradgradcheck(linear_cross_entropy, args)


@pytest.mark.parametrize("lead", [(), (1,), (0, 3), (2, 1, 2)], ids=str)
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    loss, log_z = linear_cross_entropy(*arguments(lead=lead, bias=True))
    assert loss.shape == log_z.shape == lead and loss.isfinite().all()


def test_inputs_need_not_be_contiguous() -> None:
    args = arguments(lead=(3, 2), smoothing=0.1)
    want = linear_cross_entropy(*args)
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    args[3] = args[3].t().contiguous().t()
    got = linear_cross_entropy(*args)
    assert all(t.is_contiguous() for t in got)  # as the fake kernel says
    torch.testing.assert_close(got, want)


def test_vmap_over_inputs_and_over_heads() -> None:
    args = arguments(lead=(4, 3), bias=True, smoothing=0.1)
    options = (None,) * 5
    over_inputs = torch.vmap(linear_cross_entropy, in_dims=(0, None, None, 0, *options))(*args)
    torch.testing.assert_close(over_inputs, linear_cross_entropy(*args))
    shared = [*args[:3], args[3][0], *args[4:]]  # one target for all
    got = torch.vmap(linear_cross_entropy, in_dims=(0, None, None, None, *options))(*shared)
    want = [linear_cross_entropy(x, *shared[1:])[0] for x in args[0]]
    torch.testing.assert_close(got[0], torch.stack(want))
    heads = torch.stack((args[1], 2 * args[1]), 1)
    got = torch.vmap(linear_cross_entropy, in_dims=(None, 1, None, None, *options))(args[0], heads, *args[2:])
    want = [linear_cross_entropy(args[0], w, *args[2:])[0] for w in (args[1], 2 * args[1])]
    torch.testing.assert_close(got[0], torch.stack(want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_follows_the_activations(dtype: torch.dtype) -> None:
    args = arguments(bias=True)
    args[0] = args[0].to(dtype)
    real = linear_cross_entropy(*args)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = linear_cross_entropy(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    for a, b, c in zip(real, compiled, fake, strict=True):
        assert a.dtype == b.dtype == c.dtype == torch.promote_types(dtype, torch.float32)
        assert a.shape == b.shape == c.shape and a.stride() == c.stride()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_in_eager_fake_and_compiled_execution(autocast: torch.dtype) -> None:
    args = trainable(arguments(bias=True))
    by_hand = linear_cross_entropy(args[0].to(autocast), *args[1:])[0]
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=autocast):
        real, through_compile = linear_cross_entropy(*args)[0], compiled(*args)[0]
        with torch._subclasses.FakeTensorMode() as mode:
            fake = linear_cross_entropy(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))[0]
    assert real.dtype == fake.dtype == through_compile.dtype == torch.float32
    assert torch.equal(real, by_hand)
    torch.testing.assert_close(through_compile, by_hand)
    real.mean().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in args[:3])


def test_decomposition_leaves_aten_only() -> None:
    class Head(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return linear_cross_entropy(x, weight, None, target, None, IGNORED, 0.1, 2.0, 4)[0]

    def inputs(lead: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        args = arguments(lead=lead)
        return args[0], args[1], args[3]

    batch = torch.export.Dim("batch")
    exported = torch.export.export(Head(), inputs((2, 3)), dynamic_shapes=({0: batch}, None, {0: batch}), strict=False)
    exported = exported.run_decompositions(decompositions())
    calls = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert calls and all(str(t).startswith(("aten", "<built-in", "<function sym_")) for t in calls), calls
    torch.testing.assert_close(exported.module()(*inputs((5, 3))), Head()(*inputs((5, 3))))


BROKEN: dict[str, tuple[int, Any, str]] = {
    "narrow_weight": (1, torch.zeros(V, D - 1), "width"),
    "short_bias": (2, torch.zeros(V - 1), "one per token"),
    "target_shape": (3, torch.zeros(2, dtype=torch.int64), "target must be"),
    "target_dtype": (3, torch.zeros(2, 3, dtype=torch.int32), "int64"),
    "short_class_weight": (4, torch.zeros(V - 1), "class_weight"),
    "smoothing": (6, 1.5, "label_smoothing"),
    "softcap": (7, 0.0, "softcap"),
    "chunk": (8, 0, "chunk"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_arguments_are_refused_the_same_way_real_and_fake(case: str) -> None:
    position, bad, message = BROKEN[case]
    args = arguments()
    args[position] = bad
    with pytest.raises(RuntimeError, match=message):
        linear_cross_entropy(*args)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        linear_cross_entropy(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


@pytest.mark.parametrize("outside", [V, -1])
def test_a_target_outside_the_classes_is_an_error(outside: int) -> None:
    args = arguments()
    args[3][1, 1] = outside
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(*args)


def test_cost() -> None:
    cost = REGISTRY[linear_cross_entropy].cost(*arguments(lead=(3,), bias=True))
    assert cost.flops == 3 * (2 * V * D + 4 * V)
    assert cost.bytes_read == 4 * (3 * D + V * D + V) + 8 * 3 and cost.bytes_written == 2 * 3 * 4
