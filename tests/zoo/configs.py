# SPDX-License-Identifier: Apache-2.0
"""The zoo's architectures: small random configurations, and the number of sites each implies.

The formulas are read off the papers and the modules' constructors; L is the number of layers. Written per layer, in
the order of the forward pass: q k v o are the attention's projections, a packed projection counts once. Routers and
other gates are linears; experts are not, for they are stored as one three-dimensional tensor.
"""

from __future__ import annotations

from typing import Any

from .architecture import (
    DEEP,
    ENDS,
    FRAMES,
    GROUPED,
    HEADS,
    IMAGE,
    LAYERS,
    MELS,
    POSITIONS,
    TEXT,
    VOCABULARY,
    WIDTH,
    Counts,
)
from .architecture import Architecture as A

_HIDDEN = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_DECODER = DEEP | TEXT | ENDS
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS + 1,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "decoder_start_token_id": 0, **ENDS,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- decoders


def llama(c: Any) -> Counts:
    """norm, q k v o, norm, gate up down; a last norm and the head."""
    layers = c.num_hidden_layers
    return Counts(linear=7 * layers + 1, attention=layers, head=1, norm=2 * layers + 1, rotary=2 * layers, glu=layers)


def qwen3(c: Any) -> Counts:
    """Llama's, with a norm on each of q and k."""
    layers = c.num_hidden_layers
    return Counts(linear=7 * layers + 1, attention=layers, head=1, norm=4 * layers + 1, rotary=2 * layers, glu=layers)


def gemma2(c: Any) -> Counts:
    """Llama's, with a norm behind the attention and one behind the feed-forward part."""
    return qwen3(c)


def gemma3(c: Any) -> Counts:
    """Gemma 2's, with a norm on each of q and k."""
    layers = c.num_hidden_layers
    return Counts(linear=7 * layers + 1, attention=layers, head=1, norm=6 * layers + 1, rotary=2 * layers, glu=layers)


def phi3(c: Any) -> Counts:
    """norm, qkv o, norm, gate-up down."""
    layers = c.num_hidden_layers
    return Counts(linear=4 * layers + 1, attention=layers, head=1, norm=2 * layers + 1, rotary=2 * layers, glu=layers)


def gpt_neox(c: Any) -> Counts:
    """Two norms of one input, qkv o, up down; q and k turn in their first quarter only."""
    layers = c.num_hidden_layers
    return Counts(linear=4 * layers + 1, attention=layers, head=1, norm=2 * layers + 1, rotary=2 * layers)


def gptj(c: Any) -> Counts:
    """One norm, q k v o beside up down."""
    layers = c.n_layer
    return Counts(linear=6 * layers + 1, attention=layers, head=1, norm=layers + 1, rotary=2 * layers)


def starcoder2(c: Any) -> Counts:
    """norm, q k v o, norm, up down."""
    layers = c.num_hidden_layers
    return Counts(linear=6 * layers + 1, attention=layers, head=1, norm=2 * layers + 1, rotary=2 * layers)


def gpt2(c: Any) -> Counts:
    """norm, qkv o, norm, up down."""
    layers = c.n_layer
    return Counts(linear=4 * layers + 1, attention=layers, head=1, norm=2 * layers + 1)


def opt(c: Any) -> Counts:
    """norm, q k v o, norm, up down; a projection at either end where words are narrower than the layers."""
    layers, projections = c.num_hidden_layers, 2 * (c.word_embed_proj_dim != c.hidden_size)
    last = c.do_layer_norm_before and not c._remove_final_layer_norm
    return Counts(linear=6 * layers + projections + 1, attention=layers, head=1, norm=2 * layers + last)


def bloom(c: Any) -> Counts:
    """A norm on the words; norm, qkv o, norm, up down."""
    layers = c.n_layer
    return Counts(linear=4 * layers + 1, attention=layers, head=1, norm=2 * layers + 2)


def mixtral(c: Any) -> Counts:
    """norm, q k v o, norm, router; the experts' parts are no linears."""
    layers = c.num_hidden_layers
    return Counts(linear=5 * layers + 1, attention=layers, head=1, norm=2 * layers + 1, rotary=2 * layers)


def olmoe(c: Any) -> Counts:
    """Mixtral's, with a norm on each of q and k."""
    layers = c.num_hidden_layers
    return Counts(linear=5 * layers + 1, attention=layers, head=1, norm=4 * layers + 1, rotary=2 * layers)


# ------------------------------------------------------------------------------------------- encoders


def bert(c: Any) -> Counts:
    """A norm on the words; q k v o, norm, up down, norm; a linear and a norm before the head."""
    layers = c.num_hidden_layers
    return Counts(linear=6 * layers + 2, attention=layers, head=1, norm=2 * layers + 2)


def distilbert(c: Any) -> Counts:
    """BERT's."""
    return Counts(linear=6 * c.n_layers + 2, attention=c.n_layers, head=1, norm=2 * c.n_layers + 2)


def albert(c: Any) -> Counts:
    """BERT's, with a linear from the width of words to that of layers; all layers read the same weights."""
    layers = c.num_hidden_layers
    return Counts(linear=6 * layers + 3, attention=layers, head=1, norm=2 * layers + 2)


def vit(c: Any) -> Counts:
    """norm, q k v o, norm, up down; a last norm and the classifier, which is no vocabulary. Patches are a convolution."""
    layers = c.num_hidden_layers
    return Counts(linear=6 * layers + 1, attention=layers, head=0, norm=2 * layers + 1)


