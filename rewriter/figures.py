# SPDX-License-Identifier: Apache-2.0
"""How far one value moved: an output, buffer or gradient of a program before and after a rewrite.

Each value is seen in four runs: both programs promoted to float64 (the *golden* ones), and both in their own
dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-10  # relative to the largest magnitude, between promoted programs


@dataclass(frozen=True)
class Figure:
    """One comparison, on the input where the value moved furthest.

    Attributes:
        name: "output logits", "buffer bn.running_mean", "gradient of lm_head.weight".
        dtype: the original program's own dtype of it; empty if it has none.
        largest: largest finite magnitude in the golden run of the original, the unit of ``relative``.
        deviation: max |golden after − golden before|; infinite where only one of them is a number.
        relative: ``deviation / largest``.
        error_before: max |own dtype − golden| of the original program; None if nothing could be compared.
        error_after: the same of the rewritten program, against the same golden run.
        allowed: what ``error_after`` may be.
        undecided: elements the original leaves open: NaN in both golden runs (a row that sees no key; there
            both programs must agree), or overflowing in the original's own dtype.
        sample: position of the input in the list of inputs.
        reason: what is wrong, in words; empty if nothing is.
        note: what is remarkable without being a broken promise; empty if nothing is.
    """

    name: str
    dtype: str
    largest: float
    deviation: float
    relative: float
    error_before: float | None
    error_after: float | None
    allowed: float | None
    undecided: int
    sample: int
    reason: str
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Runs:
    """One value in the four runs; None where a program does not have it."""

    golden_before: Tensor | None
    golden_after: Tensor | None
    own_before: Tensor | None
    own_after: Tensor | None


def compare(
    name: str,
    sample: int,
    runs: Runs,
    *,
    floor: float = 0.0,
    noise: float = 0.0,
    own_dtype_binds: bool = True,
) -> Figure:
    """Apply both criteria of the golden run (:mod:`rewriter.verification`).

    Args:
        floor: magnitudes below it count as it (a value that is zero but for cancellation has no unit of its
            own).
        noise: relative error in the own dtype that counts as the original's, if its error here is smaller.
        own_dtype_binds: whether an error above what is allowed in the own dtype fails, or is only noted.
    """
    golden, golden_after = runs.golden_before, runs.golden_after
    own, own_after = runs.own_before, runs.own_after
    if golden is None or own is None:
        return _unlike(name, sample, "", "only the rewritten program has it")
    if golden_after is None or own_after is None:
        return _unlike(name, sample, str(own.dtype), "the rewritten program does not have it")
    if own.shape != own_after.shape or own.dtype != own_after.dtype:
        was, now = (f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in (own, own_after))
        return _unlike(name, sample, str(own.dtype), f"{was} became {now}")
    unit = max(largest(golden), floor)
    exact = EXACT * unit if golden.is_floating_point() or golden.is_complex() else 0.0
    deviation = _maximum(_error(golden_after, golden))
    relative = deviation / unit if unit else (math.inf if deviation else 0.0)
    before, after, undecided = _own_errors(golden, golden_after, own, own_after)
    allowed = max(2 * max(before, noise * unit) + ulp(own.dtype, unit), exact)
    moved = (
        f"promoted to float64 the programs differ by {deviation:.3g}, {relative:.3g} of the largest "
        f"magnitude {unit:.3g}; an exact rewrite stays below {EXACT:g} of it"
    )
    lost = (
        f"in {own.dtype} the error against the golden run is {before:.3g} before the rewrite and "
        f"{after:.3g} after it; allowed is {allowed:.3g}"
    )
    reason = moved if deviation > exact else lost if after > allowed and own_dtype_binds else ""
    note = lost if after > allowed else ""
    if 0 < undecided == _real(golden).numel():
        note = "undefined everywhere, nothing could be compared"
    return Figure(
        name,
        str(own.dtype),
        unit,
        deviation,
        relative,
        before,
        after,
        allowed,
        undecided,
        sample,
        reason,
        note,
    )


def worst(figures: Iterable[Figure]) -> Figure:
    """Of one value on several inputs: a failure first, then a note, then the one that moved furthest."""
    return max(figures, key=lambda figure: (not figure.passed, bool(figure.note), figure.relative))


def relative_error(value: Tensor, golden: Tensor, floor: float = 0.0) -> float:
    """Largest finite error of ``value``, in units of ``golden``'s largest magnitude (at least ``floor``)."""
    error = _error(value, golden)
    unit = max(largest(golden), floor)
    return _maximum(error.masked_fill(error.isinf(), 0.0)) / unit if unit else 0.0


def largest(tensor: Tensor) -> float:
    """Largest finite magnitude; 0 if there is none."""
    return _maximum(_real(tensor).abs().nan_to_num(nan=0.0, posinf=0.0))


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """Distance of neighbouring numbers at ``magnitude``: eps · 2^⌊log2 magnitude⌋; 0 for integers."""
    if not dtype.is_floating_point and not dtype.is_complex:
        return 0.0
    info = torch.finfo(dtype)
    return float(info.eps) * 2.0 ** math.floor(math.log2(max(magnitude, float(info.tiny))))


def _own_errors(golden: Tensor, golden_after: Tensor, own: Tensor, own_after: Tensor) -> tuple[float, float, int]:
    """Errors before and after in the programs' own dtype, and how many elements the original leaves open."""
    before, after = _error(own, golden), _error(own_after, golden)
    undefined = _real(golden).isnan() & _real(golden_after).isnan()
    overflowed = ~undefined & before.isinf()
    # Where nothing is defined, the rewritten program must say so too, or say exactly what the original says.
    agreed = _real(own_after).isnan() | (_real(own_after) == _real(own))
    after = torch.where(undefined, torch.where(agreed, 0.0, math.inf).to(after), after)
    undecided = undefined | overflowed
    return (
        _maximum(before.masked_fill(undecided, 0.0)),
        _maximum(after.masked_fill(overflowed, 0.0)),
        int(undecided.sum()),
    )


def _unlike(name: str, sample: int, dtype: str, reason: str) -> Figure:
    return Figure(name, dtype, 0.0, math.inf, math.inf, None, None, None, 0, sample, reason)


def _error(value: Tensor, golden: Tensor) -> Tensor:
    """|value − golden| per element: 0 where both are NaN or the same infinity, inf where only one is."""
    if value.shape != golden.shape:
        return torch.full((), math.inf, dtype=torch.float64)
    value, golden = _real(value), _real(golden)
    same = (value == golden) | (value.isnan() & golden.isnan())
    return (value - golden).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0)


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _maximum(tensor: Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0
