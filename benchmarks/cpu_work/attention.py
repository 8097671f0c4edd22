# SPDX-License-Identifier: Apache-2.0
"""Causal attention: linear, and the pass's default (hedgehog features beyond a softmax window), against SDPA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from timing import Call
from torch import Tensor

from cpu_work.work import OURS, Work, rotating
from rewriter.passes.linear_attention.form import Form

HEADS, WIDTH, WINDOW = 8, 64, 64
SCALE = WIDTH**-0.5
CONTEXT = 16384
ROTATION = 4
Triple = tuple[Tensor, Tensor, Tensor]


def works() -> Iterator[Work]:
    asked = {"elu + 1, normalised": (2.5, 8.0, 25.0), f"hedgehog + window {WINDOW}": (1.0, 3.0, 10.0)}
    for kind, ratios in asked.items():
        for length, ratio in zip((1024, 4096, 16384), ratios, strict=True):
            yield Work("linear attention", f"{kind}, N = {length}", partial(_causal, kind, length), {"SDPA": ratio})
    for kind in asked:
        name = f"{kind}, time per token at N = 65536 against N = 4096"
        units = {OURS: 65536, "its own at 4096": 4096}
        yield Work("linear attention", name, partial(_growth, kind), {"its own at 4096": 1 / 1.25}, units=units)
        name = f"{kind}, one step at context {CONTEXT}"
        yield Work("linear attention", name, partial(_step, kind), {"SDPA": 10.0})


def _form(kind: str) -> tuple[Form, dict[str, Tensor]]:
    """As the pass makes it, with parameters of a fresh site."""
    if kind.startswith("elu"):
        return Form("elu", SCALE, 0, "sliding", 0, "max", True, HEADS), {}
    form = Form("hedgehog", SCALE, WINDOW, "sliding", 0, "max", True, HEADS)
    maps = {
        role: torch.randn(HEADS, WIDTH, WIDTH) * WIDTH**-0.5 for role in form.roles if role in ("query_map", "key_map")
    }
    return form, maps | {role: torch.ones(HEADS) for role in form.roles if role not in maps}


def _inputs(length: int, count: int = ROTATION) -> list[Triple]:
    return [tuple(torch.randn(1, HEADS, length, WIDTH) for _ in range(3)) for _ in range(count)]


def _causal(kind: str, length: int) -> Mapping[str, Call]:
    (form, tensors), inputs = _form(kind), _inputs(length)
    return {
        OURS: rotating(lambda q, k, v: form.call(q, k, v, None, tensors), inputs),
        "SDPA": rotating(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs),
    }


def _growth(kind: str) -> Mapping[str, Call]:
    form, tensors = _form(kind)
    return {
        name: rotating(lambda q, k, v: form.call(q, k, v, None, tensors), _inputs(length, 2))
        for name, length in ((OURS, 65536), ("its own at 4096", 4096))
    }


def _step(kind: str) -> Mapping[str, Call]:
    """One token after a context: ours goes on from its state; SDPA reads all keys and values."""
    (form, tensors), [(q, k, v)] = _form(kind), _inputs(CONTEXT, 1)
    _, *state = form.call(q, k, v, None, tensors, with_state=True)
    steps = _inputs(1)
    caches = _inputs(CONTEXT)  # as many layers' caches as take turns: more than a processor's cache holds

    def ours(q: Tensor, k: Tensor, v: Tensor) -> object:
        return form.call(q, k, v, None, tensors, past=state, with_state=True)

    def softmax(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> object:
        # The new key and value are written in place into caches of full length.
        keys[:, :, -1:], values[:, :, -1:] = k, v
        return F.scaled_dot_product_attention(q, keys, values)

    with_caches = [(*step, keys, values) for step, (_, keys, values) in zip(steps, caches, strict=True)]
    return {OURS: rotating(ours, steps), "SDPA": rotating(softmax, with_caches)}
