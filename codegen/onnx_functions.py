# SPDX-License-Identifier: Apache-2.0
"""The rewriter's operators as ONNX model-local functions.

Domain ``ai.rewriter`` version 1: one function per operator, plus the decoders they share, in ONNX's own text syntax
over standard operators. Codes stay packed bytes in the file; every bit operation works on uint8, the width that ONNX
Runtime's CPU kernels of ``BitShift`` and ``BitwiseAnd`` have in common. A runtime that knows nothing of the domain
inlines the functions when it loads the model and folds what depends on weights alone.

Standard operators take no missing factor or term, so each combination of optional inputs has a body of its own under
the operator's name, a function *overload* (ONNX IR 10): a call with shift and bias is one of ``BcqLinear:shift_bias``.

Shapes in the comments: N rows (outputs of a linear, tokens an embedding is asked for), I in_features, G groups, b bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx.parser

DOMAIN = "ai.rewriter"
VERSION = 1
MIN_IR_VERSION = 10  # function overloads

# Inputs that their function casts itself, so that a file may store them narrower: operator -> positions.
CAST_INSIDE: dict[str, tuple[int, ...]] = {
    "BcqLinear": (2, 4),
    "BcqEmbedding": (2,),
    "PotLinear": (2, 3),
    "PotEmbedding": (2,),
    "VqLogitsTiers": (1, 3),
    "VqLogitsProduct": (1, 3),
}


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(repr(v) for v in values)


# -- decoders ----------------------------------------------------------------------------------------------------

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

# scale [N, G], shift [N, G, ceil(b/2)] with two exponents k per byte (the even one in the low nibble)
# -> alpha = scale · 2^-k, [N, G, b]. The power is looked up: exact whatever the runtime's Pow does.
_SHIFTED_SCALES = f"""ShiftedScales <compute> (scale, shift, codes) => (alpha) {{
    four = Constant <value = uint8[1] {{4}}> ()
    mask = Constant <value = uint8[1] {{15}}> ()
    zero = Constant <value_ints = [0]> ()
    two = Constant <value_ints = [2]> ()
    last = Constant <value_ints = [-1]> ()
    low = BitwiseAnd (shift, mask)
    high = BitShift <direction = "RIGHT"> (shift, four)
    low_column = Unsqueeze (low, last)
    high_column = Unsqueeze (high, last)
    pairs = Concat <axis = -1> (low_column, high_column)
    rows = Shape <start = 0, end = 2> (shift)
    shape = Concat <axis = 0> (rows, last)
    nibbles = Reshape (pairs, shape)
    bits = Shape <start = 1, end = 2> (codes)
    k = Slice (nibbles, zero, bits, two)
    index = Cast <to = {onnx.TensorProto.INT64}> (k)
    powers = Constant <value = float[16] {{{_numbers(2.0**-k for k in range(16))}}}> ()
    factor = Gather (powers, index)
    factors = Cast <to: int = @compute> (factor)
    wide = Cast <to: int = @compute> (scale)
    column = Unsqueeze (wide, two)
    alpha = Mul (column, factors)
}}"""

# codes [N, b, ceil(I/8)], alpha [N, G, b] -> w[n, i] = Σ_b alpha[n, i // group, b] · (2·bit − 1), [N, I].
_BCQ_DECODE = """BcqDecode <group, in_features> (codes, alpha) => (weight) {
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    bases = Constant <value_ints = [1]> ()
    inner = Constant <value_ints = [2]> ()
    per_group = Constant <value_int: int = @group> ()
    width = Constant <value_int: int = @in_features> ()
    end = Unsqueeze (width, zero)
    padded = ai.rewriter.UnpackBits (codes)
    bits = Slice (padded, first, end, inner)
    bit = CastLike (bits, alpha)
    twice = Add (bit, bit)
    minus_one = Constant <value = float[1] {-1.0}> ()
    offset = CastLike (minus_one, alpha)
    sign = Add (twice, offset)
    column = Range (zero, width, one)
    group_of = Div (column, per_group)
    by_weight = Gather <axis = 1> (alpha, group_of)
    by_base = Transpose <perm = [0, 2, 1]> (by_weight)
    terms = Mul (sign, by_base)
    weight = ReduceSum <keepdims = 0> (terms, bases)
}"""

# codes [N, ceil(I·bits/8)], scale [N, G] -> w[n, i] = scale[n, i // group] · Σ_t ±magnitude, [N, I].
# A term's field of bits / terms bits: magnitude m in the low ones (0 is zero, else 2^-(m−1)), the sign in the top one.
_POT_DECODE = f"""PotDecode <bits, terms, group, in_features> (codes, scale) => (weight) {{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    field_axis = Constant <value_ints = [3]> ()
    last = Constant <value_ints = [-1]> ()
    stored = Constant <value_int: int = @bits> ()
    count = Constant <value_int: int = @terms> ()
    per_group = Constant <value_int: int = @group> ()
    width = Constant <value_int: int = @in_features> ()
    field_bits = Div (stored, count)
    top = Sub (field_bits, one)
    used = Mul (width, stored)
    end = Unsqueeze (used, zero)
    padded = ai.rewriter.UnpackBits (codes)
    stream = Slice (padded, first, end, second)
    widths = Unsqueeze (width, zero)
    counts = Unsqueeze (count, zero)
    fields = Unsqueeze (field_bits, zero)
    shape = Concat <axis = 0> (first, widths, counts, fields)
    field = Reshape (stream, shape)
    tops = Unsqueeze (top, zero)
    low = Slice (field, first, tops, field_axis)
    digits = Cast <to = {onnx.TensorProto.INT32}> (low)
    powers = Constant <value = int32[7] {{1, 2, 4, 8, 16, 32, 64}}> ()
    place_value = Slice (powers, first, tops)
    products = Mul (digits, place_value)
    m = ReduceSum <keepdims = 0> (products, last)
    table = Constant <value = float[128] {{0.0, {_numbers(2.0**-m for m in range(127))}}}> ()
    magnitudes = CastLike (table, scale)
    magnitude = Gather (magnitudes, m)
    sign_bit = Gather <axis = 3> (field, top)
    negative = Cast <to = {onnx.TensorProto.BOOL}> (sign_bit)
    opposite = Neg (magnitude)
    signed = Where (negative, opposite, magnitude)
    level = ReduceSum <keepdims = 0> (signed, last)
    column = Range (zero, width, one)
    group_of = Div (column, per_group)
    by_weight = Gather <axis = 1> (scale, group_of)
    weight = Mul (level, by_weight)
}}"""

# -- what is done with decoded rows ------------------------------------------------------------------------------

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

# -- the operators -----------------------------------------------------------------------------------------------
# Names, not overloads, choose between helpers: ONNX Runtime finds an overload from a graph but not from a function.

_BCQ = "<group: int = @group, in_features: int = @in_features>"
_POT = "<bits: int = @bits, terms: int = @terms, group: int = @group, in_features: int = @in_features>"


def _alpha(shift: bool, codes: str, scale: str, shifts: str) -> str:
    """[N, G, b] from the scales; without shift they are alpha itself."""
    if not shift:
        return f"alpha = Cast <to: int = @compute> ({scale})"
    return f"alpha = {DOMAIN}.ShiftedScales <compute: int = @compute> ({scale}, {shifts}, {codes})"


def _apply(bias: bool, result: str, x: str) -> str:
    return f"{result} = {DOMAIN}." + (f"ApplyBias ({x}, weight, bias)" if bias else f"Apply ({x}, weight)")


def _bcq_linear(shift: bool, bias: bool) -> str:
    return f"""BcqLinear <group, in_features, compute> (x, codes, scale, shift, bias) => (y) {{
    {_alpha(shift, "codes", "scale", "shift")}
    weight = ai.rewriter.BcqDecode {_BCQ} (codes, alpha)
    {_apply(bias, "y", "x")}
}}"""


def _bcq_embedding(shift: bool) -> str:
    """Gathers packed rows before it decodes, so that the table stays packed in memory too."""
    return f"""BcqEmbedding <group, in_features, compute, dtype> (ids, codes, scale, shift) => (y) {{
    last = Constant <value_ints = [-1]> ()
    row = Reshape (ids, last)
    row_codes = Gather (codes, row)
    row_scale = Gather (scale, row)
    {"row_shift = Gather (shift, row)" if shift else ""}
    {_alpha(shift, "row_codes", "row_scale", "row_shift")}
    weight = ai.rewriter.BcqDecode {_BCQ} (row_codes, alpha)
    y = ai.rewriter.RowsOf <dtype: int = @dtype> (weight, ids)
}}"""


def _pot_linear(bias: bool) -> str:
    return f"""PotLinear <bits, terms, group, in_features, compute> (x, codes, scale, bias) => (y) {{
    wide = Cast <to: int = @compute> (scale)
    weight = ai.rewriter.PotDecode {_POT} (codes, wide)
    {_apply(bias, "y", "x")}
}}"""


def _pot_embedding() -> str:
    return f"""PotEmbedding <bits, terms, group, in_features, compute, dtype> (ids, codes, scale) => (y) {{
    last = Constant <value_ints = [-1]> ()
    row = Reshape (ids, last)
    row_codes = Gather (codes, row)
    row_scale = Gather (scale, row)
    wide = Cast <to: int = @compute> (row_scale)
    weight = ai.rewriter.PotDecode {_POT} (row_codes, wide)
    y = ai.rewriter.RowsOf <dtype: int = @dtype> (weight, ids)
}}"""


def _vq_logits_tiers(bias: bool) -> str:
    """h [..., d], codebook [K, d], code_of [V, 1 to 3 little-endian bytes]: logit_i = h·C[code of i] (+ b_i)."""
    plain, biased = (
        "logits = Identity (by_token)",
        "offset = CastLike (token_bias, h) logits = Add (by_token, offset)",
    )
    return f"""VqLogitsTiers (h, codebook, code_of, token_bias) => (logits) {{
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    byte_values = Constant <value = int64[3] {{1, 256, 65536}}> ()
    bytes = Shape <start = 1, end = 2> (code_of)
    place_value = Slice (byte_values, first, bytes)
    digits = Cast <to = {onnx.TensorProto.INT64}> (code_of)
    products = Mul (digits, place_value)
    code = ReduceSum <keepdims = 0> (products, second)
    by_code = ai.rewriter.Apply (h, codebook)
    by_token = Gather <axis = -1> (by_code, code)
    {biased if bias else plain}
}}"""


def _vq_logits_product(bias: bool) -> str:
    """h [..., width], codebook [G, C, w], codes [V, G]: logit_i = Σ_g h_g·C[g, codes_ig] (+ bias_i).

    The head is decoded to [V, width], the last group's padding cut off: constant, so a runtime folds it.
    """
    return f"""VqLogitsProduct <width> (h, codebook, codes, bias) => (logits) {{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    book = Shape (codebook)
    groups = Gather (book, zero)
    per_group = Gather (book, one)
    group = Range (zero, groups, one)
    start = Mul (group, per_group)
    code = Cast <to = {onnx.TensorProto.INT64}> (codes)
    row = Add (code, start)
    dims = Shape <start = 2, end = 3> (codebook)
    flat_shape = Concat <axis = 0> (last, dims)
    flat = Reshape (codebook, flat_shape)
    parts = Gather (flat, row)
    joined_shape = Constant <value_ints = [0, -1]> ()
    joined = Reshape (parts, joined_shape)
    columns = Constant <value_int: int = @width> ()
    end = Unsqueeze (columns, zero)
    weight = Slice (joined, first, end, second)
    {_apply(bias, "logits", "h")}
}}"""


@dataclass(frozen=True)
class _Operator:
    """The body's text for a combination of optional inputs, which are listed as position -> name."""

    text: Callable[..., str]
    optional: Mapping[int, str]


