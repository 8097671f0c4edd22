# SPDX-License-Identifier: Apache-2.0
"""Linear layers and the loss: ShiftAdd at batch 1, a Tversky layer, and the fused linear + cross entropy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from timing import Call
from torch import Tensor

from cpu_work.work import OURS, Work, rotating
from rewriter.kernels.cross_entropy.op import linear_cross_entropy_reduced
from rewriter.kernels.shift_add import op as shift_add
from rewriter.kernels.tversky import op as tversky
from rewriter.passes.fuse.loss import CHUNK

SIZE, GROUP, BITS = 4096, 128, 4
COPIES = 6  # weights that take turns: 6 · 8 MiB of codes, 6 · 64 MiB of float32
POSITIONS, CLASSES, WIDTH = 4096, 32000, 512
ROWS, DIMS, FEATURES, PROTOTYPES = 512, 512, 256, 1024


def works() -> Iterator[Work]:
    asked = {
        torch.float32: {"dense float32": 4.0, "dense bfloat16": 3.0, "torch int4": 0.8},
        torch.bfloat16: {"dense bfloat16": 3.0, "torch int4": 0.8},
    }
    nbytes = SIZE * SIZE * BITS // 8 + SIZE * SIZE // GROUP * (2 + BITS // 2)
    for batch in (1, 4, 16):
        for dtype, least in asked.items():
            kind = str(dtype).removeprefix("torch.")
            name = f"{BITS}-bit layer {SIZE} × {SIZE}, batch {batch}, {kind}, weights take turns"
            yield Work("ShiftAdd", name, partial(_shift_add, batch, dtype), least if batch == 1 else {}, nbytes)
    name = f"n = {ROWS}, d = {DIMS}, K = {FEATURES}, P = {PROTOTYPES}"
    yield Work("Tversky", name, _tversky, {"broadcasted": 15.0})
    for name, backward in (("forward", False), ("forward + backward", True)):
        title = f"linear + cross entropy, {POSITIONS} × {CLASSES}, d = {WIDTH}, {name}"
        yield Work("loss", title, partial(loss_call, POSITIONS, backward), {"unfused": 1.0})


def _shift_add(batch: int, dtype: torch.dtype) -> Mapping[str, Call]:
    """The default of the pass: 4 binary bases, powers of two apart, under one float16 scale per 128 inputs.

    ``dtype`` is that of our activations. torch's int4 kernel takes bfloat16, so ours in float32 does more than it.
    """
    x = torch.randn(batch, SIZE)
    groups = SIZE // GROUP
    ours = [
        (
            torch.randint(0, 256, (SIZE, BITS, SIZE // 8), dtype=torch.uint8),
            torch.rand(SIZE, groups).half(),
            torch.randint(0, 256, (SIZE, groups, BITS // 2), dtype=torch.uint8),
        )
        for _ in range(COPIES)
    ]
    dense = [(torch.randn(SIZE, SIZE),) for _ in range(COPIES)]
    narrow, xb = [(w.bfloat16(),) for (w,) in dense], x.bfloat16()
    packed, given = [_int4() for _ in range(COPIES)], x.to(dtype)
    sides = {
        OURS: rotating(lambda c, s, e: shift_add.bcq_linear(given, c, s, e, None, GROUP, SIZE), ours),
        "dense bfloat16": rotating(lambda w: F.linear(xb, w), narrow),
        "torch int4": rotating(lambda w, s: torch._weight_int4pack_mm_for_cpu(xb, w, GROUP, s), packed),
    }
    if dtype is torch.float32:
        sides["dense float32"] = rotating(lambda w: F.linear(x, w), dense)
    return sides


def _int4() -> tuple[Tensor, Tensor]:
    words = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32)
    scales = torch.rand(SIZE // GROUP, SIZE, 2).bfloat16()
    return torch._convert_weight_to_int4pack_for_cpu(words, 1), scales


def _tversky() -> Mapping[str, Call]:
    """Product intersections and ignore-match differences per feature, as the paper writes them."""
    inputs = [(torch.randn(ROWS, DIMS),) for _ in range(4)]
    features, prototypes = torch.randn(FEATURES, DIMS), torch.randn(PROTOTYPES, DIMS)
    theta, alpha, beta = (torch.tensor(c) for c in (1.0, 0.5, 0.5))
    options = (None, None, "product", "paper", "ignorematch", "contrast", False, False)

    def ours(x: Tensor) -> Tensor:
        result: Tensor = tversky.tversky(x, features, prototypes, theta, alpha, beta, *options)
        return result

    def broadcasted(x: Tensor) -> Tensor:
        """Σ_k over common and distinctive features, each an n × P × K tensor."""
        a, b = (x @ features.T).unsqueeze(1), (prototypes @ features.T).unsqueeze(0)
        has_a, has_b = a > 0, b > 0
        common = (a * b * (has_a & has_b)).sum(-1)
        only_a, only_b = (a * (has_a & ~has_b)).sum(-1), (b * (has_b & ~has_a)).sum(-1)
        return theta * common - alpha * only_a - beta * only_b

    return {OURS: rotating(ours, inputs), "broadcasted": rotating(broadcasted, inputs)}


def loss_call(positions: int, backward: bool) -> Mapping[str, Call]:
    """The mean loss of a head over ``positions``, with gradients of the hidden states and the weight."""
    x = torch.randn(positions, WIDTH, requires_grad=backward)
    weight = torch.randn(CLASSES, WIDTH, requires_grad=backward)
    target = torch.randint(0, CLASSES, (positions,))

    def fused() -> None:
        loss = linear_cross_entropy_reduced(x, weight, None, target, None, -100, 0.0, None, "mean", CHUNK)
        if backward:
            torch.autograd.grad(loss, (x, weight))

    def unfused() -> None:
        loss = F.cross_entropy(F.linear(x, weight), target)
        if backward:
            torch.autograd.grad(loss, (x, weight))

    return {OURS: fused, "unfused": unfused}


def gradient_bytes() -> int:
    """Of what both sides return, whatever they do in between."""
    return (POSITIONS + CLASSES) * WIDTH * 4
