# SPDX-License-Identifier: Apache-2.0
"""The cases. What is asked about most comes first: a run may be cut short."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gpu_work import attention, heads, layers
from gpu_work.work import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def cases() -> Iterator[Case]:
    """Those with a rival in both 16-bit dtypes, then every other operator in one."""
    for dtype in (BF16, FP16):
        kind = str(dtype).removeprefix("torch.")
        for name, build in _main():
            yield Case(f"{name}, {kind}", partial(build, dtype=dtype))
    for name, build in _others():
        yield Case(f"{name}, bfloat16", partial(build, dtype=BF16))
    yield Case(
        "shift_add bcq 4 bit, 4096 rows, float32", partial(layers.packed_linear, format="bcq", rows=4096, dtype=FP32)
    )


def _main() -> Iterator[tuple[str, partial]]:
    for rows in (1, 16, 4096):
        yield f"shift_add bcq 4 bit, {_rows(rows)}", partial(layers.packed_linear, format="bcq", rows=rows)
    for format in ("pot", "level"):
        yield f"shift_add {format} 4 bit, 1 row", partial(layers.packed_linear, format=format, rows=1)
    for structure in ("tiers", "product"):
        for rows in (1, 64, 2048):
            yield f"vq_logits {structure}, {_rows(rows)}", partial(heads.logits, structure=structure, rows=rows)
    yield "vq_logits nll, 2048 rows", partial(heads.loss, name="nll", rows=2048)
    yield "vq_logits top-k, 64 rows", partial(heads.topk, rows=64)
    yield "tversky product, 4096 rows", partial(layers.tversky, rows=4096, intersection="product")
    yield "linear + cross entropy, 4096 rows", partial(heads.linear_loss, reduction="none", rows=4096)
    for length in (2048, 16384):
        yield f"linear attention, N = {length}", partial(attention.linear, length=length)
        yield f"hybrid attention, N = {length}", partial(attention.hybrid, length=length)
    yield "linear attention, one step", attention.step
    yield "delta attention, N = 2048", partial(attention.delta, length=2048)
    yield "additive attention, N = 2048", partial(attention.additive, length=2048)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def _others() -> Iterator[tuple[str, partial]]:
    for format in ("pot", "level"):
        yield f"shift_add {format} 4 bit, 4096 rows", partial(layers.packed_linear, format=format, rows=4096)
    for format in ("bcq", "pot", "level"):
        yield f"shift_add {format} embedding", partial(layers.embedding, format=format)
    for structure in ("residual", "product with exact rows"):
        yield f"vq_logits {structure}, 64 rows", partial(heads.logits, structure=structure, rows=64)
    for name in ("logsumexp", "softmax", "log_softmax"):
        yield f"vq_logits {name}, 64 rows", partial(heads.normalised, name=name, rows=64)
    yield "vq_logits cross entropy, 2048 rows", partial(heads.loss, name="cross entropy", rows=2048)
    yield "vq_logits cross entropy of probabilities, 64 rows", partial(heads.loss, name="probabilities", rows=64)
    yield "linear + logsumexp, 2048 rows", partial(heads.dense, name="logsumexp", rows=2048)
    yield "linear + top-k, 64 rows", partial(heads.dense, name="topk", rows=64)
    yield "linear + cross entropy, mean, 4096 rows", partial(heads.linear_loss, reduction="mean", rows=4096)
    yield "tversky min, 1024 rows", partial(layers.tversky, rows=1024, intersection="min")
    yield "feature map hedgehog, N = 16384", partial(attention.features, length=16384)
    for name in ("softmax", "log_softmax"):
        yield f"{name}, 4096 rows", partial(layers.softmax, name=name, rows=4096)
