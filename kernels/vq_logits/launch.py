# SPDX-License-Identifier: Apache-2.0
"""Calls of the codebook heads' device implementations that are compiled ahead of time for every target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Shipped
from rewriter.kernels.vq_logits import loss_launch, product_launch, tiers_launch

D, K, V = 768, 2048, 50257
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_ALL = [True, True, True]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def head(positions: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """h, codebook, code_of and token_bias of a GPT-2 small's tiers."""
    codes = empty(V, 2, dtype=torch.uint8)
    token_bias = empty(V, dtype=FP32) if bias else None
    return empty(positions, D, dtype=dtype), empty(K, D, dtype=dtype), codes, token_bias


def _residual(positions: int, dtype: torch.dtype) -> tuple[Any, ...]:
    h, _, _, bias = head(positions, dtype)
    return h, empty(2, K, D, dtype=dtype), empty(V, 2, 2, dtype=torch.uint8), bias


def _product(positions: int, dtype: torch.dtype, tokens: int = V) -> tuple[Any, ...]:
    """256 codes per 4 dimensions, the default without calibration."""
    codes = empty(tokens, D // 4, dtype=torch.uint8)
    bias = empty(tokens, dtype=dtype)
    return empty(positions, D, dtype=dtype), empty(D // 4, 256, 4, dtype=dtype), codes, bias


def target(positions: int) -> Tensor:
    return empty(positions, dtype=torch.int64)


def _product_backward(positions: int, dtype: torch.dtype) -> tuple[Any, ...]:
    h, codebook, codes, _ = _product(positions, dtype, product_launch.CHUNK)
    return empty(positions, codes.shape[0], dtype=dtype), h, codebook, codes, _ALL


def _case(
    name: str, function: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]], matrix: str = "tensor core"
) -> Shipped:
    return Shipped(f"vq_logits {name}", function, arguments, matrix)


SHIPPED = (
    _case("tiers, 1 position", tiers_launch.tiers, lambda: head(1, BF16), "mma"),
    _case("tiers, 64", tiers_launch.tiers, lambda: head(64, BF16)),
    _case("tiers, 4096", tiers_launch.tiers, lambda: head(4096, FP16)),
    _case("tiers, 64, float32", tiers_launch.tiers, lambda: head(64, FP32), "none"),
    _case("residual, 8", tiers_launch.residual, lambda: _residual(8, BF16), "mma"),
    _case(
        "tiers backward, 4096",  # its products are torch's
        tiers_launch.tiers_backward,
        lambda: (empty(4096, V, dtype=BF16), *head(4096, BF16)[:3], _ALL),
        "none",
    ),
    _case("logsumexp, 1", loss_launch.logsumexp, lambda: head(1, BF16, bias=False), "mma"),
    _case("nll, 4096", loss_launch.nll, lambda: (*head(4096, BF16), target(4096))),
    _case(
        "cross entropy, 64, float32",
        loss_launch.cross_entropy,
        lambda: (*head(64, FP32), target(64), empty(V, dtype=FP32), 0.1, -100),
        "none",
    ),
    _case(
        "cross entropy backward, 4096",
        loss_launch.loss_backward,
        lambda: (empty(4096, dtype=FP32), *head(4096, BF16), target(4096), None, 0.1, -100, _ALL),
    ),
    _case(
        "log_softmax backward, 64",
        loss_launch.weighted_backward,
        lambda: (empty(64, V, dtype=FP32), *head(64, FP16), _ALL),
    ),
    _case("product, 2", product_launch.product, lambda: _product(2, FP16), "none"),
    _case("product, 8", product_launch.product, lambda: _product(8, BF16), "mma"),
    _case("product, 64", product_launch.product, lambda: _product(64, BF16)),
    _case("product, 64, float32", product_launch.product, lambda: _product(64, FP32, product_launch.CHUNK), "none"),
    _case("product backward, 4096", product_launch.product_backward, lambda: _product_backward(4096, BF16), "none"),
)
