# SPDX-License-Identifier: Apache-2.0
"""The kernels of `linear_cross_entropy`, interpreted, against the reference in float64; gradients as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.cross_entropy import blocked, gradient, launch, op, position_op, reference, summed
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.spec import REGISTRY

IGNORED = -100
# numpy warns of what a device computes silently: log 0, and products with infinities in lanes that are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def drawn(
    rows: int, classes: int, width: int, dtype: torch.dtype, seed: int, *, bias: bool, weighted: bool, smoothing: float,
    softcap: float | None, chunk: int, transposed: bool = False, weight_dtype: torch.dtype | None = None,
) -> list[Any]:  # fmt: skip
    """Arguments of one call; every third target is ignored."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x = random(width, rows).t() if transposed else random(rows, 2 * width)[:, ::2]
    weight = random(width, classes).t() if transposed else random(classes, width)
    target = torch.randint(0, classes, (rows,), generator=g)
    target[::3] = IGNORED
    return [
        x.to(dtype), (weight / width**0.5).to(weight_dtype or dtype), random(classes).to(dtype) if bias else None, target,
        random(classes).abs() + 0.1 if weighted else None, IGNORED, smoothing, softcap, chunk,
    ]  # fmt: skip


def golden(args: list[Any]) -> list[Any]:
    """In float64, from what is read: weight and bias in the dtype of x."""
    x, weight, bias, *rest = args
    read = [x, *(None if t is None else t.to(x.dtype) for t in (weight, bias)), *rest]
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in read]


def judge(got: Tensor, eagers: list[Tensor], wanted: Tensor, unit: Tensor | None = None) -> None:
    """No more than twice what the reference loses in that dtype, and a unit in the last place of the largest value; of
    the largest of ``unit`` for gradients, sums of terms that cancel.

    ``eagers``: the reference's results in that dtype, its sums taken in several orders; some are right by chance.
    """
    assert got.shape == eagers[0].shape and got.dtype == eagers[0].dtype
    if not got.numel():
        return
    lost = max(float((eager.double() - wanted).abs().max()) for eager in eagers)
    one = torch.finfo(got.dtype).eps * wanted.abs() if unit is None else unit
    assert float((got.double() - wanted).abs().max()) <= 2 * lost + float(one.max())


def units(grads: list[Tensor], args: list[Any]) -> tuple[Tensor, ...]:
    """One unit in the last place of x's dtype, of the magnitudes that gradients of x, weight, bias and class weights add
    up: |s| p + |o| [i = y] + |e| m for each logit (`reference`) times the other factor.
    """
    x, weight, bias, target, class_weight, _, smoothing, softcap, _ = golden(args)
    grad, grad_log_z = (g.double().abs().unsqueeze(1) for g in grads)
    bias = torch.zeros(len(weight)) if bias is None else bias
    m = torch.ones(len(weight), dtype=torch.float64) if class_weight is None else class_weight
    logits, slope = x @ weight.T + bias, 1.0
    if softcap is not None:
        ratio = logits / softcap
        logits, slope = softcap * torch.tanh(ratio), (1 - torch.tanh(ratio) ** 2) * (1 + 2 * ratio.abs())
    kept = grad * (target != IGNORED).unsqueeze(1)
    token = target.clamp(min=0)
    own, each = (1 - smoothing) * kept * m[token].unsqueeze(1), smoothing / len(weight) * kept
    y = torch.zeros_like(logits).scatter_(1, token.unsqueeze(1), 1.0)
    log_z = torch.logsumexp(logits, 1, keepdim=True)
    both = logits.abs() + log_z.abs()
    terms = (own + each * m.sum() + grad_log_z) * (logits - log_z).exp() * (1 + both) + own * y + each * m
    to_class = ((1 - smoothing) * kept * y + each) * both
    through = terms * slope
    found = through @ weight.abs(), through.T @ x.abs(), through.sum(0), to_class.sum(0)
    return tuple(torch.finfo(args[0].dtype).eps * one for one in found)


Order = tuple[Tensor, Tensor, Tensor]  # of positions, classes and features


def orders(args: list[Any]) -> list[Order]:
    sizes = args[0].shape[0], *args[1].shape
    g = torch.Generator().manual_seed(11)
    permuted = [tuple(torch.randperm(n, generator=g) for n in sizes) for _ in range(4)]
    return [tuple(torch.arange(n) for n in sizes), *permuted]  # type: ignore[list-item]


