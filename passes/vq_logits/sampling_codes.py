# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens of a tiers head: K code logits and a table of biases, no logits over the vocabulary.

The tokens of code j, ordered by falling bias, have falling z_i = l_j/T + b_i/T. So what lies above a floor is a prefix
of each code, its length found by bisection, its mass

    e^{l_j/T} · Σ_{prefix} e^{b_i/T}

from sums over prefixes, which are tabled once per temperature (B_j(T) = log Σ e^{b/T} is not B_j/T). Tokens with a
repetition penalty are taken out of their codes and stand beside them, each with a z of its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rewriter.kernels.after_head.reference import by_code, code_logits
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.passes.vq_logits.sampling import Distribution, Sampling

_AT_ONCE = 8  # turns of a bisection over places that take longer than to look at all of them
_BY_VALUE = 40  # turns of a bisection by values; after them by the integers of the numbers, which ends for sure


@dataclass(frozen=True)
class CodeTable:
    """The tokens of each code for one temperature; float64, nothing larger than ``[V]``.

    Attributes:
        codebook: ``[K, d]``.
        code: of each token, ``[V]``.
        order: tokens by code, then falling bias, then number, ``[V]``.
        place: of each token in its code, ``[V]``.
        first, count: of each code in `order`, ``[K]``.
        bias: b/T in this order, ``[V]``.
        top: the largest b/T of each code, ``[K]``; -inf for a code without tokens.
        prefix: Σ e^{b/T − top} up to and with each place, ``[V]``.
    """

    codebook: Tensor
    code: Tensor
    order: Tensor
    place: Tensor
    first: Tensor
    count: Tensor
    bias: Tensor
    top: Tensor
    prefix: Tensor

    @classmethod
    def of(cls, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, temperature: float) -> CodeTable:
        code = unpack_codes(code_of)
        codes, tokens = codebook.shape[0], code.shape[0]
        bias = torch.zeros(tokens, dtype=torch.float64, device=code.device)
        bias = bias if token_bias is None else token_bias.detach().double() / temperature
        order, first, count = by_code(code, bias, codes)
        rank = torch.arange(tokens, device=code.device) - first[code[order]]
        place = torch.empty_like(rank).scatter(0, order, rank)
        bias = bias[order]
        top = torch.where(count > 0, bias[first.clamp(max=tokens - 1)], -torch.inf)
        share = (bias - top[code[order]]).exp()
        return cls(codebook.detach(), code, order, place, first, count, bias, top, _prefix_sums(share, rank))

    @cached_property
    def steps(self) -> int:
        """Turns of a bisection over the places of a code."""
        return int(self.count.max()).bit_length()


