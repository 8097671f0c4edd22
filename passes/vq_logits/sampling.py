# SPDX-License-Identifier: Apache-2.0
"""Drawing the next token, exactly and without sorting the vocabulary.

As in transformers' `generate`: repetition penalty ρ, then temperature T, then top-k, then top-p.

    z_i = logit_i / T, for a token seen before (ρ·logit_i if logit_i < 0 else logit_i / ρ) / T
    top-k keeps i if fewer than k tokens have a larger z
    top-p keeps i if the tokens with a larger z have together less than p of the mass that top-k kept

Tokens with equal z are kept or dropped together (of top-p's last equals transformers keeps some, whichever its sort puts
first). p(i) is e^{z_i} over its sum on what is kept, in float64.

Top-p needs no threshold: draw from more than is kept; if the mass above what was drawn is less than p, it is a fair draw
from what is kept, whatever else could have been drawn. If not, everything that is kept lies above it: draw from that.
Each turn drops a random part of what is too much, so few turns are needed, about log(1 / p) of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.after_head import reference


@dataclass(frozen=True)
class Sampling:
    """How to draw.

    Attributes:
        temperature: T > 0.
        top_k: number of tokens to keep, or None for all.
        top_p: share of the mass to keep, in (0, 1], or None for all.
        repetition_penalty: ρ > 0 for tokens seen before; 1 is none.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("repetition_penalty", self.repetition_penalty)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be a positive number (for the most likely token use argmax)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or be None to keep all tokens")

    def penalised(self, logits: Tensor) -> Tensor:
        """z of tokens seen before, from their logits."""
        p = self.repetition_penalty
        return torch.where(logits < 0, logits * p, logits / p) / self.temperature


class Distribution(ABC):
    """z for every token, for N positions; float64. A head's structure decides how it is held."""

    tokens: int

    @abstractmethod
    def log_mass(self, floor: Tensor) -> Tensor:
        """log Σ e^z over tokens with z ≥ floor. floor ``[N]`` -> ``[N]``."""

    @abstractmethod
    def kth(self, k: int) -> Tensor:
        """A floor ``[N]`` that keeps the tokens which fewer than k others exceed; k at most the number of tokens."""

    @abstractmethod
    def draw(self, floor: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens ``[N]`` drawn from e^z over those with z ≥ floor, and their z ``[N]``."""

    def kept(self, how: Sampling) -> tuple[Tensor, Tensor]:
        """Floor ``[N]`` of top-k, and limit ``[N]``: a token is kept if the log mass above it is less than that."""
        low = self._all() if how.top_k is None else self.kth(min(how.top_k, self.tokens))
        if how.top_p is None or how.top_p == 1:
            return low, torch.full_like(low, torch.inf)
        return low, math.log(how.top_p) + self.log_mass(low)

    def sample(self, how: Sampling, generator: torch.Generator) -> Tensor:
        """One token ``[N]`` for each position."""
        low, limit = self.kept(how)
        token, z = self.draw(low, generator)
        open = self.log_mass(just_above(z)) >= limit if how.top_p is not None else torch.zeros_like(z, dtype=torch.bool)
        while bool(open.any()):
            low = torch.where(open, just_above(z), low)
            again, z_again = self.draw(low, generator)
            token, z = torch.where(open, again, token), torch.where(open, z_again, z)
            open = open & (self.log_mass(just_above(z)) >= limit)
        return token

    @abstractmethod
    def _all(self) -> Tensor:
        """A floor ``[N]`` under every z."""


class RowDistribution(Distribution):
    """Of a head with a row per token: the vocabulary is walked in chunks, for every question once.

    Args:
        h: hidden states ``[N, d]``.
        weight, bias: ``[V, d]``, ``[V]`` or None.
        how: penalty and temperature.
        previous: int64 ``[N, P]``, tokens seen before; negative ones are none.
    """

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None, how: Sampling, previous: Tensor | None) -> None:
        self.h, self.weight, self.bias, self.how = h, weight, bias, how
        self.previous = previous if how.repetition_penalty != 1 else None
        self.tokens = weight.shape[0]

    def log_mass(self, floor: Tensor) -> Tensor:
        parts = [
            torch.where(z >= floor.unsqueeze(-1), z, -torch.inf).logsumexp(-1) for z in map(self._z, self._starts())
        ]
        return torch.logsumexp(torch.stack(parts), 0)

    def kth(self, k: int) -> Tensor:
        best = self._all().new_empty((self.h.shape[0], 0))
        for start in self._starts():
            together = torch.cat([best, self._z(start)], -1)
            best = together.topk(min(k, together.shape[-1])).values
        return best[:, -1]

    def draw(self, floor: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # argmax of z − log(exponential noise) is a draw from e^z (Gumbel), and chunks can be compared.
        best = self._all()
        token, drawn = torch.zeros_like(best, dtype=torch.int64), best
        for start in self._starts():
            z = self._z(start)
            z = torch.where(z >= floor.unsqueeze(-1), z, -torch.inf)
            score, place = (z - torch.empty_like(z).exponential_(generator=generator).log()).max(-1)
            better = score > best
            best = torch.where(better, score, best)
            token = torch.where(better, place + start, token)
            drawn = torch.where(better, z.gather(-1, place.unsqueeze(-1)).squeeze(-1), drawn)
        return token, drawn

    def _starts(self) -> range:
        return range(0, self.tokens, reference.CHUNK)

    def _z(self, start: int) -> Tensor:
        """z of the tokens from ``start`` on, ``[N, CHUNK or less]``."""
        logits = reference.row_logits(self.h, self.weight, self.bias, start).double()
        z = logits / self.how.temperature
        if self.previous is None:
            return z
        width = logits.shape[-1]
        place = self.previous - start
        place = torch.where((place >= 0) & (place < width), place, width)  # the column cut off again
        seen = F.pad(torch.zeros_like(z, dtype=torch.bool), (0, 1)).scatter(-1, place, True)[:, :width]
        return torch.where(seen, self.how.penalised(logits), z)

    def _all(self) -> Tensor:
        return torch.full((self.h.shape[0],), -torch.inf, dtype=torch.float64, device=self.h.device)


def just_above(z: Tensor) -> Tensor:
    """The next number: "≥ just_above(z)" is "> z"."""
    return torch.nextafter(z, torch.full_like(z, torch.inf))
