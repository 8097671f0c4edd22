# SPDX-License-Identifier: Apache-2.0
"""Codebook heads of GPT-2's size against its dense head: full logits, and what follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from timing import Call
from torch import Tensor

from cpu_work.work import OURS, Work, rotating
from rewriter.kernels.after_head import op as after
from rewriter.kernels.vq_logits import op

TOKENS, WIDTH, CODES = 50257, 768, 2048
GROUP_DIMS, GROUP_CODES = 4, 256
ROTATION = 8  # hidden states that take turns
COLD = 300 << 20  # bytes of codebooks that take turns, so that each has left every cache when its turn comes again
K = 50


def works() -> Iterator[Work]:
    for dtype in (torch.float32, torch.bfloat16):
        for batch, asked in ((1, 40.0), (8, 25.0), (64, 12.0)):
            yield _logits(batch, dtype, asked)
        for batch in (1, 8, 64):
            yield _cold(batch, dtype)
    for name, asked in (("negative log-likelihood", 60.0), (f"top-k {K}", 40.0), ("one sample", 15.0)):
        yield Work("VQ-logits tiers", f"{name}, batch 1", partial(_after, name), {"dense": asked})
    for batch, asked in ((1, 4.0), (8, 2.0)):
        yield Work("VQ-logits product", f"full logits, batch {batch}", partial(_product, batch), {"dense": asked})


def _traffic(batch: int, dtype: torch.dtype) -> int:
    """Codebook and output; the codes are two bytes per token."""
    return (CODES * WIDTH + batch * TOKENS) * dtype.itemsize + 2 * TOKENS


def _label(batch: int, dtype: torch.dtype) -> str:
    return f"full logits, batch {batch}, {str(dtype).removeprefix('torch.')}"


def _logits(batch: int, dtype: torch.dtype, asked: float) -> Work:
    return Work(
        "VQ-logits tiers", _label(batch, dtype), partial(_tiers, batch, dtype), {"dense": asked}, _traffic(batch, dtype)
    )


def _cold(batch: int, dtype: torch.dtype) -> Work:
    name = f"{_label(batch, dtype)}, codebooks take turns"
    sides, flops = partial(_evicted, batch, dtype), 2 * batch * CODES * WIDTH
    return Work("VQ-logits tiers", name, sides, nbytes=_traffic(batch, dtype), share=0.8, flops=flops, dtype=dtype)


def _evicted(batch: int, dtype: torch.dtype) -> Mapping[str, Call]:
    h, (_, code_of) = torch.randn(batch, WIDTH).to(dtype), _head(dtype)
    codebooks = [(torch.randn(CODES, WIDTH).to(dtype),) for _ in range(COLD // (CODES * WIDTH * dtype.itemsize))]
    return {OURS: rotating(lambda codebook: op.vq_logits_tiers(h, codebook, code_of, None), codebooks)}


def _tiers(batch: int, dtype: torch.dtype) -> Mapping[str, Call]:
    hidden = [(torch.randn(batch, WIDTH).to(dtype),) for _ in range(ROTATION)]
    codebook, code_of = _head(dtype)
    weight = torch.randn(TOKENS, WIDTH).to(dtype)
    return {
        OURS: rotating(lambda h: op.vq_logits_tiers(h, codebook, code_of, None), hidden),
        "dense": rotating(lambda h: F.linear(h, weight), hidden),
    }


def _head(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    code = torch.randint(0, CODES, (TOKENS,))
    return torch.randn(CODES, WIDTH).to(dtype), torch.stack([code & 255, code >> 8], -1).to(torch.uint8)


def _after(name: str) -> Mapping[str, Call]:
    hidden = [(torch.randn(1, WIDTH),) for _ in range(ROTATION)]
    (codebook, code_of), weight = _head(torch.float32), torch.randn(TOKENS, WIDTH)
    target = torch.tensor([11])
    sample = _sampler(codebook, code_of)
    sides: Mapping[str, tuple[Callable[[Tensor], object], Callable[[Tensor], object]]] = {
        "negative log-likelihood": (
            lambda h: op.vq_tiers_nll(h, codebook, code_of, None, target),
            lambda h: F.nll_loss(F.linear(h, weight).log_softmax(-1), target),
        ),
        f"top-k {K}": (
            lambda h: after.vq_tiers_topk(h, codebook, code_of, None, K),
            lambda h: F.linear(h, weight).topk(K),
        ),
        "one sample": (sample, lambda h: torch.multinomial(F.linear(h, weight).softmax(-1), 1)),
    }
    ours, dense = sides[name]
    return {OURS: rotating(ours, hidden), "dense": rotating(dense, hidden)}


def _sampler(codebook: Tensor, code_of: Tensor) -> Callable[[Tensor], object]:
    from rewriter.passes.vq_logits.sampling import Sampling
    from rewriter.passes.vq_logits.sampling_codes import CodeDistribution, CodeTable

    how, generator = Sampling(), torch.Generator().manual_seed(0)
    table = CodeTable.of(codebook, code_of, None, how.temperature)

    def draw(h: Tensor) -> object:
        distribution = CodeDistribution(h, table, how, None)
        return distribution.draw(torch.full((h.shape[0],), -torch.inf, dtype=torch.float64), generator)

    return draw


def _product(batch: int) -> Mapping[str, Call]:
    groups = WIDTH // GROUP_DIMS
    hidden = [(torch.randn(batch, WIDTH),) for _ in range(ROTATION)]
    codebook = torch.randn(groups, GROUP_CODES, GROUP_DIMS)
    codes = torch.randint(0, GROUP_CODES, (TOKENS, groups)).to(torch.uint8)
    weight = torch.randn(TOKENS, WIDTH)
    return {
        OURS: rotating(lambda h: op.vq_logits_product(h, codebook, codes, None), hidden),
        "dense": rotating(lambda h: F.linear(h, weight), hidden),
    }
