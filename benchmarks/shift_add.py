# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the embedded model with its linear weights and embedding in each ShiftAdd setting, head left dense.

Every setting is measured twice: fitted to the weights alone ("plain") and to the outputs on calibration text
("calibrated"), uniform grids in the same two ways. Figures are on held-out text, errors on calibration text.

.venv/bin/python benchmarks/shift_add.py                          # the tables of docs/shift_add.md
.venv/bin/python benchmarks/shift_add.py --only "bcq 3" --statistics moments.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import rewriter
from rewriter.calibration import Statistics, batches
from rewriter.passes import ShiftAdd
from rewriter.rendering import table

LM = Path(__file__).resolve().parent.parent / "examples" / "tiny_lm"
_EACH = {"embeddings": True}
SETTINGS = {
    "bcq 4": ShiftAdd(bits=4, **_EACH),
    "bcq 4, fp16 scales, group 256": ShiftAdd(bits=4, scale="fp16", group=256, **_EACH),
    "bcq 4, fp16 scales": ShiftAdd(bits=4, scale="fp16", **_EACH),
    "uniform 4": ShiftAdd(bits=4, mode="uniform", **_EACH),
    "uniform 4, group 64": ShiftAdd(bits=4, mode="uniform", group=64, **_EACH),
    "pot 4": ShiftAdd(bits=4, mode="pot", **_EACH),
    "apot 4": ShiftAdd(bits=4, mode="apot", **_EACH),
    "dense 4": ShiftAdd(bits=4, mode="dense", **_EACH),
    "pot 8, two terms": ShiftAdd(bits=8, mode="pot", terms=2, **_EACH),
    "bcq 3": ShiftAdd(bits=3, **_EACH),
    "bcq 3, fp16 scales, group 256": ShiftAdd(bits=3, scale="fp16", group=256, **_EACH),
    "bcq 3, fp16 scales": ShiftAdd(bits=3, scale="fp16", **_EACH),
    "uniform 3": ShiftAdd(bits=3, mode="uniform", **_EACH),
    "uniform 3, group 64": ShiftAdd(bits=3, mode="uniform", group=64, **_EACH),
    "pot 3": ShiftAdd(bits=3, mode="pot", **_EACH),
    "apot 3": ShiftAdd(bits=3, mode="apot", **_EACH),
    "dense 3": ShiftAdd(bits=3, mode="dense", **_EACH),
    "bcq 2, fp16 scales": ShiftAdd(bits=2, scale="fp16", **_EACH),
    "bcq 3, scaled inputs": ShiftAdd(bits=3, awq=True, **_EACH),
    "bcq 3 on average, mixed": ShiftAdd(bits=3, mean_bits=3.0, **_EACH),
}
COLUMNS = ("bits", "output error", "calibrated", "perplexity", "calibrated", "KL")


def measured(model: nn.Module, setting: ShiftAdd, statistics: Statistics, tokens: torch.Tensor) -> tuple[float, ...]:
    """Stored bits per weight, root-mean-square relative output error of the linear layers, perplexity ratio, KL."""
    opt = rewriter.optimize(model, [setting], select={"lm_head": None}, calibration=statistics)
    found = rewriter.evaluate(opt, tokens, reference=model)
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    figures = [(sizes[f"{site.paths[0]}.weight"], site.figures) for site in opt.report.sites]
    bits = sum(n * f["bits"] for n, f in figures) / sum(n for n, _ in figures)
    errors = torch.tensor([f["output_error"] for _, f in figures if "output_error" in f])
    ratio = found.perplexity / (found.reference_perplexity or float("nan"))
    return bits, float(errors.square().mean().sqrt()), ratio, found.kl or float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a setting of the table, again for more", choices=SETTINGS)
    parser.add_argument("--statistics", type=Path, help="moments from an earlier run; made and written if missing")
    given = parser.parse_args()
    console = Console()
    tokens = load_file(LM / "held_out.safetensors")["input_ids"][:12].long()
    model = AutoModelForCausalLM.from_pretrained(LM, dtype="float32").eval()
    if given.statistics is not None and given.statistics.exists():
        statistics = Statistics.load(given.statistics)
    else:
        text = load_file(LM / "calibration.safetensors")["input_ids"]
        statistics = rewriter.calibrate(rewriter.capture(model), [ShiftAdd(**_EACH)], list(batches(text, 16)))
        if given.statistics is not None:
            statistics.save(given.statistics)
    rows = table("setting", *COLUMNS, right=COLUMNS)
    for name in given.only or SETTINGS:
        setting = SETTINGS[name]
        plain = dataclasses.replace(setting, compensate=False)
        bits, error, ratio, _ = measured(model, plain, statistics, tokens)
        _, lower, better, kl = measured(model, setting, statistics, tokens)
        change = f"{lower:.4f} ({lower / error - 1:+.0%})"
        rows.add_row(name, f"{bits:.3f}", f"{error:.4f}", change, f"×{ratio:.4f}", f"×{better:.4f}", f"{kl:.4f}")
        console.log(
            f"{name}: {bits:.3f} bits, error {error:.4f} to {change}, ×{ratio:.4f} to ×{better:.4f}, KL {kl:.4f}"
        )
    console.print(rows)
    dense = rewriter.evaluate(model, tokens)
    console.print(
        f"dense perplexity {dense.perplexity:.2f} on {dense.tokens} held-out tokens, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
