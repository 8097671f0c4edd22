# SPDX-License-Identifier: Apache-2.0
"""Whole models in ONNX Runtime equal eager execution: other batch and sequence sizes, padding, rewritten sites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx_sites import (
    BcqEmbedding,
    BcqLinear,
    PotLinear,
    ProductHead,
    TiersHead,
    relative_error,
    run,
    session,
)
from torch import Tensor, nn

from rewriter.capturing import capture
from rewriter.codegen.onnx_export import export_program

transformers = pytest.importorskip("transformers")

VOCABULARY = 160
TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def llama(layers: int = 1, attention: str = "sdpa") -> nn.Module:
    config = transformers.LlamaConfig(
        **TINY, num_hidden_layers=layers, num_key_value_heads=2, attn_implementation=attention
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TINY, num_hidden_layers=1)).eval()


def rewritten_llama(head: nn.Module) -> nn.Module:
    """A Llama with every kind of rewritten site, some layers left dense; both scale kinds in one file."""
    model = llama(layers=2)
    model.model.embed_tokens = BcqEmbedding(32, VOCABULARY, bits=4)
    first, second = model.model.layers
    first.self_attn.q_proj = BcqLinear(32, 32, bits=4, bias=False)
    first.self_attn.k_proj = BcqLinear(32, 16, bits=4, shift=False, bias=False)
    first.mlp.up_proj = PotLinear(32, 48, bias=False)
    second.mlp.up_proj = BcqLinear(32, 48, group=20)
    model.lm_head = head
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-eager": lambda: llama(attention="eager"),
    "gpt2": gpt2,
    "bert": bert,
    "llama-product": lambda: rewritten_llama(ProductHead(32, VOCABULARY, codes=32)),
    "llama-tiers": lambda: rewritten_llama(TiersHead(32, VOCABULARY, codes=100)),
}


def call(batch: int, sequence: int, padded: int = 0) -> dict[str, Tensor]:
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    mask[0, :padded] = 0
    return {"input_ids": torch.randint(0, VOCABULARY, (batch, sequence)), "attention_mask": mask}


def check(model: nn.Module, path: Path, opset: int) -> onnx.ModelProto:
    """Export at batch 2, sequence 12; compare every output at other sizes, with left padding, at 1 x 1."""
    program = capture(model, None, call(2, 12))
    export_program(
        program.graph_module,
        path,
        program.example,
        input_names=program.input_names(),
        output_names=program.output_names(),
        opset=opset,
    )
    loaded = session(path)
    for inputs in (call(2, 12), call(3, 20, padded=6), call(1, 5), call(1, 1)):
        found = run(loaded, **inputs)
        with torch.no_grad():
            expected = [value for value in model(**inputs).values() if isinstance(value, Tensor)]
        assert len(found) == len(expected)
        for name, one, other in zip(program.output_names(), found, expected, strict=True):
            assert relative_error(one, other) <= 3e-6, f"{name} at {tuple(inputs['input_ids'].shape)}"
    return onnx.load(str(path))


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager_at_opset_24(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = check(MODELS[name](), tmp_path / "m.onnx", opset=24)
    operators = {node.op_type for node in model.graph.node}
    assert ("Attention" in operators) == (name != "llama-eager")
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    codes = [n for n in stored if n.rpartition(".")[2] in ("weight_codes", "weight_shift", "code_of", "codes")]
    assert len(codes) == (9 if name in ("llama-product", "llama-tiers") else 0)
    assert all(stored[n] == onnx.TensorProto.UINT8 for n in codes)


class Attentions(nn.Module):
    """Attention under a boolean mask, an additive mask, causal with grouped keys, and without a mask.

    q [batch, length, 64] has 4 heads, k [batch, length, 32] has 2. Scales are binary fractions, because the exporter
    stores Python numbers in float32 whatever the model computes in.
    """

    def forward(self, q: Tensor, k: Tensor, seen: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        attention = torch.nn.functional.scaled_dot_product_attention
        q, k = (t.view(*t.shape[:2], heads, 16).transpose(1, 2) for t, heads in ((q, 4), (k, 2)))
        wide = k.repeat_interleave(2, dim=1)
        return (
            attention(q, wide, wide, attn_mask=seen),
            attention(q, wide, wide, attn_mask=bias),
            attention(q, k, k, is_causal=True, scale=0.375, enable_gqa=True),
            attention(q, wide, wide),
        )


@pytest.mark.parametrize(
    "dtype, opset, tolerance",
    [
        (torch.float32, 20, 1e-6),
        (torch.float32, 24, 1e-6),
        (torch.float16, 24, 2**-9),  # the kernel works in float16: two units in the last place
        (torch.float64, 24, 1e-14),
    ],
)
def test_rows_without_a_key(dtype: torch.dtype, opset: int, tolerance: float, tmp_path: Path) -> None:
    """A hidden row is 0; a row of equal huge numbers is not: exporter, runtime kernel and torch agree on both."""
    torch.manual_seed(0)
    module = Attentions()
    program = capture(
        module, tuple(t.to(d) for t, d in zip(masked(2, 6), [dtype, dtype, torch.bool, dtype], strict=True))
    )
    path = tmp_path / "m.onnx"
    export_program(program.graph_module, path, program.example, input_names=("q", "k", "seen", "bias"), opset=opset)
    loaded = session(path)
    for batch, length in ((2, 6), (3, 9), (1, 4)):
        q, k, seen, bias = masked(batch, length)
        inputs = {"q": q.to(dtype), "k": k.to(dtype), "seen": seen, "bias": bias.to(dtype)}
        for found, expected in zip(run(loaded, **inputs), module(*inputs.values()), strict=True):
            assert relative_error(found, expected) <= tolerance


def masked(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, a boolean mask with one empty row, an additive mask with a row of -inf, of lowest numbers, of -10 000."""
    seen = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    seen[0, 0, 1] = False
    bias = torch.where(seen, 0.0, torch.finfo(torch.float16).min)
    bias[0, 0, 1:4] = torch.tensor([-torch.inf, torch.finfo(torch.float32).min, -10_000.0]).unsqueeze(1)
    return torch.randn(batch, length, 64), torch.randn(batch, length, 32), seen, bias


def test_padded_rows_below_opset_23(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = check(llama(), tmp_path / "m.onnx", opset=20)
    assert "Attention" not in {node.op_type for node in model.graph.node}


def test_vision_model(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
    )
    model = transformers.ViTForImageClassification(config).eval()
    program = capture(model, None, {"pixel_values": torch.randn(2, 3, 32, 32)})
    result = export_program(
        program.graph_module, tmp_path / "m.onnx", program.example, input_names=program.input_names()
    )
    assert result.inputs[0].shape == ("batch", 3, 32, 32)
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
    assert relative_error(run(result.path, pixel_values=pixels)[0], expected) <= 3e-6
