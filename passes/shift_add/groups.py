# SPDX-License-Identifier: Apache-2.0
"""Groups of a weight row, sorted once, so that any levels are scored without touching the weights again.

A ShiftAdd code maps each weight of a group to the nearest of a few levels that are symmetric about zero, so
the fit only needs magnitudes: with them sorted and their running sums kept, the number and the sum of the
magnitudes that fall to each of m levels cost m binary searches per group, instead of a pass over all its
weights:

    Σ_i (|w_i| - level(i))² = Σ_i w_i² - 2 Σ_j level_j · sum_j + Σ_j level_j² · count_j.

Where errors do not count alike (calibrated fits), every term carries the importance h_i of its weight: counts become
Σ h, sums Σ h|w|, the energy Σ h w². Plain fits are h = 1.

Every group is first divided by a power of two that brings its largest magnitude into [1/2, 1). That is
exact, so subnormal and huge weights need no special case and Q(2^k w) = 2^k Q(w) holds by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.shift_add.codec import ceil_div, group_width, to_groups

# Elements handled at once: about ten megabytes of working memory, which also stays near the cache.
CHUNK_ELEMENTS = 1 << 17

# Scales become fp16 values where every group's largest magnitude lies in this range: then the leading scale
# of a group keeps (nearly) all eleven bits, and no scale overflows.
FP16_GROUPS = (2.0**-12, 2.0**15)

WIDE = torch.float64

GAIN = 1 - 1e-9  # scales replace others only if really better, so rounding noise decides nothing


class Bins(NamedTuple):
    """How the magnitudes of a group fall to its levels, each weighed by its importance: both ``[n, m]``."""

    counts: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Groups:
    """All groups of some rows, normalised to a largest magnitude in [1/2, 1); zero groups stay zero.

    Attributes:
        values: ``[n, width]`` normalised weights, padding of a ragged group 0.
        magnitude: ``[n, width]`` sorted magnitudes, padding infinite (so that it lies above every threshold).
        running: ``[n, width + 1]`` float64 sums of the first i magnitudes times importance.
        mass: ``[n, width + 1]`` float64 sums of the importance of the first i magnitudes.
        importance: ``[n, width]`` float64 in the order of ``values``, padding 0.
        length: ``[n, 1]`` int64, weights in the group.
        energy: ``[n]`` float64 sum of squares times importance.
        exponent: ``[n]`` int32; weight = value * 2**exponent.
        largest_level: ``[n]`` float64, largest normalised value that is finite in the weight's dtype.
        per_row: groups in a row, so that n = rows * per_row.
    """

    values: Tensor
    magnitude: Tensor
    running: Tensor
    mass: Tensor
    importance: Tensor
    length: Tensor
    energy: Tensor
    exponent: Tensor
    largest_level: Tensor
    per_row: int

    @property
    def count(self) -> int:
        return self.values.shape[0]

    def by_row(self, x: Tensor) -> Tensor:
        """``[n, ...]`` -> ``[rows, per_row, ...]``."""
        return x.reshape(-1, self.per_row, *x.shape[1:])

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each group, ``[n]`` float64: in [1/2, 1), or 0."""
        return self.values.abs().amax(-1).to(WIDE)

    @property
    def mean(self) -> Tensor:
        """Mean magnitude of each group under the importance, ``[n]`` float64."""
        return self.running[:, -1] / self.mass[:, -1]

    def bins(self, levels: Tensor) -> Bins:
        """Assign each magnitude to the nearest of its group's ascending non-negative ``levels [n, m]``."""
        inner = torch.searchsorted(self.magnitude, thresholds(levels, self.magnitude.dtype)).minimum(self.length)
        edges = torch.cat((torch.zeros_like(self.length), inner, self.length), dim=-1)
        return Bins(self.mass.gather(-1, edges).diff(dim=-1), self.running.gather(-1, edges).diff(dim=-1))

    def moments(self, scale: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Σh|w|u and Σhu², each ``[n]``, u being the level of ``unit [m]`` nearest to |w| / ``scale [n]``."""
        if len(unit) <= self.values.shape[1]:
            bins = self.bins(scale.unsqueeze(-1) * unit)
            return bins.sums @ unit, bins.counts @ unit.square()
        # More levels than weights: a search per weight is cheaper than one per level.
        middles = (unit[1:] + unit[:-1]) / 2
        magnitude = self.values.abs().to(WIDE)
        relative = magnitude / scale.clamp_min(torch.finfo(WIDE).tiny).unsqueeze(-1)
        level = unit[torch.bucketize(relative, middles, right=True)]
        weighed = level * self.importance
        return (magnitude * weighed).sum(-1), (level * weighed).sum(-1)

    def error(self, cross: Tensor, square: Tensor, top: Tensor) -> Tensor:
        """``Σ h(|w| - level)²`` from its cross and square terms; infinite if ``top`` overflows the dtype."""
        error = (self.energy - 2 * cross + square).clamp_min(0)
        return torch.where(top <= self.largest_level, error, float("inf"))


def thresholds(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Midpoints between ascending levels; a magnitude on a midpoint belongs to the upper level."""
    return ((levels[:, 1:] + levels[:, :-1]) / 2).to(dtype).contiguous()


def check_weight(weight: Tensor) -> None:
    """Refuse anything that is not a non-empty, finite, floating matrix (ValueError)."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"shift_add fits non-empty matrices [out, in], got shape {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"shift_add fits floating weights, got {weight.dtype}")
    if not all(bool(torch.isfinite(rows).all()) for rows in torch.split(weight, row_chunk(weight, None))):
        raise ValueError("shift_add fits finite weights, this one holds NaN or infinity")


def check_group(group: int) -> None:
    if group < 1:
        raise PlanError(f"shift_add: group must be at least 1, got {group}")


def row_chunk(weight: Tensor, rows_per_chunk: int | None) -> int:
    """Rows to handle at once."""
    if rows_per_chunk is None:
        return max(1, CHUNK_ELEMENTS // weight.shape[1])
    if rows_per_chunk < 1:
        raise PlanError(f"shift_add: rows_per_chunk must be at least 1, got {rows_per_chunk}")
    return rows_per_chunk


def chunks(
    weight: Tensor, group: int, rows_per_chunk: int | None, importance: Tensor | None = None
) -> Iterator[Groups]:
    """The groups of a matrix ``[out, in]``, some rows at a time, row by row; ``importance`` as for `split`."""
    size = row_chunk(weight, rows_per_chunk)
    for start in range(0, weight.shape[0], size):
        shared = importance is None or importance.dim() == 1
        yield split(
            weight.detach()[start : start + size],
            group,
            importance if importance is None or shared else importance[start : start + size],
        )


def split(rows: Tensor, group: int, importance: Tensor | None = None) -> Groups:
    """Normalise and sort the groups of ``rows [r, in]``.

    Args:
        rows: floating and finite.
        group: weights per group.
        importance: what each weight's squared error counts, ``[in]`` or ``[r, in]``, non-negative and finite; a group
            whose importance is all zero counts its weights alike. None counts all alike.

    Raises:
        ValueError: the importance does not fit.
    """
    in_features = rows.shape[1]
    width = group_width(group, in_features)
    work = torch.promote_types(rows.dtype, torch.float32)
    wide = to_groups(rows.to(WIDE), group, in_features).flatten(0, 1)
    exponent = torch.frexp(wide.abs().amax(-1)).exponent
    values = times_power_of_two(wide, -exponent.unsqueeze(-1)).to(work)
    per_row = ceil_div(in_features, width)
    length = torch.full((per_row, 1), width, device=rows.device)
    length[-1] = in_features - (per_row - 1) * width
    length = length.repeat(rows.shape[0], 1)
    padding = torch.arange(width, device=rows.device) >= length
    magnitude, order = values.abs().masked_fill(padding, float("inf")).sort(-1)
    finite = magnitude.masked_fill(magnitude.isinf(), 0).to(WIDE)
    counted = _importance(rows, group, importance).masked_fill(padding, 0)
    weighed = counted.gather(-1, order)
    limit = torch.full_like(exponent, 1, dtype=WIDE) * torch.finfo(rows.dtype).max
    return Groups(
        values=values,
        magnitude=magnitude,
        running=F.pad((weighed * finite).cumsum(-1), (1, 0)),
        mass=F.pad(weighed.cumsum(-1), (1, 0)),
        importance=counted,
        length=length,
        energy=(weighed * finite.square()).sum(-1),
        exponent=exponent,
        largest_level=times_power_of_two(limit, -exponent),
        per_row=per_row,
    )


def _importance(rows: Tensor, group: int, importance: Tensor | None) -> Tensor:
    """Importance in groups, ``[n, width]`` float64, largest 1 in every group."""
    if importance is None:
        return to_groups(torch.ones_like(rows, dtype=WIDE), group, rows.shape[1]).flatten(0, 1)
    if tuple(importance.shape) not in (tuple(rows.shape), tuple(rows.shape[1:])):
        raise ValueError(f"importance {list(importance.shape)} does not fit weights {list(rows.shape)}")
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError("shift_add: importance must be finite and not negative")
    grouped = to_groups(importance.detach().to(WIDE).expand(rows.shape), group, rows.shape[1]).flatten(0, 1)
    largest = grouped.amax(-1, keepdim=True)
    return torch.where(largest > 0, grouped / largest.clamp_min(torch.finfo(WIDE).tiny), 1.0)


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2**exponent``; exact where the result is a normal number. Half at a time: 2**1074 overflows."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return x * torch.exp2(half.to(x.dtype)) * torch.exp2((exponent - half).to(x.dtype))


@dataclass(frozen=True)
class Rounding:
    """How scales are stored: in the weight's dtype, as values that fp16 holds too where ``narrow``, or powers of two."""

    dtype: torch.dtype
    narrow: bool
    power_of_two: bool = False

    @classmethod
    def of(cls, weight: Tensor, group: int, *, power_of_two: bool = False) -> Rounding:
        """fp16 scales if every non-zero group's largest magnitude lies in `FP16_GROUPS`."""
        low, high = FP16_GROUPS
        narrow = True
        for rows in torch.split(weight.detach(), row_chunk(weight, None)):
            largest = to_groups(rows.abs(), group, rows.shape[1]).amax(-1)
            fits = ((largest >= low) & (largest <= high)) | (largest == 0)
            narrow = narrow and bool(fits.all())
        return cls(weight.dtype, narrow, power_of_two)

    def stored(self, scale: Tensor, exponent: Tensor) -> Tensor:
        """Normalised scales -> what is kept; ``exponent`` broadcasts to ``scale``; overflow is infinite."""
        if self.power_of_two:  # nearest in the linear domain: the threshold between 2^e and 2^(e+1) is 1.5·2^e
            mantissa, own = torch.frexp(scale)
            scale = times_power_of_two(torch.sign(scale), own - (mantissa.abs() < 0.75).to(own.dtype))
        real = times_power_of_two(scale, exponent)
        return (real.to(torch.float16) if self.narrow else real).to(self.dtype)

    def __call__(self, scale: Tensor, exponent: Tensor) -> Tensor:
        """Round normalised scales to what can be kept, staying normalised, in float64."""
        return times_power_of_two(self.stored(scale, exponent).to(WIDE), -exponent)
