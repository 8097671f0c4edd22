# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers models with random weights, the four kinds the engine's tests run on."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

KINDS = ("gpt2", "llama", "bert", "vit")

_TEXT = {"vocab_size": 90}
_DEEP = {"num_hidden_layers": 2, "intermediate_size": 24, "hidden_size": 16}


def small_model(
    kind: str, attention: str, *, seed: int = 0, std: float = 0.3, padding: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """(model in evaluation mode, keyword inputs with batch 2) whose attention scores are of order one.

    With ``padding`` the first three of seven tokens of the first row are padding: with a causal mask, three
    rows that see no key.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(kind, {"attn_implementation": attention, "initializer_range": std}).eval()
        if kind == "vit":
            return model, {"pixel_values": torch.randn(2, 3, 8, 8)}
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[0, : 3 if padding else 0] = 0
        inputs: dict[str, Any] = {"input_ids": torch.randint(0, 90, (2, 7)), "attention_mask": mask}
    return model, inputs if kind == "bert" else {**inputs, "use_cache": False}


def _build(kind: str, options: dict[str, Any]) -> nn.Module:
    if kind == "gpt2":
        sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**_TEXT, **sizes, **ends, **options))
    if kind == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, **_DEEP, **heads, **options))
    if kind == "bert":
        heads = {"num_attention_heads": 2, "max_position_embeddings": 32}
        return hf.BertModel(hf.BertConfig(**_TEXT, **_DEEP, **heads, **options))
    patches = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_attention_heads": 2}
    return hf.ViTForImageClassification(hf.ViTConfig(**_DEEP, **patches, **options))
