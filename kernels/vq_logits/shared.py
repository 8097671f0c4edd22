# SPDX-License-Identifier: Apache-2.0
"""What the operators of codebook heads have in common: checks of arguments, batching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.batching import leading
from rewriter.kernels.spec import tensor_bytes as tensor_bytes
from rewriter.kernels.vq_logits.codec import MAX_GROUP_CODES

Grads = tuple[Tensor | None, ...]


def check_hidden(h: Tensor) -> None:
    torch._check(h.dim() >= 1, lambda: "h must have a last dimension of the head's width")
    torch._check(h.is_floating_point(), lambda: f"h must be floating, not {h.dtype}")


def check_per_token(name: str, bias: Tensor | None, codes: Tensor) -> None:
    if bias is not None:
        torch._check(
            bias.shape == codes.shape[:1],
            lambda: f"{name} must be [{codes.shape[0]}], one per token, not {tuple(bias.shape)}",
        )


def check_tiers(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> None:
    """h ``[..., d]``, codebook ``[K, d]``, code_of uint8 ``[V, 1 to 3 bytes]``, token_bias ``[V]``."""
    check_hidden(h)
    torch._check(codebook.dim() == 2, lambda: f"codebook must be [K, d], not {tuple(codebook.shape)}")
    torch._check(
        h.shape[-1] == codebook.shape[1],
        lambda: f"h has width {h.shape[-1]}, the codebook {codebook.shape[1]}",
    )
    torch._check(code_of.dtype == torch.uint8, lambda: f"code_of must be uint8, not {code_of.dtype}")
    torch._check(
        code_of.dim() == 2 and code_of.shape[1] in (1, 2, 3),
        lambda: f"code_of must be [V, 1 to 3 bytes], not {tuple(code_of.shape)}",
    )
    check_per_token("token_bias", token_bias, code_of)


def check_target(h: Tensor, target: Tensor) -> None:
    """Class numbers: target int64 of h's leading dimensions."""
    torch._check(target.dtype == torch.int64, lambda: f"target must be int64, not {target.dtype}")
    torch._check(
        target.shape == h.shape[:-1],
        lambda: f"target must be {tuple(h.shape[:-1])} for h {tuple(h.shape)}, not {tuple(target.shape)}",
    )


def check_product(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> None:
    """h ``[..., d]``, codebook ``[G, C, w]`` with (G − 1)·w < d ≤ G·w, codes uint8 ``[V, G]``, bias ``[V]``."""
    check_hidden(h)
    torch._check(codebook.dim() == 3, lambda: f"codebook must be [G, C, w], not {tuple(codebook.shape)}")
    groups, per_group, dims = codebook.shape
    torch._check(
        1 <= per_group <= MAX_GROUP_CODES, lambda: f"a group has 1 to {MAX_GROUP_CODES} codes, not {per_group}"
    )
    torch._check(
        (groups - 1) * dims < h.shape[-1] <= groups * dims,
        lambda: f"{groups} groups of {dims} dimensions do not cover h's width {h.shape[-1]}",
    )
    torch._check(codes.dtype == torch.uint8, lambda: f"codes must be uint8, not {codes.dtype}")
    torch._check(
        codes.dim() == 2 and codes.shape[1] == groups,
        lambda: f"codes must be [V, {groups}], not {tuple(codes.shape)}",
    )
    check_per_token("bias", bias, codes)


def check_k(k: int, tokens: int) -> None:
    torch._check(1 <= k <= tokens, lambda: f"k must lie in [1, {tokens}], not {k}")


def on_gpu(h: Tensor) -> bool:
    """Whether gradients are computed by operators that have kernels; see ``gradients.py``."""
    return h.is_cuda


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """`setup_context` of an operator whose arguments are all tensors (or None)."""
    ctx.save_for_backward(*inputs)


def vmap_rule(name: str, per_position: tuple[int, ...]) -> Callable[..., Any]:
    """`leading` of an operator by name, whose arguments ``per_position`` carry any leading dimensions."""
    return leading(lambda: getattr(torch.ops.rewriter, name).default, per_position)


def positions(h: Tensor) -> int:
    """Number of hidden states in ``[..., d]``."""
    return h.numel() // h.shape[-1]