class CodeDistribution(Distribution):
    """Of a tiers head.

    Args:
        h: hidden states ``[N, d]``.
        table: of the head, for the temperature of `how`.
        how: penalty and temperature.
        previous: int64 ``[N, P]``, tokens seen before; negative ones are none.
    """

    def __init__(self, h: Tensor, table: CodeTable, how: Sampling, previous: Tensor | None) -> None:
        self.table, self.how, self.tokens = table, how, table.code.shape[0]
        self.logits = code_logits(h, table.codebook).double() / how.temperature
        self.any_seen = previous is not None and how.repetition_penalty != 1 and previous.shape[-1] > 0
        if previous is None or not self.any_seen:  # what follows would be a dozen operations on nothing
            self.seen = torch.empty((h.shape[0], 0), dtype=torch.int64, device=h.device)
            self.seen_z = self.seen.double()
            return
        # Each token once: of equals, sorted, the first.
        previous = previous.sort(-1).values
        again = torch.zeros_like(previous, dtype=torch.bool)
        again[:, 1:] = previous[:, 1:] == previous[:, :-1]
        self.is_seen = (previous >= 0) & ~again
        self.seen = previous.clamp(min=0)
        self.seen_code, self.seen_place = table.code[self.seen], table.place[self.seen]
        self.seen_before = self._z(self.seen_code, self.seen_place)
        self.seen_z = torch.where(self.is_seen, how.penalised(self.seen_before * how.temperature), -torch.inf)
        share = table.bias[table.first[self.seen_code] + self.seen_place] - table.top[self.seen_code]
        self.seen_share = torch.where(self.is_seen, share.exp(), 0.0)

    def log_mass(self, floor: Tensor) -> Tensor:
        return self._categories(floor)[0].logsumexp(-1)

    def kth(self, k: int) -> Tensor:
        """Bisection, by values at first and by the numbers between them at last, until exactly k tokens are left or
        only equals remain. Of the codes only the best are looked at: as many as k and the tokens seen, of which no more
        than those were seen, so that the floor lies among their best tokens or above."""
        best = self.logits + self.table.top
        low, high = self._all(), torch.cat([best, self.seen_z], -1).amax(-1)
        codes = torch.arange(best.shape[-1], device=best.device).expand_as(best)
        enough = k + self.seen.shape[-1]
        if enough <= best.shape[-1]:
            values, codes = best.topk(enough)
            low = values[:, -1]
        low_at, high_at = _ordinal(low), _ordinal(high) + 1  # k at least from low on, fewer from high on
        for turn in itertools.count():
            middle = (low_at >> 1) + (high_at >> 1) + (low_at & high_at & 1)
            if turn < _BY_VALUE:
                value = _ordinal((_number_of(low_at) + _number_of(high_at)) / 2)
                middle = torch.where((value > low_at) & (value < high_at), value, middle)
            number = self._number(_number_of(middle), codes)
            low_at, high_at = torch.where(number >= k, middle, low_at), torch.where(number >= k, high_at, middle)
            if bool(((number == k) | (low_at + 1 >= high_at)).all()):
                break
        return _number_of(low_at)

    def draw(self, floor: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        t = self.table
        categories, length = self._categories(floor)
        noise = torch.empty_like(categories).exponential_(generator=generator)
        picked = (categories - noise.log()).argmax(-1, keepdim=True)
        codes = self.logits.shape[-1]
        code = picked.clamp(max=codes - 1)
        place = self._place_in(code, length.gather(-1, code), generator)
        token = t.order[(t.first[code] + place).clamp(max=self.tokens - 1)]
        z = self._z(code, place)
        if self.any_seen:
            beside, extra = picked >= codes, (picked - codes).clamp(min=0)
            token = torch.where(beside, self.seen.gather(-1, extra), token)
            z = torch.where(beside, self.seen_z.gather(-1, extra), z)
        return token.squeeze(-1), z.squeeze(-1)

    def _z(self, code: Tensor, place: Tensor) -> Tensor:
        """z without penalty of the tokens at these places of these codes, both ``[N, m]``."""
        at = (self.table.first[code] + place).clamp(max=self.tokens - 1)
        return self.logits.gather(-1, code) + self.table.bias[at]

    def _lengths(self, floor: Tensor, codes: Tensor | None = None) -> Tensor:
        """How many tokens of each code (of those given, ``[N, m]``) have z ≥ floor, those seen before with their old z."""
        t = self.table
        logits, first, high = self.logits, t.first, t.count.expand(self.logits.shape)
        if codes is not None:
            logits, first, high = logits.gather(-1, codes), first[codes], t.count[codes]
        if bool((floor == -torch.inf).all()):  # nothing lies below it
            return high
        low = torch.zeros_like(high)
        for _ in range(t.steps):
            middle = (low + high) >> 1
            at = (first + middle).clamp(max=self.tokens - 1)
            above = (low < high) & (logits + t.bias[at] >= floor.unsqueeze(-1))
            low, high = torch.where(above, middle + 1, low), torch.where(above, high, torch.maximum(low, middle))
        return low

    def _removed(self, values: Tensor, length: Tensor) -> Tensor:
        """Sum of values ``[N, P]`` of seen tokens that lie within the lengths, per code ``[N, K]``."""
        inside = self.is_seen & (self.seen_place < length.gather(-1, self.seen_code))
        empty = torch.zeros(length.shape, dtype=values.dtype, device=values.device)
        return empty.scatter_add(-1, self.seen_code, torch.where(inside, values, 0))

    def _number(self, floor: Tensor, codes: Tensor) -> Tensor:
        """How many tokens have z ≥ floor, ``[N]``, where no code but those given has any."""
        number = self._lengths(floor, codes).sum(-1)
        if not self.any_seen:
            return number
        f = floor.unsqueeze(-1)
        return number + (self.seen_z >= f).sum(-1) - (self.is_seen & (self.seen_before >= f)).sum(-1)

    def _categories(self, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Log masses of what lies above the floor, ``[N, K + P]``: of codes, then of tokens seen; and the lengths."""
        t = self.table
        length = self._lengths(floor)
        if not self.any_seen:
            mass = self.logits + t.top + self._sum(length, None).log()
            return torch.where(length > 0, mass, -torch.inf), length
        left = length - self._removed(torch.ones_like(self.seen), length)
        mass = self._sum(length, None) - self._removed(self.seen_share, length)
        tiny = torch.finfo(mass.dtype).tiny  # what is left of a sum may round to nothing
        mass = torch.where(left > 0, self.logits + t.top + mass.clamp(min=tiny).log(), -torch.inf)
        beside = torch.where(self.seen_z >= floor.unsqueeze(-1), self.seen_z, -torch.inf)
        return torch.cat([mass, beside], -1), length

    def _sum(self, length: Tensor, code: Tensor | None) -> Tensor:
        """Σ e^{b/T − top} over the first places of each code (of the given ones), 0 of none."""
        first = self.table.first if code is None else self.table.first[code]
        last = (first + length - 1).clamp(0, self.tokens - 1)
        return torch.where(length > 0, self.table.prefix[last], 0.0)

    def _place_in(self, code: Tensor, length: Tensor, generator: torch.Generator) -> Tensor:
        """A place among the first ``length`` of a code, by mass, without tokens seen; all ``[N, 1]``."""

        def up_to(number: Tensor) -> Tensor:
            """Mass of the first places, tokens seen left out."""
            if not self.any_seen:
                return self._sum(number, code)
            out = self.is_seen & (self.seen_code == code) & (self.seen_place < number)
            return self._sum(number, code) - torch.where(out, self.seen_share, 0.0).sum(-1, keepdim=True)

        share = torch.rand(code.shape, dtype=torch.float64, device=code.device, generator=generator)
        wanted = share * up_to(length)
        if not self.any_seen and self.table.steps <= _AT_ONCE:
            places = torch.arange(1 << self.table.steps, device=code.device)
            at = (self.table.first[code] + places).clamp(max=self.tokens - 1)
            return ((self.table.prefix[at] <= wanted) & (places < length - 1)).sum(-1, keepdim=True)
        low, high = torch.zeros_like(code), length - 1
        for _ in range(self.table.steps):
            middle = (low + high) >> 1
            short = (low < high) & (up_to(middle + 1) <= wanted)
            low, high = torch.where(short, middle + 1, low), torch.where(short, high, torch.maximum(low, middle))
        return low

    def _all(self) -> Tensor:
        shape = self.logits.shape[:1]
        return torch.full(shape, -torch.inf, dtype=torch.float64, device=self.logits.device)


def _prefix_sums(values: Tensor, rank: Tensor) -> Tensor:
    """Running sums that start anew where the rank is 0; one sum over everything would lose small codes in large ones."""
    step = 1
    while step <= int(rank.max()):
        values = values + torch.where(rank >= step, values.roll(step), 0.0)
        step *= 2
    return values


def _ordinal(z: Tensor) -> Tensor:
    """float64 as int64 in the same order, one apart from one number to the next."""
    bits = z.view(torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _number_of(ordinal: Tensor) -> Tensor:
    return torch.where(ordinal < 0, ordinal ^ torch.iinfo(torch.int64).max, ordinal).view(torch.float64)
