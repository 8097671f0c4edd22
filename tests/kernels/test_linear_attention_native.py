# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels of linear attention: as exact as the reference, inside their buffers, the same for all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import attention_cases as cases
import pytest
import torch
from attention_cases import after, call, case, near, real
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels import native as builder
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.linear_attention import features_op, native, op
from rewriter.kernels.spec import REGISTRY

Args = cases.Args
SEEDS = st.integers(0, 2**31 - 1)
NATIVE = {"additive": native.linear_attention, "hybrid": native.hybrid_attention}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths and windows around the kernel's blocks of 64 queries and vectors of 4, 8 and 16.
LENGTHS = st.sampled_from((0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200))
WIDTHS = st.sampled_from((1, 5, 16, 33))


def reference(rule: str, args: Args) -> tuple[Tensor, ...]:
    return REGISTRY[cases.OPERATORS[rule]].reference(*args.values())


def wide(args: Args) -> Args:
    return {n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in args.items()}


def as_exact(got: Tensor, usual: Tensor, golden: Tensor, exponent: float = 0.0, ulps: int = 8) -> None:
    """Off from float64 by at most twice what the reference is off in the same dtype, and by sums in another order.

    Such a sum that is an exponent, of magnitude up to ``exponent``, changes the result by as much relative to its size.
    """
    assert got.shape == usual.shape and got.dtype is usual.dtype and got.is_contiguous()
    if not got.is_floating_point():
        assert torch.equal(got, usual)
    elif got.numel():
        error, usual_error = ((x.double() - golden).abs().max() for x in (got, usual))
        size = float(golden.abs().max())
        order = (ulps + 2 * exponent) * torch.finfo(torch.float32).eps * size
        assert float(error) <= 2 * float(usual_error) + order, (error, usual_error, size)


def agrees(rule: str, args: Args, ulps: int = 8) -> None:
    results = zip(NATIVE[rule](*args.values()), reference(rule, args), reference(rule, wide(args)), strict=True)
    for n, triple in enumerate(results):
        as_exact(*(real(args, x) if n == 0 else x for x in triple), ulps=ulps)


@contextmanager
def sizes(heads: int, width: int, features: int, values: int) -> Iterator[None]:
    """Other sizes of `attention_cases` than its own, which are below a vector."""
    before = cases.HK, cases.D, cases.F, cases.DV
    cases.HK, cases.D, cases.F, cases.DV = heads, width, features, values
    try:
        yield
    finally:
        cases.HK, cases.D, cases.F, cases.DV = before


@st.composite
def calls(draw: Any, rule: str, lengths: Any = LENGTHS, widths: Any = WIDTHS) -> Args:
    """Any call the kernel does, alone or going on from another one."""
    options: dict[str, Any] = {"dtype": draw(st.sampled_from(DTYPES)), "batch": draw(st.integers(1, 2))}
    options["decay"] = draw(st.sampled_from((None, 1, 3) if rule == "additive" else (None, 1)))
    if rule == "additive":
        options["normalise"] = draw(st.sampled_from(("sum", "none")))
    else:
        options |= {
            "window": draw(st.sampled_from((1, 2, 17, 64, 70))),
            "anchor": draw(st.sampled_from(("max", "none"))),
        }
    shape = (draw(st.sampled_from((1, 2, 4))), *(draw(widths) for _ in range(3)))
    with sizes(*shape):
        args = random_call(rule, draw(lengths), draw(SEEDS), draw(st.sampled_from(("none", "left", "any"))), options)
        if draw(st.booleans()):
            earlier = random_call(rule, draw(LENGTHS), draw(SEEDS), "none", options)
            args = after(rule, args, reference(rule, earlier))
    if rule == "hybrid" and draw(st.booleans()):
        unmapped = dict.fromkeys(("q_map", "k_map", "map_scale", "log_decay"))
        args |= unmapped
        if args["past_k"] is not None:
            args = after(rule, args, reference(rule, earlier | unmapped))
    return args


def random_call(rule: str, length: int, seed: int, padding: str, options: dict[str, Any]) -> Args:
    return case(rule, length, seed, padding=padding if length else "none", **options)


