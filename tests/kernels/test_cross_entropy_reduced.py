# SPDX-License-Identifier: Apache-2.0
"""`linear_cross_entropy_reduced`: equal to linear and a reduced cross entropy, with gradients made on the way there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.kernels.cross_entropy import reference, summed
from rewriter.kernels.cross_entropy.op import (
    linear_cross_entropy,
    linear_cross_entropy_reduced,
    linear_cross_entropy_sum,
)
from rewriter.kernels.spec import REGISTRY, decompositions

V, D = 11, 5
IGNORED = -100
REDUCTIONS = ("mean", "sum")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "ignored": False},
    "smoothed": {"bias": True, "smoothing": 0.2},
    "weighted_smoothed": {"weighted": True, "smoothing": 0.3, "bias": True},
    "capped": {"softcap": 1.5, "bias": True, "smoothing": 0.1},
}


def arguments(
    *,
    bias: bool = False,
    weighted: bool = False,
    smoothing: float = 0.0,
    softcap: float | None = None,
    ignored: bool = True,
    reduction: str = "mean",
    lead: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """x, weight and bias require gradients; the last chunk of classes is ragged."""
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    x, weight = drawn(*lead, D), drawn(V, D)
    target = torch.randint(0, V, lead, generator=g)
    if ignored and target.numel():
        target.view(-1)[0] = IGNORED
    class_weight = drawn(V).detach().abs() + 0.1 if weighted else None
    return [x, weight, drawn(V) if bias else None, target, class_weight, IGNORED, smoothing, softcap, reduction, 4]


def eager(args: list[Any]) -> Tensor:
    x, weight, bias, target, class_weight, ignored, smoothing, softcap, reduction, _ = args
    logits = F.linear(x, weight, bias).flatten(0, -2)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target.flatten(), class_weight, None, ignored, None, reduction, smoothing)


def inputs(args: list[Any]) -> list[Tensor]:
    return [a for a in args[:3] if a is not None]


class Calls(TorchDispatchMode):
    """The operators that run, and the largest tensor any of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []
        self.asked: list[list[bool]] = []  # of `linear_cross_entropy_sum`: which gradients
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append(func)
        if func is linear_cross_entropy_sum:
            self.asked.append(list(args[-1]))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, value.numel() if isinstance(value, Tensor) else 0)
        return out


# ----------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_linear_and_cross_entropy(case: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of two positions; the loss is scaled by what follows, as by a gradient scaler."""
    monkeypatch.setattr(reference, "_ROWS", 2)
    monkeypatch.setattr(reference, "_AT_ONCE", 0)
    args = arguments(**CASES[case], reduction=reduction)
    loss, wanted = linear_cross_entropy_reduced(*args), eager(args)
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=1e-13)
    found, right = (torch.autograd.grad(-3 * one, inputs(args)) for one in (loss, wanted))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy_reduced(*args), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lead", [(3,), (0,)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_where_nothing_counts_it_is_what_torch_says(reduction: str, lead: tuple[int, ...]) -> None:
    """The mean of no losses is NaN, and has gradients of zero."""
    args = arguments(reduction=reduction, lead=lead)
    args[3].fill_(IGNORED)
    loss, wanted = linear_cross_entropy_reduced(*args), eager(args)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    for grad in torch.autograd.grad(loss, inputs(args)):
        assert not grad.any()


def test_half_precision_gradients_are_rounded_once() -> None:
    """A mean over 4096 positions has gradients below the least number of float16; a scaler brings them back."""
    args = arguments(lead=(4096,), dtype=torch.float16, ignored=False)
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact[:2] = [a.detach().requires_grad_() for a in exact[:2]]
    scale = 2.0**14
    found = torch.autograd.grad(linear_cross_entropy_reduced(*args) * scale, args[:2])
    wanted = torch.autograd.grad(eager(exact) * scale, exact[:2])
    before = torch.autograd.grad(eager([*args[:8], "mean", 4]) * scale, args[:2])
    for new, old, right in zip(found, before, wanted, strict=True):
        assert new.dtype == torch.float16
        one = torch.finfo(torch.float16).eps * float(right.abs().max())
        assert float((new.double() - right).abs().max()) <= 2 * float((old.double() - right).abs().max()) + one


