# SPDX-License-Identifier: Apache-2.0
"""The codebook heads in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from rewriter.codegen.onnx_operator import Operator, apply, compute, symbolic
from rewriter.kernels.vq_logits.reference import product_logits

# code_of [..., 1 to 3 little-endian bytes] -> code numbers [...], int64.
_CODE_NUMBERS = f"""CodeNumbers (code_of) => (code) {{
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    byte_values = Constant <value = int64[3] {{1, 256, 65536}}> ()
    bytes = Shape <start = -1> (code_of)
    place_value = Slice (byte_values, first, bytes)
    digits = Cast <to = {onnx.TensorProto.INT64}> (code_of)
    products = Mul (digits, place_value)
    code = ReduceSum <keepdims = 0> (products, last)
}}"""

# codebook [G, C, w], codes [V, G] -> the dense head [V, width], the last group's padding cut off.
_PRODUCT_DECODE = f"""ProductDecode <width> (codebook, codes) => (weight) {{
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
}}"""


def _vq_logits_tiers(bias: bool) -> str:
    """h [..., d], codebook [K, d], code_of [V, 1 to 3 little-endian bytes]: logit_i = h·C[code of i] (+ b_i)."""
    plain, biased = (
        "logits = Identity (by_token)",
        "offset = CastLike (token_bias, h) logits = Add (by_token, offset)",
    )
    return f"""VqLogitsTiers (h, codebook, code_of, token_bias) => (logits) {{
    code = ai.rewriter.CodeNumbers (code_of)
    by_code = ai.rewriter.Apply (h, codebook)
    by_token = Gather <axis = -1> (by_code, code)
    {biased if bias else plain}
}}"""


def _vq_logits_product(bias: bool) -> str:
    """h [..., width], codebook [G, C, w], codes [V, G]: logit_i = Σ_g h_g·C[g, codes_ig] (+ bias_i).

    The head is decoded to [V, width]: constant, so a runtime folds it.
    """
    return f"""VqLogitsProduct <width> (h, codebook, codes, bias) => (logits) {{
    weight = ai.rewriter.ProductDecode <width: int = @width> (codebook, codes)
    {apply(bias, "logits", "h")}
}}"""


def _vq_logits_product_exact(bias: bool) -> str:
    """The same with the rows ``exact`` [m, width] in place of those of the tokens ``exact_of`` [m, 1 to 3 bytes]."""
    return f"""VqLogitsProductExact <width> (h, codebook, codes, bias, exact, exact_of) => (logits) {{
    last = Constant <value_ints = [-1]> ()
    coded = ai.rewriter.ProductDecode <width: int = @width> (codebook, codes)
    token = ai.rewriter.CodeNumbers (exact_of)
    place = Unsqueeze (token, last)
    wide = CastLike (coded, h)
    rows = CastLike (exact, h)
    weight = ScatterND (wide, place, rows)
    {apply(bias, "logits", "h")}
}}"""


def _vq_logits_residual(bias: bool) -> str:
    """h [..., d], codebook [S, K, d], codes [V, S, 1 to 3 bytes]: logit_i = Σ_s h·C[s, code of i in s] (+ bias_i).

    The stages' codes number the rows of the flattened codebook; logits gathered for all stages are added up. They are
    added in float32 at least, as torch does.
    """
    return f"""VqLogitsResidual <compute> (h, codebook, codes, bias) => (logits) {{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    last = Constant <value_ints = [-1]> ()
    book = Shape (codebook)
    stages = Gather (book, zero)
    per_stage = Gather (book, one)
    width = Shape <start = 2, end = 3> (codebook)
    stage = Range (zero, stages, one)
    start = Mul (stage, per_stage)
    code = ai.rewriter.CodeNumbers (codes)
    row = Add (code, start)
    flat_shape = Concat <axis = 0> (last, width)
    flat = Reshape (codebook, flat_shape)
    narrow = ai.rewriter.Apply (h, flat)
    by_code = Cast <to: int = @compute> (narrow)
    by_stage = Gather <axis = -1> (by_code, row)
    by_token = ReduceSum <keepdims = 0> (by_stage, last)
    {"offset = CastLike (bias, by_token) total = Add (by_token, offset)" if bias else "total = Identity (by_token)"}
    logits = CastLike (total, h)
}}"""


def vq_logits_tiers(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    inputs = (h, codebook, code_of, token_bias)
    return symbolic("VqLogitsTiers", inputs, {}, h.dtype, (*h.shape[:-1], code_of.shape[0]))


def vq_logits_product(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    if not is_concrete_int(h.shape[-1]):  # a head captured alone, its input's width free within the last group
        return product_logits(h, codebook, codes, bias)
    inputs = (h, codebook, codes, bias)
    return symbolic("VqLogitsProduct", inputs, {"width": int(h.shape[-1])}, h.dtype, (*h.shape[:-1], codes.shape[0]))


def vq_logits_product_exact(
    h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, exact: Tensor, exact_of: Tensor
) -> Tensor:
    inputs, width = (h, codebook, codes, bias, exact, exact_of), int(exact.shape[1])
    return symbolic("VqLogitsProductExact", inputs, {"width": width}, h.dtype, (*h.shape[:-1], codes.shape[0]))


def vq_logits_residual(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    inputs, shape = (h, codebook, codes, bias), (*h.shape[:-1], codes.shape[0])
    return symbolic("VqLogitsResidual", inputs, {"compute": compute(h)}, h.dtype, shape)


OPERATORS = {
    "VqLogitsTiers": Operator(_vq_logits_tiers, {3: "bias"}, casts=(1, 3)),
    "VqLogitsProduct": Operator(_vq_logits_product, {3: "bias"}, casts=(1, 3)),
    "VqLogitsProductExact": Operator(_vq_logits_product_exact, {3: "bias"}, casts=(1, 3, 4)),
    "VqLogitsResidual": Operator(_vq_logits_residual, {3: "bias"}, casts=(1, 3)),
}
HELPERS: Mapping[str, str] = {"CodeNumbers": _CODE_NUMBERS, "ProductDecode": _PRODUCT_DECODE}
LOWERINGS: Mapping[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (vq_logits_tiers, vq_logits_product, vq_logits_product_exact, vq_logits_residual)
}