@pytest.mark.parametrize("rule", NATIVE)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_kernel_is_as_exact_as_the_reference(rule: str, data: st.DataObject) -> None:
    agrees(rule, data.draw(calls(rule)))


@pytest.mark.parametrize("rule", NATIVE)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_one_token_of_whole_vectors_is_as_exact_as_the_reference(rule: str, data: st.DataObject) -> None:
    """The way through `step.h`."""
    agrees(rule, data.draw(calls(rule, st.just(1), st.sampled_from((16, 32, 144)))))


def test_a_batch_of_nothing_is_nothing() -> None:
    for rule, function in NATIVE.items():
        args = case(rule, 3, 0, dtype=torch.float32)
        empty = {n: a[:0] if isinstance(a, Tensor) and a.dim() > 1 else a for n, a in args.items()}
        assert all(x.numel() == 0 for x in function(*empty.values()))


@pytest.mark.parametrize("rule", NATIVE)
def test_long_sums_stay_exact(rule: str) -> None:
    """4096 positions in 64 blocks: errors of a state do not pile up."""
    with sizes(2, 16, 16, 16):
        for decay in (None, 1):
            agrees(rule, case(rule, 4096, 1, decay=decay, dtype=torch.float32, batch=1, chunk=64))


def test_decays_are_differences_of_long_sums() -> None:
    """Near keys count most though both running sums of a block are near −100, where float32 is coarse."""
    with sizes(2, 16, 16, 16):
        args = case("hybrid", 192, 1, decay=1, dtype=torch.float32, window=64)
    agrees("hybrid", args | {"log_decay": -0.8 + 0.2 * torch.arange(4)}, ulps=1)


