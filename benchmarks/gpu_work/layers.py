# SPDX-License-Identifier: Apache-2.0
"""Dense layers without multiplications, the Tversky layer and softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_work.work import Built, Call, Draw
from rewriter.kernels.shift_add import op as shift_add
from rewriter.kernels.softmax import op as softmax_op
from rewriter.kernels.tversky import op as tversky_op

BYTE = torch.uint8
GROUP = 128


def packed(draw: Draw, format: str, out: int, width: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Tensors and numbers of a weight of 4 bits."""
    scale = draw.normal(out, width // GROUP).abs().half()
    if format == "bcq":
        codes = draw.codes(256, out, 4, width // 8, dtype=BYTE)
        return (codes, scale, draw.codes(256, out, width // GROUP, 2, dtype=BYTE)), (GROUP, width)
    codes = draw.codes(256, out, width // 2, dtype=BYTE)
    if format == "pot":
        return (codes, scale), (4, 1, GROUP, width)
    return (codes, scale, draw.normal(16)), (4, GROUP, width)


def packed_linear(draw: Draw, small: bool, format: str, rows: int, dtype: torch.dtype) -> Built:
    size = 256 if small else 4096
    x, weight = draw.normal(rows, size, dtype=dtype), draw.normal(size, size, dtype=dtype) * size**-0.5
    tensors, numbers = packed(draw, format, size, size)
    rivals, absent = {"dense": Call(F.linear, (x, weight))}, {}
    if draw.device != "cuda" or dtype is not torch.bfloat16:
        absent["torch int4"] = "for bfloat16 on a GPU only"
    else:
        try:
            rivals["torch int4"] = _int4(draw, x, size)
        except (RuntimeError, NotImplementedError) as error:
            absent["torch int4"] = str(error).partition("\n")[0]
    operator = getattr(shift_add, f"{format}_linear")
    return Built(Call(operator, (x, *tensors, None, *numbers)), rivals, absent)


def _int4(draw: Draw, x: Tensor, size: int) -> Call:
    """torch's own product with 4-bit weights, as torchao calls it; tried once, since not every GPU has it."""
    codes = torch._convert_weight_to_int4pack(draw.codes(256, size, size // 2, dtype=BYTE), 8)
    call = Call(torch._weight_int4pack_mm, (x, codes, GROUP, draw.normal(size // GROUP, size, 2, dtype=x.dtype)))
    call.run()
    return call


def embedding(draw: Draw, small: bool, format: str, dtype: torch.dtype) -> Built:
    rows, width, count = (100, 256, 7) if small else (50257, 768, 8192)
    (codes, scale, *table), numbers = packed(draw, format, rows, 2 * GROUP if small else width)
    ids = draw.codes(rows, count)
    dense = draw.normal(rows, width, dtype=dtype)
    call = Call(getattr(shift_add, f"{format}_embedding"), (ids, codes, scale.to(dtype), *table, *numbers))
    return Built(call, {"dense": Call(F.embedding, (ids, dense))})


def tversky(draw: Draw, small: bool, rows: int, dtype: torch.dtype, intersection: str) -> Built:
    width, features, prototypes, n = (32, 16, 24, 48) if small else (1024, 512, 2048, rows)
    x, bank = draw.normal(n, width, dtype=dtype), draw.normal(features, width) * width**-0.5
    points = draw.normal(prototypes, width)
    weights = [torch.tensor(c, device=draw.device) for c in (1.0, 0.5, 0.5)]
    names: tuple[Any, ...] = (intersection, "paper", "ignorematch", "contrast")
    call = Call(tversky_op.tversky, (x, bank, points, *weights, None, None, *names, False, False))
    return Built(call, {"dense": Call(F.linear, (x, points.to(dtype)))})


def softmax(draw: Draw, small: bool, name: str, rows: int, dtype: torch.dtype) -> Built:
    x = draw.normal(*((5, 300) if small else (rows, 50257)), dtype=dtype)
    return Built(Call(getattr(softmax_op, name), (x, -1)), {"torch": Call(getattr(torch, name), (x, -1))})
