# SPDX-License-Identifier: Apache-2.0
"""From which length linear attention pays: time ≈ max(FLOPs / FLOP rate, bytes / bandwidth), smallest length that wins.

    softmax    2 · T² · (D + Dv) / 2 FLOPs per head (half of the scores are hidden where causal), q k v o read and written
    linear     the operator's own cost model (`KernelSpec.cost`), and two products with D × F parameters for the maps

Operations of the two do not take equally long. On a GPU those of a fused softmax kernel are the cheaper ones, which is
why rewrites of short sequences lose although they compute less; on a CPU those of our kernels are, and those of the
aten reference are not. These factors are the constants here that are measured and not counted.
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
        overhead: how many times longer a FLOP of the linear form takes in a kernel.
        reference: the same where the aten reference runs (`has_kernel`).
        both_ways: the same for bidirectional attention without a window: two products of matrices.
    """

    flops: float
    bandwidth: float
    overhead: float
    reference: float
    both_ways: float


# cuda: H200-class rates in half precision; the overhead is the one at which the operator without window or maps meets
# FlashAttention-2 between 3 and 4 K tokens, as Lightning Attention-2's published table has it (d = 128).
# cpu: one core; overheads by benchmarks/attention_gate.py, 8 heads of 64 on 4 key heads, where the two take equal time:
# 0.17 (elu, relu with a window), 0.18 (hedgehog) and 0.24 (landmarks) in kernels, 0.95 for both directions, and
# 3.35 at 4096 tokens for terraces.
MACHINES = {
    "cuda": Machine(6e14, 3e12, 10.0, 10.0, 10.0),
    "cpu": Machine(6e10, 1e10, 0.24, 3.4, 1.0),
}


def has_kernel(form: Form, device: str) -> bool:
    """Whether more than the aten reference runs there: the CPU's kernels do sliding windows and decays per head."""
    if device != "cpu":
        return True
    return form.causal and form.block == "sliding" and not form.sinks and not form.is_mixture


@functools.cache
def pays_from(form: Form, key_heads: int, dim: int, features: int, device: str) -> int:
    """The smallest power of two from which the rewritten site takes less time than softmax; 2^20 if none below does."""
    machine = MACHINES.get(device, MACHINES["cuda"])
    overhead = machine.overhead if has_kernel(form, device) else machine.reference
    if not form.causal:
        overhead = machine.both_ways
    length = 64
    while length < _LARGEST:
        if _time(linear(form, key_heads, dim, features, length), machine, overhead) < _time(
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
