# SPDX-License-Identifier: Apache-2.0
"""Look-ups in packed embedding tables on GPUs: only the rows asked for are read, and decoded on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, launch
from rewriter.kernels.shift_add import codec, reference
from rewriter.kernels.shift_add.kernels import rows_of
from rewriter.kernels.shift_add.launch_common import Weight, bcq, level, meta, pot


def bcq_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    """`rewriter.kernels.shift_add.reference.bcq_embedding` on a GPU; a wrong index gives NaN instead of an error."""
    return _rows(ids, bcq(codes, scale, shift, group, in_features))


def pot_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    """`rewriter.kernels.shift_add.reference.pot_embedding` on a GPU; a wrong index gives NaN instead of an error."""
    return _rows(ids, pot(codes, scale, bits, terms, group, in_features))


def level_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    """`rewriter.kernels.shift_add.reference.level_embedding` on a GPU; a wrong index gives NaN instead of an error."""
    return _rows(ids, level(codes, scale, levels, bits, group, in_features))


def _rows(ids: Tensor, weight: Weight) -> Tensor:
    reference.check_ids(ids)
    out = weight.scale.new_empty((*ids.shape, weight.in_features))
    launch(
        rows_of,
        lambda c: (codec.ceil_div(ids.numel(), c["BN"]), codec.ceil_div(weight.in_features, c["BK"])),
        {
            "ids_ptr": ids.contiguous(), **weight.pointers, "out_ptr": out, "count": ids.numel(), **weight.sizes,
        },
        weight.layout,
        [Config({"BN": bn, "BK": bk, "SHARE": weight.share(bk)}) for bn, bk in ((4, 512), (16, 128))],
    )  # fmt: skip
    return out


def _bcq_case() -> Sequence[Any]:
    codes, scale = meta((50257, 4, 96), torch.uint8), meta((50257, 6), torch.float16)
    return meta((8, 1024), torch.int64), codes, scale, meta((50257, 6, 2), torch.uint8), 128, 768


def _level_case() -> Sequence[Any]:
    codes, scale = meta((50257, 384), torch.uint8), meta((50257, 6), torch.bfloat16)
    return meta((8, 1024), torch.int64), codes, scale, meta((16,), torch.float32), 4, 128, 768


SHIPPED: tuple[Shipped, ...] = (
    Shipped("bcq rows, fp16", bcq_embedding, _bcq_case, "none"),
    Shipped("level rows, bf16", level_embedding, _level_case, "none"),
)
