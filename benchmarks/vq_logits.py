# SPDX-License-Identifier: Apache-2.0
"""Every structure of VQ-logits on the embedded model: bytes of the head, KL, perplexity, top-1, without any training.

.venv/bin/python benchmarks/vq_logits.py            # the table of docs/vq_logits.md
.venv/bin/python benchmarks/vq_logits.py "tiers|pure" # the settings whose name the regular expression finds

Statistics come from calibration text, figures from held-out text. For tiers and pure codebooks it also prints the floor
H(token | cluster) of the held-out counts under the very clustering of that head, in nats per token: no codebook with this
clustering has a smaller loss. The excess is the log-loss over the dense head's.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rewriter
from rewriter.narrow import stored_bytes
from rewriter.passes import VQLogits
from rewriter.passes.vq_logits.tiers import floor
from rewriter.rendering import table

LM = Path(__file__).resolve().parent.parent / "examples" / "tiny_lm"
SETTINGS = {
    "product, w=4": VQLogits("product"),
    "product, w=4, 128 exact rows": VQLogits("product", exact_rows=128),
    "product, w=6": VQLogits("product", dims=6),
    "product, w=6, 208 codes": VQLogits("product", dims=6, codes=208),
    "product, w=6, 32 exact rows": VQLogits("product", dims=6, exact_rows=32),
    "product, w=6, 128 exact rows": VQLogits("product", dims=6, exact_rows=128),
    "product, w=8": VQLogits("product", dims=8),
    "product, w=8, 32 exact rows": VQLogits("product", dims=8, exact_rows=32),
    "product, w=8, 128 exact rows": VQLogits("product", dims=8, exact_rows=128),
    "rotated, w=4": VQLogits("product", rotate=True),
    "rotated, w=6": VQLogits("product", dims=6, rotate=True),
    "rotated, w=8": VQLogits("product", dims=8, rotate=True),
    "lowrank, rank 192, w=4": VQLogits("lowrank", rank=192),
    "lowrank, rank 128, w=4": VQLogits("lowrank", rank=128),
    "tiers, K=723": VQLogits("tiers", codes=723),
    "tiers, K=2048": VQLogits("tiers", codes=2048),
    "pure, K=723": VQLogits("pure", codes=723),
    "residual, 2 stages of 512": VQLogits("residual", codes=512),
    "residual, 4 stages of 256": VQLogits("residual", codes=256, stages=4),
    "auto, max_kl=0.1": VQLogits(max_kl=0.1),
    "auto, max_kl=0.05": VQLogits(),
    "auto, max_kl=0.05, no exact rows": VQLogits(exact_rows=0),
}


def main(wanted: str = "") -> None:
    held_out = load_file(LM / "held_out.safetensors")["input_ids"][:12].long()
    calibration = load_file(LM / "calibration.safetensors")["input_ids"].long()
    model = AutoModelForCausalLM.from_pretrained(LM, dtype="float32").eval()
    program = rewriter.capture(model)
    statistics = rewriter.calibrate(program, ["vq_logits"], calibration.split(8))
    dense_bytes = 2 * model.lm_head.weight.numel()
    counts = torch.bincount(held_out[:, 1:].flatten(), minlength=model.config.vocab_size)
    console = Console(width=150)
    columns = ("head bytes", "saved", "KL", "perplexity", "top-1", "excess", "floor", "excess / floor")
    rows = table("setting", *columns, right=columns)
    for name, setting in SETTINGS.items():
        if re.search(wanted, name) is None:
            continue
        opt = rewriter.optimize(model, [setting], calibration=statistics)
        head = {n: t for n, t in opt.state_dict().items() if n.startswith("lm_head.")}
        found = rewriter.evaluate(opt, held_out, reference=model)
        excess = found.nll - found.reference_nll
        figures = ["", ""]
        if "code_of" in str(head):
            code_of = next(t for n, t in head.items() if n.endswith("code_of"))
            lowest = floor(counts, code_of, bias=any(n.endswith("token_bias") for n in head))
            figures = [f"{lowest:.3f}", f"{excess / lowest:.2f}"]
        size = sum(stored_bytes(t) for t in head.values())
        ratio = found.perplexity / found.reference_perplexity
        row = (f"{size:,}", f"−{1 - size / dense_bytes:.1%}", f"{found.kl:.4f}", f"×{ratio:.3f}", f"{found.top1:.1%}")
        console.print(name, *row, highlight=False)  # a table that is complete in some minutes; each row as it comes
        rows.add_row(name, *row, f"{excess:.3f}", *figures)
    console.print(rows)
    console.print(
        f"dense perplexity {found.reference_perplexity:.2f} on {found.tokens} tokens, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
