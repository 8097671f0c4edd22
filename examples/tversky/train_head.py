# SPDX-License-Identifier: Apache-2.0
"""Trains one small language model per head from scratch on tiny_lm's text: dense or Tversky, tied or not.

    S(x, π) = θ Σ_k u_k v_k  −  α Σ_k u_k [v_k = 0]  −  β Σ_k [u_k = 0] v_k,      u = relu(Ω x),  v = relu(Ω π)

Everything but the head is the same: backbone, batches, steps, seed, optimisers and the learning rates tried.
A Tversky head adds the feature bank Ω; its model pays for that with a narrower feed-forward layer, so that it never
has more parameters than the dense model it is compared with. The rate is chosen per head on calibration text, after
short runs; held-out text is only reported. Two ways to begin:

    uniform   Ω, Π ~ U[0, 1), θ = 1, α = β = ½: the authors' code
    centred   Ω ~ N(0, 1/d), Π ~ N(0, 0.02²), θ = 1, α = β = 0: logits near zero, and α and β start where nothing
              depends on which features a prototype happens to have

A tied head's Π is the embedding, which begins as N(0, 0.02²) either way.

    python examples/tversky/train_head.py --head tversky_centred_tied --rate 6e-3   # one run, printed
    python examples/tversky/train_head.py --compare                                 # every head, into results.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent / "tiny_lm"))

from data import load  # noqa: E402  (tiny_lm's scripts lie in their own folder)
from head_loss import head_loss  # noqa: E402

RESULTS = FOLDER / "results.json"
VOCABULARY, WIDTH, LAYERS, FEED_FORWARD, FEATURES = 8192, 128, 2, 320, 128  # of the dense models
ROWS, LENGTH = 4, 128  # of a batch
JUDGED_TOKENS = 24_576  # of the calibration text (learning rates) and of the held-out text (results)
MUON_RATE, WEIGHT_DECAY, WARM_UP_STEPS, GRADIENT_NORM = 6e-3, 0.1, 50, 1.0
STEPS, TRIAL_STEPS = 500, 100
RATES = (6e-3, 2e-2, 6e-2)
HEADS = ("dense_tied", "tversky_centred_tied", "dense", "tversky_centred", "tversky_uniform_tied", "tversky_uniform")


@dataclass(frozen=True)
class Run:
    """One training: the head, its learning rate, the number of steps, and the seed of weights and batches."""

    head: str
    rate: float
    steps: int
    seed: int = 1
    features: int = FEATURES

    @property
    def feed_forward(self) -> int:
        """The widest feed-forward layer with which the model has no more parameters than the dense one."""
        if self.head.startswith("dense"):
            return FEED_FORWARD
        extra = self.features * WIDTH + 3
        return FEED_FORWARD - math.ceil(extra / (3 * WIDTH * LAYERS))

    def factor(self, step: int) -> float:
        """On both learning rates: linear warm-up, then linear to zero."""
        return min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / self.steps)


class Model(nn.Module):
    """A Llama backbone and one of HEADS; `operands` gives A [N, m] and B [V, m] with logits A Bᵀ."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(run.seed)
        self.backbone = LlamaModel(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=run.feed_forward,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=LENGTH,
            )
        )
        self.tied = run.head.endswith("_tied")
        self.is_tversky = run.head.startswith("tversky")
        uniform = "uniform" in run.head
        if not self.tied:
            self.rows = nn.Parameter(
                torch.rand(VOCABULARY, WIDTH) if uniform else 0.02 * torch.randn(VOCABULARY, WIDTH)
            )
        if self.is_tversky:
            shape = (run.features, WIDTH)
            self.features = nn.Parameter(torch.rand(shape) if uniform else torch.randn(shape) / math.sqrt(WIDTH))
            scalars = (1.0, 0.5, 0.5) if uniform else (1.0, 0.0, 0.0)
            self.theta, self.alpha, self.beta = (nn.Parameter(torch.tensor(value)) for value in scalars)

    def hidden(self, ids: Tensor) -> Tensor:
        """[rows, length] int64 -> [rows · length, WIDTH]"""
        hidden: Tensor = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.backbone.embed_tokens.weight if self.tied else self.rows
        if not self.is_tversky:
            return x, rows
        u, v = torch.relu(x @ self.features.T), torch.relu(rows @ self.features.T)
        no_u, no_v = (u <= 0).to(u.dtype), (v <= 0).to(v.dtype)
        return torch.cat((u, no_u), 1), torch.cat((self.theta * v - self.alpha * no_v, -self.beta * v), 1)

    def loss(self, batch: Tensor, products: torch.dtype = torch.float32) -> Tensor:
        """Mean cross entropy in nats of a batch [rows, length + 1]; A Bᵀ in `products`, the rest in float32."""
        left, right = self.operands(self.hidden(batch[:, :-1]))
        return head_loss(left, right, batch[:, 1:].flatten(), products)


