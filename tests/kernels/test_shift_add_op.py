# SPDX-License-Identifier: Apache-2.0
"""The operators against dense layers on decoded weights, and everything torch asks of an operator."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.shift_add import codec, op
from rewriter.kernels.spec import REGISTRY

KINDS = ["bcq-pot", "bcq-free", "pot-1", "pot-2", "level"]
OUT = 5


@dataclass(frozen=True)
class Packed:
    """A random packed weight of one kind, with the calls that use it."""

    kind: str
    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    bits: int
    group: int
    width: int

    levels: Tensor | None = None

    @property
    def terms(self) -> int:
        return int(self.kind[-1])

    @property
    def operators(self) -> tuple[OpOverload, OpOverload]:
        """The linear and the embedding operator."""
        family = self.kind.split("-")[0]
        return getattr(op, f"{family}_linear"), getattr(op, f"{family}_embedding")

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.operators[0](x, *self.linear_args(bias))

    def embedding(self, ids: Tensor) -> Tensor:
        return self.operators[1](ids, *self.embedding_args())

    def linear_args(self, bias: Tensor | None) -> tuple[Any, ...]:
        tensors, numbers = self._args
        return *tensors, bias, *numbers

    def embedding_args(self) -> tuple[Any, ...]:
        tensors, numbers = self._args
        return *tensors, *numbers

    @property
    def _args(self) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        if self.kind.startswith("bcq"):
            return (self.codes, self.scale, self.shift), (self.group, self.width)
        if self.kind == "level":
            return (self.codes, self.scale, self.levels), (self.bits, self.group, self.width)
        return (self.codes, self.scale), (self.bits, self.terms, self.group, self.width)

    def decode(self, dtype: torch.dtype) -> Tensor:
        if self.kind.startswith("bcq"):
            return codec.decode_bcq(self.codes, self.scale, self.shift, self.group, self.width, dtype)
        if self.levels is not None:
            layout = (self.bits, self.group, self.width)
            return codec.decode_levels(self.codes, self.scale, self.levels, *layout, dtype)
        return codec.decode_pot(self.codes, self.scale, self.bits, self.terms, self.group, self.width, dtype)


def packed(kind: str, seed: int = 0, width: int = 21, group: int = 8, dtype: torch.dtype = torch.float64) -> Packed:
    g = torch.Generator().manual_seed(seed)
    groups, bits = -(-width // group), 3 if kind.startswith("bcq") else 4
    if kind.startswith("bcq"):
        codes = codec.pack_bits(torch.randint(0, 2, (OUT, bits, width), generator=g))
        shift = codec.pack_nibbles(torch.randint(0, 5, (OUT, groups, bits), generator=g))
        if kind == "bcq-pot":
            return Packed(kind, codes, _scale(g, dtype, OUT, groups), shift, bits, group, width)
        return Packed(kind, codes, _scale(g, dtype, OUT, groups, bits), None, bits, group, width)
    codes = codec.pack_stream(torch.randint(0, 1 << bits, (OUT, width), generator=g), bits)
    scale = _scale(g, dtype, OUT, groups)
    if kind == "level":  # any table will do, stored wide or narrow
        levels = torch.randn(1 << bits, generator=g, dtype=torch.float64).to(torch.float16).to(dtype)
        return Packed(kind, codes, scale, None, bits, group, width, levels)
    return Packed(kind, codes, scale, None, bits, group, width)


def _scale(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.rand(shape, generator=g, dtype=torch.float64) + 0.5).to(torch.float16).to(dtype)


def _input(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------- values


@settings(deadline=None, max_examples=50)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31 - 1),
    width=st.integers(1, 40),
    group=st.integers(1, 48),
    batch=st.lists(st.integers(0, 3), max_size=3),
    with_bias=st.booleans(),
)
def test_linear_is_the_dense_layer_on_the_decoded_weight(
    kind: str, seed: int, width: int, group: int, batch: list[int], with_bias: bool
) -> None:
    weight = packed(kind, seed, width, group)
    x, bias = _input(*batch, width), _input(OUT, seed=1) if with_bias else None
    expected = F.linear(x, weight.decode(torch.float64), bias)
    actual = weight.linear(x, bias)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31 - 1),
    width=st.integers(1, 40),
    group=st.integers(1, 48),
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_embedding_is_the_rows_of_the_decoded_weight(
    kind: str, seed: int, width: int, group: int, shape: list[int], dtype: torch.dtype
) -> None:
    weight = packed(kind, seed, width, group, torch.float32)
    ids = torch.randint(0, OUT, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    assert torch.equal(weight.embedding(ids), F.embedding(ids, weight.decode(torch.float32)))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_activations_give_the_same_contiguous_result(kind: str) -> None:
    weight = packed(kind)
    x = _input(3, 4, weight.width)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat_interleave(2, -1)[..., ::2]):
        assert not strided.is_contiguous()
        out = weight.linear(strided)
        assert out.is_contiguous()
        torch.testing.assert_close(out, weight.linear(x), rtol=0, atol=1e-12)
    assert weight.linear(x[0, 0]).shape == (OUT,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reduced_precision_multiplies_the_rounded_weight(kind: str, dtype: torch.dtype) -> None:
    weight = packed(kind, dtype=dtype)
    x = _input(4, weight.width, dtype=dtype)
    found = REGISTRY[weight.operators[0]].reference(x, *weight.linear_args(None))
    assert torch.equal(found, F.linear(x, weight.decode(torch.float32).to(dtype)))


@pytest.mark.parametrize("kind", KINDS)
def test_output_dtypes_follow_activations_and_embeddings_their_scales(kind: str) -> None:
    for scale in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weight = packed(kind, dtype=scale)
        assert weight.embedding(torch.tensor([0, 1])).dtype is scale
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            bias = torch.zeros(OUT, dtype=scale)
            assert weight.linear(_input(2, weight.width, dtype=dtype), bias).dtype is dtype


# ---------------------------------------------------------------------------------- what torch asks


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    weight = packed(kind)
    trained = replace(weight, scale=weight.scale.requires_grad_())
    x, bias = _input(2, 3, weight.width).requires_grad_(), _input(OUT).requires_grad_()
    linear, embedding = weight.operators
    torch.library.opcheck(linear, (x, *trained.linear_args(bias)))
    torch.library.opcheck(linear, (x.detach(), *weight.linear_args(None)))
    torch.library.opcheck(embedding, (torch.tensor([[0, 4], [4, 1]]), *trained.embedding_args()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    weight = packed(kind)
    x, bias = _input(2, 3, weight.width).requires_grad_(), _input(OUT).requires_grad_()
    scale = weight.scale.requires_grad_()

    def linear(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return replace(weight, scale=scale).linear(x, bias)

    assert torch.autograd.gradcheck(linear, (x, scale, bias))
    assert torch.autograd.gradgradcheck(linear, (x, scale, bias))
    ids = torch.tensor([[0, 4], [4, 1]])
    assert torch.autograd.gradcheck(lambda scale: replace(weight, scale=scale).embedding(ids), (scale,))


def test_the_table_has_gradients_too() -> None:
    weight = packed("level")
    x, levels, ids = _input(2, weight.width), weight.levels.requires_grad_(), torch.tensor([[0, 4], [4, 1]])
    assert torch.autograd.gradcheck(lambda levels: replace(weight, levels=levels).linear(x), (levels,))
    assert torch.autograd.gradgradcheck(lambda levels: replace(weight, levels=levels).linear(x), (levels,))
    assert torch.autograd.gradcheck(lambda levels: replace(weight, levels=levels).embedding(ids), (levels,))
    trained = replace(weight, levels=levels, scale=weight.scale.clone().requires_grad_())
    torch.library.opcheck(op.level_linear, (x.requires_grad_(), *trained.linear_args(_input(OUT).requires_grad_())))
    torch.library.opcheck(op.level_embedding, (ids, *trained.embedding_args()))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gradients_asked_for_are_computed(kind: str) -> None:
    weight = packed(kind)
    x = _input(2, weight.width).requires_grad_()
    weight.linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.decode(torch.float64).sum(0).expand(2, -1), rtol=0, atol=1e-12)
    assert weight.scale.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_batches_have_zero_gradients(kind: str, shape: tuple[int, ...]) -> None:
    weight = packed(kind)
    scale = weight.scale.requires_grad_()
    x = _input(*shape, weight.width).requires_grad_()
    replace(weight, scale=scale).linear(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert scale.grad is not None and not scale.grad.any()
    rows = weight.embedding(torch.zeros(shape, dtype=torch.int64))
    assert rows.shape == (*shape, weight.width)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_activations_and_over_everything_else(kind: str) -> None:
    weight = packed(kind)
    x = _input(4, 3, weight.width)
    expected = weight.linear(x)
    for axis in (0, 1):
        actual = torch.vmap(weight.linear, in_dims=axis, out_dims=axis)(x)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    ids = torch.tensor([[0, 4], [4, 1], [2, 2]])
    assert torch.equal(torch.vmap(weight.embedding)(ids), weight.embedding(ids))

    scales = torch.stack([weight.scale, 2 * weight.scale])
    both = torch.vmap(lambda scale, x: replace(weight, scale=scale).linear(x))(scales, x[:2])
    torch.testing.assert_close(both, torch.stack([expected[0], 2 * expected[1]]), rtol=0, atol=1e-12)

    one = x[0, 0].requires_grad_()
    (jacobian,) = torch.autograd.grad(weight.linear(one), one, torch.eye(OUT).double(), is_grads_batched=True)
    torch.testing.assert_close(jacobian, weight.decode(torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_no_weights_is_refused(kind: str) -> None:
    weight = packed(kind)
    none, x = weight.scale.unsqueeze(0)[:0], _input(weight.width)
    with pytest.raises(NotImplementedError, match="at least one example"):
        torch.vmap(lambda scale: replace(weight, scale=scale).linear(x))(none)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_agrees_between_eager_fake_and_compiled(kind: str, autocast: torch.dtype) -> None:
    weight, bias = packed(kind, dtype=torch.float32), _input(OUT, dtype=torch.float32)
    for dtype in (torch.float32, torch.float64):
        expected = autocast if dtype is torch.float32 else torch.float64  # autocast leaves float64 alone
        x = _input(2, weight.width, dtype=dtype)
        with torch.autocast("cpu", dtype=autocast):
            real = weight.linear(x, bias)
            torch._dynamo.reset()
            compiled = torch.compile(weight.linear, backend="aot_eager", fullgraph=True)(x, bias)
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = weight.linear(mode.from_tensor(x), bias)
        assert real.dtype is compiled.dtype is fake.dtype is expected
        assert torch.equal(real, compiled)
        assert torch.equal(real, weight.linear(x.to(expected), bias))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_equals_eager_training(kind: str) -> None:
    weight = packed(kind)
    x, bias = _input(3, weight.width).requires_grad_(), _input(OUT).requires_grad_()
    scale = weight.scale.requires_grad_()

    def loss(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return replace(weight, scale=scale).linear(x, bias).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(loss(x, scale, bias), (x, scale, bias)),
        torch.autograd.grad(compiled(x, scale, bias), (x, scale, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_export_keeps_one_node_and_decomposes_to_the_reference(kind: str) -> None:
    weight = packed(kind, dtype=torch.float32)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return weight.linear(x)

    x = _input(3, weight.width, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {0: batch}})
    ours = [n.target for n in program.graph.nodes if n.target in REGISTRY]
    assert ours == [weight.operators[0]]
    inlined = program.run_decompositions({ours[0]: REGISTRY[ours[0]].reference})
    assert not any(n.target in REGISTRY for n in inlined.graph.nodes)
    for rows in (1, 7):
        other = _input(rows, weight.width, dtype=torch.float32)
        torch.testing.assert_close(inlined.module()(other), weight.linear(other), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------- cost and refusals


def test_cost_counts_packed_bytes_and_the_rows_read() -> None:
    weight = packed("bcq-pot", width=128, group=128, dtype=torch.float16)
    x, bias = _input(2, 3, 128, dtype=torch.float16), torch.zeros(OUT, dtype=torch.float16)
    cost = REGISTRY[op.bcq_linear].cost(x, *weight.linear_args(bias))
    codes, scales, shifts = OUT * 3 * 16, OUT * 2, OUT * 2
    assert cost.bytes_read == 6 * 128 * 2 + codes + scales + shifts + OUT * 2
    assert cost.bytes_written == 6 * OUT * 2
    assert cost.flops == 2 * 6 * OUT * 128 + 3 * OUT * 128
    ids = torch.tensor([0, 1])
    rows = REGISTRY[op.bcq_embedding].cost(ids, *weight.embedding_args())
    assert rows.bytes_read == 2 * 8 + 2 * (codes + scales + shifts) // OUT
    assert rows.bytes_written == 2 * 128 * 2
    four = packed("pot-1", width=128, group=128, dtype=torch.float16)
    assert REGISTRY[op.pot_linear].cost(x, *four.linear_args(None)).bytes_read == 6 * 256 + OUT * 64 + OUT * 2
    assert REGISTRY[op.pot_embedding].cost(ids, *four.embedding_args()).bytes_read == 16 + 2 * (64 + 2)

    level = packed("level", width=128, group=128, dtype=torch.float16)
    table = 16 * 2
    cost = REGISTRY[op.level_linear].cost(x, *level.linear_args(None))
    assert cost.bytes_read == 6 * 256 + OUT * 64 + OUT * 2 + table
    assert cost.flops == 2 * 6 * OUT * 128 + OUT * 128
    assert REGISTRY[op.level_embedding].cost(ids, *level.embedding_args()).bytes_read == 16 + 2 * (64 + 2) + table


BCQ, POT, LEVEL = packed("bcq-pot"), packed("pot-2"), packed("level")
X = _input(2, 21)
REFUSED: list[tuple[Callable[[], Tensor], str]] = [
    (lambda: BCQ.linear(_input(2, 20)), "x has 20 features, the weight in_features=21"),
    (lambda: BCQ.linear(X.to(torch.int64)), "x must be floating"),
    (lambda: BCQ.linear(torch.tensor(1.0)), "at least one dimension"),
    (lambda: BCQ.linear(X, _input(4)), "bias must be [5], got [4]"),
    (lambda: BCQ.linear(X, torch.zeros(OUT, dtype=torch.int64)), "bias must be floating"),
    (lambda: replace(BCQ, codes=BCQ.codes.to(torch.int8)).linear(X), "codes must be uint8"),
    (lambda: replace(BCQ, codes=BCQ.codes[0]).linear(X), "codes must be [out, bits, bytes]"),
    (lambda: replace(BCQ, codes=BCQ.codes[..., :2]).linear(X), "codes need 3 bytes for in_features=21, got 2"),
    (lambda: replace(BCQ, codes=BCQ.codes[:, :0]).linear(X), "1 to 8 bases are supported, codes have 0"),
    (lambda: replace(BCQ, scale=BCQ.scale[:, :2]).linear(X), "scale must be [5, 3], got [5, 2]"),
    (lambda: replace(BCQ, scale=BCQ.scale.to(torch.int32)).linear(X), "scale must be floating"),
    (lambda: replace(BCQ, shift=None).linear(X), "scale must be [5, 3, 3], got [5, 3]"),
    (lambda: replace(BCQ, shift=BCQ.codes[:, :1]).linear(X), "shift must be [5, 3, 2]"),
    (lambda: replace(BCQ, group=0).linear(X), "group must be at least 1"),
    (lambda: replace(BCQ, width=0).linear(X[:, :0]), "in_features must be at least 1"),
    (lambda: BCQ.embedding(torch.tensor([0.0])), "ids must be int32 or int64"),
    (lambda: replace(POT, bits=3).linear(X), "bits=3 does not divide into terms=2"),
    (lambda: replace(POT, bits=2).linear(X), "at least 2, a sign and a magnitude"),
    (lambda: replace(POT, bits=16).linear(X), "more than the 12 bits"),
    (lambda: replace(POT, kind="pot-0").linear(X), "terms must be at least 1"),
    (lambda: replace(POT, kind="pot-1", bits=10).linear(X), "sub-fields above 8 bits"),
    (lambda: replace(POT, codes=POT.codes[:, 1:]).linear(X), "codes need 11 bytes"),
    (lambda: replace(POT, codes=POT.codes[0]).linear(X), "codes must be [out, bytes]"),
    (lambda: replace(POT, codes=POT.codes.to(torch.int32)).linear(X), "codes must be uint8"),
    (lambda: replace(LEVEL, bits=13).linear(X), "bits=13 must be 1 to 12"),
    (lambda: replace(LEVEL, bits=3).linear(X), "codes need 8 bytes for in_features=21 at 3 bits, got 11"),
    (lambda: replace(LEVEL, codes=LEVEL.codes[0]).linear(X), "codes must be [out, bytes]"),
    (lambda: replace(LEVEL, codes=LEVEL.codes.to(torch.int32)).linear(X), "codes must be uint8"),
    (lambda: replace(LEVEL, scale=LEVEL.scale[1:]).linear(X), "scale must be [5, 3], got [4, 3]"),
    (lambda: replace(LEVEL, levels=LEVEL.codes[0]).linear(X), "levels must be floating"),
    (lambda: replace(LEVEL, levels=LEVEL.levels[1:]).linear(X), "levels must be [16], got [15]"),
    (lambda: LEVEL.embedding(torch.tensor([0.5])), "ids must be int32 or int64"),
    (lambda: POT.embedding(torch.tensor([True])), "ids must be int32 or int64"),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[message for _, message in REFUSED])
def test_bad_arguments_are_refused_alike_by_the_operator_and_its_fake(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [-1, OUT])
def test_rows_that_do_not_exist_are_refused(kind: str, row: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        packed(kind).embedding(torch.tensor([0, row]))
