# SPDX-License-Identifier: Apache-2.0
"""What follows a head on a GPU. Losses and gradients are those of ``kernels/vq_logits/loss_launch.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.after_head import kernels
from rewriter.kernels.after_head.reference import soft_weights
from rewriter.kernels.launching import Config, Shipped, Unsupported, launch, precision
from rewriter.kernels.vq_logits import launch as shipped
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.loss_launch import (
    CHUNK,
    Tiles,
    cross_entropy,
    linear_logsumexp,
    linear_logsumexp_backward,
    log_mass,
    loss_backward,
    loss_blocks,
    weighted_backward,
    within_codes,
)
from rewriter.kernels.vq_logits.tiers_launch import cdiv, code_logits, expanded, require, rows_of, sums_by_code

__all__ = [
    "SHIPPED", "cross_entropy", "linear_logsumexp", "linear_logsumexp_backward", "linear_topk", "log_softmax",
    "loss_backward", "soft_cross_entropy", "softmax", "topk", "weighted_backward",
]  # fmt: skip

Pair = tuple[Tensor, Tensor]


# -- softmax and losses against probabilities --------------------------------------------------------------------


def log_softmax(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """`vq_tiers_log_softmax`: log p(i) = l_{M(i)} + b_i − log Z."""
    return _normalised(h, codebook, code_of, token_bias, exp=False)


def softmax(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """`vq_tiers_softmax`."""
    return _normalised(h, codebook, code_of, token_bias, exp=True)


def _normalised(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, exp: bool) -> Tensor:
    require(h, codebook, code_of, token_bias)
    flat, codebook = rows_of(h), codebook.contiguous()
    log_z = Tiles(flat, codebook, log_mass(code_of, token_bias, codebook.shape[0])).log_z()
    table = code_logits(flat, codebook, torch.float32)
    out = h.new_empty((flat.shape[0], code_of.shape[0]), dtype=torch.float32)
    bias = None if token_bias is None else token_bias.contiguous()
    return expanded(table, code_of.unsqueeze(1), bias, log_z, out, exp).reshape(*h.shape[:-1], -1)


def soft_cross_entropy(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """`vq_tiers_soft_cross_entropy`: −Σ_j T_j log P(j) − Σ_i t_i log P(i | M(i)), T the sums of t."""
    require(h, codebook, code_of, token_bias, target, weight)
    codes = codebook.shape[0]
    flat, codebook = rows_of(h), codebook.contiguous()
    t = soft_weights(rows_of(target).float(), weight, label_smoothing)
    per_code = torch.zeros((flat.shape[0], codes), dtype=torch.float32, device=h.device)
    sums_by_code(t, unpack_codes(code_of), codes, per_code)
    mass = log_mass(code_of, token_bias, codes)
    tiles = Tiles(flat, codebook, mass, share=per_code)
    return tiles.loss(share_within=t @ within_codes(code_of, token_bias, mass)).reshape(h.shape[:-1])


# -- the largest logits ------------------------------------------------------------------------------------------


def topk(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, k: int) -> Pair:
    """`vq_tiers_topk`: the best codes by their best tokens, then the best among k tokens of each.

    Raises:
        Unsupported: these candidates are no fewer than the vocabulary.
    """
    require(h, codebook, code_of, token_bias)
    tokens, codes = code_of.shape[0], codebook.shape[0]
    picks = min(k, codes)
    if k * picks >= tokens:
        raise Unsupported(f"for k={k} of {tokens} tokens all logits are looked at")
    flat = rows_of(h)
    positions = flat.shape[0]
    order, first, count = _by_code(unpack_codes(code_of), token_bias, codes)
    bias = None if token_bias is None else token_bias.contiguous()
    best = torch.where(count > 0, order[first.clamp(max=tokens - 1)], -1)
    top = None if bias is None else bias[best.clamp(min=0)]
    logits, keys = flat.new_empty((positions, codes)), flat.new_empty((positions, codes), dtype=torch.int64)
    _tile_keys(flat, codebook.contiguous(), top, best, logits, keys, 0)
    picked = keys.topk(picks, sorted=False).indices
    candidates = flat.new_empty((positions, picks * k), dtype=torch.int64)
    launch(
        kernels.candidate_keys,
        lambda c: (positions, cdiv(picks * k, c["PLACES"])),
        {"logits": logits, "picked": picked, "order": order, "first": first, "count": count, "bias": bias,
         "out": candidates, "positions": positions, "entries": codes, "picks": picks, "k": k},
        {},
        [Config({"PLACES": 512}, 4, 1)],
    )  # fmt: skip
    return _read(candidates.topk(k).values, h)


def linear_topk(h: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Pair:
    """`linear_topk`, a chunk of the vocabulary after the other; no more than CHUNK + k keys per position are alive."""
    require(h, weight, bias)
    flat, weight = rows_of(h), weight.contiguous()
    best = flat.new_empty((flat.shape[0], 0), dtype=torch.int64)
    for start in range(0, weight.shape[0], CHUNK):
        part = weight[start : start + CHUNK]
        offset = None if bias is None else bias[start : start + CHUNK].contiguous()
        keys = flat.new_empty((flat.shape[0], best.shape[1] + part.shape[0]), dtype=torch.int64)
        keys[:, part.shape[0] :] = best
        _tile_keys(flat, part, offset, None, None, keys[:, : part.shape[0]], start)
        best = keys.topk(min(k, keys.shape[1]), sorted=False).values
    return _read(best.sort(descending=True).values, h)


def _by_code(code: Tensor, bias: Tensor | None, codes: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.by_code`, in the order of float32 biases, by bounds instead of additions."""
    order = torch.arange(code.shape[0], device=code.device)
    if bias is not None:
        order = bias.float().sort(descending=True, stable=True).indices
    ordered, place = code[order].sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(codes + 1, device=code.device))
    return order[place], bounds[:-1].contiguous(), bounds.diff()


