# SPDX-License-Identifier: Apache-2.0
"""Codebook heads on the CPU: ``tiers.cpp`` and ``product.cpp`` beside this file.

The product with the codebook of a tiers head stays torch's; what is new is that codes are read as they are stored, and
nothing else of the vocabulary's size is made. float16 and float64 run the references, and so does a head with a code
outside its codebook, for the reference to say so.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import native
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.vq_logits import reference
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.exact import check_exact
from rewriter.kernels.vq_logits.shared import check_k, check_product, check_target, check_tiers

_HERE = Path(__file__).parent
_FLAGS = (*native.FLAGS, "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_TIERS = {
    "tiers_logits_f32": [_POINTER] * 4 + [_LONG, _INT],
    "tiers_logits_bf16": [_POINTER] * 4 + [_LONG, _INT],
    "tiers_losses": [_POINTER] * 5 + [_LONG, _LONG, _INT],
    "tiers_topk": [_POINTER] * 5 + [_LONG, _LONG, _INT, _INT],
}
_PRODUCT = {"product_logits": [_POINTER] * 4 + [_LONG, _INT]}
_DTYPES = (torch.float32, torch.bfloat16)
MOST_ROWS = 256  # of a product head; more of them are faster through the decoded weight (benchmarks/cpu.py)


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code_of", "bias")),
        *((name, ctypes.c_long) for name in ("codes", "tokens")),
        ("bytes", ctypes.c_int),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codebook", "code", "bias")),
        *((name, ctypes.c_long) for name in ("groups", "codes", "dims", "tokens")),
    )


def vq_logits_tiers(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """logit_i = h·C_{M(i)} + b_i. h ``[..., d]`` -> ``[..., V]``."""
    check_tiers(h, codebook, code_of, token_bias)
    call = _Tiers(h, codebook, code_of, token_bias)
    out = h.new_empty((*h.shape[:-1], code_of.shape[0]))
    call("tiers_logits_f32" if h.dtype is torch.float32 else "tiers_logits_bf16", out)
    return out


def vq_tiers_logsumexp(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """log Z. h ``[..., d]`` -> ``[...]``, float32."""
    check_tiers(h, codebook, code_of, token_bias)
    call = _Tiers(h, codebook, code_of, token_bias, wide=True)
    out = h.new_empty(h.shape[:-1], dtype=torch.float32)
    call("tiers_losses", None, out, numbers=(0,))
    return out


def vq_tiers_nll(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, target: Tensor) -> Tensor:
    """log Z − logit_y, 0 where y is -100. h ``[..., d]``, target int64 ``[...]`` -> ``[...]``, float32."""
    check_tiers(h, codebook, code_of, token_bias)
    check_target(h, target)
    call = _Tiers(h, codebook, code_of, token_bias, wide=True)
    out = h.new_empty(h.shape[:-1], dtype=torch.float32)
    call("tiers_losses", target.contiguous(), out, numbers=(reference.IGNORE_INDEX,))
    return out


def vq_tiers_topk(
    h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest logits and their tokens, of equals the smaller token first. h ``[..., d]`` -> twice ``[..., k]``."""
    check_tiers(h, codebook, code_of, token_bias)
    check_k(k, code_of.shape[0])
    call = _Tiers(h, codebook, code_of, token_bias)
    values = torch.empty((*h.shape[:-1], k))
    tokens = torch.empty((*h.shape[:-1], k), dtype=torch.int64)
    call("tiers_topk", values, tokens, numbers=(k, h.dtype is torch.bfloat16))
    return values.to(h.dtype), tokens


class _Tiers:
    """A call of `tiers.cpp`.

    Args:
        wide: the biases are read in float32, as losses do; otherwise rounded to h's dtype first.

    Raises:
        Unsupported: a dtype, or an empty head.
    """

    def __init__(
        self, h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, wide: bool = False
    ) -> None:
        if h.dtype not in _DTYPES:
            raise Unsupported(f"the CPU kernels of tiers heads take float32 and bfloat16, not {h.dtype}")
        if not (code_of.shape[0] and codebook.shape[0]):
            raise Unsupported("a head without tokens or without codes")
        self.logits = F.linear(h, codebook.to(h.dtype)).reshape(-1, codebook.shape[0]).float().contiguous()
        self.code_of = code_of.contiguous()
        self.bias = (
            None if token_bias is None else token_bias.to(torch.float32 if wide else h.dtype).float().contiguous()
        )
        self.head = _Head(
            *map(native.address, (self.code_of, self.bias)), codebook.shape[0], code_of.shape[0], code_of.shape[1]
        )

    def __call__(self, name: str, *buffers: Tensor | None, numbers: tuple[int, ...] = ()) -> None:
        """Run a function of the library on these buffers."""
        outside = _INT(0)
        tensors = map(native.address, (self.logits, *buffers))
        function = getattr(_tiers(), name)
        rows, threads = self.logits.shape[0], torch.get_num_threads()
        function(ctypes.byref(self.head), ctypes.byref(outside), *tensors, rows, *numbers, threads)
        if outside.value:
            raise Unsupported("a code or a target lies outside of the head")


def vq_logits_product(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """logit_i = Σ_g h_g·C[g, codes_ig] + bias_i. h ``[..., d]`` -> ``[..., V]``."""
    check_product(h, codebook, codes, bias)
    if h.dtype not in _DTYPES:
        raise Unsupported(f"the CPU kernel of product heads takes float32 and bfloat16, not {h.dtype}")
    (groups, per_group, dims), tokens, width = codebook.shape, codes.shape[0], h.shape[-1]
    rows = h.numel() // width if width else 0
    if rows > MOST_ROWS or not (rows and tokens):
        raise Unsupported(f"1 to {MOST_ROWS} rows and at least one token, not {rows} and {tokens}")
    flat = F.pad(h.reshape(rows, width).float(), (0, groups * dims - width)).contiguous()
    book, packed = codebook.to(h.dtype).float().contiguous(), codes.contiguous()
    offsets = None if bias is None else bias.to(h.dtype).float().contiguous()
    out = torch.empty((*h.shape[:-1], tokens))
    product = _Product(*map(native.address, (book, packed, offsets)), groups, per_group, dims, tokens)
    outside = _INT(0)
    tensors = map(native.address, (flat, out))
    _product().product_logits(ctypes.byref(product), ctypes.byref(outside), *tensors, rows, torch.get_num_threads())
    if outside.value:
        raise Unsupported("a code lies outside of the codebook")
    return out.to(h.dtype)


def vq_logits_product_exact(
    h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, exact: Tensor, exact_of: Tensor
) -> Tensor:
    """The same, but h·exact_r + bias_i for token i = exact_of[r]: torch's product with these rows alone."""
    check_exact(h, codebook, codes, bias, exact, exact_of)
    out, rows = vq_logits_product(h, codebook, codes, bias), unpack_codes(exact_of)
    own = None if bias is None else bias.index_select(0, rows).to(h.dtype)
    return out.index_copy_(-1, rows, F.linear(h, exact.to(h.dtype), own))


@cache
def _tiers() -> ctypes.CDLL:
    return native.library(_HERE / "tiers.cpp", {}, _TIERS, _FLAGS)


@cache
def _product() -> ctypes.CDLL:
    return native.library(_HERE / "product.cpp", {}, _PRODUCT, _FLAGS)
