# SPDX-License-Identifier: Apache-2.0
"""The cases of `benchmarks/gpu.py`: an operator with arguments of a real size, and what one would use instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._ops import OpOverload

from rewriter.kernels.after_head import op as after
from rewriter.kernels.cross_entropy.op import linear_cross_entropy
from rewriter.kernels.linear_attention import op as attention
from rewriter.kernels.shift_add import op as shift_add
from rewriter.kernels.tversky import op as tversky
from rewriter.kernels.vq_logits import codec
from rewriter.kernels.vq_logits import op as heads


@dataclass(frozen=True)
class Built:
    """A call, and rivals that compute what it stands for."""

    operator: OpOverload
    arguments: Sequence[Any]
    rivals: Mapping[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """``build(device, small, generator)`` makes it."""

    name: str
    build: Callable[[str, bool, Generator], Built]


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        for rows in (1, 16, 4096):
            yield Case(f"shift_add bcq 4 bit, {rows} rows, {kind}", _bcq(rows, dtype))
        yield Case(f"shift_add pot 4 bit, 1 row, {kind}", _pot(1, dtype))
        for rows in (1, 64, 2048):
            yield Case(f"vq_logits tiers, {rows} rows, {kind}", _tiers(rows, dtype))
            yield Case(f"vq_logits product, {rows} rows, {kind}", _product(rows, dtype))
        yield Case(f"vq_logits nll, 2048 rows, {kind}", _nll(2048, dtype))
        yield Case(f"vq_logits top-k, 64 rows, {kind}", _topk(64, dtype))
        yield Case(f"tversky, 4096 rows, {kind}", _tversky(4096, dtype))
        yield Case(f"linear + cross entropy, 4096 rows, {kind}", _loss(4096, dtype))
        for length in (2048, 16384):
            yield Case(f"linear attention, N = {length}, {kind}", _linear_attention(length, dtype))
            yield Case(f"hybrid attention, N = {length}, {kind}", _hybrid(length, dtype))
        yield Case(f"delta attention, N = 2048, {kind}", _delta(2048, dtype))


Build = Callable[[str, bool, Generator], Built]


class _Draw:
    """Tensors of one device."""

    def __init__(self, device: str, generator: Generator) -> None:
        self.options: dict[str, Any] = {"device": device, "generator": generator}

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, **self.options).to(dtype)

    def codes(self, below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, **self.options)


def _bcq(rows: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        draw, size = _Draw(device, generator), 256 if small else 4096
        x, weight = draw.normal(rows, size, dtype=dtype), draw.normal(size, size, dtype=dtype)
        codes = draw.codes(256, size, 4, size // 8).to(torch.uint8)
        scale = draw.normal(size, size // 128).abs().half()
        shift = draw.codes(256, size, size // 128, 2).to(torch.uint8)
        rivals: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, weight)}
        if device == "cuda" and dtype is torch.bfloat16:
            packed = torch._convert_weight_to_int4pack(draw.codes(256, size, size // 2).to(torch.uint8), 8)
            scales = draw.normal(size // 128, size, 2, dtype=dtype)
            rivals["torch int4"] = lambda: torch._weight_int4pack_mm(x, packed, 128, scales)
        return Built(shift_add.bcq_linear, (x, codes, scale, shift, None, 128, size), rivals)

    return build


def _pot(rows: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        draw, size = _Draw(device, generator), 256 if small else 4096
        x, weight = draw.normal(rows, size, dtype=dtype), draw.normal(size, size, dtype=dtype)
        codes = draw.codes(256, size, size // 2).to(torch.uint8)
        scale = draw.normal(size, size // 128).abs().half()
        arguments = (x, codes, scale, None, 4, 1, 128, size)
        return Built(shift_add.pot_linear, arguments, {"dense": lambda: F.linear(x, weight)})

    return build


def _head(draw: _Draw, small: bool, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, codebook, codes, and the dense head's weight."""
    tokens, codes, width = (1000, 64, 96) if small else (50257, 2048, 768)
    h, codebook = draw.normal(rows, width, dtype=dtype), draw.normal(codes, width, dtype=dtype) * width**-0.5
    return h, codebook, codec.pack_codes(draw.codes(codes, tokens), codes), draw.normal(tokens, width, dtype=dtype)


