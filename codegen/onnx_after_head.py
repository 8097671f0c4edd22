# SPDX-License-Identifier: Apache-2.0
"""What follows a head in ONNX: standard operators throughout; the decompositions of these operators are traced.

Only the order of equals needs a word. torch exports no stable sort, and ONNX's TopK, which every sort becomes, puts the
smaller index first by its specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from rewriter.codegen.onnx_operator import Operator
from rewriter.kernels.after_head import reference


def vq_tiers_topk(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, k: int) -> Any:
    return reference.tiers_topk(h, codebook, code_of, token_bias, k, stable=False)


def linear_topk(h: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Any:
    return reference.linear_topk(h, weight, bias, k, stable=False)


OPERATORS: Mapping[str, Operator] = {}
HELPERS: Mapping[str, str] = {}
LOWERINGS: Mapping[str, Callable[..., Any]] = {function.__name__: function for function in (vq_tiers_topk, linear_topk)}
