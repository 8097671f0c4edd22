# SPDX-License-Identifier: Apache-2.0
"""The ShiftAdd operators on GPUs: which Triton kernel runs, on what blocks.

One row of x is memory traffic alone: `matvec`, or `lookup_matvec` for binary bases. More rows go through `tl.dot`; up to
16 share one small tile, since matrix instructions have no smaller one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, launch, precision
from rewriter.kernels.shift_add import codec, launch_embedding, launch_gradients, reference
from rewriter.kernels.shift_add.kernels import lookup_matvec, matmul, matvec
from rewriter.kernels.shift_add.launch_common import OCTET, Weight, bcq, level, meta, pot, refuse_float64, unit_stride

SMALL_BATCH = 16
LOOKUP_BITS = 2  # from here on building the tables of sums costs less than they save


# ---------------------------------------------------------------------------------------------------------- y = x Wᵀ + b


def bcq_linear(
    x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor | None, group: int, in_features: int
) -> Tensor:
    """`rewriter.kernels.shift_add.reference.bcq_linear` on a GPU."""
    return _linear(x, bcq(codes, scale, shift, group, in_features), bias)


def pot_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    """`rewriter.kernels.shift_add.reference.pot_linear` on a GPU."""
    return _linear(x, pot(codes, scale, bits, terms, group, in_features), bias)


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
    """`rewriter.kernels.shift_add.reference.level_linear` on a GPU."""
    return _linear(x, level(codes, scale, levels, bits, group, in_features), bias)


def _linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    reference.check_linear(x, bias, weight.out_features, weight.in_features)
    refuse_float64(x, bias)
    rows = unit_stride(x.reshape(-1, weight.in_features))
    out = x.new_empty((rows.shape[0], weight.out_features))
    args = {
        "x_ptr": rows, **weight.pointers, "bias_ptr": None if bias is None else bias.contiguous(), "out_ptr": out,
        **weight.sizes, "x_stride": rows.stride(0),
    }  # fmt: skip
    if rows.shape[0] > 1:
        _matmul(args, weight, rows)
    elif weight.format == "bcq" and weight.bits >= LOOKUP_BITS and weight.share(OCTET) != "weight":
        _lookup_matvec(args, weight)
    else:
        _matvec(args, weight)
    return out.reshape(*x.shape[:-1], weight.out_features)


def _matmul(args: Mapping[str, Any], weight: Weight, rows: Tensor) -> None:
    count = rows.shape[0]
    launch(
        matmul,
        lambda c: (codec.ceil_div(weight.out_features, c["BN"]), codec.ceil_div(count, c["BM"])),
        {**args, "count": count},
        {**weight.layout, "PRECISION": precision(rows.dtype)},
        [
            Config({"BM": bm, "BN": bn, "BK": bk, "SHARE": weight.share(bk)}, warps, stages)
            for bm, bn, bk, warps, stages in _tiles(count, rows.dtype, weight)
        ],
    )


def _tiles(count: int, dtype: torch.dtype, weight: Weight) -> Sequence[tuple[int, int, int, int, int]]:
    """BM, BN, BK, warps, stages; wide tiles where each decoded weight meets many rows."""
    if dtype is torch.float32:
        # Triton 3.7 compiles float32 tiles of 64 rows and more to TF32 instructions on sm_100, also for "ieee".
        return [(16, 32, 64, 4, 3)] if count <= SMALL_BATCH else [(32, 64, 32, 4, 3)]
    if weight.crosses_bytes:  # each word is loaded by itself, from addresses that take registers
        return [(16, 32, 64, 4, 2)] if count <= SMALL_BATCH else [(64, 64, 64, 8, 2)]
    if count <= SMALL_BATCH:
        return [(16, 32, 128, 4, 4), (16, 64, 64, 4, 4)]
    if count <= 64:
        return [(64, 32, 64, 4, 3), (64, 64, 64, 4, 3)]
    if weight.format == "level":  # looked-up values take registers, too
        return [(128, 128, 64, 8, 3)]
    return [(128, 128, 64, 8, 3), (128, 64, 64, 4, 3)]


def _matvec(args: Mapping[str, Any], weight: Weight) -> None:
    launch(
        matvec,
        lambda c: (codec.ceil_div(weight.out_features, c["BN"]), args["x_ptr"].shape[0]),
        args,
        weight.layout,
        [Config({"BN": bn, "BK": bk, "SHARE": weight.share(bk), "STAGES": 4}) for bn, bk in ((8, 512), (16, 256))],
    )


def _lookup_matvec(args: Mapping[str, Any], weight: Weight) -> None:
    launch(
        lookup_matvec,
        lambda c: (codec.ceil_div(weight.out_features, c["BN"]), args["x_ptr"].shape[0]),
        args,
        {"BITS": weight.bits, "GROUP": weight.group},
        [Config({"BN": bn, "BK": bk, "STAGES": 4}) for bn, bk in ((32, 128), (32, 256))],
    )


# -------------------------------------------------------------------------------------------- what is compiled beforehand


def _bcq_case(count: int, dtype: torch.dtype, bits: int = 4, shifted: bool = True, size: int = 4096) -> Sequence[Any]:
    groups = size // 128
    scale = meta((size, groups) if shifted else (size, groups, bits), torch.float16)
    shift = meta((size, groups, codec.ceil_div(bits, 2)), torch.uint8) if shifted else None
    codes = meta((size, bits, size // 8), torch.uint8)
    return meta((count, size), dtype), codes, scale, shift, meta((size,), dtype), 128, size


def _pot_case(count: int, dtype: torch.dtype, bits: int = 4, terms: int = 1, size: int = 4096) -> Sequence[Any]:
    codes, scale = meta((size, size * bits // 8), torch.uint8), meta((size, size // 128), torch.float16)
    return meta((count, size), dtype), codes, scale, None, bits, terms, 128, size


def _level_case(count: int, dtype: torch.dtype, bits: int = 4, size: int = 4096) -> Sequence[Any]:
    codes, scale = meta((size, size * bits // 8), torch.uint8), meta((size, size // 128), torch.float16)
    return meta((count, size), dtype), codes, scale, meta((1 << bits,), torch.float32), None, bits, 128, size


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SHIPPED: tuple[Shipped, ...] = (
    Shipped("bcq 4 bits, 1 row, bf16", bcq_linear, lambda: _bcq_case(1, BF16), "none"),
    Shipped("bcq 1 bit, 1 row, fp32", bcq_linear, lambda: _bcq_case(1, FP32, 1), "none"),
    Shipped("bcq 4 bits, 8 rows, bf16", bcq_linear, lambda: _bcq_case(8, BF16), "mma"),
    Shipped("bcq 3 bits free scales, 64 rows, fp16", bcq_linear, lambda: _bcq_case(64, FP16, 3, False)),
    Shipped("bcq 4 bits, 4096 rows, bf16", bcq_linear, lambda: _bcq_case(4096, BF16)),
    Shipped("bcq 4 bits, 8 rows, fp32", bcq_linear, lambda: _bcq_case(8, FP32), "none"),
    Shipped("bcq 4 bits, 4096 rows, fp32", bcq_linear, lambda: _bcq_case(4096, FP32), "none"),
    Shipped("pot 4 bits, 1 row, bf16", pot_linear, lambda: _pot_case(1, BF16), "none"),
    Shipped("pot 6 bits of 2 terms, 8 rows, bf16", pot_linear, lambda: _pot_case(8, BF16, 6, 2), "mma"),
    Shipped("pot 4 bits, 4096 rows, bf16", pot_linear, lambda: _pot_case(4096, BF16)),
    Shipped("level 4 bits, 1 row, bf16", level_linear, lambda: _level_case(1, BF16), "none"),
    Shipped("level 3 bits, 8 rows, fp16", level_linear, lambda: _level_case(8, FP16, 3), "mma"),
    Shipped("level 4 bits, 4096 rows, bf16", level_linear, lambda: _level_case(4096, BF16)),
    *launch_gradients.SHIPPED,
    *launch_embedding.SHIPPED,
)
