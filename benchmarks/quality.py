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

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import rewriter
from rewriter import calibration, sizes, store
from rewriter.passes import LinearAttention, Pass, ShiftAdd, Tversky, VQLogits

ROOT = Path(__file__).resolve().parent.parent
LM = ROOT / "examples" / "tiny_lm"
ROWS = 12  # windows of 1024 tokens

PAGE = """# What each rewrite costs and saves, untrained

Written by `benchmarks/quality.py` (torch {torch}): the embedded model `examples/tiny_lm` (6.9 M parameters, V = 8192, untied
head), no training at all. Perplexity and KL(original ‖ rewritten) in nats per token on the first 12 × 1024 held-out tokens, top-1
agreement on the same. Every setting not marked *uncalibrated* was fitted with statistics of the calibration split, in windows of
256 tokens as it is stored, for attention of 1024. Nothing here depends on the machine's load; rows of the committed page come
from several runs of the script, each of part of the settings.

- *sites*: those rewritten by a pass of the table, without preparatory exact ones.
- *parameters*: floating-point numbers; packed codes are not among them. *stored*: bytes of everything as saved, fp16 where that
  loses nothing. *read per token*: bytes of weights one token reads at batch 1, of an embedding one row; keys, values and states
  are not counted, so linear attention shows what it adds and not the cache it saves.
- `shift_add` rows rewrite all linear weights and the embedding and leave the head dense, unless they say otherwise.

{table}

How to read it

- **ShiftAdd**: calibrated, 4 bits cost half a per cent, 3 bits three to four, 2 bits twenty: train those. Among the
  modes `bcq` and `uniform` are close; a single power of two per weight is for hardware that wants it.
- **Heads**: product codes are the ones to take; tiers and pure codebooks cannot tell the tokens of a cluster apart, which is a floor
  of the structure and not of the fit ([vq_logits](vq_logits.md)).
- **Attention**: the softmax window carries most of it at these lengths; what the linear branch adds shows in the recall
  probe ([linear_attention](linear_attention.md)).
- **Tversky**: exact as a signed pair, which saves nothing; as a smaller bank it is a low-rank factorisation and costs what one
  costs ([tversky](tversky.md)).
"""


@dataclass(frozen=True)
class Setting:
    """One line of the table: passes, where they may go, and whether they see calibration text."""

    name: str
    passes: tuple[str | Pass, ...]
    select: dict[str, str | None] = field(default_factory=dict)
    calibrated: bool = True
    length: int = 1024
    windows: int = 256  # tokens of a calibration input


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
        for bits in (4, 3)
        for mode in ("bcq", "uniform", "pot", "apot", "dense")
    ]
    made += [(f"bcq {bits}, fp16 scales", ShiftAdd(bits=bits, scale="fp16", embeddings=True)) for bits in (4, 3)]
    made += [
        ("bcq 2", ShiftAdd(bits=2, embeddings=True)),
        ("pot 8, two terms", ShiftAdd(mode="pot", bits=8, terms=2, embeddings=True)),
        ("bcq, 3.5 bits on average", ShiftAdd(mean_bits=3.5, embeddings=True)),
        ("bcq 4, awq", ShiftAdd(awq=True, embeddings=True)),
    ]
    rows = [Setting(f"shift_add {name}", (one,) if one.mean_bits else ("fuse", one), body) for name, one in made]
    plain = [("bcq 4", ShiftAdd(embeddings=True)), ("uniform 4", ShiftAdd(mode="uniform", embeddings=True))]
    rows += [Setting(f"shift_add {name}, uncalibrated", ("fuse", one), body, calibrated=False) for name, one in plain]
    return [*rows, Setting("shift_add bcq 4, head too", ("fuse", ShiftAdd(embeddings=True)))]


def tversky() -> list[Setting]:
    outputs: dict[str, str | None] = {"re:.*o_proj": "tversky", "re:.*": None}
    body: dict[str, str | None] = {"lm_head": None}
    return [
        Setting("tversky signed pair, all linears", ("fuse", Tversky(init="signed_pair")), body, calibrated=False),
        Setting("tversky low rank 96, output projections", ("fuse", Tversky(features=96)), outputs),
        Setting("tversky low rank, error 0.05 (default), body", (Tversky(),), body),
        Setting("tversky low rank, error 0.3, body", (Tversky(max_error=0.3),), body),
        Setting("tversky single pass, output projections", ("fuse", Tversky(init="single")), outputs),
    ]


def attention() -> list[Setting]:
    rows = []
    for length in (256, 1024):
        for name, one in (
            ("window 64 + landmarks", LinearAttention(min_length=None)),
            ("window 64 + landmarks, every 4th softmax", LinearAttention(min_length=None, keep_softmax_every=4)),
            ("landmarks, no window", LinearAttention(min_length=None, window=None)),
        ):
            rows.append(Setting(f"linear_attention {name}", ("fuse", one), length=length, windows=1024))
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
    return Setting("all four", passes, {"re:.*o_proj": "tversky"}, windows=1024)


def calibrated(
    program: rewriter.Program, chosen: list[Setting], text: torch.Tensor, length: int
) -> rewriter.Statistics | None:
    """One pass over the calibration text for all settings that want it in windows of ``length`` tokens."""
    passes = [one for setting in chosen if setting.calibrated for one in setting.passes]
    if not passes:
        return None
    windows = text[: len(text) // length * length].reshape(-1, length)
    return rewriter.calibrate(program, passes, list(calibration.batches(windows)))


class Remembered:
    """A model that computes each batch once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.logits: dict[bytes, torch.Tensor] = {}

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in self.logits:
            with torch.no_grad():
                self.logits[key] = self.model(ids).logits
        return self.logits[key]


def measure(
    model: nn.Module,
    reference: Remembered,
    setting: Setting,
    tokens: torch.Tensor,
    statistics: rewriter.Statistics | None,
) -> Row:
    opt = rewriter.optimize(
        model, list(setting.passes), select=setting.select, calibration=statistics if setting.calibrated else None
    )
    found = rewriter.evaluate(opt, tokens, reference=reference, length=setting.length)
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
        sum(site.contract != "EXACT" or "tversky" in site.rule for site in opt.report.sites),
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
    model = AutoModelForCausalLM.from_pretrained(LM, dtype="float32").eval()
    tokens = load_file(LM / "held_out.safetensors")["input_ids"][:ROWS].long()
    text = load_file(LM / "calibration.safetensors")["input_ids"].flatten()
    chosen = [s for s in settings() if not words or any(word in s.name for word in words)]
    program = rewriter.capture(model, example_kwargs={"input_ids": tokens[:2, :64]})
    statistics = {w: calibrated(program, [s for s in chosen if s.windows == w], text, w) for w in (256, 1024)}
    reference, rows = Remembered(model), []
    for setting in chosen:
        start = time.perf_counter()
        rows.append(measure(model, reference, setting, tokens, statistics[setting.windows]))
        print(markdown(rows[-1:]).splitlines()[-1], f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(markdown(rows))
    if not words:
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        (results / "quality.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
        (ROOT / "docs" / "quality.md").write_text(PAGE.format(table=markdown(rows), torch=torch.__version__))


if __name__ == "__main__":
    main()
