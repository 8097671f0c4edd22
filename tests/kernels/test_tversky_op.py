# SPDX-License-Identifier: Apache-2.0
"""The Tversky operator as a torch operator: opcheck, gradients, vmap, dtypes, refusals, memory, cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.kernels.spec import REGISTRY
from rewriter.kernels.tversky import op, reference
from rewriter.kernels.tversky.arguments import Arguments
from rewriter.kernels.tversky.reference import CONVENTIONS, DIFFERENCES, FORMS, INTERSECTIONS

NAMES = [(i, c, d, f) for i in INTERSECTIONS for c in CONVENTIONS for d in DIFFERENCES for f in FORMS]
# Each intersection in each convention, differences and forms dealt out over them.
DEALT = [n for k, n in enumerate(NAMES) if k % 4 == (k // 4 + k // 8) % 4]
PLAIN = ("product", "paper", "ignorematch", "contrast")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def arguments(
    names: tuple[str, str, str, str] = PLAIN,
    *,
    lead: tuple[int, ...] = (2, 3),
    pair: bool = True,
    bias: bool = True,
    per_prototype: bool = False,
    mirrored: bool = False,
    projected: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Any]:
    """All arguments of one call: d = 3, K = 4, P = 5."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    weight = (5,) if per_prototype else ()
    tensors = [random(*lead, 3), random(4, 3), random(5, 4 if projected else 3)]
    tensors += [random(*weight).abs() + 0.5 for _ in range(3)]
    optional = [torch.tensor(0.7, dtype=dtype) if pair else None, random(5) if bias else None]
    return [*tensors, *optional, *names, mirrored, projected]


def trainable(args: list[Any]) -> list[Any]:
    return [a.requires_grad_() if isinstance(a, Tensor) else a for a in args]


