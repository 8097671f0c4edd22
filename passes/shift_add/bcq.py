# SPDX-License-Identifier: Apache-2.0
"""Binary coding of dense weights: each group of a row as a sum of ±1 bases under one scale per basis.

    w[o, i] ≈ Σ_b alpha[o, g, b] · c_b,  c_b ∈ {-1, +1},  g = i // group

The 2^bits levels of a group are symmetric, so the fit works on magnitudes
(`rewriter.passes.shift_add.groups`). It goes up one basis at a time. At every width it starts from

    the previous width, embedded without changing a level,
    the mid-rise uniform grid with its best step (alpha = step·(2^(b-2), …, 1, 1/2)),
    the previous width plus the residual basis c = sign(r), alpha = mean|r| (the greedy rule of BCQ),
    and, with free scales, bases in geometric progression,

alternates nearest levels with least-squares scales alpha = (CᵀC)⁻¹Cᵀw, and keeps the best of all per group,
judged with the scales as stored. So the error never grows with ``bits`` and is never above the uniform
grid's.

Alternating from greedy starts: Xu et al., "Alternating Multi-bit Quantization", 2018;
uniform grids as binary codes: Park et al., "LUT-GEMM", 2022; power-of-two scales: You et al., "ShiftAddLLM",
2024.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.shift_add import codec
from rewriter.passes.shift_add import measures
from rewriter.passes.shift_add.groups import (
    GAIN,
    WIDE,
    Groups,
    Rounding,
    check_group,
    check_weight,
    chunks,
    times_power_of_two,
)
from rewriter.passes.shift_add.levels import Fitness, code_words, judge
from rewriter.passes.shift_add.search import best_scale

ScaleKind = Literal["pot", "fp16"]

ROUNDS = 8  # alternations per start; the error has settled to three digits by then
GEOMETRIC_RATIOS = (0.65, 0.75, 0.9)  # best bases of bell-shaped and heavy-tailed groups fall off this slowly


@dataclass(frozen=True, eq=False)
class BCQCodes:
    """A weight in binary coding, laid out as `rewriter.kernels.shift_add.codec` describes.

    Attributes:
        codes: ``uint8 [out, bits, ceil(in / 8)]``.
        scale: in the weight's dtype; ``[out, G]`` with ``shift``, else ``[out, G, bits]``.
        shift: ``uint8 [out, G, ceil(bits / 2)]`` packed exponents; None where each basis has its own scale.
        group: weights per group; the last may be ragged.
        in_features: columns of the weight.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    group: int
    in_features: int

    @property
    def bits(self) -> int:
        """Bases, that is stored code bits per weight."""
        return self.codes.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the dense weight."""
        return self.codes.shape[0], self.in_features

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and exponents included."""
        out, width = self.shape
        return measures.bits_per_weight(self.codes, self.scale, self.shift, weights=out * width)

    def rows(self, start: int, end: int) -> BCQCodes:
        """The codes of rows ``start`` to ``end - 1``, sharing memory."""
        shift = None if self.shift is None else self.shift[start:end]
        return replace(self, codes=self.codes[start:end], scale=self.scale[start:end], shift=shift)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[out, in]`` in ``dtype`` (the scales' by default)."""
        work = codec.compute_dtype(self.scale)
        dense = codec.decode_bcq(self.codes, self.scale, self.shift, self.group, self.in_features, work)
        return dense.to(self.scale.dtype if dtype is None else dtype)


def fit(
    weight: Tensor,
    *,
    bits: int,
    group: int = 128,
    scale: ScaleKind = "pot",
    rows_per_chunk: int | None = None,
) -> BCQCodes:
    """Fit a dense weight in closed form; deterministic, and independent of ``rows_per_chunk``.

    Scales are rounded to fp16 values and returned in the weight's dtype; where a non-zero group's largest
    magnitude lies outside [2^-12, 2^15] the scales of the whole weight keep the precision of its dtype.

    Args:
        weight: ``[out, in]``, floating and finite.
        bits: bases per weight, 1 to 8.
        group: weights along ``in`` that share scales; wider than the row means the row.
        scale: "pot": one scale per group, bases differ by powers of two; "fp16": one per basis and group.
        rows_per_chunk: rows fitted at once; by default about ten MB of working memory.

    Raises:
        PlanError: ``bits``, ``group`` or ``scale`` out of range.
        ValueError: the weight is not a finite floating matrix.
    """
    _check(weight, bits, group)
    if scale not in ("pot", "fp16"):
        raise PlanError(f'shift_add: scale must be "pot" or "fp16", got {scale!r}')
    rounding = Rounding.of(weight, group)
    parts = []
    for groups in chunks(weight, group, rows_per_chunk):
        alpha = _fit_groups(groups, bits, scale, rounding)
        parts.append(_encode(groups, alpha, scale == "pot", rounding, weight.shape[1], group))
    return _join(parts, group, weight.shape[1])


def uniform(weight: Tensor, *, bits: int, group: int = 128, rows_per_chunk: int | None = None) -> BCQCodes:
    """The mid-rise uniform grid ``step · (j + 1/2)`` with its best step per group, in the same format.

    This is round-to-nearest integer quantisation, the yardstick which `fit` never exceeds. Arguments, errors
    and rounding of the scale as for `fit`.
    """
    _check(weight, bits, group)
    rounding = Rounding.of(weight, group)
    parts = []
    for groups in chunks(weight, group, rows_per_chunk):
        alpha = _uniform(groups, bits, rounding).alpha
        parts.append(_encode(groups, alpha, True, rounding, weight.shape[1], group))
    return _join(parts, group, weight.shape[1])


def nearest(weight: Tensor, like: BCQCodes, rows_per_chunk: int | None = None) -> BCQCodes:
    """Code ``weight [out, in]`` anew under the scales of ``like``: each weight's nearest level; idempotent.

    Raises:
        ValueError: the weight is not a finite floating matrix of ``like``'s shape.
    """
    _check(weight, like.bits, like.group)
    if tuple(weight.shape) != like.shape:
        raise ValueError(f"weight {list(weight.shape)} does not fit the scales of a {list(like.shape)} weight")
    alphas = codec.bcq_alpha(like.scale.detach(), like.shift, like.bits, WIDE).flatten(0, 1)
    parts, done = [], 0
    for groups in chunks(weight, like.group, rows_per_chunk):
        alpha = alphas[done : done + groups.count]
        done += groups.count
        normalised = times_power_of_two(alpha, -groups.exponent.unsqueeze(-1))
        parts.append(_pack_words(code_words(groups, normalised), like.bits, weight.shape[1], groups))
    return replace(like, codes=torch.cat(parts))


def _check(weight: Tensor, bits: int, group: int) -> None:
    check_group(group)
    if not 1 <= bits <= codec.MAX_BASES:
        raise PlanError(f"shift_add: bits must be 1 to {codec.MAX_BASES} in mode bcq, got {bits}")
    check_weight(weight)


# ---------------------------------------------------------------------------------- fitting


@dataclass
class _Best:
    """The best scales so far, group by group: ``alpha [n, bits]`` normalised, as stored; ``error [n]``."""

    alpha: Tensor
    error: Tensor

    def offer(self, alpha: Tensor, error: Tensor) -> None:
        better = error < self.error * GAIN
        self.alpha = torch.where(better.unsqueeze(-1), alpha, self.alpha)
        self.error = torch.where(better, error, self.error)


def _fit_groups(groups: Groups, bits: int, kind: ScaleKind, rounding: Rounding) -> Tensor:
    """Scales ``[n, bits]`` of all groups, descending, normalised."""
    # One basis has a closed form: c = sign(w), alpha = mean|w|.
    alpha = rounding(groups.mean, groups.exponent).unsqueeze(-1)
    best = _Best(alpha, judge(groups, alpha).error)
    for width in range(2, bits + 1):
        best = _widen(groups, best, width, kind, rounding)
    return best.alpha


def _widen(groups: Groups, narrower: _Best, bits: int, kind: ScaleKind, rounding: Rounding) -> _Best:
    """The best ``bits`` bases, given the best ``bits - 1``."""
    head, last = narrower.alpha[:, :-1], narrower.alpha[:, -1:]
    if kind == "pot":  # a basis is the sum of two halves of itself: every level stays
        embedded = torch.cat((head, last / 2, last / 2), dim=-1)
    else:
        embedded = torch.cat((head, last, torch.zeros_like(last)), dim=-1)
    best = _Best(embedded, judge(groups, embedded).error)
    grid = _uniform(groups, bits, rounding)
    # mean|r| of the residual, as for a normal one: sqrt(2/pi) of its root mean square
    residual = (best.error / groups.length[:, 0]).sqrt() * (2 / torch.pi) ** 0.5
    starts = [grid.alpha, torch.cat((narrower.alpha, residual.unsqueeze(-1)), dim=-1)]
    if kind == "fp16":
        starts += [_geometric(groups, bits, ratio) for ratio in GEOMETRIC_RATIOS]
        grid = _Best(rounded := _rounded(grid.alpha, groups, rounding), judge(groups, rounded).error)
    best.offer(grid.alpha, grid.error)
    for start in starts:
        _alternate(groups, start, best, kind, rounding)
    return best


def _alternate(groups: Groups, start: Tensor, best: _Best, kind: ScaleKind, rounding: Rounding) -> None:
    """Nearest levels and least-squares scales in turn, offering every set of scales to ``best``."""
    alpha = start
    fitness = judge(groups, alpha)
    for _ in range(ROUNDS):
        alpha = (
            _pot_scales(groups, fitness, rounding)
            if kind == "pot"
            else _rounded(_free_scales(fitness, alpha), groups, rounding)
        )
        fitness = judge(groups, alpha)
        best.offer(alpha, fitness.error)


def _rounded(alpha: Tensor, groups: Groups, rounding: Rounding) -> Tensor:
    return rounding(alpha, groups.exponent.unsqueeze(-1))


def _geometric(groups: Groups, bits: int, ratio: float) -> Tensor:
    """Bases falling off by ``ratio`` whose sum is the largest magnitude of the group."""
    ladder = ratio ** torch.arange(bits, dtype=WIDE, device=groups.values.device)
    return (groups.largest / ladder.sum()).unsqueeze(-1) * ladder


def _uniform(groups: Groups, bits: int, rounding: Rounding) -> _Best:
    """The mid-rise grid ``step · (j + 1/2)`` with its best step, as bases step·(2^(bits-2), …, 1, 1/2)."""
    device = groups.values.device
    unit = (torch.arange(1 << (bits - 1), dtype=WIDE, device=device) + 0.5) / 2.0 ** (bits - 2)
    scale, error = best_scale(groups, unit, rounding)
    return _Best(scale.unsqueeze(-1) * 2.0 ** -torch.arange(bits, dtype=WIDE, device=device), error)


def _free_scales(fitness: Fitness, alpha: Tensor) -> Tensor:
    """Least squares with a light pull towards ``alpha``: (CᵀC + λI) δ = Cᵀw - CᵀC·alpha, never singular.

    Levels do not depend on the order or the signs of the scales; they are returned descending and positive.
    """
    bits = alpha.shape[1]
    weights = fitness.gram[:, 0, 0].view(-1, 1, 1)  # CᵀC has the number of weights on its diagonal
    ridge = 1e-6 * weights * torch.eye(bits, dtype=WIDE, device=alpha.device)
    residual = fitness.moment - (fitness.gram @ alpha.unsqueeze(-1)).squeeze(-1)
    delta = _solve(fitness.gram + ridge, residual)
    return (alpha + delta).abs().sort(-1, descending=True).values


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Batched solution of small positive definite systems ``[n, b, b] · x = [n, b]`` by elimination.

    All systems take each step together; LAPACK would be called once per system.
    """
    a, x = matrix.clone(), right.clone()
    size = a.shape[-1]
    for i in range(size):
        factor = a[:, i + 1 :, i] / a[:, i, i, None]
        a[:, i + 1 :, i:] -= factor.unsqueeze(-1) * a[:, i, None, i:]
        x[:, i + 1 :] -= factor * x[:, i, None]
    for i in reversed(range(size)):
        x[:, i] = (x[:, i] - (a[:, i, i + 1 :] * x[:, i + 1 :]).sum(-1)) / a[:, i, i]
    return x


def _pot_scales(groups: Groups, fitness: Fitness, rounding: Rounding) -> Tensor:
    """Best alpha = s·u over the exponent patterns u = 2^-k: s = uᵀCᵀw / uᵀCᵀCu removes (uᵀCᵀw)² / uᵀCᵀCu."""
    units = 2.0 ** -_exponent_patterns(fitness.moment.shape[1]).to(fitness.moment.device)
    squares = (units.unsqueeze(1) * units.unsqueeze(2)).flatten(1)
    moment = (fitness.moment @ units.t()).clamp_min(0)
    curvature = (fitness.gram.flatten(1) @ squares.t()).clamp_min(torch.finfo(WIDE).tiny)
    choice = (moment.square() / curvature).argmax(-1, keepdim=True)
    scale = (moment.gather(-1, choice) / curvature.gather(-1, choice)).squeeze(-1)
    return rounding(scale, groups.exponent).unsqueeze(-1) * units[choice.squeeze(-1)]


@lru_cache(maxsize=codec.MAX_BASES)
def _exponent_patterns(bits: int) -> Tensor:
    """Ascending exponents ``[patterns, bits]`` from 0: steps of 0, 1 or 2, of which at most three are not 1.

    All steps 1 is the uniform grid. The largest exponent, also after embedding in wider codes, is 10.
    """
    steps = (s for s in itertools.product((1, 0, 2), repeat=bits - 1) if sum(d != 1 for d in s) <= 3)
    return torch.tensor([(0, *itertools.accumulate(s)) for s in steps], dtype=WIDE)


# ---------------------------------------------------------------------------------- encoding


def _encode(groups: Groups, alpha: Tensor, pot: bool, rounding: Rounding, in_features: int, group: int) -> BCQCodes:
    """Pack the rows of a chunk: nearest codes, scales as stored, exponents relative to the first basis."""
    bits = alpha.shape[1]
    codes = _pack_words(code_words(groups, alpha), bits, in_features, groups)
    if not pot:
        scale = groups.by_row(rounding.stored(alpha, groups.exponent.unsqueeze(-1)))
        return BCQCodes(codes, scale, None, group, in_features)
    scale = groups.by_row(rounding.stored(alpha[:, 0], groups.exponent))
    exponents = torch.frexp(alpha).exponent
    shift = groups.by_row(exponents[:, :1] - exponents)
    return BCQCodes(codes, scale, codec.pack_nibbles(shift), group, in_features)


def _pack_words(words: Tensor, bits: int, in_features: int, groups: Groups) -> Tensor:
    """Code words of the groups -> bit planes ``uint8 [rows, bits, ceil(in / 8)]``."""
    rows = codec.from_groups(groups.by_row(words), in_features)
    planes = torch.stack([(rows >> b) & 1 for b in range(bits)], dim=1)
    return codec.pack_bits(planes)


def _join(parts: list[BCQCodes], group: int, in_features: int) -> BCQCodes:
    shifts = [p.shift for p in parts if p.shift is not None]
    return BCQCodes(
        codes=torch.cat([p.codes for p in parts]),
        scale=torch.cat([p.scale for p in parts]),
        shift=torch.cat(shifts) if shifts else None,
        group=group,
        in_features=in_features,
    )