def _tile_keys(
    flat: Tensor,
    table: Tensor,
    offset: Tensor | None,
    ids: Tensor | None,
    logits: Tensor | None,
    out: Tensor,
    first_id: int,
) -> None:
    positions, width = flat.shape
    entries = table.shape[0]
    blocks, configs = loss_blocks(positions, flat.dtype)
    launch(
        kernels.tile_keys,
        lambda c: (cdiv(entries, c["COLUMNS"]), cdiv(positions, c["ROWS"])),
        {"h": flat, "table": table, "offset": offset, "ids": ids, "logits": logits, "out": out,
         "positions": positions, "entries": entries, "width": width, "first_id": first_id,
         "out_stride": out.stride(0)},
        {"PRECISION": precision(flat.dtype), **blocks},
        configs,
    )  # fmt: skip


def _read(keys: Tensor, h: Tensor) -> Pair:
    """Values in h's dtype and tokens of keys ``[N, k]``."""
    shape = (*h.shape[:-1], keys.shape[-1])
    values, tokens = h.new_empty(shape), h.new_empty(shape, dtype=torch.int64)
    launch(
        kernels.read_keys,
        lambda c: (cdiv(keys.numel(), c["PLACES"]),),
        {"keys": keys.contiguous(), "values": values, "tokens": tokens, "total": keys.numel()},
        {},
        [Config({"PLACES": 256}, 4, 1)],
    )
    return values, tokens


def _dense(positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    h, _, _, _ = shipped.head(positions, dtype)
    return h, shipped.empty(CHUNK, shipped.D, dtype=dtype), shipped.empty(CHUNK, dtype=dtype)


def _dense_backward(positions: int, dtype: torch.dtype) -> tuple[Any, ...]:
    per_position = shipped.empty(positions, dtype=torch.float32)
    return per_position, *_dense(positions, dtype), per_position, [True, True, True]


def _probabilities(positions: int, dtype: torch.dtype) -> tuple[Any, ...]:
    target = shipped.empty(positions, shipped.V, dtype=torch.float32)
    return *shipped.head(positions, dtype), target, None, 0.1


SHIPPED = (
    Shipped("after_head softmax, 64", softmax, lambda: shipped.head(64, torch.bfloat16)),
    Shipped(
        "after_head cross entropy against probabilities, 4096",
        soft_cross_entropy,
        lambda: _probabilities(4096, torch.bfloat16),
    ),
    Shipped("after_head topk 50, 1", topk, lambda: (*shipped.head(1, torch.bfloat16), 50), "mma"),
    Shipped("after_head topk of a dense head, 64", linear_topk, lambda: (*_dense(64, torch.bfloat16), 50)),
    Shipped("after_head logsumexp of a dense head, 4096", linear_logsumexp, lambda: _dense(4096, torch.bfloat16)),
    Shipped(
        "after_head logsumexp of a dense head, backward, 4096",
        linear_logsumexp_backward,
        lambda: _dense_backward(4096, torch.bfloat16),
    ),
)
