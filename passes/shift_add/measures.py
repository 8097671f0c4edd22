# SPDX-License-Identifier: Apache-2.0
"""What a ShiftAdd weight costs and how far it lies from the dense one: the one place that defines both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rewriter.narrow import stored_bytes
from rewriter.passes.shift_add.groups import row_chunk


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    """``‖W - Ŵ‖ / ‖W‖`` in the Frobenius norm, accumulated in float64; a zero weight gives 0 or infinity.

    Args:
        weight: dense matrix ``[out, in]``.
        decoded: its approximation, same shape.
    """
    if weight.shape != decoded.shape:
        raise ValueError(f"weights of shapes {list(weight.shape)} and {list(decoded.shape)} do not compare")
    error = energy = 0.0
    rows = row_chunk(weight, None)
    for w, d in zip(torch.split(weight.detach(), rows), torch.split(decoded.detach(), rows), strict=True):
        dense = w.to(torch.float64)
        error += float((dense - d.to(torch.float64)).norm()) ** 2
        energy += float(dense.norm()) ** 2
    if energy == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return float((error / energy) ** 0.5)


def errors(weight: Tensor, codes: _Codes, moment: Tensor | None) -> dict[str, float]:
    """Relative errors of a fitted weight, some rows at a time: the dense decoded matrix never exists as a whole.

    ``weight_error`` = ‖Δ‖ / ‖W‖, and where the inputs' second moment Σ = E[x xᵀ] ``[in, in]`` is known,
    ``output_error`` = √(tr ΔΣΔᵀ / tr WΣWᵀ), the relative root-mean-square error of x Wᵀ; Δ = W - Ŵ.
    """
    figures = {"weight_error": _ratio(weight, codes, lambda rows: rows.square().sum())}
    if moment is not None:
        wide = moment.to(torch.float64)
        figures["output_error"] = _ratio(weight, codes, lambda rows: ((rows @ wide) * rows).sum())
    return figures


def _ratio(weight: Tensor, codes: _Codes, energy: Callable[[Tensor], Tensor]) -> float:
    """√(Σ energy(Δ) / Σ energy(W)) over chunks of rows in float64; a zero weight gives 0 or infinity."""
    rows = row_chunk(weight, None)
    lost = total = 0.0
    for start in range(0, weight.shape[0], rows):
        dense = weight.detach()[start : start + rows].to(torch.float64)
        total += float(energy(dense))
        lost += float(energy(dense - codes.rows(start, start + rows).decode().to(torch.float64)))
    if total <= 0.0:
        return 0.0 if lost <= 0.0 else float("inf")
    return float((max(lost, 0.0) / total) ** 0.5)


class _Codes(Protocol):
    """A fitted weight, see `rewriter.passes.shift_add.codes`."""

    def rows(self, start: int, end: int) -> _Codes: ...

    def decode(self) -> Tensor: ...


def bits_per_weight(*stored: Tensor, weights: int) -> float:
    """Stored bits per weight of ``weights`` weights: codes, shifts, scales, tables together."""
    return 8 * sum(stored_bytes(t) for t in stored) / weights
