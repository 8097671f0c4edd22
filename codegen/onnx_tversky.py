# SPDX-License-Identifier: Apache-2.0
"""The Tversky projection in ONNX: the product contrast as one function, any other similarity by its aten reference.

ONNX Runtime finds an overload by the inputs that are there, not by attributes, so a bank that is mirrored and prototypes
that are given by their scores have names of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from rewriter.codegen.onnx_operator import ONNX_DTYPE, Operator, compute, symbolic
from rewriter.kernels.tversky import reference
from rewriter.kernels.tversky.arguments import Arguments

_OPTIONAL = {3: "theta", 4: "alpha", 5: "beta", 6: "negative", 7: "bias"}
_WIDE = "<to: int = @compute>"


def _name(mirrored: bool, projected: bool) -> str:
    return "Tversky" + "Mirrored" * mirrored + "Projected" * projected


def _tversky(
    theta: bool, alpha: bool, beta: bool, negative: bool, bias: bool, *, mirrored: bool, projected: bool
) -> str:
    """x [..., d], features [K, d], prototypes [P, d] or their scores [P, K], coefficients [] or [P], bias [P].

    y = U (θ V − α (1 − m_V))ᵀ − (1 − m_U) (β V)ᵀ + bias with U = relu(x Ωᵀ), V = relu(Π Ωᵀ) and their gates m; for the
    pair V − n V⁻ and m − n m⁻ of the negated prototypes. What depends on weights alone is folded when a model is loaded.
    """
    lines = [
        f"wide = Cast {_WIDE} (x)",
        f"bank = Cast {_WIDE} (features)",
        f"given = Cast {_WIDE} (prototypes)",
        "turned = Transpose <perm = [1, 0]> (bank)",
        "scores = MatMul (wide, turned)",
        "held = Identity (given)" if projected else "held = MatMul (given, turned)",
        *(_mirror("scores", "z") + _mirror("held", "b") if mirrored else ["z = Identity (scores)", "b = Identity (held)"]),
        "zero_value = Constant <value_float = 0.0> ()",
        "zero = CastLike (zero_value, z)",
        "column = Constant <value_ints = [-1, 1]> ()",
        "u = Relu (z)",
        "positive = Relu (b)",
    ]
    if negative:
        lines += [
            f"n = Cast {_WIDE} (negative)",
            "opposite = Neg (b)",
            "opposite_positive = Relu (opposite)",
            "less = Mul (n, opposite_positive)",
            "v = Sub (positive, less)",
        ]
    else:
        lines += ["v = Identity (positive)"]
    lines += [*_rows("theta"), "common = Mul (theta_rows, v)"] if theta else ["common = Identity (v)"]
    if alpha:
        lines += [*_gate("b", "absent"), *_rows("alpha")]
        if negative:
            lines += [*_gate("opposite", "opposite_absent"), "fewer = Mul (n, opposite_absent)"]
        lines += [
            "only = Sub (absent, fewer)" if negative else "only = Identity (absent)",
            "distinctive = Mul (alpha_rows, only)",
            "right = Sub (common, distinctive)",
        ]
    else:
        lines += ["right = Identity (common)"]
    lines += ["right_turned = Transpose <perm = [1, 0]> (right)", "first = MatMul (u, right_turned)"]
    if beta:
        lines += [
            *_gate("z", "lacking"), *_rows("beta"), "other = Mul (beta_rows, v)",
            "other_turned = Transpose <perm = [1, 0]> (other)",
            "second = MatMul (lacking, other_turned)", "similarity = Sub (first, second)",
        ]  # fmt: skip
    else:
        lines += ["similarity = Identity (first)"]
    lines += [f"offset = Cast {_WIDE} (bias)", "sum = Add (similarity, offset)"] if bias else ["sum = Identity (similarity)"]
    body = "\n    ".join([*lines, "y = Cast <to: int = @dtype> (sum)"])
    inputs = ", ".join(("x", "features", "prototypes", *_OPTIONAL.values()))
    return f"{_name(mirrored, projected)} <compute, dtype> ({inputs}) => (y) {{\n    {body}\n}}"


def _mirror(scores: str, result: str) -> list[str]:
    return [f"minus_{scores} = Neg ({scores})", f"{result} = Concat <axis = -1> ({scores}, minus_{scores})"]


def _gate(scores: str, result: str) -> list[str]:
    """1 where a feature is not had."""
    return [f"{result}_mask = LessOrEqual ({scores}, zero)", f"{result} = Cast {_WIDE} ({result}_mask)"]


def _rows(coefficient: str) -> list[str]:
    """[] or [P] -> [1, 1] or [P, 1], beside [P, K]."""
    wide = f"{coefficient}_wide"
    return [f"{wide} = Cast {_WIDE} ({coefficient})", f"{coefficient}_rows = Reshape ({wide}, column)"]


def tversky(*args: Any) -> Tensor:
    a = Arguments(*args)
    if not reference.is_bilinear(a.intersection, a.difference, a.form):
        return reference.tversky(*args)
    attributes = {"compute": compute(a.x), "dtype": ONNX_DTYPE[a.x.dtype]}
    shape = (*a.x.shape[:-1], a.prototypes.shape[0])
    return symbolic(_name(a.mirrored, a.projected), a.tensors, attributes, a.x.dtype, shape)


OPERATORS = {
    _name(mirrored, projected): Operator(
        functools.partial(_tversky, mirrored=mirrored, projected=projected), _OPTIONAL, casts=tuple(range(1, 8))
    )
    for mirrored in (False, True)
    for projected in (False, True)
}
HELPERS: Mapping[str, str] = {}
LOWERINGS: Mapping[str, Callable[..., Tensor]] = {"tversky": tversky}
