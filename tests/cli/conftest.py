# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama in a folder, token files, and the command line run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import Result
from commands import VOCABULARY, Run
from safetensors.torch import save_file
from typer.testing import CliRunner

from rewriter.cli.app import app


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 512 tokens, width 64, two layers; random weights that an fp16 file can hold."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config).half()
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    ids = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_file({"input_ids": ids}, path)
    return path


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command at 100 columns; results carry stdout and stderr apart."""

    def call(*arguments: Any) -> Result:
        return CliRunner().invoke(
            app, [str(a) for a in arguments], env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
        )

    return call
