# SPDX-License-Identifier: Apache-2.0
"""The rewrites the cases try, as their author would first write them: the formula, and no guards.

Each is stated for this engine, and as the same pair of Python functions for engines whose patterns are traced. No
author's guard says when they are legal: that is what the corpus asks of the engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rewriter
from rewriter.expressions import Operator
from rewriter.operators import addmm, baddbmm, cast, dropout, exp, linear, relu, sigmoid, swap_last
from rewriter.pattern import Const, Var, pattern
from rewriter.rules import Pass

aten = torch.ops.aten
x, y, z = Var("x"), Var("y"), Var("z")


@dataclass(frozen=True)
class Traced:
    """A pattern and its replacement as Python functions of the same tensors, and examples of those."""

    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    examples: tuple[Tensor, ...]


@dataclass(frozen=True)
class Rewrite:
    """One rewrite.

    Attributes:
        formula: for readers; ours: the pass; traced: every spelling a user of traced patterns would register.
    """

    formula: str
    ours: Pass
    traced: tuple[Traced, ...]


_M, _N = torch.rand(3, 4), torch.rand(3, 4)
_SQUARE = torch.rand(4, 4)
_HEADS = tuple(torch.rand(2, 3, 5, 4) for _ in range(3))


@rewriter.rule(pattern("x·σ(x)", x * sigmoid(x)), name="corpus_silu")
def _silu(edit, x):
    """x·σ(x) = silu(x)"""
    return edit.call(aten.silu.default, x)


SILU = Rewrite("x·σ(x) = silu(x)", _silu, (Traced(lambda x: x * torch.sigmoid(x), lambda x: F.silu(x), (_M,)),))


@rewriter.rule(pattern("x + (−y)", x + -y), name="corpus_subtract")
def _subtract(edit, x, y):
    """x + (−y) = x − y"""
    return edit.call(aten.sub.Tensor, x, y)


SUBTRACT = Rewrite(
    "x + (−y) = x − y", _subtract, (Traced(lambda x, y: x + -y, lambda x, y: x - y, (_M, _N)),)
)  # fmt: skip


@rewriter.rule(pattern("x·y + x·z", x * y + x * z), name="corpus_factor")
def _factor(edit, x, y, z):
    """x·y + x·z = x·(y + z)"""
    return edit.call(aten.mul.Tensor, x, edit.call(aten.add.Tensor, y, z))


FACTOR = Rewrite(
    "x·y + x·z = x·(y + z)",
    _factor,
    (Traced(lambda x, y, z: x * y + x * z, lambda x, y, z: x * (y + z), (_M, _N, _M + 1)),),
)


@rewriter.rule(pattern("x + x", x + x), name="corpus_double")
def _double(edit, x):
    """x + x = 2x"""
    return edit.call(aten.mul.Tensor, x, 2)


DOUBLE = Rewrite("x + x = 2x", _double, (Traced(lambda x: x + x, lambda x: x * 2, (_M,)),))


@rewriter.rule(pattern("x·x", x * x), name="corpus_square")
def _square(edit, x):
    """x·x = x²"""
    return edit.call(aten.pow.Tensor_Scalar, x, 2)


SQUARE = Rewrite("x·x = x²", _square, (Traced(lambda x: x * x, lambda x: x**2, (_M,)),))


@rewriter.rule(pattern("x·1", x * 1), name="corpus_one")
def _one(edit, x):
    """x·1 = x"""
    return x


ONE = Rewrite("x·1 = x", _one, (Traced(lambda x: x * 1, lambda x: x, (_M,)),))


@rewriter.rule(pattern("xᵀᵀ", swap_last(swap_last(x))), name="corpus_transposed_twice")
def _transposed_twice(edit, x):
    """(xᵀ)ᵀ = x"""
    return x


TRANSPOSED_TWICE = Rewrite(
    "(xᵀ)ᵀ = x",
    _transposed_twice,
    (
        Traced(lambda x: x.transpose(-2, -1).transpose(-2, -1), lambda x: x, (_M,)),
        Traced(lambda x: x.t().t(), lambda x: x, (_M,)),
    ),
)


@rewriter.rule(pattern("max(max(x, 0), 0)", relu(relu(x))), name="corpus_relu_twice")
def _relu_twice(edit, x):
    """max(max(x, 0), 0) = max(x, 0)"""
    return edit.call(aten.relu.default, x)


RELU_TWICE = Rewrite(
    "max(max(x, 0), 0) = max(x, 0)",
    _relu_twice,
    (Traced(lambda x: torch.relu(torch.relu(x)), lambda x: torch.relu(x), (_M,)),),
)


@rewriter.rule(
    pattern("there and back", cast(cast(x, torch.float64), torch.float32)), name="corpus_there_and_back"
)
def _there_and_back(edit, x):
    """float32(float64(x)) = x"""
    return x


THERE_AND_BACK = Rewrite(
    "float32(float64(x)) = x",
    _there_and_back,
    (Traced(lambda x: x.to(torch.float64).to(torch.float32), lambda x: x, (_M,)),),
)

_sum = Operator("sum", (aten.sum.dim_IntList,), ("x", "dim", "keepdim"))
_e = exp(x)


@rewriter.rule(pattern("exp(x) / Σ exp(x)", _e / _sum(_e, -1, True)), name="corpus_normalise")
def _normalise(edit, x):
    """exp(x) / Σ exp(x) = softmax(x)"""
    return edit.call(aten.softmax.int, x, -1)


NORMALISE = Rewrite(
    "exp(x) / Σ exp(x) = softmax(x)",
    _normalise,
    (Traced(lambda x: (e := torch.exp(x)) / e.sum([-1], True), lambda x: torch.softmax(x, -1), (_M,)),),
)


@rewriter.rule(pattern("x / 4", x / 4), name="corpus_quarter")
def _quarter(edit, x):
    """x / 4 = 0.25 x"""
    return edit.call(aten.mul.Tensor, x, 0.25)


QUARTER = Rewrite("x / 4 = 0.25 x", _quarter, (Traced(lambda x: x / 4, lambda x: x * 0.25, (_M,)),))


@rewriter.rule(pattern("addmm", addmm(z, x, y)), name="corpus_addmm")
def _addmm(edit, x, y, z):
    """addmm(z, x, y) = x y + z"""
    return edit.call(aten.add.Tensor, edit.call(aten.mm.default, x, y), z)


ADDMM = Rewrite(
    "addmm(z, x, y) = x y + z",
    _addmm,
    (Traced(lambda z, x, y: torch.addmm(z, x, y), lambda z, x, y: torch.mm(x, y) + z, (torch.rand(4), _M, _SQUARE)),),
)


@rewriter.rule(pattern("x y + z", x @ y + z), name="corpus_merge")
def _merge(edit, x, y, z):
    """x y + z = addmm(z, x, y)"""
    return edit.call(aten.addmm.default, z, x, y)


MERGE = Rewrite(
    "x y + z = addmm(z, x, y)",
    _merge,
    (Traced(lambda x, y, z: x @ y + z, lambda x, y, z: torch.addmm(z, x, y), (_M, _SQUARE, torch.rand(4))),),
)

@rewriter.rule(pattern("baddbmm", baddbmm(z, x, y)), name="corpus_baddbmm")
def _baddbmm(edit, x, y, z):
    """baddbmm(z, x, y) = x y + z"""
    return edit.call(aten.add.Tensor, edit.call(aten.bmm.default, x, y), z)


_BATCH = torch.rand(2, 4, 4)
BADDBMM = Rewrite(
    "baddbmm(z, x, y) = x y + z",
    _baddbmm,
    (Traced(lambda z, x, y: torch.baddbmm(z, x, y), lambda z, x, y: torch.bmm(x, y) + z, (_BATCH, _BATCH + 1, _BATCH + 2)),),
)


@rewriter.rule(pattern("x Wᵀ + b", linear(x, y) + z), name="corpus_bias")
def _bias(edit, x, y, z):
    """x Wᵀ + b = linear(x, W, b)"""
    return edit.call(aten.linear.default, x, y, z)


BIAS = Rewrite(
    "x Wᵀ + b = linear(x, W, b)",
    _bias,
    (Traced(lambda x, w, b: F.linear(x, w) + b, lambda x, w, b: F.linear(x, w, b), (_M, _SQUARE, torch.rand(4))),),
)

_sin = Operator("sin", (aten.sin.default,), ("x",))
_cos = Operator("cos", (aten.cos.default,), ("x",))
_QUARTER_TURN = 1.5707963267948966


@rewriter.rule(pattern("sin(x), cos(x)", _sin(x), _cos(x)), name="corpus_turn")
def _turn(edit, x):
    """sin(x), cos(x) = sin(x), sin(x + π/2)"""
    return edit.call(aten.sin.default, x), edit.call(aten.sin.default, edit.call(aten.add.Tensor, x, _QUARTER_TURN))


TURN = Rewrite(
    "sin(x), cos(x) = sin(x), sin(x + π/2)",
    _turn,
    (Traced(lambda x: (x.sin(), x.cos()), lambda x: (x.sin(), (x + _QUARTER_TURN).sin()), (_M,)),),
)


@rewriter.rule(pattern("0·dropout(x)", dropout(x, Const("p"), Const("train")) * 0), name="corpus_dropped")
def _dropped(edit, x):
    """0·dropout(x) = 0·x"""
    return edit.call(aten.mul.Tensor, x, 0)


DROPPED = Rewrite(
    "0·dropout(x) = 0·x",
    _dropped,
    (
        Traced(lambda x: F.dropout(x, 0.5, True) * 0, lambda x: x * 0, (_M,)),
        Traced(lambda x: F.dropout(x, 0.5, False) * 0, lambda x: x * 0, (_M,)),
    ),
)

_HALF = 0.5  # the scale of the corpus' attentions: 1/√d for their head dimension of 4
ATTENTION = Rewrite(
    "softmax(½ q kᵀ + mask) v = sdpa(q, k, v, mask)",
    rewriter.passes.Fuse(attention=True, qkv=False),
    (
        Traced(
            lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) * _HALF, -1) @ v,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=_HALF),
            _HEADS,
        ),
        Traced(
            lambda q, k, v, mask: torch.softmax(q @ k.transpose(-2, -1) * _HALF + mask, -1) @ v,
            lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, scale=_HALF),
            (*_HEADS, torch.rand(2, 3, 5, 5)),
        ),
        Traced(
            lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) * _HALF, -1, dtype=torch.float32).to(q.dtype) @ v,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=_HALF),
            tuple(t.half() for t in _HEADS),
        ),
        Traced(
            lambda q, k, v: F.dropout(torch.softmax(q @ k.transpose(-2, -1) * _HALF, -1), 0.5, False) @ v,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=_HALF),
            _HEADS,
        ),
        Traced(
            lambda q, k, v: F.dropout(torch.softmax(q @ k.transpose(-2, -1) * _HALF, -1), 0.5, True) @ v,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, scale=_HALF),
            _HEADS,
        ),
    ),
)


def _merged(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, ...]:
    return torch.split(F.linear(x, torch.cat([wq, wk, wv])), [4, 4, 4], -1)


QKV = Rewrite(
    "x Wqᵀ, x Wkᵀ, x Wvᵀ = split(x [Wq; Wk; Wv]ᵀ)",
    rewriter.passes.Fuse(attention=False, qkv=True),
    (
        Traced(
            lambda x, wq, wk, wv: (F.linear(x, wq), F.linear(x, wk), F.linear(x, wv)),
            _merged,
            (torch.rand(2, 3, 4), *(torch.rand(4, 4) for _ in range(3))),
        ),
    ),
)