def ordered(args: list[Any], order: Order) -> list[Any]:
    """The same call with positions, classes and features in another order; the chunks then hold other classes."""
    positions, classes, features = order
    x, weight, bias, target, class_weight, *options = args
    target = torch.where(target == IGNORED, IGNORED, classes.argsort()[target.clamp(min=0)])
    bias, class_weight = (None if t is None else t[classes] for t in (bias, class_weight))
    return [x[positions][:, features], weight[classes][:, features], bias, target[positions], class_weight, *options]


def restored(found: tuple[Tensor, ...], order: Order) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and class weights of an ordered call, in the given order; empty ones as they are."""
    positions, classes, features = (places.argsort() for places in order)
    to_x, to_weight, *rest = found
    return (
        to_x[positions][:, features] if to_x.dim() > 1 else to_x,
        to_weight[classes][:, features] if to_weight.dim() > 1 else to_weight,
        *(t[classes] if t.numel() else t for t in rest),
    )


def check(args: list[Any], needed: list[bool], which: int = 0) -> None:
    """Loss, log Z and all gradients of one call."""
    rows = args[0].shape[0]
    g = torch.Generator().manual_seed(rows)
    grads = [torch.randn(rows, generator=g), torch.randn(rows, generator=g)]
    with interpreting(which):
        loss, log_z = launch.linear_cross_entropy(*args)
        found = launch.linear_cross_entropy_backward(*grads, *args[:5], log_z, *args[5:], needed)
    wanted = reference.linear_cross_entropy(*golden(args))
    right = gradient.gradients(*(g.double() for g in grads), *golden(args[:5]), wanted[1], *args[5:], needed)
    eagers, its = [], []
    for order in orders(args):
        call, back = ordered(args, order), order[0].argsort()
        losses, log_zs = reference.linear_cross_entropy(*call)
        eagers.append((losses[back], log_zs[back]))
        turned = [one[order[0]] for one in grads]
        its.append(restored(gradient.gradients(*turned, *call[:5], log_zs, *call[5:], needed), order))
    for one, others, exact in zip((loss, log_z), zip(*eagers, strict=True), wanted, strict=True):
        judge(one, list(others), exact)
    for one, others, exact, unit in zip(found, zip(*its, strict=True), right, units(grads, args), strict=True):
        judge(one, list(others), exact, unit)


def check_sum(found: tuple[Tensor, ...], args: list[Any], needed: list[bool]) -> None:
    """A loss summed, with its gradients, against the reference."""
    exact = gradient.linear_cross_entropy_sum(*golden(args), needed)
    rows = args[0].shape[0]
    each = units([torch.ones(rows), torch.zeros(rows)], args)
    eagers = []
    for order in orders(args):
        total, *its = gradient.linear_cross_entropy_sum(*ordered(args, order), needed)
        eagers.append((total, *restored(tuple(its), order)))
    for one, others, wanted, unit in zip(found, zip(*eagers, strict=True), exact, (None, *each[:3]), strict=True):
        judge(one, list(others), wanted, unit)


OPTIONS = st.fixed_dictionaries(
    {
        "bias": st.booleans(),
        "weighted": st.booleans(),
        "smoothing": st.sampled_from([0.0, 0.2, 1.0]),
        "softcap": st.sampled_from([None, 1.5, 30.0]),
        "chunk": st.sampled_from([100, 256, 1000]),
        "transposed": st.booleans(),
        "weight_dtype": st.sampled_from([None, torch.float32]),
    }
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=12)
@given(
    rows=st.sampled_from([0, 1, 5, 128, 131]),
    classes=st.sampled_from([1, 3, 64, 257, 300]),
    width=st.sampled_from([1, 31, 32, 70]),
    dtype=DTYPES,
    options=OPTIONS,
    which=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_any_shape_stride_dtype_and_option(
    rows: int, classes: int, width: int, dtype: torch.dtype, options: dict[str, Any], which: int, seed: int
) -> None:
    args = drawn(rows, classes, width, dtype, seed, **options)
    check(args, [True, True, options["bias"], options["weighted"]], which)


@settings(max_examples=12)
@given(
    rows=st.sampled_from([0, 1, 4]),
    classes=st.sampled_from([1, 3, 300, 4100]),  # one tile, or a ragged second or third
    width=st.sampled_from([1, 33]),
    dtype=DTYPES,
    options=OPTIONS,
    needed=st.tuples(st.booleans(), st.booleans()),
    which=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_summed_on_a_gpu_and_on_a_cpu(
    rows: int, classes: int, width: int, dtype: torch.dtype, options: dict[str, Any], needed: tuple[bool, bool],
    which: int, seed: int,
) -> None:  # fmt: skip
    """Both in blocks of two positions."""
    args = drawn(rows, classes, width, dtype, seed, **options)
    wanted = [*needed, options["bias"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_ROWS", 2)
        patch.setattr(reference, "_AT_ONCE", 0)
        with interpreting(which):
            on_gpu = launch.linear_cross_entropy_sum(*args, wanted)
        on_cpu = summed.linear_cross_entropy_sum(*args, wanted)
    check_sum(on_gpu, args, wanted)
    check_sum(on_cpu, args, wanted)


def test_classes_are_dealt_out_and_put_together_again() -> None:
    """700 classes and few positions: three programs of 256 classes each, the last one ragged."""
    args = drawn(9, 700, 33, torch.float32, 0, bias=True, weighted=True, smoothing=0.1, softcap=None, chunk=512)
    check(args, [True, True, True, True])


def test_what_is_not_asked_for_is_empty() -> None:
    args = drawn(4, 20, 8, torch.float32, 0, bias=True, weighted=True, smoothing=0.1, softcap=None, chunk=64)
    ones = torch.ones(4)
    with interpreting():
        _, log_z = launch.linear_cross_entropy(*args)
        found = launch.linear_cross_entropy_backward(
            ones, ones, *args[:5], log_z, *args[5:], [False, True, False, False]
        )
    assert [t.numel() for t in found] == [0, 160, 0, 0]


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    args = drawn(3, 300, 16, torch.float32, 5, bias=False, weighted=False, smoothing=0.0, softcap=None, chunk=256)
    args[0] = args[0] * 1e4
    check(args, [True, True, False, False])


def test_infinite_and_undefined_logits() -> None:
    """A bias of −inf forbids a class, one of inf wins; NaN spreads over its row alone."""
    args = drawn(4, 600, 16, torch.float32, 1, bias=True, weighted=False, smoothing=0.0, softcap=None, chunk=512)
    args[2][:256] = float("-inf")
    args[3][:] = torch.tensor([300, 301, IGNORED, 302])
    args[0][1] = float("nan")
    with interpreting():
        got = launch.linear_cross_entropy(*args)
    torch.testing.assert_close(got, reference.linear_cross_entropy(*args), equal_nan=True)
    args[2][:] = float("-inf")
    with interpreting():
        assert launch.linear_cross_entropy(*args)[1][0] == float("-inf")
    args[2][5] = float("inf")
    with interpreting():
        assert launch.linear_cross_entropy(*args)[1][0] == float("inf")


@pytest.mark.parametrize("outside", [-1, 20, 2**40])
def test_a_target_outside_the_classes_makes_its_loss_undefined(outside: int) -> None:
    args = drawn(4, 20, 8, torch.float32, 0, bias=False, weighted=True, smoothing=0.0, softcap=None, chunk=64)
    args[3][:] = torch.tensor([1, outside, 2, IGNORED])
    with interpreting():
        loss, log_z = launch.linear_cross_entropy(*args)
    assert loss.isnan().tolist() == [False, True, False, False] and log_z.isfinite().all()


def test_float64_is_left_to_the_reference() -> None:
    args = drawn(2, 3, 4, torch.float64, 0, bias=False, weighted=False, smoothing=0.0, softcap=None, chunk=64)
    with pytest.raises(Unsupported, match="float64"):
        launch.linear_cross_entropy(*args)


# --------------------------------------------------------------------------------------- the gradient's operator


@pytest.mark.parametrize("needed", [[True] * 4, [True, False, False, False]], ids=["all", "x"])
def test_opcheck_of_the_gradient(needed: list[bool]) -> None:
    args = drawn(4, 20, 8, torch.float32, 0, bias=True, weighted=True, smoothing=0.1, softcap=3.0, chunk=8)
    log_z = reference.linear_cross_entropy(*args)[1]
    call = (torch.ones(4), torch.ones(4), *args[:5], log_z, *args[5:], needed)
    torch.library.opcheck(op.linear_cross_entropy_backward, call)


def test_training_eager_and_compiled_gives_the_gradients_of_differentiable_aten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = drawn(6, 40, 8, torch.float32, 3, bias=True, weighted=False, smoothing=0.1, softcap=None, chunk=16)
    args[:3] = [a.contiguous().requires_grad_() for a in args[:3]]

    def gradients(function: Any) -> tuple[Tensor, ...]:
        loss, log_z = function(*args)
        return torch.autograd.grad(loss.sum() + log_z.square().sum(), args[:3])

    torch._dynamo.reset()
    found = [
        gradients(f) for f in (op.linear_cross_entropy, torch.compile(op.linear_cross_entropy, backend="aot_eager"))
    ]
    monkeypatch.setattr(position_op, "is_last", lambda grad: False)
    wanted = gradients(op.linear_cross_entropy)
    for one in found:
        torch.testing.assert_close(one, wanted)


def test_gradients_of_several_seeds_at_once() -> None:
    args = drawn(3, 20, 4, torch.float32, 3, bias=False, weighted=False, smoothing=0.0, softcap=None, chunk=8)
    x = args[0].contiguous().requires_grad_()
    loss, _ = op.linear_cross_entropy(x, *args[1:])
    (jacobian,) = torch.autograd.grad(loss, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for row, seed in zip(jacobian, torch.eye(3), strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(loss, x, seed, retain_graph=True)[0])


# ------------------------------------------------------------------------------------------------ blocks on a CPU


@settings(max_examples=25)
@given(
    rows=st.sampled_from([0, 1, 7, 20]),
    classes=st.sampled_from([1, 9, 40]),
    options=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "weighted": st.booleans(),
            "smoothing": st.sampled_from([0.0, 0.2]),
            "softcap": st.sampled_from([None, 1.5]),
            "chunk": st.sampled_from([4, 100]),
            "transposed": st.booleans(),
            "weight_dtype": st.sampled_from([None, torch.float32]),
        }
    ),
    seed=st.integers(0, 999),
)
def test_blocks_are_the_reference(rows: int, classes: int, options: dict[str, Any], seed: int) -> None:
    args = drawn(rows, classes, 5, torch.float64, seed, **options)
    g = torch.Generator().manual_seed(seed)
    grads = [torch.randn(rows, generator=g, dtype=torch.float64) for _ in range(2)]
    needed = [True, True, options["bias"], False]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "ROWS", 8)
        got = blocked.linear_cross_entropy(*args)
        found = blocked.linear_cross_entropy_backward(*grads, *args[:5], got[1], *args[5:], needed)
    wanted = reference.linear_cross_entropy(*args)
    its = gradient.gradients(*grads, *args[:5], wanted[1], *args[5:], needed)
    for one, other in zip((*got, *found), (*wanted, *its), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-6 if one.dtype is torch.float32 else 1e-12, atol=1e-12)


def test_blocks_know_infinite_and_undefined_logits() -> None:
    args = drawn(4, 60, 16, torch.float32, 1, bias=True, weighted=False, smoothing=0.0, softcap=None, chunk=16)
    args[2][:32] = float("-inf")
    args[3][:] = torch.tensor([33, 34, IGNORED, 35])
    args[0][1] = float("nan")
    got, want = blocked.linear_cross_entropy(*args), reference.linear_cross_entropy(*args)
    torch.testing.assert_close(got, want, equal_nan=True)
    for value in (float("-inf"), float("inf")):
        args[2][5:] = value
        assert blocked.linear_cross_entropy(*args)[1][0] == value


def test_class_weights_that_learn_are_left_to_the_reference() -> None:
    args = drawn(2, 3, 4, torch.float32, 0, bias=False, weighted=True, smoothing=0.0, softcap=None, chunk=64)
    with pytest.raises(Unsupported, match="class weights"):
        blocked.linear_cross_entropy_backward(*torch.ones(2, 2), *args[:5], torch.ones(2), *args[5:], [True] * 4)


def test_cost_of_the_gradient_counts_the_products_asked_for() -> None:
    args = drawn(4, 20, 8, torch.float32, 0, bias=False, weighted=False, smoothing=0.0, softcap=None, chunk=8)
    cost = REGISTRY[op.linear_cross_entropy_backward].cost
    call = (torch.ones(4), torch.ones(4), *args[:5], torch.ones(4), *args[5:])
    both, one = cost(*call, [True, True, False, False]), cost(*call, [True, False, False, False])
    assert both.flops - one.flops == 2 * 4 * 20 * 8
    assert both.bytes_written - one.bytes_written == 4 * 20 * 8