# ------------------------------------------------------------------------------------- what runs when


def test_gradients_are_computed_only_where_they_are_asked_for() -> None:
    args = arguments(bias=True)

    def asked() -> list[list[bool]]:
        with Calls() as calls:
            linear_cross_entropy_reduced(*args)
        return calls.asked

    assert asked() == [[True, True, True]]
    with torch.no_grad():
        assert asked() == [[False, False, False]]
        found = linear_cross_entropy_sum(*args[:8], args[9], [False] * 3)
    assert [one.numel() for one in found] == [1, 0, 0, 0]
    args[:3] = [a.detach() for a in args[:3]]
    assert asked() == [[False, False, False]]
    args[1].requires_grad_()  # of the weight alone
    loss = linear_cross_entropy_reduced(*args)
    assert loss.grad_fn is not None
    with torch.no_grad():
        found = summed.linear_cross_entropy_sum(*args[:8], args[9], [False, True, False])
    assert [one.numel() for one in found] == [1, 0, V * D, 0]
    args[4] = torch.ones(V, dtype=torch.float64, requires_grad=True)  # class weights have no place in the sum
    assert asked() == []
    torch.testing.assert_close(torch.autograd.grad(linear_cross_entropy_reduced(*args), args[1])[0],
                               torch.autograd.grad(loss, args[1])[0])  # fmt: skip


def test_ignored_positions_are_left_out() -> None:
    args = arguments(lead=(6,))
    args[3][2:] = IGNORED
    with torch.no_grad(), Calls() as calls:
        _, to_x, _, _ = summed.linear_cross_entropy_sum(*args[:8], args[9], [True, True, False])
    assert calls.largest == V * D  # of one or two positions there are fewer logits
    assert to_x[2:].eq(0).all() and to_x[:1].ne(0).any() == (args[3][0] != IGNORED)


