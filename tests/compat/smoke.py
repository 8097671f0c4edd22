# SPDX-License-Identifier: Apache-2.0
"""What an environment must be able to do; prints one JSON line per check. Run by ``run.py`` in each environment."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**TINY, "vocab_size": 64, "intermediate_size": 48, "max_position_embeddings": 64}
BOUNDS = {"bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, **BOUNDS))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2, **BOUNDS))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TEXT))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**TINY, intermediate_size=48, image_size=16, patch_size=8))


def imports() -> None:
    import rewriter
    from rewriter.kernels import spec

    if not rewriter.__version__ or spec.NAMESPACE != "rewriter":
        raise AssertionError("the package under test is not the one that was built")


def captured(build: Callable[[], nn.Module]) -> None:
    """The captured program computes what the model computes, also at sizes other than the example's."""
    import rewriter

    torch.manual_seed(0)
    model = build().eval()
    program = rewriter.capture(model, None, inputs(model, 2, 8))
    for batch, length in ((2, 8), (1, 5)):
        given = inputs(model, batch, length)
        with torch.no_grad():
            torch.testing.assert_close(program(**given)[0], model(**given)[0], rtol=1e-5, atol=1e-5)


def inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    if type(model).__name__.startswith("ViT"):
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    ids = torch.randint(0, 64, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def onnx() -> None:
    """An exported model runs in ONNX Runtime at a size other than the example's."""
    import onnxruntime

    import rewriter

    torch.manual_seed(0)
    model = llama().eval()
    program = rewriter.capture(model, None, inputs(model, 2, 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.onnx"
        rewriter.export_onnx(program, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = inputs(model, 1, 5)
        (logits, *_) = session.run(None, {name: value.numpy() for name, value in given.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(**given).logits, rtol=1e-4, atol=1e-5)


def interpreter() -> None:
    """One kernel with a run-time loop, masked bfloat16 loads and a reduction, against torch."""
    from interpreter import Interpreted
    from smoke_kernel import row_dots

    x, y = torch.randn(3, 70).bfloat16(), torch.randn(3, 70).bfloat16()
    out = torch.empty(3)
    Interpreted(row_dots)[(3,)](x, y, out, 70, BLOCK=32)
    torch.testing.assert_close(out, (x.float() * y.float()).sum(1))


def command_line() -> None:
    """The console script starts and knows its commands."""
    program = Path(sys.executable).with_name("rewriter")
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    if done.returncode or "optimize" not in done.stdout:
        raise AssertionError(f"exit status {done.returncode}: {done.stderr.strip()[-200:]}")


CHECKS: dict[str, Callable[[], None]] = {
    "import": imports,
    "command line": command_line,
    "GPT-2": lambda: captured(gpt2),
    "Llama": lambda: captured(llama),
    "BERT": lambda: captured(bert),
    "ViT": lambda: captured(vit),
    "ONNX export": onnx,
    "Triton interpreter": interpreter,
}


def main() -> None:
    torch.set_num_threads(1)
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            check()
            error = None
        except Exception as failure:  # whatever goes wrong is the finding
            traceback.print_exc()
            error = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"
        print(json.dumps({"check": name, "seconds": time.perf_counter() - start, "error": error}), flush=True)


if __name__ == "__main__":
    main()
