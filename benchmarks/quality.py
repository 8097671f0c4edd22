# SPDX-License-Identifier: Apache-2.0
"""What each family costs and saves without any training, on the embedded model's held-out text.

.venv/bin/python benchmarks/quality.py               # all settings -> docs/quality.md, benchmarks/results/quality.json
.venv/bin/python benchmarks/quality.py shift_add     # those whose name contains a word, printed only
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rewriter
from rewriter import calibration, sizes, store
from rewriter.passes import LinearAttention, Pass, ShiftAdd, Tversky, VQLogits

ROOT = Path(__file__).resolve().parent.parent
LM = ROOT / "examples" / "tiny_lm"
ROWS = 12  # windows of 1024 tokens


@dataclass(frozen=True)
class Setting:
    """One line of the table: passes, where they may go, and whether they see calibration text."""

    name: str
    passes: tuple[str | Pass, ...]
    select: dict[str, str | None] = field(default_factory=dict)
    calibrated: bool = True
    length: int = 1024


@dataclass(frozen=True)
class Row:
    """What a setting measured; bytes as stored, perplexity and KL in nats per token of held-out text."""

    name: str
    length: int
    perplexity: float
    dense: float
    kl: float
    top1: float
    parameters: int
    stored: int
    read: int
    sites: int

    @property
    def ratio(self) -> float:
        return self.perplexity / self.dense


def settings() -> list[Setting]:
    return [
        Setting("exact rewrites only", ("fuse",), calibrated=False),
        *shift_add(),
        *tversky(),
        *attention(),
        *heads(),
        all_four(),
    ]


def shift_add() -> list[Setting]:
    """All linear weights and the embedding; the head stays dense except in the last."""
    body: dict[str, str | None] = {"lm_head": None}
    made: list[tuple[str, ShiftAdd]] = [
        (f"{mode} {bits}", ShiftAdd(mode=mode, bits=bits, embeddings=True))
        for bits in (4, 3, 2)
        for mode in ("bcq", "uniform", "pot", "apot", "dense")
    ]
    made += [(f"bcq {bits}, fp16 scales", ShiftAdd(bits=bits, scale="fp16", embeddings=True)) for bits in (4, 3, 2)]
    made += [
        ("pot 8, two terms", ShiftAdd(mode="pot", bits=8, terms=2, embeddings=True)),
        ("bcq, 3.5 bits on average", ShiftAdd(mean_bits=3.5, embeddings=True)),
        ("bcq 4, awq", ShiftAdd(awq=True, embeddings=True)),
    ]
    rows = [Setting(f"shift_add {name}", ("fuse", one), body) for name, one in made]
    plain = [("bcq 4", ShiftAdd(embeddings=True)), ("uniform 4", ShiftAdd(mode="uniform", embeddings=True))]
    rows += [Setting(f"shift_add {name}, uncalibrated", ("fuse", one), body, calibrated=False) for name, one in plain]
    return [*rows, Setting("shift_add bcq 4, head too", ("fuse", ShiftAdd(embeddings=True)))]


def tversky() -> list[Setting]:
    outputs: dict[str, str | None] = {"re:.*o_proj": "tversky", "re:.*": None}
    body: dict[str, str | None] = {"lm_head": None}
    return [
        Setting("tversky signed pair, all linears", ("fuse", Tversky(init="signed_pair")), body, calibrated=False),
        Setting("tversky low rank 96, output projections", ("fuse", Tversky(features=96)), outputs),
        Setting("tversky low rank, error 0.1, body", ("fuse", Tversky()), body),
        Setting("tversky low rank, error 0.3, body", ("fuse", Tversky(max_error=0.3)), body),
        Setting("tversky single pass, output projections", ("fuse", Tversky(init="single")), outputs),
    ]


def attention() -> list[Setting]:
    rows = []
    for length in (256, 1024):
        for name, one in (
            ("window 64 + landmarks", LinearAttention(min_length=None)),
            ("window 64 + landmarks, every 4th softmax", LinearAttention(min_length=None, keep_softmax_every=4)),
            ("window 64 + hedgehog", LinearAttention(min_length=None, feature_map="hedgehog")),
            ("landmarks, no window", LinearAttention(min_length=None, window=None)),
        ):
            rows.append(Setting(f"linear_attention {name}", ("fuse", one), length=length))
    return rows


def heads() -> list[Setting]:
    made = [(f"product {dims}", VQLogits(structure="product", dims=dims)) for dims in (3, 4, 6, 8)]
    made += [
        ("auto, KL 0.05", VQLogits()),
        ("product 4, rotated", VQLogits(structure="product", rotate=True)),
        ("product 6, 128 exact rows", VQLogits(structure="product", dims=6, exact_rows=128)),
        ("tiers 819", VQLogits(structure="tiers", codes=819)),
        ("pure 819", VQLogits(structure="pure", codes=819)),
        ("residual 2 x 1024", VQLogits(structure="residual", codes=1024)),
        ("low rank 128 + product", VQLogits(structure="lowrank", rank=128)),
    ]
    return [Setting(f"vq_logits {name}", ("fuse", one)) for name, one in made]


def all_four() -> Setting:
    passes = (
        "fuse", VQLogits(structure="product"), LinearAttention(min_length=None), ShiftAdd(embeddings=True), Tversky(features=96),
    )  # fmt: skip
    return Setting("all four", passes, {"re:.*o_proj": "tversky"})


def measure(model: Any, setting: Setting, tokens: torch.Tensor, data: list[Any]) -> Row:
    opt = rewriter.optimize(
        model, list(setting.passes), select=setting.select, calibration=data if setting.calibrated else None
    )
    found = rewriter.evaluate(opt, tokens, reference=model, length=setting.length)
    floats = {id(t): t.numel() for _, t in store.tensors(opt) if t.is_floating_point()}
    if found.reference_perplexity is None or found.kl is None or found.top1 is None:
        raise RuntimeError("an evaluation against a reference has its figures")
    return Row(
        setting.name,
        setting.length,
        found.perplexity,
        found.reference_perplexity,
        found.kl,
        found.top1,
        sum(floats.values()),
        opt.report.bytes_after,
        sizes.read_per_token(opt.program),
        len(opt.report.sites),
    )


def markdown(rows: list[Row]) -> str:
    lines = [
        "| setting | length | perplexity | KL | top-1 | sites | parameters | stored | read per token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.name} | {r.length} | {r.perplexity:.2f} (×{r.ratio:.4f}) | {r.kl:.4f} | {r.top1:.1%} | {r.sites} "
        f"| {r.parameters / 1e6:.2f} M | {r.stored / 1e6:.2f} MB | {r.read / 1e6:.2f} MB |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    words = sys.argv[1:]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(LM, dtype="float32").eval()
    tokens = load_file(LM / "held_out.safetensors")["input_ids"][:ROWS].long()
    text = load_file(LM / "calibration.safetensors")["input_ids"]
    data = list(calibration.batches(text))
    rows = []
    for setting in settings():
        if words and not any(word in setting.name for word in words):
            continue
        start = time.perf_counter()
        rows.append(measure(model, setting, tokens, data))
        print(markdown(rows[-1:]).splitlines()[-1], f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(markdown(rows))
    if not words:
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        (results / "quality.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