@pytest.mark.parametrize("rule", NATIVE)
def test_strides_do_not_matter(rule: str) -> None:
    with sizes(2, 12, 12, 12):
        args = case(rule, 70, 3, dtype=torch.float32)
    moved = {
        # [B, T, h, D] in memory, as transformers has it, or its last dimension strided
        n: a.transpose(1, 2).contiguous().transpose(1, 2) if n in "qkv" else a.repeat_interleave(2, -1)[..., ::2]
        for n, a in args.items()
        if isinstance(a, Tensor) and a.dim() == 4
    }
    for a, b in zip(NATIVE[rule](*(args | moved).values()), NATIVE[rule](*args.values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", (1, 20))
def test_caches_of_another_dtype_are_taken_in_that_of_the_tokens(length: int) -> None:
    """As after a call under autocast: rows were copied as bytes of the other width."""
    with sizes(2, 16, 16, 16):
        args = case("hybrid", length, 1, dtype=torch.bfloat16, window=17)
        past = reference("hybrid", case("hybrid", 30, 2, dtype=torch.float32, window=17))
    same = [x.bfloat16() if n in (1, 2, 3) else x for n, x in enumerate(past)]
    got, want = (native.hybrid_attention(*after("hybrid", args, p).values()) for p in (past, same))
    for a, b in zip(got, want, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


# -- feature maps ------------------------------------------------------------------------------------------------


def features_call(
    kind: str, seed: int, shape: Sequence[int], columns: int, dtype: torch.dtype, scale: float
) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    batch, heads, length, width = shape
    sizes_ = ((heads, width, columns), (heads, columns), (heads, width, columns), (heads, columns))
    parameters = [torch.randn(s, generator=g) * width**-0.5 for s in sizes_]
    x = torch.randn(batch, heads, length, width, generator=g).to(dtype)
    return [x, *(p if n < features_op.KINDS[kind] else None for n, p in enumerate(parameters)), kind, scale]


def features_agree(args: list[Any]) -> None:
    golden = [a.double() if isinstance(a, Tensor) else a for a in args]
    formula, exponent = REGISTRY[op.attention_features].reference, 0.0
    if args[1] is not None and args[0].numel():
        exponent = float((args[-1] * golden[0] @ golden[1]).abs().max())
    as_exact(native.attention_features(*args), formula(*args), formula(*golden), exponent)


@pytest.mark.parametrize("kind", features_op.KINDS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_feature_maps_are_as_exact_as_the_reference(kind: str, data: st.DataObject) -> None:
    width, columns = (data.draw(st.sampled_from((1, 3, 16, 33))) for _ in range(2))
    shape = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(LENGTHS), width)
    dtype, scale = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from((1.0, 0.3, 8.0)))
    args = features_call(kind, data.draw(SEEDS), shape, columns, dtype, scale)
    features_agree(args)


@pytest.mark.parametrize("kind", features_op.KINDS)
def test_what_torch_asks_of_the_operator_of_features(kind: str) -> None:
    args = features_call(kind, 0, (2, 3, 5, 4), 6, torch.float32, 0.5)
    leaves = tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in args)
    torch.library.opcheck(op.attention_features, leaves)
    exact = [a.detach().double().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    tensors = [a for a in exact if isinstance(a, Tensor)]
    rest = exact[len(tensors) :]
    assert torch.autograd.gradcheck(lambda *t: op.attention_features(*t, *rest), tensors, fast_mode=True)
    x, *others = (a.detach() if isinstance(a, Tensor) else a for a in args)
    rows = torch.stack([x, 2 * x])
    for n, mapped in enumerate(torch.vmap(lambda r: op.attention_features(r, *others))(rows)):
        near(mapped, op.attention_features(rows[n], *others), 1e-6)
    if others[0] is not None:
        weights = torch.stack([others[0], -others[0]])
        both = torch.vmap(lambda w: op.attention_features(x, w, *others[1:]))(weights)
        near(both[1], op.attention_features(x, -others[0], *others[1:]), 1e-6)


def test_wrong_features_are_named() -> None:
    x, weight, *rest = features_call("hedgehog", 0, (1, 2, 3, 4), 5, torch.float32, 1.0)
    for wrong, message in (
        ((x[0], weight, *rest), r"x must be \[batch"),
        ((x, None, *rest), "hedgehog has weight, and no others"),
        ((x, weight[:1], *rest), "weight must be"),
        ((x, weight, *rest[:3], "cosine", 1.0), "kind must be one of elu"),
        ((x, weight, *rest[:3], "elu", 1.0), "elu has no parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            op.attention_features(*wrong)


# -- memory and threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", (67, 1))
@pytest.mark.parametrize("rule", (*NATIVE, "features"))
def test_nothing_is_read_or_written_beside_the_tensors(rule: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are surrounded by NaN, which would show in the results, and results by a pattern that must stay."""
    made: list[tuple[Tensor, int]] = []

    def guarded(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        count = torch.Size(shape).numel()
        block = torch.full((count + 128,), 77, dtype=torch.uint8 if dtype is torch.bool else dtype)
        made.append((block, count))
        return block[64 : 64 + count].view(dtype).view(shape)

    monkeypatch.setattr(native, "_made", guarded)
    with sizes(2, *((16, 32, 16) if length == 1 else (5, 7, 9))):
        args = case(rule if rule != "features" else "additive", length, 5, dtype=torch.float32, decay=1)
        if rule == "hybrid":
            args = after(rule, args, reference(rule, case(rule, 9, 6, dtype=torch.float32, decay=1)))
    if rule == "features":
        names = ("x", "weight", "bias", "gain_weight", "gain_bias", "kind", "scale")
        args = dict(
            zip(
                names,
                features_call("landmark", 0, (2, 3, length, 5), 16 if length == 1 else 7, torch.float32, 1.0),
                strict=True,
            )
        )
    function: Callable[..., Any] = native.attention_features if rule == "features" else NATIVE[rule]
    want, made[:] = function(*args.values()), []
    poisoned = {n: surrounded(a) if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in args.items()}
    got = function(*poisoned.values())
    for a, b in zip(*((r,) if isinstance(r, Tensor) else r for r in (got, want)), strict=True):
        assert torch.equal(a, b)
    assert made and all((b[:64] == 77).all() and (b[64 + n :] == 77).all() for b, n in made)


def surrounded(x: Tensor) -> Tensor:
    """The same values between NaNs: before, after, and after each row."""
    around = torch.full([s + 2 for s in x.shape], torch.nan)
    inner = around[tuple(slice(1, -1) for _ in x.shape)]
    inner.copy_(x)
    return inner


@pytest.mark.parametrize("rule", NATIVE)
def test_results_do_not_depend_on_threads(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "threads", lambda work, grain: torch.get_num_threads())
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):  # five are more than there are states, not more than there are heads of queries
            torch.set_num_threads(count)
            with sizes(2, 8, 8, 8):
                results.append(NATIVE[rule](*case(rule, 150, 0, dtype=torch.float32, decay=1).values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_python_threads_may_call_at_the_same_time() -> None:
    """Each has buffers of its own, whatever the sizes of the others' calls."""

    def work(n: int) -> None:
        for length in (1, 900, 40):
            args = case("hybrid", length, n, dtype=torch.float32, window=1 + 30 * (n % 3))
            want = native.hybrid_attention(*args.values())
            for _ in range(5):
                again = native.hybrid_attention(*args.values())
                assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))

    with sizes(2, 32, 32, 32), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


# -- where it is used, and where not -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", (("-mno-avx512f",), ("-mno-avx",)), ids=("eight lanes", "four lanes"))
def test_processors_with_shorter_vectors(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if builder.platform.machine() != "x86_64":
        pytest.skip("these are flags of x86")

    def narrow(source: str, name: str) -> Any:
        path = native.Path(native.__file__).with_name(source)
        return getattr(builder.library(path, {}, {name: (native.ctypes.c_void_p,)}, (*builder.FLAGS, *flags)), name)

    monkeypatch.setattr(native, "_function", narrow)
    with sizes(2, 33, 20, 17):
        agrees("additive", case("additive", 150, 1, dtype=torch.float32, decay=3, padding="any"))
        agrees("hybrid", case("hybrid", 150, 2, dtype=torch.bfloat16, decay=1, padding="left", window=64))
    with sizes(2, 16, 32, 16):
        earlier = reference("hybrid", case("hybrid", 20, 3, dtype=torch.float32, decay=1, window=17))
        agrees("hybrid", after("hybrid", case("hybrid", 1, 4, dtype=torch.float32, decay=1, window=17), earlier))
    for kind in features_op.KINDS:
        args = features_call(kind, 3, (2, 3, 67, 19), 21, torch.float32, 1.0)
        features_agree(args)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("additive", {"dtype": torch.float64}),
        ("additive", {"decay": 4}),
        ("additive", {"causal": False}),
        ("hybrid", {"dtype": torch.float64}),
        ("hybrid", {"block": "terrace"}),
        ("hybrid", {"sinks": 1}),
    ],
)
def test_what_the_kernel_does_not_do_runs_the_reference(rule: str, options: dict[str, Any]) -> None:
    args = case(rule, 9, 0, **({"dtype": torch.float32} | options))
    with pytest.raises(Unsupported):
        NATIVE[rule](*args.values())
    for a, b in zip(call(rule, args), reference(rule, args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", NATIVE)
def test_the_operator_runs_the_kernel_and_without_a_compiler_the_reference(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = case(rule, 70, 0, dtype=torch.float32)
    for a, b in zip(call(rule, args), NATIVE[rule](*args.values()), strict=True):
        assert torch.equal(a, b)

    def missing(*_: Any) -> Any:
        raise Unsupported("no C++ compiler")

    monkeypatch.setattr(native, "_function", missing)
    for a, b in zip(call(rule, args), reference(rule, args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", NATIVE)
def test_gradients_are_the_references(rule: str) -> None:
    args = case(rule, 20, 0, dtype=torch.float32)
    leaves = [args[n].requires_grad_() for n in ("q", "k", "v")]
    weight = torch.randn(call(rule, args)[0].shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((call(rule, args)[0] * weight).sum(), leaves)
    want = torch.autograd.grad((reference(rule, args)[0] * weight).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        near(a, b, 1e-5)