def _tiers(rows: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        h, codebook, code_of, weight = _head(_Draw(device, generator), small, rows, dtype)
        return Built(heads.vq_logits_tiers, (h, codebook, code_of, None), {"dense": lambda: F.linear(h, weight)})

    return build


def _product(rows: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        draw = _Draw(device, generator)
        h, _, code_of, weight = _head(draw, small, rows, dtype)
        width, tokens = h.shape[1], code_of.shape[0]
        codebook = draw.normal(width // 4, 256, 4, dtype=dtype) * width**-0.5
        codes = draw.codes(256, tokens, width // 4).to(torch.uint8)
        return Built(heads.vq_logits_product, (h, codebook, codes, None), {"dense": lambda: F.linear(h, weight)})

    return build


def _nll(rows: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        draw = _Draw(device, generator)
        h, codebook, code_of, weight = _head(draw, small, rows, dtype)
        bias, target = draw.normal(code_of.shape[0]), draw.codes(code_of.shape[0], rows)
        dense = {"dense": lambda: F.cross_entropy(F.linear(h, weight).float(), target, reduction="none")}
        return Built(heads.vq_tiers_nll, (h, codebook, code_of, bias, target), dense)

    return build


def _topk(rows: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        h, codebook, code_of, weight = _head(_Draw(device, generator), small, rows, dtype)
        dense = {"dense": lambda: F.linear(h, weight).topk(50)}
        return Built(after.vq_tiers_topk, (h, codebook, code_of, None, 50), dense)

    return build


def _tversky(rows: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        draw = _Draw(device, generator)
        width, features, prototypes, n = (32, 16, 24, 48) if small else (1024, 512, 2048, rows)
        x, bank = draw.normal(n, width, dtype=dtype), draw.normal(features, width) * width**-0.5
        points = draw.normal(prototypes, width)
        weights = [torch.tensor(c, device=device) for c in (1.0, 0.5, 0.5)]
        options = ("product", "paper", "ignorematch", "contrast", False, False)
        dense = {"dense": lambda: F.linear(x, points.to(dtype))}
        return Built(tversky.tversky, (x, bank, points, *weights, None, None, *options), dense)

    return build


def _loss(rows: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        draw = _Draw(device, generator)
        n, classes, width = (40, 300, 32) if small else (rows, 32000, 2048)
        x, weight = draw.normal(n, width, dtype=dtype), draw.normal(classes, width, dtype=dtype) * width**-0.5
        target = draw.codes(classes, n)
        dense = {"unfused": lambda: F.cross_entropy(F.linear(x, weight).float(), target, reduction="none")}
        return Built(linear_cross_entropy, (x, weight, None, target, None, -100, 0.0, None, 2048), dense)

    return build


def _qkv(draw: _Draw, length: int, dtype: torch.dtype, small: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads, width, n = (2, 16, 100) if small else (16, 64, length)
    return tuple(draw.normal(1, heads, n, width, dtype=dtype) for _ in range(3))


def _against(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    rivals: dict[str, Callable[[], object]] = {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return rivals
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    rivals["flash-linear-attention"] = lambda: chunk_linear_attn(*turned, normalize=False)
    return rivals


def _linear_attention(length: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        q, k, v = _qkv(_Draw(device, generator), length, dtype, small)
        features = [F.elu(x) + 1 for x in (q, k)]
        arguments = (*features, v, None, None, None, None, 1.0, True, "sum", 64)
        return Built(attention.linear_attention, arguments, _against(q, k, v))

    return build


def _hybrid(length: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        q, k, v = _qkv(_Draw(device, generator), length, dtype, small)
        maps = [torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k)]
        per_head = torch.ones(q.shape[1], device=device)
        arguments = (q, k, v, *maps, per_head, per_head.clone(), *(None,) * 9)
        setting = (q.shape[-1] ** -0.5, 16 if small else 64, "sliding", 0, "max", False, 64)
        return Built(attention.hybrid_attention, (*arguments, *setting), _against(q, k, v))

    return build


def _delta(length: int, dtype: torch.dtype) -> Build:
    def build(device: str, small: bool, generator: Generator) -> Built:
        draw = _Draw(device, generator)
        q, k, v = _qkv(draw, length, dtype, small)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = draw.normal(*q.shape[:3]).sigmoid().to(dtype)
        arguments = (q, k, v, beta, None, None, None, 1.0, 64)
        return Built(attention.delta_attention, arguments, _against(q, k, v))

    return build
