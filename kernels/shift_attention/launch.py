# SPDX-License-Identifier: Apache-2.0
"""Attention by additions on GPUs: sums over tokens first, then one pass over the tokens; backward is the same twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, Unsupported, launch
from rewriter.kernels.shift_attention import reference
from rewriter.kernels.shift_attention.kernels import attend, key_gradients, query_gradients, summed_products

WIDEST = 64  # head dim whose [D, Dv] sums one program keeps in registers
SPAN = 512  # tokens one program sums; longer sequences are summed in parts, in a fixed order


def additive_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None
) -> Tensor:
    """`rewriter.kernels.shift_attention.reference.additive_attention` on a GPU; q, k, v of any strides."""
    q, k, v, keep = _checked(q, k, v, keep, gain, conv)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    sums = _summed(k, v, keep, 1.0)
    launch(
        attend,
        lambda c: _grid(q, c),
        {
            "q_ptr": q, "v_ptr": v, "sums_ptr": sums, "keep_ptr": keep, "gain_ptr": _contiguous(gain),
            "conv_ptr": _contiguous(conv), "out_ptr": out, **_sizes(q, v), **_strides("q", q), **_strides("v", v),
        },
        {**_taps(conv), **_formula(q, v), "ANGLE": reference.ANGLE},
        [_tile(v)],
    )  # fmt: skip
    return out


def additive_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gain and conv, the last two empty where there are none."""
    q, k, v, keep = _checked(q, k, v, keep, gain, conv)
    grad, taps = grad.contiguous(), _taps(conv)
    (batch, heads, tokens, _), config = q.shape, _tile(v)
    tiles = -(-tokens // config.constants["BT"])
    to_q, to_k, to_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    to_sum = torch.empty(v.shape, dtype=torch.float32, device=q.device)
    to_gain = torch.empty((batch, heads, tiles), dtype=torch.float32, device=q.device)
    to_conv = torch.empty((batch, heads, tiles, taps["TAPS"]), dtype=torch.float32, device=q.device)
    launch(
        query_gradients,
        lambda c: _grid(q, c),
        {
            "grad_ptr": grad, "q_ptr": q, "v_ptr": v, "sums_ptr": _summed(k, v, keep, 1.0), "keep_ptr": keep,
            "gain_ptr": _contiguous(gain), "to_sum_ptr": to_sum, "to_q_ptr": to_q, "to_gain_ptr": to_gain,
            "to_conv_ptr": to_conv, **_sizes(q, v), **_strides("q", q), **_strides("v", v),
        },
        {**taps, **_formula(q, v), "ANGLE": reference.ANGLE},
        [config],
    )  # fmt: skip
    launch(
        key_gradients,
        lambda c: _grid(q, c),
        {
            "grad_ptr": grad, "k_ptr": k, "v_ptr": v, "to_sum_ptr": to_sum,
            "mixed_ptr": _summed(q, to_sum, None, reference.ANGLE), "keep_ptr": keep, "conv_ptr": _contiguous(conv),
            "to_k_ptr": to_k, "to_v_ptr": to_v, **_sizes(q, v), **_strides("k", k), **_strides("v", v),
        },
        {**taps, **_formula(q, v)},
        [config],
    )  # fmt: skip
    none = q.new_empty(0)
    return (
        to_q,
        to_k,
        to_v,
        none if gain is None else to_gain.sum((0, 2)).to(gain.dtype),
        none if conv is None else to_conv.sum((0, 2)).to(conv.dtype),
    )


def _checked(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, gain: Tensor | None, conv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    reference.check(q, k, v, keep, gain, conv)
    if any(t is not None and t.dtype is torch.float64 for t in (q, k, v, gain, conv)):
        raise Unsupported("float64 is computed by the reference")
    if max(q.shape[3], v.shape[3]) > WIDEST:
        raise Unsupported(f"head dims above {WIDEST} are computed by the reference")
    dense = [x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (q, k, v)]
    return *dense, None if keep is None else keep.contiguous().view(torch.uint8)  # type: ignore[return-value]


def _summed(x: Tensor, v: Tensor, keep: Tensor | None, factor: float) -> Tensor:
    """``factor · b(x)ᵀ v`` per head, float32 ``[batch, heads, D, Dv]``."""
    batch, heads, tokens, dim = x.shape
    parts = max(-(-tokens // SPAN), 1)
    out = torch.empty((batch, heads, parts, dim, v.shape[3]), dtype=torch.float32, device=x.device)
    launch(
        summed_products,
        lambda c: (batch * heads, parts),
        {
            "x_ptr": x, "v_ptr": v, "keep_ptr": keep, "out_ptr": out, **_sizes(x, v), "span": SPAN,
            **_strides("x", x), **_strides("v", v),
        },
        {"FACTOR": factor, "WIDE": v.dtype is torch.float32, "DP": _padded(dim), "VP": _padded(v.shape[3])},
        [Config({"BT": 32}, num_warps=4, num_stages=2)],
    )  # fmt: skip
    return out.sum(2) if parts > 1 else out.squeeze(2)


def _tile(v: Tensor) -> Config:
    """Few tokens, since a program holds S beside them; fewer for float32, whose products take more registers."""
    return Config({"BT": 16 if v.dtype is torch.float32 else 32}, num_warps=4, num_stages=2)


def _grid(q: Tensor, constants: Any) -> tuple[int, int]:
    return q.shape[0] * q.shape[1], -(-q.shape[2] // constants["BT"])


def _sizes(x: Tensor, v: Tensor) -> dict[str, int]:
    return {"heads": x.shape[1], "tokens": x.shape[2], "dim": x.shape[3], "width": v.shape[3]}


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1), f"{name}_token": x.stride(2)}


def _taps(conv: Tensor | None) -> dict[str, int]:
    return {"TAPS": 0 if conv is None else conv.shape[1]}


def _formula(q: Tensor, v: Tensor) -> dict[str, Any]:
    wide = torch.float32 in (q.dtype, v.dtype)
    return {"RESIDUAL": reference.RESIDUAL, "WIDE": wide, "DP": _padded(q.shape[3]), "VP": _padded(v.shape[3])}


def _padded(size: int) -> int:
    return max(1 << (size - 1).bit_length(), 16)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# -------------------------------------------------------------------------------------------- what is compiled beforehand


def _case(dtype: torch.dtype, dim: int, tokens: int = 4096, *, whole: bool = True) -> Sequence[Any]:
    """q, k, v as projections leave them: ``[B, T, H, D]`` with the two in the middle swapped."""

    def meta(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    activations = [meta(8, tokens, 8, dim).transpose(1, 2) for _ in range(3)]
    if not whole:
        return *activations, None, None, None
    return *activations, meta(8, tokens, kind=torch.bool), meta(8), meta(8, 9)


def _gradient_case(dtype: torch.dtype, dim: int) -> Sequence[Any]:
    arguments = _case(dtype, dim)
    return torch.empty(arguments[2].shape, dtype=dtype, device="meta"), *arguments


SHIPPED: tuple[Shipped, ...] = (
    Shipped("additive attention 64, bf16", additive_attention, lambda: _case(torch.bfloat16, 64), "mma"),
    Shipped("additive attention 32, fp16", additive_attention, lambda: _case(torch.float16, 32, whole=False), "mma"),
    Shipped("additive attention 64, fp32", additive_attention, lambda: _case(torch.float32, 64), "mma"),
    Shipped("additive_attention_backward, 64, bf16", additive_attention_backward, lambda: _gradient_case(torch.bfloat16, 64), "mma"),
    Shipped("additive_attention_backward, 32, fp16", additive_attention_backward, lambda: _gradient_case(torch.float16, 32), "mma"),
    Shipped("additive_attention_backward, 64, fp32", additive_attention_backward, lambda: _gradient_case(torch.float32, 64), "mma"),
)