_OPERATORS = {
    "BcqLinear": _Operator(_bcq_linear, {3: "shift", 4: "bias"}),
    "BcqEmbedding": _Operator(_bcq_embedding, {3: "shift"}),
    "PotLinear": _Operator(_pot_linear, {3: "bias"}),
    "PotEmbedding": _Operator(_pot_embedding, {}),
    "VqLogitsTiers": _Operator(_vq_logits_tiers, {3: "bias"}),
    "VqLogitsProduct": _Operator(_vq_logits_product, {3: "bias"}),
}
_HELPERS = {
    "UnpackBits": _UNPACK_BITS,
    "ShiftedScales": _SHIFTED_SCALES,
    "BcqDecode": _BCQ_DECODE,
    "PotDecode": _POT_DECODE,
    "Apply": _APPLY,
    "ApplyBias": _APPLY_BIAS,
    "RowsOf": _ROWS_OF,
}


def overload_of(name: str, present: Sequence[bool]) -> str:
    """The overload of operator ``name`` for a call whose inputs are present as listed: ``"shift_bias"``, ``""``, ..."""
    optional = _OPERATORS[name].optional
    return "_".join(word for i, word in optional.items() if i < len(present) and present[i])


def function_protos(called: Iterable[tuple[str, str]], opset: int) -> list[onnx.FunctionProto]:
    """The functions that calls of ``called`` (operator, overload) need, bodies stamped with ``opset``.

    The bodies use no operator whose meaning changed between opsets 20 and 25, so one text serves all of them.

    Raises:
        KeyError: the domain has no such operator.
    """
    calls = sorted(set(called))
    operators = [_parse(_text(name, overload), opset, overload) for name, overload in calls]
    used = {node.op_type for function in operators for node in function.node if node.domain == DOMAIN}
    helpers: list[onnx.FunctionProto] = []
    for name in reversed(_HELPERS):  # a helper calls only those above it
        if name in used:
            helper = _parse(_HELPERS[name], opset)
            used |= {node.op_type for node in helper.node if node.domain == DOMAIN}
            helpers.append(helper)
    return [*reversed(helpers), *operators]


def _text(name: str, overload: str) -> str:
    operator = _OPERATORS[name]
    given = set(overload.split("_"))
    return operator.text(*(word in given for word in operator.optional.values()))


def _parse(text: str, opset: int, overload: str = "") -> onnx.FunctionProto:
    header = f'<domain: "{DOMAIN}", opset_import: ["": {opset}, "{DOMAIN}": {VERSION}]>\n'
    function = onnx.parser.parse_function(header + text)
    function.overload = overload
    return function