# --------------------------------------------------------------------------------- encoder and decoder


def t5(c: Any) -> Counts:
    """Encoder: norm, q k v o, norm, (gate) up down. Decoder: another norm, q k v o across. A last norm on either."""
    encoder, decoder = c.num_layers, c.num_decoder_layers
    forward = 3 if c.is_gated_act else 2
    return Counts(
        linear=(4 + forward) * encoder + (8 + forward) * decoder + 1,
        attention=encoder + 2 * decoder,
        head=1,
        norm=2 * encoder + 1 + 3 * decoder + 1,
        glu=(encoder + decoder) * c.is_gated_act,
    )


def whisper(c: Any) -> Counts:
    """Encoder: norm, q k v o, norm, up down. Decoder: another norm, q k v o across. A last norm on either."""
    encoder, decoder = c.encoder_layers, c.decoder_layers
    return Counts(
        linear=6 * encoder + 10 * decoder + 1,
        attention=encoder + 2 * decoder,
        head=1,
        norm=2 * encoder + 1 + 3 * decoder + 1,
    )


def bart(c: Any) -> Counts:
    """Whisper's; the norm that is not at the end of a stack is at its start."""
    return whisper(c)


def clip(c: Any) -> Counts:
    """Two stacks of norm, q k v o, norm, up down; a projection of each; images have a norm at either end."""
    layers = c.text_config.num_hidden_layers + c.vision_config.num_hidden_layers
    return Counts(linear=6 * layers + 2, attention=layers, head=0, norm=2 * layers + 1 + 2)


_GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, **ENDS
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": LAYERS,
    "num_decoder_layers": LAYERS + 1, "num_heads": HEADS, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_HEAD_DIM = {"head_dim": WIDTH // HEADS}
_GEMMA = {"query_pre_attn_scalar": 4, "sliding_window": 4, **_HEAD_DIM}

ZOO: dict[str, A] = {
    "llama": A("LlamaForCausalLM", "LlamaConfig", _DECODER | GROUPED, llama),
    "mistral": A("MistralForCausalLM", "MistralConfig", _DECODER | GROUPED | {"sliding_window": 4}, llama),
    "qwen2": A("Qwen2ForCausalLM", "Qwen2Config", _DECODER | GROUPED, llama),
    "qwen3": A("Qwen3ForCausalLM", "Qwen3Config", _DECODER | GROUPED | _HEAD_DIM, qwen3),
    "phi3": A("Phi3ForCausalLM", "Phi3Config", _DECODER | GROUPED, phi3),
    "gemma": A("GemmaForCausalLM", "GemmaConfig", _DECODER | GROUPED | _HEAD_DIM, llama),
    "gemma2": A(
        "Gemma2ForCausalLM", "Gemma2Config", _DECODER | GROUPED | _GEMMA, gemma2, implementations=("eager",)
    ),
    "gemma3": A("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER | GROUPED | _GEMMA, gemma3),
    "gpt_neox": A("GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER, gpt_neox),
    "gptj": A("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 2}, gptj, implementations=("eager",)),
    "starcoder2": A("Starcoder2ForCausalLM", "Starcoder2Config", _DECODER | GROUPED, starcoder2),
    "gpt2": A("GPT2LMHeadModel", "GPT2Config", _GPT2, gpt2),
    "opt": A("OPTForCausalLM", "OPTConfig", _HIDDEN | TEXT | ENDS | {
        "hidden_size": WIDTH, "ffn_dim": 24, "word_embed_proj_dim": 8}, opt),
    "bloom": A("BloomForCausalLM", "BloomConfig", {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, **ENDS,
    }, bloom, implementations=("eager",)),
    "mixtral": A("MixtralForCausalLM", "MixtralConfig", _DECODER | GROUPED | {
        "num_local_experts": 4, "num_experts_per_tok": 2}, mixtral),
    "olmoe": A("OlmoeForCausalLM", "OlmoeConfig", _DECODER | GROUPED | {
        "num_experts": 4, "num_experts_per_tok": 2}, olmoe),
    "bert": A("BertForMaskedLM", "BertConfig", DEEP | TEXT, bert),
    "roberta": A("RobertaForMaskedLM", "RobertaConfig", DEEP | TEXT | ENDS, bert),
    "distilbert": A("DistilBertForMaskedLM", "DistilBertConfig", TEXT | {
        "dim": WIDTH, "hidden_dim": 24, "n_layers": LAYERS, "n_heads": HEADS}, distilbert),
    "albert": A("AlbertForMaskedLM", "AlbertConfig", DEEP | TEXT | {"embedding_size": 8}, albert),
    "vit": A("ViTForImageClassification", "ViTConfig", DEEP | IMAGE, vit, "image"),
    "t5": A("T5ForConditionalGeneration", "T5Config", _T5, t5, "text to text"),
    "mt5": A("MT5ForConditionalGeneration", "MT5Config", _T5, t5, "text to text"),
    "bart": A("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ | {
        "max_position_embeddings": POSITIONS}, bart, "text to text"),
    "whisper": A("WhisperForConditionalGeneration", "WhisperConfig", _SEQ2SEQ | {
        "num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": POSITIONS,
    }, whisper, "audio to text"),
    "clip": A("CLIPModel", "CLIPConfig", {
        "text_config": DEEP | TEXT | ENDS | {"projection_dim": 8},
        "vision_config": DEEP | IMAGE | {"projection_dim": 8},
        "projection_dim": 8,
    }, clip, "image and text"),
}  # fmt: skip
