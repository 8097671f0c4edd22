# SPDX-License-Identifier: Apache-2.0
"""The embedded language model, rewritten by all its passes, against itself: eager and compiled; and where its time goes."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timing import Call
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM, DynamicCache

import rewriter
from cpu_work.work import OURS, Work, rotating
from rewriter.facts import path_of
from rewriter.passes import LinearAttention
from rewriter.rules import provenance

LM = Path(__file__).resolve().parent.parent.parent / "examples" / "tiny_lm"
LENGTH = 1024
PASSES = ("fuse", LinearAttention(min_length=None), "shift_add", "vq_logits")


def works() -> Iterator[Work]:
    asked = {"eager": 1.0, "compiled": 1.0}
    yield Work("tiny_lm", f"logits of 1 × {LENGTH} tokens", _logits, asked)
    yield Work("tiny_lm", f"logits of 1 × {LENGTH} tokens, ours compiled too", _compiled, asked)
    yield Work("tiny_lm", f"one decode step at context {LENGTH}", _step, asked)


@functools.cache
def models() -> tuple[nn.Module, rewriter.Optimized]:
    """The model, and what the passes make of it with its calibration text."""
    model = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32).eval()
    calibration = load_file(LM / "calibration.safetensors")["input_ids"].long()
    return model, rewriter.optimize(model, PASSES, calibration=[(row[None],) for row in calibration[:128]])


def _tokens() -> Tensor:
    return load_file(LM / "held_out.safetensors")["input_ids"][:8, :LENGTH].long()


def _logits() -> Mapping[str, Call]:
    model, opt = models()
    inputs = [(row[None],) for row in _tokens()]
    compiled = torch.compile(model)
    return {
        OURS: rotating(lambda ids: opt(ids).logits, inputs),
        "eager": rotating(lambda ids: model(ids, use_cache=False).logits, inputs),
        "compiled": rotating(lambda ids: compiled(ids, use_cache=False).logits, inputs),
    }


def _compiled() -> Mapping[str, Call]:
    """Our operators stay calls; what lies between them is merged as the model's own is."""
    _, opt = models()
    ours = torch.compile(opt)
    return _logits() | {OURS: rotating(lambda ids: ours(ids).logits, [(row[None],) for row in _tokens()])}


def _step() -> Mapping[str, Call]:
    """Every side decodes on from the same context; a call adds one token to what it keeps."""
    model, opt = models()
    context = _tokens()[:1]
    state = rewriter.DecodeState(opt)
    state.prefill(context)
    token = context[:, -1:]
    compiled = torch.compile(model)

    def kept(run: Any) -> Call:
        cache = DynamicCache()
        with torch.no_grad():
            run(context, past_key_values=cache, use_cache=True)

        def step() -> Tensor:
            logits: Tensor = run(token, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)  # so that every call has the same context
            return logits

        return step

    return {OURS: lambda: state.step(token), "eager": kept(model), "compiled": kept(compiled)}


class _Timed(fx.Interpreter):
    """Runs a program and adds up the seconds of its nodes by site and operator."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        site = str(provenance(n).get("site") or path_of(n)).partition(":")[0]
        self.seconds[site, str(n.target)] += time.perf_counter() - start
        return result


def by_site(runs: int = 5) -> list[tuple[str, float, float]]:
    """(site, milliseconds of the original, of the rewritten program) for every module that both have, largest first.

    Sites of equal layers are added up. Nodes are timed one by one, so that the sum is more than a call takes.
    """
    _, opt = models()
    ids = _tokens()[:1]
    sums: list[dict[str, float]] = []
    for program in (opt.original_program(), opt.program):
        best: dict[str, float] = {}
        for _ in range(runs):
            timed = _Timed(program.graph_module)
            with torch.no_grad():
                timed.run(*_arguments(program, ids))
            total: dict[str, float] = defaultdict(float)
            for (site, _), seconds in timed.seconds.items():
                total[_folded(site)] += seconds
            best = {site: min(seconds, best.get(site, seconds)) for site, seconds in total.items()}
        sums.append(best)
    sites = dict.fromkeys((*sums[0], *sums[1]))
    rows = [(site, 1e3 * sums[0].get(site, 0.0), 1e3 * sums[1].get(site, 0.0)) for site in sites]
    return sorted(rows, key=lambda row: -max(row[1:]))


def _arguments(program: rewriter.Program, ids: Tensor) -> list[Any]:
    """The example's arguments with these tokens in their place and masks of the same length."""
    return [
        (ids if x.dtype is torch.int64 and index == 0 else x.new_ones(ids.shape)) if isinstance(x, Tensor) else x
        for index, x in enumerate(program.example)
    ]


def _folded(site: str) -> str:
    """Layers of one kind under one name: module numbers become *; merged and single projections under their parent."""
    parts = ["*" if part.isdigit() else part for part in site.split(".")]
    joined = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv"}
    joined |= {"gate_proj": "gate_up", "up_proj": "gate_up", "gate_up_proj": "gate_up"}
    return ".".join(joined.get(part, part) for part in parts)
