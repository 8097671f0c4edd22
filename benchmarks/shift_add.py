# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the embedded model with its linear weights and embedding in each ShiftAdd setting, head left dense.

.venv/bin/python benchmarks/shift_add.py        # the table of docs/shift_add.md
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import rewriter
from rewriter.passes import ShiftAdd
from rewriter.passes.shift_add import bcq, measures
from rewriter.rendering import table

LM = Path(__file__).resolve().parent.parent / "examples" / "tiny_lm"
SETTINGS = {
    "bcq 4, pot scales": ShiftAdd(bits=4, embeddings=True),
    "bcq 4, fp16 scales": ShiftAdd(bits=4, scale="fp16", embeddings=True),
    "bcq 4, fp16 scales, group 256": ShiftAdd(bits=4, scale="fp16", group=256, embeddings=True),
    "bcq 3, pot scales": ShiftAdd(bits=3, embeddings=True),
    "bcq 3, fp16 scales": ShiftAdd(bits=3, scale="fp16", embeddings=True),
    "bcq 2, fp16 scales": ShiftAdd(bits=2, scale="fp16", embeddings=True),
    "pot 4, one term": ShiftAdd(bits=4, mode="pot", embeddings=True),
    "pot 8, two terms": ShiftAdd(bits=8, mode="pot", terms=2, embeddings=True),
}


def uniform(model: nn.Module) -> tuple[nn.Module, float, float]:
    """The model with every weight but the head's on the best mid-rise 4-bit grid; its bits and largest error."""
    error = 0.0
    for name, module in model.named_modules():
        if name != "lm_head" and isinstance(module, nn.Linear | nn.Embedding):
            codes = bcq.uniform(module.weight.data, bits=4)
            error = max(error, measures.relative_error(module.weight.data, codes.decode()))
            module.weight.data = codes.decode()
    return model, 4 + 16 / 128, error  # a grid stores one fp16 step per group and no exponents


def main() -> None:
    tokens = load_file(LM / "held_out.safetensors")["input_ids"][:12].long()
    model = AutoModelForCausalLM.from_pretrained(LM, dtype="float32").eval()
    rows = table(
        "setting",
        "bits per weight",
        "largest error",
        "perplexity",
        right=("bits per weight", "largest error", "perplexity"),
    )
    grid, bits, error = uniform(AutoModelForCausalLM.from_pretrained(LM, dtype="float32").eval())
    found = rewriter.evaluate(grid, tokens, reference=model)
    dense = found.reference_perplexity or float("nan")
    rows.add_row("uniform grid, 4 bits", f"{bits:.3f}", f"{error:.3f}", f"×{found.perplexity / dense:.3f}")
    for name, setting in SETTINGS.items():
        opt = rewriter.optimize(model, [setting], select={"lm_head": None})
        figures = [site.figures for site in opt.report.sites]
        ratio = rewriter.evaluate(opt, tokens).perplexity / dense
        worst = max(f["weight_error"] for f in figures)
        rows.add_row(name, f"{max(f['bits'] for f in figures):.3f}", f"{worst:.3f}", f"×{ratio:.3f}")
    console = Console()
    console.print(rows)
    console.print(f"dense perplexity {dense:.2f} on {found.tokens} held-out tokens, torch {torch.__version__}")


if __name__ == "__main__":
    main()
