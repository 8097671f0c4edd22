# SPDX-License-Identifier: Apache-2.0
"""What a family says to put its operators into an ONNX file, and the function bodies that families share.

A family's file ``onnx_<family>.py`` holds OPERATORS (name -> `Operator`), HELPERS (functions its operators call, a
helper after those it calls itself) and LOWERINGS (the operator of torch -> the symbolic node that stands for it). It
may hold CONTRIB: edits of a model that put ``com.microsoft`` operators in place of its own, for ``contrib=True``.
`onnx_functions` and `onnx_lowering` put the families together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DOMAIN = "ai.rewriter"
CONTRIB_DOMAIN = "com.microsoft"  # ONNX Runtime's own operators
VERSION = 1
MIN_IR_VERSION = 10  # function overloads
ONNX_DTYPE = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}  # onnx.TensorProto


@dataclass(frozen=True)
class Operator:
    """One operator of the domain.

    Attributes:
        text: the function's body in ONNX's text syntax, given for each optional input whether it is there.
        optional: optional inputs, position -> name.
        casts: positions of inputs that the function casts itself, so that a file may store them narrower.
    """

    text: Callable[..., str]
    optional: Mapping[int, str] = field(default_factory=dict)
    casts: tuple[int, ...] = ()


def symbolic(
    name: str,
    inputs: Sequence[Tensor | None],
    attributes: dict[str, Any],
    dtype: torch.dtype,
    shape: Sequence[Any],
) -> Tensor:
    """One node ``ai.rewriter::<name>`` in a trace for ONNX."""
    node: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=dtype, shape=tuple(shape), version=VERSION
    )
    return node


def compute(*tensors: Tensor) -> int:
    """Decoding arithmetic as an ONNX type: float32, or float64 as soon as one of the tensors is float64."""
    wide = any(t.dtype is torch.float64 for t in tensors)
    return ONNX_DTYPE[torch.float64 if wide else torch.float32]


def numbers(values: Iterable[float]) -> str:
    """Values as the text syntax writes a list."""
    return ", ".join(repr(v) for v in values)


def apply(bias: bool, result: str, x: str) -> str:
    """The statement ``result = x weightᵀ (+ bias)`` of a body that has ``weight``."""
    return f"{result} = {DOMAIN}." + (f"ApplyBias ({x}, weight, bias)" if bias else f"Apply ({x}, weight)")


# Bytes [..., B] -> bits [..., 8 B], uint8 0 or 1: bit i is bit i % 8 of byte i // 8.
_UNPACK_BITS = """UnpackBits (codes) => (bits) {
    place = Constant <value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
    one = Constant <value = uint8[1] {1}> ()
    last = Constant <value_ints = [-1]> ()
    column = Unsqueeze (codes, last)
    shifted = BitShift <direction = "RIGHT"> (column, place)
    each = BitwiseAnd (shifted, one)
    rows = Shape <start = 0, end = -1> (codes)
    shape = Concat <axis = 0> (rows, last)
    bits = Reshape (each, shape)
}"""

# x [..., I], weight [N, I] -> x wᵀ (+ bias), [..., N]. One MatMul is left when the weight is folded.
_APPLY = """Apply (x, weight) => (y) {
    cast = CastLike (weight, x)
    turned = Transpose <perm = [1, 0]> (cast)
    y = MatMul (x, turned)
}"""
_APPLY_BIAS = """ApplyBias (x, weight, bias) => (y) {
    product = ai.rewriter.Apply (x, weight)
    offset = CastLike (bias, x)
    y = Add (product, offset)
}"""

# rows [M, I] of the ids [...] -> [..., I].
_ROWS_OF = """RowsOf <dtype> (rows, ids) => (y) {
    leading = Shape (ids)
    width = Shape <start = 1, end = 2> (rows)
    shape = Concat <axis = 0> (leading, width)
    cast = Cast <to: int = @dtype> (rows)
    y = Reshape <allowzero = 1> (cast, shape)
}"""

SHARED = {"UnpackBits": _UNPACK_BITS, "Apply": _APPLY, "ApplyBias": _APPLY_BIAS, "RowsOf": _ROWS_OF}
