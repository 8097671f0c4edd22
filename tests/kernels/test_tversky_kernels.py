# SPDX-License-Identifier: Apache-2.0
"""The kernels of `tversky`, interpreted, against the reference in float64: every similarity, gradients as well."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.spec import REGISTRY
from rewriter.kernels.tversky import gradient, launch, op, reference
from rewriter.kernels.tversky.reference import CONVENTIONS, DIFFERENCES, FORMS, INTERSECTIONS

NAMES = list(product(INTERSECTIONS, CONVENTIONS, DIFFERENCES, FORMS))
TENSORS = 8
Names = tuple[str, str, str, str]
# numpy warns of what a device computes silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def drawn(
    names: Names, dtype: torch.dtype, seed: int, *, sizes: tuple[int, int, int, int] = (66, 40, 34, 35),
    each: bool = True, pair: bool = False, bias: bool = True, without: tuple[int, ...] = (), mirrored: bool = False,
    projected: bool = False, transposed: bool = False, wide_weights: bool = False,
) -> list[Any]:  # fmt: skip
    """Arguments of one call of n rows, width d, K features, P prototypes; coefficients ``without`` (3 θ, 4 α, 5 β) are None.

    Values are multiples of 1/2, so that scores are exact: they meet zeros and ties, and slopes there are the reference's.
    """
    rows, width, features, prototypes = sizes
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=g).mul(2).round().div(2)
        return values.to(torch.float32 if wide_weights else dtype)

    x = random(width, rows).t() if transposed else random(rows, 2 * width)[:, ::2]
    bank = random(width, features).t() if transposed else random(features, width)
    weights = [random(*((prototypes,) if each else ())).abs() + 0.5 for _ in range(3)]
    args: list[Any] = [x.to(dtype), bank, random(prototypes, features if projected else width), *weights]
    args += [random() if pair else None, random(prototypes) if bias else None, *names, mirrored, projected]
    for position in without:
        args[position] = None
    return args


def golden(args: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in args]


def judge(got: Tensor, eagers: list[Tensor], wanted: Tensor, terms: Tensor | None = None) -> None:
    """No more than twice what the reference loses, and a unit in the last place: of the sum of magnitudes of ``terms`` for
    the gradient of a coefficient, a sum over all rows whose own magnitude says nothing about rounding.

    ``eagers``: the reference's results in that dtype, its sums taken in several orders; some are right by chance.
    """
    assert got.shape == eagers[0].shape and got.dtype == eagers[0].dtype
    if not got.numel():
        return
    scale = wanted.abs().max() if terms is None else terms.abs().sum_to_size(wanted.shape or (1, 1)).max()
    lost = max(float((eager.double() - wanted).abs().max()) for eager in eagers)
    assert float((got.double() - wanted).abs().max()) <= 2 * lost + torch.finfo(got.dtype).eps * float(scale)


Order = tuple[Tensor, ...]  # of rows, features, prototypes and dimensions


def orders(args: list[Any]) -> list[Order]:
    sizes = args[0].shape[0], args[1].shape[0], args[2].shape[0], args[0].shape[1]
    g = torch.Generator().manual_seed(11)
    given = tuple(torch.arange(n) for n in sizes)
    return [given, *(tuple(torch.randperm(n, generator=g) for n in sizes) for _ in range(4))]


def ordered(args: list[Any], order: Order) -> list[Any]:
    """The same call with rows, features, prototypes and dimensions in another order."""
    rows, features, prototypes, dims = order
    pi = args[2][prototypes][:, features if args[-1] else dims]
    rest = [a[prototypes] if isinstance(a, Tensor) and a.dim() and a.numel() else a for a in args[3:]]
    return [args[0][rows][:, dims], args[1][features][:, dims], pi, *rest]


def check_forward(args: list[Any], which: int = 0) -> None:
    with interpreting(which):
        got = launch.tversky(*args)
    eagers = [
        reference.tversky(*ordered(args, order))[order[0].argsort()][:, order[2].argsort()] for order in orders(args)
    ]
    judge(got, eagers, reference.tversky(*golden(args)))


def check_gradients(args: list[Any], which: int = 0) -> None:
    out = reference.tversky(*golden(args))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(args[0].dtype)
    with interpreting(which):
        got = launch.tversky_backward(grad, *args)
    eagers = [
        ordered(
            [*gradient.gradients(grad[order[0]][:, order[2]], *ordered(args, order)), args[-1]],
            tuple(places.argsort() for places in order),
        )
        for order in orders(args)
    ]
    wanted = gradient.gradients(grad.double(), *golden(args))
    for position, (one, exact) in enumerate(zip(got, wanted, strict=True)):
        each = terms(position, grad.double(), golden(args)) if position > 2 and exact.numel() else None
        judge(one, [eager[position] for eager in eagers], exact, each)


def terms(position: int, grad: Tensor, args: list[Any]) -> Tensor:
    """What the gradient of a coefficient is the sum of, for each row and prototype: G ∂S/∂(that coefficient)."""

    def of(number: Tensor) -> Tensor:
        return reference.tversky(*args[:position], number, *args[position + 1 :])

    _, slope = torch.func.jvp(of, (args[position],), (torch.ones_like(args[position]),))
    return grad * slope


@settings(max_examples=14)
@given(
    names=st.sampled_from(NAMES),
    sizes=st.sampled_from([(1, 1, 1, 1), (0, 3, 4, 5), (65, 33, 17, 31), (5, 40, 70, 66), (3, 0, 2, 1), (2, 3, 0, 4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    options=st.fixed_dictionaries(
        {
            "each": st.booleans(),
            "pair": st.booleans(),
            "bias": st.booleans(),
            "without": st.sampled_from([(), (3,), (4,), (5,), (3, 4), (4, 5), (3, 4, 5)]),
            "mirrored": st.booleans(),
            "projected": st.booleans(),
            "transposed": st.booleans(),
            "wide_weights": st.booleans(),
        }
    ),
    which=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_any_shape_stride_dtype_and_option(
    names: Names, sizes: tuple[int, int, int, int], dtype: torch.dtype, options: dict[str, Any], which: int, seed: int
) -> None:
    args = drawn(names, dtype, seed, sizes=sizes, **options)
    check_forward(args, which)
    if sizes[1] and sizes[2]:
        check_gradients(args, which)


@pytest.mark.parametrize("number", range(len(NAMES)), ids=["-".join(n) for n in NAMES])
def test_every_similarity(number: int) -> None:
    """Sums over several blocks; single and paired branches, one coefficient and one each dealt out over the names."""
    args = drawn(
        NAMES[number], torch.float32, number, sizes=(33, 8, 18, 17), pair=number % 3 == 0, each=number % 2 == 0
    )
    check_forward(args)
    check_gradients(args)


def test_a_long_sum_is_dealt_out() -> None:
    """1100 rows of few features: the bank's gradient is added up from three parts."""
    args = drawn(("product", "paper", "ignorematch", "contrast"), torch.float32, 0, sizes=(1100, 9, 5, 6))
    check_gradients(args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_signed_pair_is_the_dense_layer_it_came_from(dtype: torch.dtype) -> None:
    """Both branches meet in the accumulator, where they are one weight."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 64, generator=g).to(dtype) for rows in (40, 33))
    eye, one = torch.eye(64, dtype=dtype), torch.ones((), dtype=dtype)
    names = ("product", "paper", "ignorematch", "contrast")
    with interpreting():
        got = launch.tversky(x, eye, w, one, None, None, one, None, *names, True, False)
    judge(got, [x @ w.t()], x.double() @ w.double().t())


@pytest.mark.parametrize("names", [n for n in NAMES if n[3] == "ratio" and n[2] == "ignorematch"], ids="-".join)
def test_empty_sets_give_what_the_reference_gives(names: Names) -> None:
    """No features at all, on either side or both: 0, not 0/0, and gradients that are numbers."""
    nothing, something = -torch.ones(2, 3), torch.ones(2, 3)
    half = torch.tensor(0.5)
    for x, prototypes in ((nothing, nothing), (nothing, something), (something, nothing), (0 * nothing, something)):
        args = [x, torch.eye(3), prototypes, half, half, half, None, None, *names, False, False]
        with interpreting():
            got, found = launch.tversky(*args), launch.tversky_backward(torch.ones(2, 2), *args)
        torch.testing.assert_close(got, reference.tversky(*args))
        for one, other in zip(found, gradient.gradients(torch.ones(2, 2), *args), strict=True):
            torch.testing.assert_close(one, other)
            assert one.isfinite().all()


@pytest.mark.parametrize("intersection", ["product", "min", "softmin"])
def test_nan_and_infinity_stay_in_their_rows(intersection: str) -> None:
    args = drawn((intersection, "paper", "ignorematch", "contrast"), torch.float32, 0, sizes=(4, 6, 6, 5))
    args[0][1, 2] = float("nan")
    args[0][2, 3] = float("inf")
    with interpreting():
        got = launch.tversky(*args)
    torch.testing.assert_close(got, reference.tversky(*args), equal_nan=True)


def test_float64_is_left_to_the_reference() -> None:
    with pytest.raises(Unsupported, match="float64"):
        launch.tversky(*drawn(NAMES[0], torch.float64, 0))


# --------------------------------------------------------------------------------------- the gradient's operator


@pytest.mark.parametrize("names", [NAMES[0], ("min", "code", "subtractmatch", "ratio")], ids="-".join)
def test_opcheck_of_the_gradient(names: Names) -> None:
    args = drawn(names, torch.float32, 0, sizes=(3, 4, 5, 6), pair=True)
    torch.library.opcheck(op.tversky_backward, (torch.ones(3, 6), *args))


@pytest.mark.parametrize("names", [NAMES[0], ("softmin", "code", "subtractmatch", "ratio")], ids="-".join)
def test_training_through_the_operator_a_gpu_uses(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and compiled, the gradients are those of differentiable aten; θ of a ratio has none."""
    args = drawn(names, torch.float32, 0, sizes=(3, 4, 5, 6), pair=True)
    tensors = [a.contiguous().requires_grad_() for a in args[:TENSORS]]

    def gradients(function: Any) -> tuple[Tensor | None, ...]:
        loss = function(*tensors, *args[TENSORS:]).square().sum()
        return torch.autograd.grad(loss, tensors, allow_unused=True)

    wanted = gradients(op.tversky)
    assert (wanted[3] is None) == (names[3] == "ratio")
    monkeypatch.setattr(op, "on_device", lambda tensor: True)
    torch._dynamo.reset()
    for function in (op.tversky, torch.compile(op.tversky, backend="aot_eager", fullgraph=True)):
        for one, other in zip(gradients(function), wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_the_gradient_costs_about_twice_the_similarity_more() -> None:
    args = drawn(NAMES[0], torch.float32, 0, sizes=(6, 4, 5, 3))
    forward, backward = (REGISTRY[o].cost for o in (op.tversky, op.tversky_backward))
    grad = torch.ones(6, 3)
    assert backward(grad, *args).flops == 3 * forward(*args).flops
    assert backward(grad, *args).bytes_written == sum(t.numel() * 4 for t in args[:TENSORS] if t is not None)
