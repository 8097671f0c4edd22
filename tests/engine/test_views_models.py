# SPDX-License-Identifier: Apache-2.0
"""Views on real architectures: the numbers of sites equal those computed from the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from rewriter.facts import Facts
from rewriter.legality import refusal
from rewriter.views import ATTENTION, EMBEDDING, HEAD, LINEAR, QKV

from .helpers import capture_graph

LAYERS = 2
IDS = torch.randint(3, 500, (2, 8))
MASK = torch.ones(2, 8, dtype=torch.long)


@dataclass(frozen=True)
class Architecture:
    """A small model, its inputs, and how many sites of each kind its configuration implies."""

    build: Callable[[str], nn.Module]
    inputs: dict[str, Any]
    linear: int
    embedding: int
    attention: int
    qkv: int
    head: int


def gpt2(attention: str) -> nn.Module:
    config = GPT2Config(
        n_layer=LAYERS, n_head=4, n_embd=64, vocab_size=768, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    config._attn_implementation = attention
    return GPT2LMHeadModel(config)


def llama(attention: str) -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
        intermediate_size=96, vocab_size=1024, max_position_embeddings=32,
    )  # fmt: skip
    config._attn_implementation = attention
    return LlamaForCausalLM(config)


def bert(attention: str) -> nn.Module:
    config = BertConfig(
        num_hidden_layers=LAYERS, num_attention_heads=4, hidden_size=64, intermediate_size=96, vocab_size=1024,
        max_position_embeddings=32,
    )  # fmt: skip
    config._attn_implementation = attention
    return BertModel(config)


def vit(attention: str) -> nn.Module:
    config = ViTConfig(
        num_hidden_layers=LAYERS, num_attention_heads=4, hidden_size=64, intermediate_size=96, image_size=32,
        patch_size=8, num_labels=10,
    )  # fmt: skip
    config._attn_implementation = attention
    return ViTForImageClassification(config)


ARCHITECTURES = {
    # per layer: c_attn, c_proj, c_fc, c_proj; wte and wpe; q, k, v are one linear; the head is tied
    "gpt2": Architecture(
        gpt2,
        {"input_ids": IDS, "use_cache": False},
        linear=4 * LAYERS + 1, embedding=2, attention=LAYERS, qkv=0, head=1,
    ),
    # per layer: q, k, v, o, gate, up, down
    "llama": Architecture(
        llama,
        {"input_ids": IDS, "attention_mask": MASK, "use_cache": False},
        linear=7 * LAYERS + 1, embedding=1, attention=LAYERS, qkv=LAYERS, head=1,
    ),
    # per layer: q, k, v, o, intermediate, output; the pooler; words, positions, types
    "bert": Architecture(
        bert,
        {"input_ids": IDS, "attention_mask": MASK},
        linear=6 * LAYERS + 1, embedding=3, attention=LAYERS, qkv=LAYERS, head=0,
    ),
    # per layer: q, k, v, o, fc1, fc2; the classifier of 10 classes is no vocabulary; patches are a convolution
    "vit": Architecture(
        vit, {"pixel_values": torch.rand(2, 3, 32, 32)}, linear=6 * LAYERS + 1, embedding=0, attention=LAYERS,
        qkv=LAYERS, head=0,
    ),
}  # fmt: skip


@cache
def captured(name: str, attention: str) -> Facts:
    architecture = ARCHITECTURES[name]
    auto = torch.export.Dim.AUTO
    dynamic = {
        key: ({0: auto} if name == "vit" else {0: auto, 1: auto}) if isinstance(value, torch.Tensor) else None
        for key, value in architecture.inputs.items()
    }
    torch.manual_seed(0)
    return Facts(capture_graph(architecture.build(attention).eval(), (), architecture.inputs, dynamic))


BOTH = pytest.mark.parametrize("attention", ["eager", "sdpa"])
ALL = pytest.mark.parametrize("name", ARCHITECTURES)


@ALL
@BOTH
def test_every_site_is_found_and_legal(name: str, attention: str) -> None:
    facts = captured(name, attention)
    expected = ARCHITECTURES[name]
    for view in (LINEAR, EMBEDDING, ATTENTION, QKV, HEAD):
        matches = view.find(facts)
        assert len(matches) == getattr(expected, view.name), view.name
        assert [str(refusal(facts, match)) for match in matches] == ["None"] * len(matches)
        assert [m.root for m in matches] == sorted(m.root for m in matches)


@ALL
@BOTH
def test_linears_are_the_linear_modules(name: str, attention: str) -> None:
    facts = captured(name, attention)
    model = ARCHITECTURES[name].build(attention)
    modules = {path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    matches = LINEAR.find(facts)
    assert Counter(match.path for match in matches) == Counter(modules)
    for match in matches:
        assert match["transposed"] is (type(model.get_submodule(match.path)).__name__ == "Conv1D")
        assert (match["bias"] is not None) is (getattr(model.get_submodule(match.path), "bias", None) is not None)


@ALL
@BOTH
def test_attention_captures(name: str, attention: str) -> None:
    facts = captured(name, attention)
    for index, match in enumerate(ATTENTION.find(facts)):
        assert match["spelling"] == attention and match["scale"] == 0.25 and match["mask"] is not None
        assert match["dropout_p"] == 0.0 and match["groups"] == (2 if name == "llama" else 1)
        heads = facts.shape(match["k_base"])
        assert heads is not None and heads[1] == (2 if name == "llama" else 4)
        assert str(index) in match.path.split(".") and len(match.paths) == 1


@BOTH
def test_heads(attention: str) -> None:
    for name, tied in (("gpt2", True), ("llama", False)):
        (head,) = HEAD.find(captured(name, attention))
        assert head.path == "lm_head" and head["tied"] is tied
    for name, reason in (("bert", "its 64 outputs are fewer than 512"), ("vit", "its 10 outputs are fewer than 512")):
        assert reason in HEAD.explain(captured(name, attention))[0].reason


@BOTH
def test_projections(attention: str) -> None:
    for match in QKV.find(captured("llama", attention)):
        layer = match.path.rpartition(".")[0]
        assert match.paths == tuple(f"{layer}.{role}_proj" for role in "qkv")
    misses = QKV.explain(captured("gpt2", attention))
    assert [miss.reason for miss in misses] == ["q, k and v already come from one linear"] * LAYERS


@BOTH
def test_half_precision_and_labels_change_nothing(attention: str) -> None:
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    facts = Facts(capture_graph(llama(attention).eval().half(), (), inputs))
    assert [len(view.find(facts)) for view in (LINEAR, EMBEDDING, ATTENTION, QKV, HEAD)] == [15, 1, 2, 2, 1]
    for match in ATTENTION.find(facts):
        assert refusal(facts, match) is None and (len(match.casts) == 2) is (attention == "eager")


@BOTH
def test_training_draws_random_numbers_inside_attention(attention: str) -> None:
    facts = Facts(capture_graph(gpt2(attention).train(), (), {"input_ids": IDS, "use_cache": False}))
    matches = ATTENTION.find(facts)
    assert len(matches) == LAYERS and {match["dropout_p"] for match in matches} == {0.1}
    for match in matches:
        reason = refusal(facts, match)
        assert reason is not None and reason.kind == "random" and "modeling_gpt2.py" in reason.source
