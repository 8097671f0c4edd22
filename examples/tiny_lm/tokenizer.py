# SPDX-License-Identifier: Apache-2.0
"""Trains the byte-level BPE tokenizer (V = 8192) on the training split alone; saves it in transformers form.

Byte-level means lossless: `decode(encode(text)) == text` for every text, with no unknown token.
`<|file|>` (id 0) opens each file of the corpus; it serves as beginning, end and padding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from corpus import FOLDER, read_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 8192
CONTEXT = 1024
FILE_TOKEN = "<|file|>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly VOCABULARY entries: `<|file|>`, the 256 bytes, and merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[FILE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=FILE_TOKEN,
        eos_token=FILE_TOKEN,
        pad_token=FILE_TOKEN,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Trains the tokenizer on the pinned training files and saves it beside this script."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    tokenizer = train_tokenizer(read_split("train"))
    tokenizer.save_pretrained(FOLDER)
    print(f"{len(tokenizer)} entries")


if __name__ == "__main__":
    main()
