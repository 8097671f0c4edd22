# SPDX-License-Identifier: Apache-2.0
"""ShiftAdd's operators in ONNX: packed bytes are decoded by bit operations on uint8, then multiplied.

Shapes in the comments: N rows (outputs of a linear, tokens an embedding is asked for), I in_features, G groups, b bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
from torch import Tensor

from rewriter.codegen import onnx_matmul_nbits
from rewriter.codegen.onnx_operator import DOMAIN, ONNX_DTYPE, Operator, apply, compute, numbers, symbolic

# -- decoders ----------------------------------------------------------------------------------------------------

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
    powers = Constant <value = float[16] {{{numbers(2.0**-k for k in range(16))}}}> ()
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
    table = Constant <value = float[128] {{0.0, {numbers(2.0**-m for m in range(127))}}}> ()
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

# codes [N, ceil(I·bits/8)], scale [N, G], levels [2^bits] -> w[n, i] = scale[n, i // group] · levels[word], [N, I].
_LEVEL_DECODE = f"""LevelDecode <bits, group, in_features> (codes, scale, levels) => (weight) {{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    stored = Constant <value_int: int = @bits> ()
    per_group = Constant <value_int: int = @group> ()
    width = Constant <value_int: int = @in_features> ()
    used = Mul (width, stored)
    end = Unsqueeze (used, zero)
    padded = ai.rewriter.UnpackBits (codes)
    stream = Slice (padded, first, end, second)
    widths = Unsqueeze (width, zero)
    places = Unsqueeze (stored, zero)
    shape = Concat <axis = 0> (first, widths, places)
    bit = Reshape (stream, shape)
    digits = Cast <to = {onnx.TensorProto.INT32}> (bit)
    powers = Constant <value = int32[12] {{{numbers(2**k for k in range(12))}}}> ()
    place_value = Slice (powers, first, places)
    products = Mul (digits, place_value)
    word = ReduceSum <keepdims = 0> (products, last)
    level = Gather (levels, word)
    column = Range (zero, width, one)
    group_of = Div (column, per_group)
    by_weight = Gather <axis = 1> (scale, group_of)
    weight = Mul (level, by_weight)
}}"""

# -- functions ---------------------------------------------------------------------------------------------------
# Names, not overloads, choose between helpers: ONNX Runtime finds an overload from a graph but not from a function.

_BCQ = "<group: int = @group, in_features: int = @in_features>"
_LEVEL = "<bits: int = @bits, group: int = @group, in_features: int = @in_features>"
_POT = "<bits: int = @bits, terms: int = @terms, group: int = @group, in_features: int = @in_features>"


def _alpha(shift: bool, codes: str, scale: str, shifts: str) -> str:
    """[N, G, b] from the scales; without shift they are alpha itself."""
    if not shift:
        return f"alpha = Cast <to: int = @compute> ({scale})"
    return f"alpha = {DOMAIN}.ShiftedScales <compute: int = @compute> ({scale}, {shifts}, {codes})"


def _bcq_linear(shift: bool, bias: bool) -> str:
    return f"""BcqLinear <group, in_features, compute> (x, codes, scale, shift, bias) => (y) {{
    {_alpha(shift, "codes", "scale", "shift")}
    weight = ai.rewriter.BcqDecode {_BCQ} (codes, alpha)
    {apply(bias, "y", "x")}
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
    {apply(bias, "y", "x")}
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


def _level_linear(bias: bool) -> str:
    return f"""LevelLinear <bits, group, in_features, compute> (x, codes, scale, levels, bias) => (y) {{
    wide = Cast <to: int = @compute> (scale)
    table = Cast <to: int = @compute> (levels)
    weight = ai.rewriter.LevelDecode {_LEVEL} (codes, wide, table)
    {apply(bias, "y", "x")}
}}"""


def _level_embedding() -> str:
    return f"""LevelEmbedding <bits, group, in_features, compute, dtype> (ids, codes, scale, levels) => (y) {{
    last = Constant <value_ints = [-1]> ()
    row = Reshape (ids, last)
    row_codes = Gather (codes, row)
    row_scale = Gather (scale, row)
    wide = Cast <to: int = @compute> (row_scale)
    table = Cast <to: int = @compute> (levels)
    weight = ai.rewriter.LevelDecode {_LEVEL} (row_codes, wide, table)
    y = ai.rewriter.RowsOf <dtype: int = @dtype> (weight, ids)
}}"""


# -- what stands for the operators of torch ----------------------------------------------------------------------


def bcq_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    group: int,
    in_features: int,
) -> Tensor:
    attributes = {"group": group, "in_features": in_features, "compute": compute(x, scale)}
    inputs = (x, codes, scale, shift, bias)
    return symbolic("BcqLinear", inputs, attributes, x.dtype, (*x.shape[:-1], codes.shape[0]))


def bcq_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    attributes = {"group": group, "in_features": in_features, "compute": compute(scale)}
    attributes["dtype"] = ONNX_DTYPE[scale.dtype]
    return symbolic("BcqEmbedding", (ids, codes, scale, shift), attributes, scale.dtype, (*ids.shape, in_features))


def pot_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    terms: int,
    group: int,
    in_features: int,
) -> Tensor:
    attributes = {"bits": bits, "terms": terms, "group": group, "in_features": in_features}
    attributes["compute"] = compute(x, scale)
    inputs = (x, codes, scale, bias)
    return symbolic("PotLinear", inputs, attributes, x.dtype, (*x.shape[:-1], codes.shape[0]))


def pot_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    attributes = {"bits": bits, "terms": terms, "group": group, "in_features": in_features}
    attributes |= {"compute": compute(scale), "dtype": ONNX_DTYPE[scale.dtype]}
    return symbolic("PotEmbedding", (ids, codes, scale), attributes, scale.dtype, (*ids.shape, in_features))


def level_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    attributes = {"bits": bits, "group": group, "in_features": in_features, "compute": compute(x, scale, levels)}
    inputs = (x, codes, scale, levels, bias)
    return symbolic("LevelLinear", inputs, attributes, x.dtype, (*x.shape[:-1], codes.shape[0]))


def level_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    attributes = {"bits": bits, "group": group, "in_features": in_features}
    attributes |= {"compute": compute(scale, levels), "dtype": ONNX_DTYPE[scale.dtype]}
    inputs = (ids, codes, scale, levels)
    return symbolic("LevelEmbedding", inputs, attributes, scale.dtype, (*ids.shape, in_features))


OPERATORS = {
    "BcqLinear": Operator(_bcq_linear, {3: "shift", 4: "bias"}, casts=(2, 4)),
    "BcqEmbedding": Operator(_bcq_embedding, {3: "shift"}, casts=(2,)),
    "PotLinear": Operator(_pot_linear, {3: "bias"}, casts=(2, 3)),
    "PotEmbedding": Operator(_pot_embedding, casts=(2,)),
    "LevelLinear": Operator(_level_linear, {4: "bias"}, casts=(2, 3, 4)),
    "LevelEmbedding": Operator(_level_embedding, casts=(2, 3)),
}
CONTRIB = (onnx_matmul_nbits.replace,)
HELPERS = {
    "ShiftedScales": _SHIFTED_SCALES,
    "BcqDecode": _BCQ_DECODE,
    "PotDecode": _POT_DECODE,
    "LevelDecode": _LEVEL_DECODE,
}
LOWERINGS: Mapping[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (bcq_linear, bcq_embedding, pot_linear, pot_embedding, level_linear, level_embedding)
}
