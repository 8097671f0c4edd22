# SPDX-License-Identifier: Apache-2.0
"""From which length linear attention pays: time ≈ max(FLOPs / FLOP rate, bytes / bandwidth), smallest length that wins.

    softmax    2 · T² · (D + Dv) / 2 FLOPs per head (half of the scores are hidden where causal), q k v o read and written
    linear     the operator's own cost model (`KernelSpec.cost`), and two products with D × F parameters for the maps

A FLOP of a fused softmax kernel costs less than one of the chunked form, which is why rewrites of short sequences lose
although they compute less. The factor between them is the one constant here that is measured and not counted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from rewriter.kernels.linear_attention import op
from rewriter.kernels.spec import REGISTRY, Cost
from rewriter.passes.linear_attention.form import CHUNK, Form

_LARGEST = 1 << 20


@dataclass(frozen=True)
class Machine:
    """Rates of a device, for the comparison of two programs on it; only their ratios matter.

    Attributes:
        flops: FLOP/s of a fused softmax attention.
        bandwidth: bytes/s.
        overhead: how many times longer a FLOP of the linear form takes.
    """

    flops: float
    bandwidth: float
    overhead: float


# cuda: H200-class rates in half precision; the overhead is the one at which the operator without window or maps meets
# FlashAttention-2 between 3 and 4 K tokens, as Lightning Attention-2's published table has it (d = 128).
# cpu: one core; measured with the aten reference at 4 heads of 64 from 512 to 4096 tokens: 2.0 to 4.1, equal times at 4096.
MACHINES = {"cuda": Machine(6e14, 3e12, 10.0), "cpu": Machine(6e10, 1e10, 3.0)}


@functools.cache
def pays_from(form: Form, key_heads: int, dim: int, features: int, device: str) -> int:
    """The smallest power of two from which the rewritten site takes less time than softmax; 2^20 if none below does."""
    machine = MACHINES.get(device, MACHINES["cuda"])
    length = 64
    while length < _LARGEST:
        if _time(linear(form, key_heads, dim, features, length), machine, machine.overhead) < _time(
            softmax(form, key_heads, dim, length), machine, 1.0
        ):
            return length
        length *= 2
    return _LARGEST


def _time(cost: Cost, machine: Machine, overhead: float) -> float:
    return max(cost.flops * overhead / machine.flops, (cost.bytes_read + cost.bytes_written) / machine.bandwidth)


def softmax(form: Form, key_heads: int, dim: int, length: int) -> Cost:
    """What `scaled_dot_product_attention` does for one sequence."""
    pairs = length * length // (2 if form.causal else 1)
    half = 2 * length * dim  # bytes of one head in a half-precision type
    return Cost(4 * pairs * dim * form.heads, half * (form.heads + 2 * key_heads), half * form.heads)


def linear(form: Form, key_heads: int, dim: int, features: int, length: int) -> Cost:
    """What the operator says of itself, on descriptions, and the maps: two products for queries, one for keys."""

    def described(heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(1, heads, length, width, dtype=dtype, device="meta")

    half, wide = torch.float16, torch.float32
    q, k = described(form.heads, dim, half), described(key_heads, dim, half)
    q_map, k_map = described(form.heads, features, wide), described(key_heads, features, wide)
    projections = Cost(2 * length * dim * features * (2 * form.heads + key_heads), 0, 0)
    rest = (None, None, None, None, 1.0, form.causal, "sum", CHUNK)
    if not form.window:
        return projections + REGISTRY[op.linear_attention].cost(q_map, k_map, k, *rest)
    gate = torch.empty(form.heads, device="meta")
    options = (form.scale, form.window, form.block, form.sinks, form.anchor, False, CHUNK)
    if form.is_mixture:
        near = REGISTRY[op.hybrid_attention].cost(q, k, k, None, None, gate, *(None,) * 10, *options)
        return near + REGISTRY[op.linear_attention].cost(q, k, k, *rest)
    return projections + REGISTRY[op.hybrid_attention].cost(q, k, k, q_map, k_map, gate, gate, *(None,) * 9, *options)
