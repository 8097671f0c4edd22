# SPDX-License-Identifier: Apache-2.0
"""Modules with one rewriter operator each, random codes inside, and the way every test runs a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import rewriter.kernels.shift_add.op
import rewriter.kernels.vq_logits.op  # noqa: F401  (importing registers the operators)
from rewriter.kernels.shift_add.codec import ceil_div, pack_bits, pack_nibbles, pack_stream
from rewriter.kernels.vq_logits.codec import pack_codes

ops = torch.ops.rewriter


def half_values(*shape: int) -> Tensor:
    """Random float32 numbers that float16 holds exactly, as the passes make scales and codebooks."""
    return torch.randn(shape).mul(0.1).half().float()


class BcqLinear(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        bits: int = 3,
        group: int = 16,
        *,
        shift: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        groups = ceil_div(inputs, group)
        self.group, self.inputs = group, inputs
        self.register_buffer("weight_codes", pack_bits(torch.randint(0, 2, (outputs, bits, inputs))))
        self.weight_scale = nn.Parameter(half_values(outputs, groups, *([] if shift else [bits])))
        exponents = torch.randint(0, 16, (outputs, groups, bits))
        self.register_buffer("weight_shift", pack_nibbles(exponents) if shift else None)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.bcq_linear(
            x, self.weight_codes, self.weight_scale, self.weight_shift, self.bias, self.group, self.inputs
        )


class BcqEmbedding(BcqLinear):
    def __init__(self, width: int, rows: int, bits: int = 3, group: int = 16, *, shift: bool = True) -> None:
        super().__init__(width, rows, bits, group, shift=shift, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.bcq_embedding(ids, self.weight_codes, self.weight_scale, self.weight_shift, self.group, self.inputs)


class PotLinear(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, bits: int = 6, terms: int = 2, group: int = 16, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.layout = (bits, terms, group, inputs)
        self.register_buffer("weight_codes", pack_stream(torch.randint(0, 1 << bits, (outputs, inputs)), bits))
        self.weight_scale = nn.Parameter(half_values(outputs, ceil_div(inputs, group)))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.pot_linear(x, self.weight_codes, self.weight_scale, self.bias, *self.layout)


class PotEmbedding(PotLinear):
    def __init__(self, width: int, rows: int, bits: int = 6, terms: int = 2, group: int = 16) -> None:
        super().__init__(width, rows, bits, terms, group, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.pot_embedding(ids, self.weight_codes, self.weight_scale, *self.layout)


class LevelLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bits: int = 3, group: int = 16, *, bias: bool = True) -> None:
        super().__init__()
        self.layout = (bits, group, inputs)
        self.register_buffer("weight_codes", pack_stream(torch.randint(0, 1 << bits, (outputs, inputs)), bits))
        self.weight_scale = nn.Parameter(half_values(outputs, ceil_div(inputs, group)))
        self.register_buffer("weight_levels", torch.randn(1 << bits))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.level_linear(x, self.weight_codes, self.weight_scale, self.weight_levels, self.bias, *self.layout)


class LevelEmbedding(LevelLinear):
    def __init__(self, width: int, rows: int, bits: int = 3, group: int = 16) -> None:
        super().__init__(width, rows, bits, group, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.level_embedding(ids, self.weight_codes, self.weight_scale, self.weight_levels, *self.layout)


class TiersHead(nn.Module):
    def __init__(self, width: int, tokens: int, codes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.codebook = nn.Parameter(half_values(codes, width))
        self.register_buffer("code_of", pack_codes(torch.randint(0, codes, (tokens,)), codes))
        self.token_bias = nn.Parameter(half_values(tokens)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        return ops.vq_logits_tiers(h, self.codebook, self.code_of, self.token_bias)


class ProductHead(nn.Module):
    def __init__(self, width: int, tokens: int, codes: int = 16, dims: int = 4, *, bias: bool = False) -> None:
        super().__init__()
        groups = ceil_div(width, dims)
        self.codebook = nn.Parameter(half_values(groups, codes, dims))
        self.register_buffer("codes", torch.randint(0, codes, (tokens, groups), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.randn(tokens)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        return ops.vq_logits_product(h, self.codebook, self.codes, self.bias)


def session(model: str | Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: str | Path | bytes | onnxruntime.InferenceSession, **inputs: Tensor) -> list[np.ndarray[Any, Any]]:
    loaded = model if isinstance(model, onnxruntime.InferenceSession) else session(model)
    return list(loaded.run(None, {name: tensor.detach().numpy() for name, tensor in inputs.items()}))


def relative_error(found: np.ndarray[Any, Any], expected: Tensor, floor: float = 1e-30) -> float:
    """Largest difference over the largest magnitude expected, which counts as ``floor`` at least."""
    reference = expected.detach().double().numpy()
    assert found.shape == reference.shape
    largest = max(float(np.abs(reference).max(initial=0.0)), floor)
    return float(np.abs(found.astype(np.float64) - reference).max(initial=0.0)) / largest
