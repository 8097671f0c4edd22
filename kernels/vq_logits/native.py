# SPDX-License-Identifier: Apache-2.0
"""Codebook heads on the CPU: ``tiers.cpp`` and ``product.cpp`` beside this file.

Codes are read as they are stored, and nothing of the vocabulary's size is made but logits that are asked for. The product of
a tiers head with its codebook is our own where the processor has AVX-512 (``dots.h``) and torch's elsewhere; for more than
`MEASURED_ROWS` rows, where arithmetic decides and torch may know matrix units, the faster of the two by measurement.
float16 and float64 run the references, and so does a head with a code outside its codebook, for the reference to say so.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import choosing, native
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.vq_logits import reference
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.exact import check_exact
from rewriter.kernels.vq_logits.shared import check_k, check_product, check_target, check_tiers

_HERE = Path(__file__).parent
_FLAGS = (*native.FLAGS, "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_TIERS: native.Functions = {
    "tiers_own_product": [_POINTER],
    "tiers_product": [_POINTER, _INT, _POINTER, _LONG, _INT, _POINTER],
    "tiers_logits": [_POINTER, _INT] + [_POINTER] * 2 + [_LONG, _INT, _POINTER],
    "tiers_losses": [_POINTER, _INT] + [_POINTER] * 3 + [_LONG, _LONG, _INT, _POINTER],
    "tiers_topk": [_POINTER, _INT] + [_POINTER] * 3 + [_LONG, _LONG, _INT, _POINTER],
}
_PRODUCT: native.Functions = {"product_logits": [_POINTER] * 4 + [_LONG, _INT]}
_DTYPES = (torch.float32, torch.bfloat16)
MEASURED_ROWS = 8  # of a tiers head; for so many its codebook is read no faster than it is multiplied
GRAIN = 1 << 16  # products that are worth a thread
MOST_ROWS = 256  # of a product head; more of them are faster through the decoded weight (benchmarks/cpu.py)


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codebook", "code_of", "bias")),
        *((name, ctypes.c_long) for name in ("stride", "codes", "width", "tokens")),
        ("bytes", ctypes.c_int),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codebook", "code", "bias")),
        *((name, ctypes.c_long) for name in ("groups", "codes", "dims", "tokens")),
    )


def vq_logits_tiers(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """logit_i = h·C_{M(i)} + b_i. h ``[..., d]`` -> ``[..., V]``."""
    call = _Tiers(h, codebook, code_of, token_bias)
    out = h.new_empty((*h.shape[:-1], code_of.shape[0]))
    call.run(_tiers().tiers_logits, out)
    return out


def vq_tiers_logsumexp(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """log Z. h ``[..., d]`` -> ``[...]``, float32."""
    call = _Tiers(h, codebook, code_of, token_bias, wide=True)
    out = h.new_empty(h.shape[:-1], dtype=torch.float32)
    call.run(_tiers().tiers_losses, None, out, number=0)
    return out


def vq_tiers_nll(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, target: Tensor) -> Tensor:
    """log Z − logit_y, 0 where y is -100. h ``[..., d]``, target int64 ``[...]`` -> ``[...]``, float32."""
    check_target(h, target)
    call = _Tiers(h, codebook, code_of, token_bias, wide=True)
    out = h.new_empty(h.shape[:-1], dtype=torch.float32)
    call.run(_tiers().tiers_losses, target.contiguous(), out, number=reference.IGNORE_INDEX)
    return out


def vq_tiers_topk(
    h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest logits and their tokens, of equals the smaller token first. h ``[..., d]`` -> twice ``[..., k]``."""
    call = _Tiers(h, codebook, code_of, token_bias)
    check_k(k, code_of.shape[0])
    shape = (*h.shape[:-1], k)
    values, tokens = h.new_empty(shape), h.new_empty(shape, dtype=torch.int64)
    call.run(_tiers().tiers_topk, values, tokens, number=k)
    return values, tokens


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
        if not _fits(h, codebook, code_of, token_bias):
            check_tiers(h, codebook, code_of, token_bias)  # says why
        dtype = h.dtype
        if dtype not in _DTYPES:
            raise Unsupported(f"the CPU kernels of tiers heads take float32 and bfloat16, not {dtype}")
        (codes, width), (tokens, per_code) = codebook.shape, code_of.shape
        if not (tokens and codes):
            raise Unsupported("a head without tokens or without codes")
        self.code_of = code_of.contiguous()
        self.bias = None if token_bias is None else token_bias.to(torch.float32 if wide else dtype).float().contiguous()
        self.rows, self.narrow = math.prod(h.shape[:-1]), dtype is torch.bfloat16
        self.threads = native.threads((self.rows + 1) * codes * width, GRAIN)
        self.x, self.book = h.reshape(self.rows, width).contiguous(), codebook.to(dtype)
        if width > 1 and self.book.stride(1) != 1:
            self.book = self.book.contiguous()
        self.head = _Head(
            *(None, self.code_of.data_ptr(), native.address(self.bias)),
            *(self.book.stride(0), codes, width, tokens, per_code),
        )

    def run(self, function: Any, *buffers: Tensor | None, number: int | None = None) -> None:
        """Call a function of the library with these buffers."""
        self._call(function, self._by_torch() if self._way() == "torch" else None, *buffers, number=number)

    def _way(self) -> str:
        """Whose product with the codebook. A head with a code for every token is the dense one, bit for bit."""
        if not _own_product() or self.head.codes >= self.head.tokens:
            return "torch"
        if self.rows <= MEASURED_ROWS:
            return "own"
        function = _tiers().tiers_product
        sizes = (choosing.bucket(self.rows), *self.book.shape, self.threads)
        kind = " ".join(map(str, (_tiers()._name.rpartition("/")[2], self.x.dtype, *sizes)))
        ways = {"own": lambda: self._call(function, None), "torch": lambda: self._call(function, self._by_torch())}
        return choosing.fastest(kind, ways)

    def _by_torch(self) -> Tensor:
        return F.linear(self.x, self.book)

    def _call(self, function: Any, products: Tensor | None, *buffers: Tensor | None, number: int | None = None) -> None:
        """With torch's products, or None for the library's own."""
        self.head.codebook = self.book.data_ptr() if products is None else None
        x = self.x if products is None else products
        outside = _INT()
        numbers = (self.rows, self.threads) if number is None else (self.rows, number, self.threads)
        addresses = (native.address(buffer) for buffer in buffers)
        function(ctypes.byref(self.head), self.narrow, x.data_ptr(), *addresses, *numbers, ctypes.byref(outside))
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


def _fits(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> bool:
    """What `check_tiers` asks, without eight calls that each can word an error: they took as long as the rest of a call."""
    return (
        h.dim() > 0
        and codebook.dim() == 2
        and h.shape[-1] == codebook.shape[1]
        and code_of.dim() == 2
        and code_of.dtype is torch.uint8
        and code_of.shape[1] in (1, 2, 3)
        and (token_bias is None or token_bias.shape == code_of.shape[:1])
    )


@cache
def _own_product() -> bool:
    """Whether the library was built with a product."""
    own = _INT()
    _tiers().tiers_own_product(ctypes.byref(own))
    return bool(own.value)


@cache
def _tiers() -> ctypes.CDLL:
    return native.library(_HERE / "tiers.cpp", {}, _TIERS, _FLAGS)


@cache
def _product() -> ctypes.CDLL:
    return native.library(_HERE / "product.cpp", {}, _PRODUCT, _FLAGS)
