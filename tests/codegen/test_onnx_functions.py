# SPDX-License-Identifier: Apache-2.0
"""Each ONNX function computes what its operator computes: any shape, every opset, packed codes as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_sites import (
    BcqEmbedding,
    BcqLinear,
    LevelEmbedding,
    LevelLinear,
    PotEmbedding,
    PotLinear,
    ProductHead,
    TiersHead,
    relative_error,
    run,
    session,
)
from torch import Tensor, nn

from rewriter.codegen.onnx_functions import function_protos, overload_of
from rewriter.codegen.onnx_operator import DOMAIN, MIN_IR_VERSION, VERSION

FLOAT = TensorProto.FLOAT
OPSETS = range(20, 26)


@dataclass(frozen=True)
class Call:
    """One call of an operator: first input ``x``, then the module's tensors ``stored`` (a missing one is empty)."""

    name: str
    module: nn.Module
    stored: tuple[str, ...]
    attributes: dict[str, int]


def file_of(call: Call, rank: int, opset: int) -> bytes:
    name, module, stored = call.name, call.module, call.stored
    tensors = [getattr(module, role) for role in stored]
    inputs = ["x", *("" if t is None else role for role, t in zip(stored, tensors, strict=True))]
    overload = overload_of(name, [bool(i) for i in inputs])
    ids = name.endswith("Embedding")
    node = helper.make_node(name, inputs, ["y"], domain=DOMAIN, overload=overload, **call.attributes)
    graph = helper.make_graph(
        [node],
        "call",
        [helper.make_tensor_value_info("x", TensorProto.INT64 if ids else FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", FLOAT, [None] * (rank + 1 if ids else rank))],
        [numpy_helper.from_array(t.detach().numpy(), r) for r, t in zip(stored, tensors, strict=True) if t is not None],
    )
    model = helper.make_model(
        graph,
        functions=function_protos([(name, overload)], opset),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=MIN_IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def bcq_linear(m: BcqLinear) -> Call:
    attributes = {"group": m.group, "in_features": m.inputs, "compute": FLOAT}
    return Call("BcqLinear", m, ("weight_codes", "weight_scale", "weight_shift", "bias"), attributes)


def bcq_embedding(m: BcqEmbedding) -> Call:
    attributes = {"group": m.group, "in_features": m.inputs, "compute": FLOAT, "dtype": FLOAT}
    return Call("BcqEmbedding", m, ("weight_codes", "weight_scale", "weight_shift"), attributes)


def _pot(m: PotLinear) -> dict[str, int]:
    return dict(zip(("bits", "terms", "group", "in_features"), m.layout, strict=True)) | {"compute": FLOAT}


def pot_linear(m: PotLinear) -> Call:
    return Call("PotLinear", m, ("weight_codes", "weight_scale", "bias"), _pot(m))


def pot_embedding(m: PotEmbedding) -> Call:
    return Call("PotEmbedding", m, ("weight_codes", "weight_scale"), _pot(m) | {"dtype": FLOAT})


def _level(m: LevelLinear) -> dict[str, int]:
    return dict(zip(("bits", "group", "in_features"), m.layout, strict=True)) | {"compute": FLOAT}


def level_linear(m: LevelLinear) -> Call:
    return Call("LevelLinear", m, ("weight_codes", "weight_scale", "weight_levels", "bias"), _level(m))


def level_embedding(m: LevelEmbedding) -> Call:
    stored = ("weight_codes", "weight_scale", "weight_levels")
    return Call("LevelEmbedding", m, stored, _level(m) | {"dtype": FLOAT})


def tiers(m: TiersHead) -> Call:
    return Call("VqLogitsTiers", m, ("codebook", "code_of", "token_bias"), {})


def product(m: ProductHead, width: int) -> Call:
    return Call("VqLogitsProduct", m, ("codebook", "codes", "bias"), {"width": width})


def check(call: Call, *inputs: Tensor, opset: int = 24, tolerance: float = 2e-6) -> None:
    """The file's result equals the operator's at every input; one file serves all inputs of a rank.

    The terms of a sum are of order one, so a result that cancels to less is judged against one.
    """
    sessions = {rank: session(file_of(call, rank, opset)) for rank in {x.dim() for x in inputs}}
    for x in inputs:
        (found,) = run(sessions[x.dim()], x=x)
        assert relative_error(found, call.module(x), floor=1.0) <= tolerance


small = st.integers(1, 40)
seeds = st.integers(0, 2**16)
law = settings(deadline=None, max_examples=25)


@law
@given(
    inputs=small,
    outputs=st.integers(1, 9),
    bits=st.integers(1, 8),
    group=small,
    shift=st.booleans(),
    bias=st.booleans(),
    seed=seeds,
)
def test_bcq_linear(inputs: int, outputs: int, bits: int, group: int, shift: bool, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = BcqLinear(inputs, outputs, bits, group, shift=shift, bias=bias)
    x = torch.randn(2, 3, inputs)
    check(bcq_linear(module), x, x[0], x[0, 0], x[:, :1], x[:0])


@law
@given(width=small, rows=st.integers(1, 9), bits=st.integers(1, 8), group=small, shift=st.booleans(), seed=seeds)
def test_bcq_embedding(width: int, rows: int, bits: int, group: int, shift: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = BcqEmbedding(width, rows, bits, group, shift=shift)
    ids = torch.randint(0, rows, (2, 3))
    check(bcq_embedding(module), ids, ids[0], ids[0, 0], ids[:1, :1])


fields = st.integers(2, 8).flatmap(lambda field: st.tuples(st.just(field), st.integers(1, 12 // field)))


@law
@given(inputs=small, outputs=st.integers(1, 9), field=fields, group=small, bias=st.booleans(), seed=seeds)
def test_pot_linear(inputs: int, outputs: int, field: tuple[int, int], group: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    bits, terms = field
    module = PotLinear(inputs, outputs, bits * terms, terms, group, bias=bias)
    x = torch.randn(2, 3, inputs)
    check(pot_linear(module), x, x[0], x[0, 0], x[:, :1], x[:0])


@law
@given(inputs=small, outputs=st.integers(1, 9), bits=st.integers(1, 12), group=small, bias=st.booleans(), seed=seeds)
def test_level_linear(inputs: int, outputs: int, bits: int, group: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = LevelLinear(inputs, outputs, bits, group, bias=bias)
    x = torch.randn(2, 3, inputs)
    check(level_linear(module), x, x[0], x[:0], x[:, :1])


@law
@given(width=small, rows=st.integers(1, 9), bits=st.integers(1, 12), group=small, seed=seeds)
def test_level_embedding(width: int, rows: int, bits: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(0, rows, (2, 3))
    check(level_embedding(LevelEmbedding(width, rows, bits, group)), ids, ids[0], ids[:, :1])


@law
@given(width=small, rows=st.integers(1, 9), field=fields, group=small, seed=seeds)
def test_pot_embedding(width: int, rows: int, field: tuple[int, int], group: int, seed: int) -> None:
    torch.manual_seed(seed)
    bits, terms = field
    module = PotEmbedding(width, rows, bits * terms, terms, group)
    ids = torch.randint(0, rows, (2, 3))
    check(pot_embedding(module), ids, ids[0], ids[0, 0], ids[:1, :1])


@law
@given(
    width=small,
    tokens=st.integers(1, 40),
    codes=st.sampled_from([1, 5, 256, 257]),
    bias=st.booleans(),
    seed=seeds,
)
def test_tiers(width: int, tokens: int, codes: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = TiersHead(width, tokens, codes, bias=bias)
    h = torch.randn(2, 3, width)
    check(tiers(module), h, h[0], h[0, 0], h[:, :1])


def test_tiers_three_byte_codes() -> None:
    module = TiersHead(2, 50, 70_000)
    check(tiers(module), torch.randn(3, 2))


@law
@given(
    width=small,
    tokens=st.integers(1, 30),
    codes=st.sampled_from([1, 7, 256]),
    dims=st.integers(1, 8),
    bias=st.booleans(),
    seed=seeds,
)
def test_product(width: int, tokens: int, codes: int, dims: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = ProductHead(width, tokens, codes, dims, bias=bias)
    h = torch.randn(2, 3, width)
    check(product(module, width), h, h[0], h[0, 0], h[:, :1])


LINEAR, IDS = torch.randn(2, 5, 21), torch.randint(0, 11, (2, 5))
EVERY: dict[str, tuple[Callable[[], Call], Tensor]] = {
    "BcqLinear": (lambda: bcq_linear(BcqLinear(21, 11, shift=False, bias=False)), LINEAR),
    "BcqLinear:bias": (lambda: bcq_linear(BcqLinear(21, 11, shift=False)), LINEAR),
    "BcqLinear:shift": (lambda: bcq_linear(BcqLinear(21, 11, bias=False)), LINEAR),
    "BcqLinear:shift_bias": (lambda: bcq_linear(BcqLinear(21, 11)), LINEAR),
    "BcqEmbedding": (lambda: bcq_embedding(BcqEmbedding(21, 11, shift=False)), IDS),
    "BcqEmbedding:shift": (lambda: bcq_embedding(BcqEmbedding(21, 11)), IDS),
    "PotLinear": (lambda: pot_linear(PotLinear(21, 11, bias=False)), LINEAR),
    "PotLinear:bias": (lambda: pot_linear(PotLinear(21, 11)), LINEAR),
    "PotEmbedding": (lambda: pot_embedding(PotEmbedding(21, 11)), IDS),
    "LevelLinear": (lambda: level_linear(LevelLinear(21, 11, bias=False)), LINEAR),
    "LevelLinear:bias": (lambda: level_linear(LevelLinear(21, 11)), LINEAR),
    "LevelEmbedding": (lambda: level_embedding(LevelEmbedding(21, 11)), IDS),
    "VqLogitsTiers": (lambda: tiers(TiersHead(21, 11, 5, bias=False)), LINEAR),
    "VqLogitsTiers:bias": (lambda: tiers(TiersHead(21, 11, 5)), LINEAR),
    "VqLogitsProduct": (lambda: product(ProductHead(21, 11), 21), LINEAR),
    "VqLogitsProduct:bias": (lambda: product(ProductHead(21, 11, bias=True), 21), LINEAR),
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", EVERY)
def test_every_function_at_every_opset(name: str, opset: int) -> None:
    call, x = EVERY[name]
    check(call(), x, opset=opset)


def test_embedding_decodes_only_the_rows_asked_for() -> None:
    """The table reaches ``Gather`` as packed bytes, before any bit operation."""
    (embedding,) = [f for f in function_protos([("BcqEmbedding", "shift")], 24) if f.name == "BcqEmbedding"]
    readers = [node.op_type for node in embedding.node if {"codes", "scale", "shift"} & set(node.input)]
    assert readers == ["Gather", "Gather", "Gather"]


def test_bit_operations_stay_in_bytes() -> None:
    """What feeds a bit operation is codes, an 8-bit constant, or another bit operation; never a cast."""
    for function in function_protos([("BcqLinear", "shift"), ("PotLinear", "")], 24):
        made_by = {output: node.op_type for node in function.node for output in node.output}
        for node in function.node:
            if node.op_type in ("BitShift", "BitwiseAnd"):
                assert all(made_by.get(i) != "Cast" for i in node.input)
