# SPDX-License-Identifier: Apache-2.0
"""What the zoo is made of: a small random model, calls it takes, and how many sites its configuration implies.

Classes are named by text and looked up when a model is built, so that the same table serves releases of transformers
that lack some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 520  # the Head view takes 512 outputs or more for a vocabulary
WIDTH = 16
HEADS = 4
GROUPS = 2  # key/value heads where queries are grouped
LAYERS = 2
POSITIONS = 32
FRAMES = 24  # of audio: twice the encoder's positions
MELS = 8
PIXELS = 8

IMPLEMENTATIONS = ("sdpa", "eager")
PADDINGS = ("none", "left", "right", "empty row")

# Options most configurations take, by the usual names.
DEEP = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 24}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GROUPED = {"num_key_value_heads": GROUPS}
IMAGE = {"image_size": PIXELS, "patch_size": 4, "num_channels": 3}

_SPREAD = 0.15  # of random weights: attention scores of order one
# Weights are multiples of this: products of two of them, and sums of as many products as a row has, are float32 numbers,
# so that weights that are folded into each other round nothing and the golden run sees the rewrite alone.
_GRID = 1 / 64
_SEED = 7


@dataclass(frozen=True)
class Counts:
    """Sites of a captured program, one per *call*: a layer that is run twice counts twice, shared weights or not."""

    linear: int
    attention: int
    head: int
    norm: int
    rotary: int = 0
    glu: int = 0


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Attributes:
        model, config: class names in transformers.
        options: of the small configuration.
        implied: the number of sites, as a formula over the configuration. It knows nothing of any matcher.
        inputs: what kind of call it takes: "text", "image", "text to text", "audio to text", "image and text".
        implementations: of attention, those the model allows.
    """

    model: str
    config: str
    options: Mapping[str, Any]
    implied: Callable[[Any], Counts]
    inputs: str = "text"
    implementations: tuple[str, ...] = IMPLEMENTATIONS

    @property
    def available(self) -> bool:
        """Whether the installed release has it."""
        return hasattr(transformers, self.model) and hasattr(transformers, self.config)

    def configuration(self) -> Any:
        return getattr(transformers, self.config)(**self.options)

    def build(self, implementation: str) -> nn.Module:
        """A new model in evaluation mode. The same weights for every implementation; no norm is the identity."""
        config = self.configuration()
        config._attn_implementation = implementation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model: nn.Module = getattr(transformers, self.model)(config).eval()
            generator = torch.Generator().manual_seed(_SEED)
            with torch.no_grad():
                for parameter in model.parameters():
                    # Norms start as ones and zeros: rewrites that confuse them would not show.
                    mean = parameter.mean() if parameter.dim() == 1 else 0.0
                    drawn = mean + _SPREAD * torch.randn(parameter.shape, generator=generator)
                    parameter.copy_((drawn / _GRID).round() * _GRID)
        return model

    def call(self, padding: str = "none", batch: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments; `padding` is one of `PADDINGS` and tells what the attention mask of the text hides."""
        generator = torch.Generator().manual_seed(seed)

        def tokens(count: int) -> Tensor:
            return torch.randint(2, VOCABULARY, (batch, count), generator=generator)

        def values(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator)

        text = {"input_ids": tokens(length), "attention_mask": mask(padding, batch, length)}
        if self.inputs == "text":
            return text
        if self.inputs == "text to text":
            count = length - 2
            return text | {"decoder_input_ids": tokens(count), "decoder_attention_mask": mask("right", batch, count)}
        if self.inputs == "audio to text":
            return {"input_features": values(MELS, FRAMES), "decoder_input_ids": tokens(length)}
        image = {"pixel_values": values(3, PIXELS, PIXELS)}
        return image if self.inputs == "image" else text | image

    @property
    def paddings(self) -> tuple[str, ...]:
        """Those that make a difference to this kind of call."""
        return PADDINGS if "text" in self.inputs.split()[0] or self.inputs == "image and text" else PADDINGS[:1]


def mask(padding: str, batch: int, length: int) -> Tensor:
    """An attention mask [batch, length] that hides three positions of the first row, or all of the second."""
    ones = torch.ones(batch, length, dtype=torch.long)
    if padding == "left":
        ones[0, :3] = 0
    elif padding == "right":
        ones[0, -3:] = 0
    elif padding == "empty row":
        ones[1] = 0
    return ones
