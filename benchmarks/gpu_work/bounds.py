# SPDX-License-Identifier: Apache-2.0
"""The least time of every case on GPUs that are not here, from the cost model of its operator: the table of docs/kernels.md.

Bytes of the operands and results as they are stored at the speed of memory, operations at the peak of the matrix units
(`rewriter.codegen.roofline`), whichever takes longer. What is decoded or looked up on the way costs instructions that this
does not count. Beside it the same for what the operator replaces, where that is a matrix product or attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_work.attention import causal
from gpu_work.cases import cases
from gpu_work.work import Call, Draw
from rewriter.codegen import roofline
from rewriter.kernels.spec import REGISTRY, Cost, tensor_bytes

CHIPS = ("sm_90", "gfx942")
KIND = ", bfloat16"


def markdown() -> str:
    """A row per case in bfloat16; arguments have shapes and no data."""
    chips = [roofline.CHIPS[target] for target in CHIPS]
    names = [chip.name for chip in chips]
    heads = ["work", "MB", "GFLOP", *(f"{name}, µs" for name in names), f"what it replaces, {' / '.join(names)}, µs"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for case in cases():
        if not case.name.endswith(KIND):
            continue
        built = case.build(Draw("meta", None), False)
        cost = REGISTRY[built.call.function].cost(*built.call.arguments)
        nbytes = cost.bytes_read + cost.bytes_written
        times = [_text(roofline.bound(cost, chip.bandwidth, chip.flops)) for chip in chips]
        others = [_replaced(name, call, chips) for name, call in built.rivals.items()]
        replaced = "; ".join(other for other in others if other) or "–"
        lines.append([case.name.removesuffix(KIND), f"{nbytes / 1e6:.3g}", f"{cost.flops / 1e9:.3g}", *times, replaced])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(bound: roofline.Bound) -> str:
    return f"{1e6 * bound.seconds:.3g} {bound.by}"


def _replaced(name: str, call: Call, chips: Sequence[roofline.Chip]) -> str:
    cost = _cost(call)
    if cost is None:
        return ""
    times = [f"{1e6 * roofline.bound(cost, chip.bandwidth, chip.flops).seconds:.3g}" for chip in chips]
    return f"{name} {' / '.join(times)}"


def _cost(call: Call) -> Cost | None:
    """Of a matrix product, or of softmax attention whose scores stay in registers; None for anything else."""
    if call.function is F.linear:
        x, weight = call.arguments
        results = x.numel() // x.shape[-1] * weight.shape[0]
        return Cost(2 * results * x.shape[-1], tensor_bytes(x, weight), results * x.element_size())
    if call.function in (causal, F.scaled_dot_product_attention):
        q, k, v = call.arguments
        pairs = q.numel() // q.shape[-1] * k.shape[-2]
        flops = 2 * pairs * (q.shape[-1] + v.shape[-1])
        return Cost(flops // 2 if call.function is causal else flops, tensor_bytes(q, k, v), _output(q, v))
    return None


def _output(q: Tensor, v: Tensor) -> int:
    return q.numel() // q.shape[-1] * v.shape[-1] * torch.finfo(q.dtype).bits // 8