def floating(args: list[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


CASES: dict[str, dict[str, Any]] = {
    "pair": {},
    "projected": {"projected": True, "per_prototype": True},
    "chunked": {"names": ("min", "paper", "subtractmatch", "ratio")},
    "sums": {"names": ("softmin", "code", "subtractmatch", "contrast"), "mirrored": True, "projected": True},
}


@pytest.mark.parametrize("case", ["pair", "projected", "chunked", "sums"])
def test_opcheck(case: str) -> None:
    torch.library.opcheck(op.tversky, tuple(trainable(arguments(**CASES[case]))))


@pytest.mark.parametrize("names", DEALT, ids="-".join)
def test_gradients_of_first_order(names: tuple[str, str, str, str]) -> None:
    """Away from kinks, which random scores are."""
    bank = DEALT.index(names) % 2 == 0
    args = trainable(arguments(names, lead=(2,), per_prototype=bank, mirrored=bank, dtype=torch.float64))
    tensors = floating(args)
    assert torch.autograd.gradcheck(lambda *t: op.tversky(*t, *args[8:]), tensors, fast_mode=True)


@pytest.mark.parametrize("case", ["pair", "chunked", "sums"])
def test_gradients_of_second_order(case: str) -> None:
    args = trainable(arguments(**(CASES[case] | {"lead": (2,), "dtype": torch.float64})))
    tensors = floating(args)
    assert torch.autograd.gradgradcheck(lambda *t: op.tversky(*t, *args[8:]), tensors, fast_mode=True)


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_gradients_by_hand_equal_those_autograd_finds_in_the_reference(names: tuple[str, str, str, str]) -> None:
    args = trainable(arguments(names, dtype=torch.float64))
    by_hand, found = (
        torch.autograd.grad(
            function(*args).square().sum(), floating(args), allow_unused=True, materialize_grads=True
        )
        for function in (op.tversky, reference.tversky)
    )
    for a, b in zip(by_hand, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("empty", ["input", "prototype", "both", "zero"])
@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_empty_sets_give_finite_values_and_gradients(names: tuple[str, str, str, str], empty: str) -> None:
    """A gmean of an empty set has NaN for a gradient in the literature, a ratio of two empty ones for a value."""
    features = torch.eye(3)
    x = torch.full((2, 3), -1.0 if empty in ("input", "both") else 0.0 if empty == "zero" else 1.0)
    prototypes = torch.full((2, 3), -1.0 if empty in ("prototype", "both") else 0.0 if empty == "zero" else 1.0)
    weights = [torch.tensor(v) for v in (1.0, 0.5, 0.5)]
    args = trainable([x, features, prototypes, *weights, None, None, *names, False, False])
    out = op.tversky(*args)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), floating(args), allow_unused=True):
        assert grad is None or grad.isfinite().all()


def test_the_softmin_of_two_empty_sets_is_what_its_convention_says() -> None:
    """Sums of the authors' code are −log(e⁰ + e⁰); the paper's sum has no term."""
    nothing = -torch.ones(1, 3)
    for convention, value in (("code", -torch.tensor(2.0).log()), ("paper", torch.tensor(0.0))):
        names = ("softmin", convention, "ignorematch", "contrast")
        out = op.tversky(nothing, torch.eye(3), nothing, None, None, None, None, None, *names, False, False)
        torch.testing.assert_close(out, value.reshape(1, 1))


@pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("case", ["pair", "chunked"])
def test_any_leading_dimensions(case: str, lead: tuple[int, ...]) -> None:
    args = arguments(**(CASES[case] | {"lead": lead}))
    flat = op.tversky(args[0].reshape(-1, 3), *args[1:])
    torch.testing.assert_close(op.tversky(*args), flat.reshape(*lead, 5))


@pytest.mark.parametrize("case", ["pair", "chunked"])
def test_vmap_over_inputs_and_over_prototypes(case: str) -> None:
    args = arguments(**(CASES[case] | {"lead": (6, 2)}))
    mapped = torch.vmap(lambda x: op.tversky(x, *args[1:]), in_dims=1)(args[0])
    torch.testing.assert_close(mapped, op.tversky(args[0].movedim(1, 0), *args[1:]))
    many = torch.stack((args[2], -args[2]))
    mapped = torch.vmap(lambda p: op.tversky(args[0], args[1], p, *args[3:]))(many)
    torch.testing.assert_close(mapped, torch.stack([op.tversky(args[0], args[1], p, *args[3:]) for p in many]))


@pytest.mark.parametrize("hidden", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_of_the_output_follows_the_inputs(hidden: torch.dtype, weights: torch.dtype) -> None:
    args = arguments(dtype=weights)
    args[0] = args[0].to(hidden)
    assert op.tversky(*args).dtype == hidden
    with torch._subclasses.FakeTensorMode() as mode:
        assert op.tversky(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)).dtype == hidden


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_in_eager_fake_and_compiled_execution(autocast: torch.dtype) -> None:
    args = arguments()
    by_hand = op.tversky(args[0].to(autocast), *args[1:])
    compiled = torch.compile(op.tversky, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=autocast):
        real, through_compile = op.tversky(*args), compiled(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op.tversky(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert real.dtype == fake.dtype == through_compile.dtype == by_hand.dtype == autocast
    assert torch.equal(real, by_hand)
    torch.testing.assert_close(through_compile, by_hand)


def test_training_under_autocast_gives_gradients_in_the_parameters_dtype() -> None:
    args = trainable(arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        op.tversky(*args).float().square().mean().backward()
    for tensor in floating(args):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all()


def test_compiled_with_dynamic_shapes_forward_and_backward() -> None:
    compiled = torch.compile(op.tversky, backend="aot_eager", fullgraph=True, dynamic=True)
    for lead in ((2, 3), (4, 7)):
        args = trainable(arguments(**(CASES["chunked"] | {"lead": lead})))
        want, got = (
            torch.autograd.grad(f(*args).sum(), floating(args), allow_unused=True, materialize_grads=True)
            for f in (op.tversky, compiled)
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ precision, memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 512])
def test_the_signed_pair_loses_no_more_than_a_dense_layer(dtype: torch.dtype, width: int) -> None:
    """Both branches meet before the downcast; apart, each rounded, they lose over 3 times what a dense layer loses."""
    g = torch.Generator().manual_seed(width)
    x, w = (torch.randn(64, width, generator=g).to(dtype) for _ in range(2))
    eye = torch.eye(width, dtype=dtype)
    one = torch.ones((), dtype=dtype)
    pair = op.tversky(x, torch.cat((eye, -eye)), w, one, one * 0, one * 0, one, None, *PLAIN, False, False)
    golden = x.double() @ w.double().t()

    def error(y: Tensor) -> float:
        return float((y.double() - golden).abs().max())

    largest = float(golden.abs().max())
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.tensor(largest).log2().floor()
    assert error(pair) <= 2 * error(x @ w.t()) + float(ulp)
    if dtype is torch.bfloat16 and width == 512:  # the same, but for where the branches meet
        branch = [
            op.tversky(x, torch.cat((eye, -eye)), p, None, None, None, None, None, *PLAIN, False, False) for p in (w, -w)
        ]
        assert error(branch[0] - branch[1]) > 3 * error(x @ w.t())


class _Largest(TorchDispatchMode):
    """The most elements any tensor made inside had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("intersection", INTERSECTIONS)
def test_nothing_of_inputs_times_prototypes_times_features_is_made(intersection: str) -> None:
    n, p, k = 8, 4096, 32
    g = torch.Generator().manual_seed(0)
    x, features, prototypes = (torch.randn(rows, 16, generator=g) for rows in (n, k, p))
    half = torch.tensor(0.5)
    names = (intersection, "paper", "subtractmatch", "contrast")
    args = trainable([x, features, prototypes, half, half.clone(), half.clone(), None, None, *names, False, False])
    with _Largest() as forward:
        out = op.tversky(*args)
    with _Largest() as backward:
        out.sum().backward()
    allowed = max(n * reference.CHUNK, p * k)
    assert forward.elements <= allowed < n * p * k / 4
    assert backward.elements <= allowed


# ----------------------------------------------------------------------------------------------- refusals, cost


def _refused() -> Iterator[tuple[str, int, Any, str]]:
    half = torch.tensor
    yield "x not floating", 0, torch.zeros(2, 3, dtype=torch.int64), "x must be floating"
    yield "x too wide", 0, torch.zeros(2, 7), "7 dimensions"
    yield "features", 1, torch.zeros(4), "features must be"
    yield "prototypes", 2, torch.zeros(5, 4), "prototypes have 4"
    yield "theta", 3, torch.zeros(4), "theta must be"
    yield "alpha", 4, torch.zeros(1, 5), "alpha must be"
    yield "negative", 6, torch.zeros(5), "negative must be a scalar"
    yield "bias", 7, half(1.0), "bias must be"
    yield "intersection", 8, "cosine", "unknown intersection 'cosine'; one of product"
    yield "convention", 9, "mine", "unknown convention"
    yield "difference", 10, "substractmatch", "unknown difference"
    yield "form", 11, "linear", "unknown form"


@pytest.mark.parametrize(("position", "value", "message"), [c[1:] for c in _refused()], ids=[c[0] for c in _refused()])
def test_wrong_arguments_are_refused_the_same_way_real_and_fake(position: int, value: Any, message: str) -> None:
    args = arguments()
    args[position] = value
    with pytest.raises(ValueError, match=message):
        op.tversky(*args)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op.tversky(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


def test_arguments_are_named_as_the_schema_names_them() -> None:
    for operator, before in ((op.tversky, 0), (op.tversky_backward, 1)):
        named = [argument.name for argument in operator._schema.arguments]
        assert named[before:] == [field.name for field in fields(Arguments)]


def test_cost_of_the_two_products() -> None:
    """2n(dK + 2KP) with β, 2n(dK + KP) without, and what the prototypes' scores take unless they are stored."""
    n, d, k, p = 6, 3, 4, 5
    cost = REGISTRY[op.tversky].cost
    args = arguments(pair=False, bias=False)
    assert cost(*args).flops == 2 * n * (d * k + 2 * k * p) + 2 * p * d * k
    args[5] = None
    assert cost(*args).flops == 2 * n * (d * k + k * p) + 2 * p * d * k
    stored = arguments(pair=False, bias=False, projected=True)
    assert cost(*stored).flops == 2 * n * (d * k + 2 * k * p)
    assert cost(*stored).bytes_read == 4 * (n * d + k * d + p * k + 3)
    assert cost(*stored).bytes_written == 4 * n * p


def test_cost_of_other_sums_and_of_a_pair() -> None:
    cost = REGISTRY[op.tversky].cost
    product, smallest = (cost(*arguments((i, *PLAIN[1:]), pair=False)).flops for i in ("product", "min"))
    pair = cost(*arguments(("min", *PLAIN[1:]))).flops
    assert product < smallest < pair < 2 * smallest