def test_no_more_logits_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 positions × 3000 classes in blocks of 20 positions."""
    monkeypatch.setattr(reference, "_ROWS", 20)
    monkeypatch.setattr(reference, "_AT_ONCE", 0)
    x, weight = torch.randn(1000, 4), torch.randn(3000, 4)
    with Calls() as calls:
        summed.linear_cross_entropy_sum(
            x, weight, None, torch.arange(1000), None, IGNORED, 0.1, None, 64, [True, True, False]
        )
    assert calls.largest == 20 * 3000


@pytest.mark.parametrize(("classes", "chunk", "rows"), [(32000, 2048, 262), (256000, 2048, 128), (10, 1, 409)])
def test_rows_of_a_block(classes: int, chunk: int, rows: int) -> None:
    assert reference.block_rows(classes, chunk) == rows


# ----------------------------------------------------------------------------------------------------- operator


def test_opcheck() -> None:
    args = arguments(**CASES["weighted_smoothed"], dtype=torch.float32)
    torch.library.opcheck(linear_cross_entropy_reduced, tuple(args))
    torch.library.opcheck(linear_cross_entropy_sum, (*args[:8], args[9], [True, True, True]))


def test_gradients_of_first_and_second_order() -> None:
    args = arguments(**CASES["capped"], lead=(3,))

    def loss(*tensors: Tensor) -> Tensor:
        return linear_cross_entropy_reduced(*tensors, *args[3:])

    assert torch.autograd.gradcheck(loss, args[:3], fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, args[:3], fast_mode=True)


def test_gradients_of_several_seeds_at_once() -> None:
    args = arguments()
    loss = linear_cross_entropy_reduced(*args)
    seeds = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (both,) = torch.autograd.grad(loss, args[0], seeds, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, args[0])
    torch.testing.assert_close(both, torch.stack((one, -2 * one)))


def test_vmap() -> None:
    args = arguments(smoothing=0.1)
    options = (None,) * 6
    got = torch.vmap(linear_cross_entropy_reduced, in_dims=(0, None, None, 0, *options))(*args)
    each = [linear_cross_entropy_reduced(x, *args[1:3], t, *args[4:]) for x, t in zip(args[0], args[3], strict=True)]
    torch.testing.assert_close(got, torch.stack(each))


def test_a_gradient_that_was_not_asked_for_is_an_error() -> None:
    args = arguments(weighted=True)
    with pytest.raises(RuntimeError, match="not asked for the gradient of weight"):
        linear_cross_entropy_sum(*args[:8], args[9], [True, False, False])
    args[4].requires_grad_()
    with pytest.raises(RuntimeError, match="gradient of class_weight"):
        linear_cross_entropy_sum(*args[:8], args[9], [True, True, False])


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, V * D).reshape(V, D))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = linear_cross_entropy_reduced(x, self.weight, None, target, None, IGNORED, 0.1, 2.0, "mean", 4)
        return loss


def test_exported_it_is_one_operator_and_compiled_it_trains() -> None:
    x, _, _, target, *_ = arguments(dtype=torch.float32)
    head = Head()
    exported = torch.export.export(head, (x.detach(), target), strict=False)
    calls = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert calls == [linear_cross_entropy_reduced]  # whoever runs it decides whether gradients are computed
    plain = exported.run_decompositions(decompositions())
    names = [str(n.target) for n in plain.graph.nodes if n.op == "call_function"]
    assert names and not any("rewriter" in name for name in names)
    torch.testing.assert_close(plain.module()(x.detach(), target), head(x, target))
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    found, wanted = (torch.autograd.grad(f(x, target), (x, head.weight)) for f in (compiled, head))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast: torch.dtype) -> None:
    args = arguments(bias=True, dtype=torch.float32)
    by_hand = linear_cross_entropy_reduced(args[0].to(autocast), *args[1:])
    with torch.autocast("cpu", dtype=autocast):
        loss = linear_cross_entropy_reduced(*args)
    assert loss.dtype == torch.float32 and torch.equal(loss, by_hand)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, args[:3]))


def test_wrong_reductions_are_refused() -> None:
    args = arguments()
    args[8] = "none"
    for function in (linear_cross_entropy_reduced, summed.linear_cross_entropy_reduced):
        with pytest.raises(RuntimeError, match="reduction must be 'mean' or 'sum'"):
            function(*args)


def test_what_reports_and_exporters_read_is_the_same() -> None:
    """The spec's fake kernel, the reference and the CPU's function, beside what the operator is made of."""
    args, spec = arguments(weighted=True, bias=True), REGISTRY[linear_cross_entropy_reduced]
    with torch.no_grad():
        wanted, one = linear_cross_entropy_reduced(*args), spec.fake(*args)
        for function in (spec.reference, spec.implementation("cpu")):
            torch.testing.assert_close(function(*args), wanted)
    assert one.shape == wanted.shape and one.dtype == wanted.dtype


def test_cost() -> None:
    args = arguments(bias=True, dtype=torch.float32)
    loss = REGISTRY[linear_cross_entropy].cost(*args[:8], args[9])
    cost = REGISTRY[linear_cross_entropy_reduced].cost(*args)
    assert (cost.flops, cost.bytes_read, cost.bytes_written) == (loss.flops, loss.bytes_read, 4)
    both = REGISTRY[linear_cross_entropy_sum].cost(*args[:8], args[9], [True, True, False])
    assert both.flops == loss.flops + 6 * (2 * 2 * V * D + 3 * V)
    assert both.bytes_written == 4 * (1 + 6 * D + V * D)