def batch_at(run: Run, stream: Tensor, step: int) -> Tensor:
    """[ROWS, LENGTH + 1] random rows of the stream, the same for every head."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_000 + step)
    starts = torch.randint(stream.numel() - LENGTH, (ROWS,), generator=generator)
    return stream[starts[:, None] + torch.arange(LENGTH + 1)]


def judged(model: Model, split: str) -> float:
    """Mean loss in nats per token over the first JUDGED_TOKENS of a split, in windows of LENGTH."""
    rows = load(split)[: JUDGED_TOKENS + 1].unfold(0, LENGTH + 1, LENGTH)
    with torch.no_grad():
        losses = [float(model.loss(part)) * len(part) for part in rows.split(ROWS)]
    return sum(losses) / len(rows)


def optimizers_of(model: Model, rate: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon at one rate for the backbone's matrices, AdamW at the head's rate for all else; with their base rates."""
    embedding = model.backbone.embed_tokens.weight
    matrices = [w for w in model.backbone.parameters() if w.ndim == 2 and w is not embedding]
    head = [w for name, w in model.named_parameters() if name in ("rows", "features")]
    others = [w for w in model.parameters() if w.ndim < 2] + [embedding]
    groups = [{"params": head, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [(torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True), rate), (muon, MUON_RATE)]


def train(run: Run, trial: bool = False) -> dict[str, Any]:
    """Trains one model; returns its settings, parameters, losses in nats per token, and the scalars of its head.

    A trial, from which a learning rate is chosen, does not look at the held-out text.
    """
    stream, model, begun = load("train"), Model(run), time.monotonic()
    optimizers = optimizers_of(model, run.rate)
    for step in range(run.steps):
        for optimizer, base in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base * run.factor(step)
        loss = model.loss(batch_at(run, stream, step), torch.bfloat16)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 49:
            print(f"{run.head} rate {run.rate:g} step {step + 1}: {float(loss.detach()):.3f}", file=sys.stderr)
    found: dict[str, Any] = {
        **asdict(run),
        "tokens_per_step": ROWS * LENGTH,
        "feed_forward": run.feed_forward,
        "parameters": sum(w.numel() for w in model.parameters()),
        "calibration_loss": round(judged(model, "calibration"), 4),
    }
    if not trial:
        held_out = judged(model, "held_out")
        found |= {"held_out_loss": round(held_out, 4), "held_out_perplexity": round(math.exp(held_out), 2)}
    scalars = {name: round(float(w.detach()), 4) for name, w in model.named_parameters() if w.ndim == 0}
    return {**found, "scalars": scalars, "seconds": round(time.monotonic() - begun)}


def compare() -> None:
    """Every head: a trial per rate, then the run at the best of them; results.json is written after each, and continued."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"trials": [], "runs": []}

    def done(what: str, run: Run) -> dict[str, Any]:
        for found in kept[what]:
            if {**found, **asdict(run)} == found:
                return dict(found)
        kept[what].append(train(run, trial=what == "trials"))
        write(kept)
        return dict(kept[what][-1])

    for head in HEADS:
        trials = [done("trials", Run(head, rate, TRIAL_STEPS)) for rate in RATES]
        best = min(trials, key=lambda trial: trial["calibration_loss"])
        done("runs", Run(head, best["rate"], STEPS))


def write(results: dict[str, Any]) -> None:
    """Replaces results.json, whole."""
    partial = RESULTS.with_suffix(".json.tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, RESULTS)


def main() -> None:
    """Trains as asked; one run is printed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--head", choices=HEADS)
    what.add_argument("--compare", action="store_true", help="every head, its rate searched, into results.json")
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"each of {ROWS * LENGTH} tokens")
    parser.add_argument("--features", type=int, default=FEATURES)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.compare:
        return compare()
    print(json.dumps(train(Run(given.head, given.rate, given.steps, given.seed, given.features))), flush=True)
    return None


if __name__ == "__main__":
    main()
