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
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.shift_add import codec
from rewriter.passes.shift_add import modes
from rewriter.passes.shift_add.codes import BCQCodes
from rewriter.passes.shift_add.groups import GAIN, WIDE, Groups, Rounding
from rewriter.passes.shift_add.levels import Fitness, Levels, judge, words_of
from rewriter.passes.shift_add.modes import Codes, Grid, Mode
from rewriter.passes.shift_add.search import best_scale

ScaleKind = Literal["pot", "fp16"]

ROUNDS = 8  # alternations per start; the error has settled to three digits by then
GEOMETRIC_RATIOS = (0.65, 0.75, 0.9)  # best bases of bell-shaped and heavy-tailed groups fall off this slowly


class _Binary(Mode):
    """Scales are ``alpha [rows, bits]``, one per basis, as stored; code words hold bit b for basis b."""

    @property
    def free(self) -> bool:
        """Whether each basis has a scale of its own; otherwise they are powers of two apart."""
        return False

    @property
    def coefficients(self) -> int:
        return self.bits if self.free else 1

    def grid(self, scales: Tensor) -> Grid:
        levels = Levels.of(scales)
        positive, negative = words_of(levels, self.bits)
        return Grid(levels.values, positive, negative)

    def design(self, words: Tensor, scales: Tensor) -> Tensor:
        places = torch.arange(self.bits, device=words.device)
        signs = (((words.unsqueeze(-1) >> places) & 1) * 2 - 1).to(WIDE)
        return signs if self.free else (signs @ _units(scales).unsqueeze(-1))

    def refit(self, scales: Tensor, coefficients: Tensor, rounding: Rounding) -> Tensor:
        if self.free:
            return rounding(coefficients.to(WIDE), _no_exponent(coefficients))
        leading = rounding(coefficients.to(WIDE).clamp_min(0), _no_exponent(coefficients))
        return leading * _units(scales)

    def assemble(self, words: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Codes:
        planes = torch.stack([(words >> b) & 1 for b in range(self.bits)], dim=1)
        codes, width = codec.pack_bits(planes), words.shape[-1]
        if self.free:
            return BCQCodes(codes, scales.to(dtype), None, group, width)
        exponents = torch.frexp(_units(scales)).exponent
        shift = codec.pack_nibbles(exponents[..., :1] - exponents)
        return BCQCodes(codes, scales[..., 0].to(dtype), shift, group, width)

    def scales_of(self, codes: Codes) -> Tensor:
        shift = cast(BCQCodes, codes).shift
        return codec.bcq_alpha(codes.scale.detach(), shift, codes.bits, WIDE)


@dataclass(frozen=True)
class BCQ(_Binary):
    """Fitted binary bases; ``scale``: "pot": powers of two apart under one scale per group, "fp16": free.

    Raises:
        PlanError: ``bits`` or ``scale`` out of range.
    """

    name: ClassVar[str] = "bcq"
    bits: int = 4
    scale: ScaleKind = "pot"

    def __post_init__(self) -> None:
        _check_bits(self.bits, "bcq")
        if self.scale not in ("pot", "fp16"):
            raise PlanError(f'shift_add: scale must be "pot" or "fp16", got {self.scale!r}')

    @property
    def free(self) -> bool:
        return self.scale == "fp16"

    def best(self, groups: Groups, rounding: Rounding) -> Tensor:
        return _fit_groups(groups, self.bits, self.scale, rounding)


@dataclass(frozen=True)
class Uniform(_Binary):
    """The mid-rise uniform grid ``step · (j + 1/2)`` with its best step per group, stored as binary bases.

    This is round-to-nearest integer quantisation, exactly: alpha = step · (2^(bits-2), …, 1, 1/2). ``scale``: "fp16",
    or "pot" for steps that are powers of two.

    Raises:
        PlanError: ``bits`` out of range.
    """

    name: ClassVar[str] = "uniform"
    bits: int = 4
    scale: ScaleKind = "fp16"

    def __post_init__(self) -> None:
        _check_bits(self.bits, "uniform")

    @property
    def power_of_two(self) -> bool:
        return self.scale == "pot"

    def best(self, groups: Groups, rounding: Rounding) -> Tensor:
        return _uniform(groups, self.bits, rounding).alpha


def fit(
    weight: Tensor,
    *,
    bits: int,
    group: int = 128,
    scale: ScaleKind = "pot",
    importance: Tensor | None = None,
    rows_per_chunk: int | None = None,
) -> BCQCodes:
    """`modes.fit` of a `BCQ` mode; arguments, rounding of the scales and errors as there."""
    mode = BCQ(bits, scale)
    return cast(BCQCodes, modes.fit(weight, mode, group=group, importance=importance, rows_per_chunk=rows_per_chunk))


def uniform(weight: Tensor, *, bits: int, group: int = 128, rows_per_chunk: int | None = None) -> BCQCodes:
    """`modes.fit` of the `Uniform` grid, the yardstick which `fit` never exceeds."""
    return cast(BCQCodes, modes.fit(weight, Uniform(bits), group=group, rows_per_chunk=rows_per_chunk))


def _check_bits(bits: int, mode: str) -> None:
    if not 1 <= bits <= codec.MAX_BASES:
        raise PlanError(f"shift_add: bits must be 1 to {codec.MAX_BASES} in mode {mode}, got {bits}")


def _units(alpha: Tensor) -> Tensor:
    """The powers of two 2^-k of bases under a shared scale, ``[..., bits]``; 1 for the bases of a zero group."""
    leading = alpha[..., :1]
    return torch.where(leading == 0, 1.0, alpha / torch.where(leading == 0, 1.0, leading))


def _no_exponent(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.int32)


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
    residual = (best.error / groups.mass[:, -1]).sqrt() * (2 / torch.pi) ** 0.5
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
    weights = fitness.gram[:, 0, 0].view(-1, 1, 1)  # CᵀC has the weights' importance on its diagonal
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
