# SPDX-License-Identifier: Apache-2.0
"""Bytes: what is stored, and what one token reads of it."""

from __future__ import annotations

import torch
from torch import nn

import rewriter
from rewriter.passes import ShiftAdd
from rewriter.sizes import model_bytes, read_per_token


class Tied(nn.Module):
    """ids -> embedding -> linear -> head tied to the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.linear = nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.linear(self.embedding(ids)))
        return hidden


def captured(tied: bool) -> rewriter.Program:
    return rewriter.capture(Tied(tied), (torch.zeros(2, 3, dtype=torch.int64),))


def test_an_embedding_reads_one_row() -> None:
    program = captured(tied=False)
    linear = (32 * 32 + 32) * 4
    assert model_bytes(program.root) == 2 * 64 * 32 * 4 + linear
    assert read_per_token(program) == 32 * 4 + linear + 64 * 32 * 4


def test_a_tied_table_is_read_once_and_whole() -> None:
    program = captured(tied=True)
    assert read_per_token(program) == model_bytes(program.root) == (64 * 32 + 32 * 32 + 32) * 4


def test_packed_rows_count_as_packed() -> None:
    example = (torch.zeros(2, 3, dtype=torch.int64),)
    opt = rewriter.optimize(Tied(tied=False), [ShiftAdd(bits=4, embeddings=True)], example)
    tensors = dict(opt.program.tensors())
    row = 32 // 8 * 4 + 2 + 2  # four bit planes, one fp16 scale, four exponents in two bytes
    linears = 32 * row + 64 * row + 32 * 4
    assert tensors["embedding.weight_codes"].shape == (64, 4, 4)
    assert read_per_token(opt.program) == row + linears
