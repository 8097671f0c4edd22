# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the checkpoint beside this script, of a unigram and of an interpolated 5-gram model.

    perplexity = exp( −1/(N − 1) Σ_{t=1}^{N−1} ln p(x_t | what the model sees of x_0 … x_{t−1}) )

over the held-out stream x of N tokens; each token but the first is predicted once. The stream is cut into
windows of 1024: token t sees the tokens since the start of the window that holds token t − 1. The n-gram
model sees the four tokens before t, wherever the windows begin; its discounts are fitted to the calibration
split. All three are built or trained on the training split and share the tokenizer.
"""

from __future__ import annotations

import argparse
import math

import torch
from corpus import FOLDER
from data import load
from ngram import KneserNey, unigram_log_probabilities
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

ORDER = 5


def model_loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats of the tokens after the first of a 1-D int64 stream.

    Windows are as long as the model's context. Raises ValueError for fewer than two tokens.
    """
    if tokens.numel() < 2:
        raise ValueError("perplexity needs at least two tokens: the first one is not predicted")
    window = model.config.max_position_embeddings
    total = 0.0
    with torch.no_grad():
        for start in range(0, tokens.numel() - 1, window):
            piece = tokens[start : start + window + 1]
            logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0]
            total += float(cross_entropy(logits.float(), piece[1:], reduction="sum"))
    return total / (tokens.numel() - 1)


def baseline_losses(tokens: torch.Tensor, vocabulary: int) -> dict[str, float]:
    """Mean negative log-likelihood in nats of the same tokens under the two baselines, by name."""
    train, calibration, wanted = load("train").numpy(), load("calibration").numpy(), tokens.numpy()
    unigram = unigram_log_probabilities(train, wanted, vocabulary)
    ngram = KneserNey.fit(train, ORDER, vocabulary).tuned(calibration).log_probabilities(wanted)
    return {
        "unigram": -float(unigram[1:].mean()),
        f"interpolated {ORDER}-gram": -float(ngram[1:].mean()),
    }


def main() -> None:
    """Prints the three figures as a Markdown table."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokens = load("held_out")
    losses = baseline_losses(tokens, model.config.vocab_size)
    losses["this model"] = model_loss(model, tokens)
    print("| model | nats per token | perplexity |\n|---|---:|---:|")
    for name, loss in losses.items():
        print(f"| {name} | {loss:.3f} | {math.exp(loss):.1f} |")


if __name__ == "__main__":
    main()
