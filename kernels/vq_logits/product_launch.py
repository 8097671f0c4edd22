# SPDX-License-Identifier: Apache-2.0
"""Product codebooks on a GPU, with exact rows too.

What is read of such a head are its codes, G bytes a token. For one to four positions a table of h_g·C[g, c] is built
for each group, and a logit is a sum of G numbers from the tables. For more positions that would be G loads per logit;
then rows are decoded into the tile of a matrix product, once for all its positions. For many, for float32 (of which
Triton 3.7 makes TF32 on sm_100 in that kernel, against ``input_precision``), and for gradients, which need the rows
again, a chunk of the vocabulary at a time is decoded and multiplied by torch's library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.kernels.launching import Config, launch, precision
from rewriter.kernels.vq_logits import product_kernels as kernels
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.tiers_launch import HALF, cdiv, require, rows_of

BY_TABLE = 4  # positions
BY_TILE = 512
# Tokens whose decoded rows are alive at a time: 12 MB of 768 bfloat16 numbers each, which stay in the L2 cache.
CHUNK = 8192
_TABLES = [Config({"COLUMNS": 128, "GROUPS": 16}, 4, 1), Config({"COLUMNS": 256, "GROUPS": 8}, 8, 1)]
_DECODING = [Config({"COLUMNS": 32}, 4, 1)]
_ADDING = [Config({"TOKENS": 16}, 4, 1)]


def product(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """`vq_logits_product`."""
    require(h, codebook, codes, bias)
    flat, codebook, codes = rows_of(h), codebook.contiguous(), codes.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = h.new_empty((flat.shape[0], codes.shape[0]))
    if flat.shape[0] <= BY_TABLE:
        _by_table(flat, codebook, codes, bias, out)
    elif flat.shape[0] <= BY_TILE and h.dtype in HALF:
        _by_tile(flat, codebook, codes, bias, out)
    else:
        for start in range(0, codes.shape[0], CHUNK):
            rows = decoded(codebook, codes[start : start + CHUNK], flat)
            logits = out[:, start : start + CHUNK]
            if bias is None:
                torch.mm(flat, rows.t(), out=logits)
            else:
                torch.addmm(bias[start : start + CHUNK].to(h.dtype), flat, rows.t(), out=logits)
    return out.reshape(*h.shape[:-1], -1)


def _by_table(flat: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, out: Tensor) -> None:
    positions, width = flat.shape
    groups, per_group, dims = codebook.shape
    rows = _power_of_two(positions)
    tables = flat.new_empty((groups, per_group, rows), dtype=torch.float32)
    launch(
        kernels.build_tables,
        lambda c: (groups, cdiv(per_group, c["CODES"])),
        {"h": flat, "codebook": codebook, "out": tables, "positions": positions, "codes": per_group, "dims": dims,
         "width": width},
        {"ROWS": rows, "DIMS": _power_of_two(dims)},
        [Config({"CODES": 128}, 4, 1)],
    )  # fmt: skip
    launch(
        kernels.sum_tables,
        lambda c: (cdiv(codes.shape[0], c["COLUMNS"]),),
        {"tables": tables, "codes_of": codes, "bias": bias, "out": out, "positions": positions,
         "tokens": codes.shape[0], "groups": groups, "codes": per_group},
        {"ROWS": rows},
        _TABLES,
    )  # fmt: skip


def _by_tile(flat: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, out: Tensor) -> None:
    positions, width = flat.shape
    groups, per_group, dims = codebook.shape
    blocks, configs = tile_blocks(positions, dims)
    launch(
        kernels.product_logits,
        lambda c: (cdiv(codes.shape[0], c["COLUMNS"]), cdiv(positions, c["ROWS"])),
        {"h": flat, "codebook": codebook, "codes_of": codes, "bias": bias, "out": out, "positions": positions,
         "tokens": codes.shape[0], "groups": groups, "codes": per_group, "dims": dims, "width": width},
        {"PRECISION": precision(flat.dtype), "DIMS": _power_of_two(dims), **blocks},
        configs,
    )  # fmt: skip


def tile_blocks(positions: int, dims: int) -> tuple[dict[str, int], list[Config]]:
    """Tile of a product with decoded rows, 64 features deep (or one group, where that has more)."""
    groups = max(64 // _power_of_two(dims), 1)
    if positions <= 16:
        return {"ROWS": 16, "COLUMNS": 64, "GROUPS": groups}, [Config({}, 4, 1)]
    return {"ROWS": 64, "COLUMNS": 128, "GROUPS": groups}, [Config({}, 8, 1)]


def decoded(codebook: Tensor, codes: Tensor, like: Tensor) -> Tensor:
    """The rows of these tokens, ``[tokens, d]``, in the dtype and width of ``like`` ``[..., d]``."""
    groups, per_group, dims = codebook.shape
    tokens, width = codes.shape[0], like.shape[-1]
    out = like.new_empty((tokens, width))
    launch(
        kernels.decode_rows,
        lambda c: (cdiv(tokens, c["COLUMNS"]), cdiv(groups, c["GROUPS"])),
        {"codebook": codebook, "codes_of": codes, "out": out, "tokens": tokens, "groups": groups, "codes": per_group,
         "dims": dims, "width": width},
        {"GROUPS": max(64 // _power_of_two(dims), 1), "DIMS": _power_of_two(dims)},
        _DECODING,
    )  # fmt: skip
    return out


def product_backward(
    grad: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """`vq_logits_product_backward`, a chunk of the vocabulary after the other."""
    require(grad, h, codebook, codes)
    flat, rows, codebook, codes = rows_of(h), rows_of(grad), codebook.contiguous(), codes.contiguous()
    of_h = torch.zeros(flat.shape, dtype=torch.float32, device=h.device)
    of_codebook = torch.zeros(codebook.shape, dtype=torch.float32, device=h.device)
    for start in range(0, codes.shape[0], CHUNK):
        here, part = codes[start : start + CHUNK], rows[:, start : start + CHUNK]
        if wanted[0]:
            of_h += part @ decoded(codebook, here, flat)
        if wanted[1]:
            _add_to_codebook((part.t() @ flat).contiguous(), here, of_codebook)
    return (
        of_h.to(h.dtype).reshape(h.shape) if wanted[0] else h.new_empty(0),
        of_codebook.to(codebook.dtype) if wanted[1] else codebook.new_empty(0),
        rows.sum(0, dtype=torch.float32) if wanted[2] else h.new_empty(0, dtype=torch.float32),
    )


def _add_to_codebook(dense: Tensor, codes: Tensor, out: Tensor) -> None:
    groups, per_group, dims = out.shape
    padded = _power_of_two(dims)
    launch(
        kernels.add_to_codebook,
        lambda c: (groups, cdiv(per_group, c["CODES"])),
        {"dense": dense, "codes_of": codes, "out": out, "tokens": codes.shape[0], "groups": groups,
         "codes": per_group, "dims": dims, "width": dense.shape[1]},
        {"CODES": max(256 // padded, 1), "DIMS": padded},
        _ADDING,
    )  # fmt: skip


# -- exact rows --------------------------------------------------------------------------------------------------


def product_exact(
    h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, exact: Tensor, exact_of: Tensor
) -> Tensor:
    """`vq_logits_product_exact`: the product's logits, then those of the few exact tokens over them."""
    require(exact, exact_of)
    out = product(h, codebook, codes, bias)
    index = unpack_codes(exact_of)
    own = None if bias is None else bias.index_select(0, index).to(h.dtype)
    return out.index_copy_(-1, index, torch.nn.functional.linear(h, exact.to(h.dtype), own))


def product_exact_backward(
    grad: Tensor,
    h: Tensor,
    codebook: Tensor,
    codes: Tensor,
    exact: Tensor,
    exact_of: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vq_logits_product_exact_backward`: the product's without the exact tokens, and theirs."""
    require(exact, exact_of)
    index = unpack_codes(exact_of)
    coded = grad.index_fill(-1, index, 0.0)
    of_h, of_codebook, of_bias = product_backward(coded, h, codebook, codes, wanted[:3])
    own = grad.index_select(-1, index)
    if wanted[0]:
        of_h += own @ exact.to(h.dtype)
    if wanted[2]:
        of_bias.index_add_(0, index, own.reshape(-1, own.shape[-1]).sum(0, dtype=torch.float32))
    of_exact = exact.new_empty(0)
    if wanted[3]:
        of_exact = (own.reshape(-1, own.shape[-1]).t() @ rows_of(h)).to(exact.dtype)
    return of_h, of_codebook, of_bias, of_exact


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
