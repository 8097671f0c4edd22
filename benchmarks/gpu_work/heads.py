# SPDX-License-Identifier: Apache-2.0
"""Heads with a codebook, what follows them, and losses of a dense head; against the dense head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_work.work import Built, Call, Draw
from rewriter.kernels.after_head import op as after
from rewriter.kernels.cross_entropy import op as losses
from rewriter.kernels.vq_logits import codec
from rewriter.kernels.vq_logits import op as heads

DIMS, PER_GROUP = 4, 256  # of a product code
EXACT = 100  # rows kept exactly


def _head(draw: Draw, small: bool, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, codebook, codes and biases of the tokens, and the dense head's weight."""
    tokens, codes, width = (1000, 64, 96) if small else (50257, 2048, 768)
    h, codebook = draw.normal(rows, width, dtype=dtype), draw.normal(codes, width, dtype=dtype) * width**-0.5
    code_of = _packed(draw.codes(codes, tokens), codes)
    return h, codebook, code_of, draw.normal(tokens), draw.normal(tokens, width, dtype=dtype) * width**-0.5


def _packed(numbers: Tensor, codes: int) -> Tensor:
    """Code numbers in bytes; of those on the meta device, which cannot be looked at, the shape."""
    if numbers.is_meta:
        return numbers.new_empty((*numbers.shape, codec.code_bytes(codes)), dtype=torch.uint8)
    return codec.pack_codes(numbers, codes)


def logits(draw: Draw, small: bool, structure: str, rows: int, dtype: torch.dtype) -> Built:
    h, codebook, code_of, _, weight = _head(draw, small, rows, dtype)
    tokens, width = weight.shape
    dense = {"dense": Call(F.linear, (h, weight))}
    if structure == "tiers":
        return Built(Call(heads.vq_logits_tiers, (h, codebook, code_of, None)), dense)
    if structure == "residual":
        stages = torch.stack((codebook, codebook.flip(0) * 0.5))
        codes = torch.stack((code_of, code_of.flip(0)), 1)
        return Built(Call(heads.vq_logits_residual, (h, stages, codes, None)), dense)
    table = draw.normal(width // DIMS, PER_GROUP, DIMS, dtype=dtype) * width**-0.5
    codes = draw.codes(PER_GROUP, tokens, width // DIMS, dtype=torch.uint8)
    if structure == "product":
        return Built(Call(heads.vq_logits_product, (h, table, codes, None)), dense)
    numbers = _packed(torch.arange(EXACT, device=draw.device), tokens)
    return Built(Call(heads.vq_logits_product_exact, (h, table, codes, None, weight[:EXACT], numbers)), dense)


def normalised(draw: Draw, small: bool, name: str, rows: int, dtype: torch.dtype) -> Built:
    """log Z, or (log) probabilities of all tokens."""
    h, codebook, code_of, bias, weight = _head(draw, small, rows, dtype)
    module = heads if name == "logsumexp" else after
    function: Callable[..., Tensor] = getattr(torch, name)
    call = Call(getattr(module, f"vq_tiers_{name}"), (h, codebook, code_of, bias))
    return Built(call, {"dense": Call(lambda h, weight: function(F.linear(h, weight).float(), -1), (h, weight))})


def _unfused(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight).float(), target, reduction="none")


def loss(draw: Draw, small: bool, name: str, rows: int, dtype: torch.dtype) -> Built:
    h, codebook, code_of, bias, weight = _head(draw, small, rows, dtype)
    target = draw.codes(code_of.shape[0], rows)
    head = (h, codebook, code_of, bias)
    if name == "nll":
        call = Call(heads.vq_tiers_nll, (*head, target))
    elif name == "cross entropy":
        call = Call(after.vq_tiers_cross_entropy, (*head, target, None, 0.1, -100))
    else:
        target = draw.normal(rows, code_of.shape[0]).softmax(-1)
        call = Call(after.vq_tiers_soft_cross_entropy, (*head, target, None, 0.1))
    return Built(call, {"dense": Call(_unfused, (h, weight, target))})


def topk(draw: Draw, small: bool, rows: int, dtype: torch.dtype) -> Built:
    h, codebook, code_of, _, weight = _head(draw, small, rows, dtype)
    k = 5 if small else 50
    dense = {"dense": Call(_dense_topk, (h, weight, k))}
    return Built(Call(after.vq_tiers_topk, (h, codebook, code_of, None, k)), dense, chooses=True)


def _dense_topk(h: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = F.linear(h, weight).topk(k)
    return found.values, found.indices


def dense(draw: Draw, small: bool, name: str, rows: int, dtype: torch.dtype) -> Built:
    """What follows a dense head, without its logits."""
    h, *_, weight = _head(draw, small, rows, dtype)
    if name == "topk":
        k = 5 if small else 50
        unfused = Call(_dense_topk, (h, weight, k))
        return Built(Call(after.linear_topk, (h, weight, None, k)), {"unfused": unfused}, chooses=True)
    unfused = Call(lambda h, weight: F.linear(h, weight).float().logsumexp(-1), (h, weight))
    return Built(Call(after.linear_logsumexp, (h, weight, None)), {"unfused": unfused})


def linear_loss(draw: Draw, small: bool, reduction: str, rows: int, dtype: torch.dtype) -> Built:
    n, classes, width = (40, 300, 32) if small else (rows, 32000, 2048)
    x, weight = draw.normal(n, width, dtype=dtype), draw.normal(classes, width, dtype=dtype) * width**-0.5
    target = draw.codes(classes, n)

    def unfused(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), target, reduction=reduction)

    settings = (-100, 0.0, None)
    call = Call(losses.linear_cross_entropy, (x, weight, None, target, None, *settings, 2048))
    if reduction != "none":
        call = Call(losses.linear_cross_entropy_reduced, (x, weight, None, target, None, *settings, reduction, 2048))
    return Built(call, {"unfused": Call(unfused, (x, weight))})
