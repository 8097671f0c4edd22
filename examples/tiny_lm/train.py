# SPDX-License-Identifier: Apache-2.0
"""Trains the tiny language model: `python train.py --steps N --work FOLDER`.

Every batch is a pure function of the seed and the step, the checkpoint in FOLDER holds weights and optimiser
state, and the log is cut back to the checkpoint's step: a killed run continues with the same command. Where
it turns out too slow, `--planned P --shortened-at S` ends a run of P steps after N, as if decided at step S.
When the last step is done the fp16 checkpoint and the log replace the ones beside this script.

Hidden matrices are trained by Muon, embedding, head and norms by AdamW; the learning rate warms up and then
falls linearly to zero. Most steps see 256-token rows; the last LONG_SHARE of them the full 1024-token
context, so that all rotary positions are trained. Rows are cut from the stream of all training files and may
span several of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import FOLDER
from data import FILE_ID, load
from head_loss import head_loss
from tokenizer import CONTEXT, VOCABULARY
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

TOKENS_PER_STEP = 4096
SHORT_ROW, LONG_ROW = 256, CONTEXT
LONG_SHARE = 0.14
WARM_UP_STEPS = 100
ADAMW_RATE = 4e-3
MUON_RATE = 6e-3
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0
LOG_EVERY, SAVE_EVERY = 20, 200
HELD_OUT_ROWS = 16
LOG_NAME = "training_log.jsonl"
CHECKPOINT_NAME = "checkpoint.pt"
EXPORTED = ("config.json", "generation_config.json", "model.safetensors")


@dataclass(frozen=True)
class Run:
    """What a run depends on: its length in steps, the seed of weights and batches, and where it keeps state.

    A run planned for `planned` steps may be cut short to `steps` of them at step `shortened_at`: from there
    the rate falls from where it stands to zero. `dtype` is that of the matrix products; weights and
    optimiser state are float32.
    """

    steps: int
    seed: int
    work: Path
    planned: int
    shortened_at: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def long_from(self) -> int:
        """The first step on LONG_ROW-token rows."""
        return round(self.steps * (1 - LONG_SHARE))

    def rate(self, step: int) -> float:
        """The factor on both learning rates: linear warm-up, then linear to zero at the last step."""
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        if step < self.shortened_at:
            return warm_up * (1 - step / self.planned)
        left = (self.steps - step) / (self.steps - self.shortened_at)
        return warm_up * (1 - self.shortened_at / self.planned) * left

    def row_length(self, step: int) -> int:
        return SHORT_ROW if step < self.long_from else LONG_ROW


def new_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 6.9 M parameters: width 256, 4 layers, 4 query and 2 key-value heads, untied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=FILE_ID,
        eos_token_id=FILE_ID,
        pad_token_id=None,  # an id here would freeze that embedding row at zero, and the token opens files
    )
    return LlamaForCausalLM(config)


def batch_at(run: Run, stream: torch.Tensor, step: int) -> torch.Tensor:
    """The int64 [rows, row length + 1] batch of a step: inputs and, shifted by one, targets.

    Each epoch cuts the stream at a new random offset and visits the rows in a new random order.
    """
    length = run.row_length(step)
    phase_step = step if length == SHORT_ROW else step - run.long_from
    rows = TOKENS_PER_STEP // length
    steps_per_epoch = (stream.numel() - length - 1) // length // rows
    epoch, index = divmod(phase_step, steps_per_epoch)
    generator = torch.Generator().manual_seed((run.seed * 1000 + epoch) * 10_000 + length)
    offset = int(torch.randint(length, (1,), generator=generator))
    order = torch.randperm(steps_per_epoch * rows, generator=generator)[index * rows : (index + 1) * rows]
    return stream[offset + order[:, None] * length + torch.arange(length + 1)]


def row_loss(model: LlamaForCausalLM, batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mean cross entropy in nats of tokens 1 … L of each row, given those before; products in `dtype`."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
    return head_loss(hidden.float().flatten(0, 1), model.lm_head.weight, batch[:, 1:].flatten(), dtype)


def new_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest; only matrices other than the embedding decay."""
    named = dict(model.named_parameters())
    head, embedding = named.pop("lm_head.weight"), named.pop("model.embed_tokens.weight")
    matrices = [weight for weight in named.values() if weight.ndim == 2]
    vectors = [weight for weight in named.values() if weight.ndim < 2]
    groups = [
        {"params": [head], "weight_decay": WEIGHT_DECAY},
        {"params": [embedding, *vectors], "weight_decay": 0.0},
    ]
    return [
        torch.optim.AdamW(groups, lr=ADAMW_RATE, betas=(0.9, 0.95), fused=True),
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
    ]


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer, rate in zip(optimizers, (ADAMW_RATE, MUON_RATE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def held_out_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean loss in nats per token over some held-out rows [n, L + 1], in float32."""
    with torch.no_grad():
        return sum(float(row_loss(model, row[None], torch.float32)) for row in rows) / len(rows)


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes `folder` in transformers' form: config, generation config and fp16 weights."""
    half = LlamaForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    ids = {"bos_token_id": FILE_ID, "eos_token_id": FILE_ID, "pad_token_id": FILE_ID}
    half.generation_config = GenerationConfig(**ids)
    half.save_pretrained(folder)


def replace(source: Path, target: Path) -> None:
    """Copies a file so that `target` is always either the old or the whole new one."""
    partial = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def save_checkpoint(
    run: Run, step: int, seconds: float, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Stores all that the next step depends on, and beside it the model as it stands (`run.work/export`)."""
    state = {
        "steps": run.steps,
        "planned": run.planned,
        "seed": run.seed,
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = run.work / (CHECKPOINT_NAME + ".tmp")
    torch.save(state, partial)
    os.replace(partial, run.work / CHECKPOINT_NAME)
    export(model, run.work / "export")


def resume(run: Run, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Restores the checkpoint of this run, if any. Returns the next step and the seconds already spent.

    Raises ValueError where the folder holds a run of another seed, or one whose steps so far were not those
    of this run.
    """
    file = run.work / CHECKPOINT_NAME
    if not file.exists():
        (run.work / LOG_NAME).write_text("", encoding="utf-8")
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    ahead = state["step"] <= run.shortened_at  # the steps so far followed the plan alone
    same_length = state["planned"] == run.planned and (state["steps"] == run.steps or ahead)
    if not same_length or state["seed"] != run.seed:
        raise ValueError(
            f"{file} belongs to a run of {state['steps']} steps with seed {state['seed']}: "
            "repeat those, or choose another --work folder"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    log = run.work / LOG_NAME
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
    log.write_text("".join(kept), encoding="utf-8")
    return state["step"], state["seconds"]


def take_step(
    run: Run,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batch: torch.Tensor,
    factor: float,
) -> float:
    """One optimiser step at `factor` times the learning rates. Returns the batch's loss in nats."""
    # On one core the plain attention is faster on short rows, the fused one on long rows.
    model.set_attn_implementation("eager" if batch.shape[1] <= SHORT_ROW + 1 else "sdpa")
    set_rate(optimizers, factor)
    loss = row_loss(model, batch, run.dtype)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def train(run: Run) -> LlamaForCausalLM:
    """Runs (or continues) the whole training; keeps log and checkpoint in `run.work`. Returns the model."""
    run.work.mkdir(parents=True, exist_ok=True)
    stream = load("train")
    held_out = load("held_out")[: HELD_OUT_ROWS * LONG_ROW + 1].unfold(0, LONG_ROW + 1, LONG_ROW)
    model = new_model(run.seed)
    optimizers = new_optimizers(model)
    step, spent = resume(run, model, optimizers)
    begun = time.monotonic() - spent
    losses: list[float] = []
    while step < run.steps:
        losses.append(take_step(run, model, optimizers, batch_at(run, stream, step), run.rate(step)))
        step += 1
        if step % LOG_EVERY and step < run.steps:
            continue
        entry: dict[str, float] = {
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "row_length": run.row_length(step - 1),
            "rate": round(run.rate(step - 1), 5),
            "train_loss": round(sum(losses) / len(losses), 4),
        }
        losses.clear()
        due = step % SAVE_EVERY == 0 or step == run.steps
        if due:
            entry["held_out_loss"] = round(held_out_loss(model, held_out), 4)
        entry["seconds"] = round(time.monotonic() - begun, 1)
        append(run.work / LOG_NAME, entry)
        if due:
            save_checkpoint(run, step, entry["seconds"], model, optimizers)
    return model


def append(log: Path, entry: dict[str, float]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def main() -> None:
    """Trains as asked and puts the result beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, required=True, help=f"each of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planned", type=int, help="steps first planned, where the run is cut short")
    parser.add_argument("--shortened-at", type=int, default=0, help="the step at which it is cut short")
    given = parser.parse_args()
    run = Run(given.steps, given.seed, given.work, given.planned or given.steps, given.shortened_at)
    export(train(run), run.work / "export")
    for name in EXPORTED:
        replace(run.work / "export" / name, FOLDER / name)
    replace(run.work / LOG_NAME, FOLDER / LOG_NAME)


if __name__ == "__main__":
    main()
