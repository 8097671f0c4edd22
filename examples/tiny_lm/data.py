# SPDX-License-Identifier: Apache-2.0
"""The three splits as token ids: `load("train" | "calibration" | "held_out")`, and how they are built.

A split is one stream of ids: each file in the order of `files.json`, opened by `<|file|>` (id 0). The
streams are shipped, so nothing here depends on the running Python's standard library:

    train.u16.xz               LZMA of little-endian uint16, the whole stream
    calibration.safetensors    input_ids, int32 [n, 256], consecutive rows of the stream
    held_out.safetensors       input_ids, int32 [n, 1024], consecutive rows of the stream

The last, incomplete row of the calibration and held-out streams is cut off. `python data.py` writes them.
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from corpus import FOLDER, SPLITS, read_split
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

FILE_ID = 0
ROW_LENGTH = {"calibration": 256, "held_out": 1024}


def _file_of(split: str) -> Path:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    return FOLDER / ("train.u16.xz" if split == "train" else f"{split}.safetensors")


def load(split: str) -> torch.Tensor:
    """The token ids of a split as one int64 vector. Raises ValueError for an unknown split name."""
    file = _file_of(split)
    if split == "train":
        ids = np.frombuffer(lzma.decompress(file.read_bytes()), dtype="<u2")
        return torch.from_numpy(ids.astype(np.int64))
    return load_file(file)["input_ids"].flatten().long()


def batches(tokens: torch.Tensor, length: int, batch: int) -> Iterator[torch.Tensor]:
    """Consecutive, disjoint int64 [≤ batch, length] pieces of a 1-D stream; the incomplete last row is cut.

    Raises ValueError where the stream does not fill one row.
    """
    rows = tokens.numel() // length
    if rows == 0:
        raise ValueError(f"{tokens.numel()} tokens do not fill one row of {length}")
    yield from tokens[: rows * length].view(rows, length).split(batch)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """One int64 stream: `<|file|>` and the ids of the text, for each text."""
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for text in ids for token in (FILE_ID, *text)])


def save(split: str, tokens: torch.Tensor) -> None:
    """Stores the stream of one split in its shipped form."""
    file = _file_of(split)
    if split == "train":
        raw = tokens.numpy().astype("<u2").tobytes()
        file.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
        return
    length = ROW_LENGTH[split]
    rows = tokens.numel() // length
    ids = tokens[: rows * length].view(rows, length).to(torch.int32)
    save_file({"input_ids": ids.contiguous()}, file)


def main() -> None:
    """Encodes the pinned files of every split and stores the ids beside this script."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    for split in SPLITS:
        save(split, encode(read_split(split), tokenizer))
        print(f"{split:12} {load(split).numel():9,} tokens, {_file_of(split).stat().st_size:9,} bytes")


if __name__ == "__main__":
    main()
