# SPDX-License-Identifier: Apache-2.0
"""The metric a weight is rounded in: H = E[x xᵀ], damped, with the order and the factor that rounding in sequence needs.

    ‖X(W - Ŵ)ᵀ‖² / rows = Σ_o e_o H e_oᵀ,  e = W - Ŵ,  H = E[x xᵀ] + λ·mean(diag E[x xᵀ])·I

Every row of the weight has a cost of its own under one common H. Rounding column j and moving the columns after it to
where they make up best for the error needs row j of U, the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU): the update is
w_k -= (w_j - ŵ_j) / U_jj · U_jk. The order decides who can make up for whom: columns of large input go first, while
many others are still free.

Frantar et al., "GPTQ" / "OPTQ", 2022; the order ("act-order") and the groups fixed beforehand that it needs ("static
groups") come from its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.passes.shift_add.groups import WIDE

MAX_DAMPING = 1.0  # more would no longer be the metric that was asked for


@dataclass(frozen=True, eq=False)
class Metric:
    """What rounding errors of one weight's rows cost.

    Attributes:
        form: ``[in, in]`` float64, H: symmetric positive definite.
        order: ``[in]`` int64, columns in the order they are rounded in.
        factor: ``[in, in]`` float64, U for H with rows and columns in that order: upper triangular.
        sorted: whether the order follows the inputs' energy instead of the columns' numbers.
    """

    form: Tensor
    order: Tensor
    factor: Tensor
    sorted: bool

    @classmethod
    def of(cls, moment: Tensor, *, damping: float = 0.01, act_order: bool = True) -> Metric:
        """The metric of a second moment ``[in, in]``.

        An input that was always zero gets the mean energy: its errors must cost something, or its weights would be
        moved at will. Where rounding of a nearly singular moment defeats the factorisation, damping grows tenfold.

        Raises:
            PlanError: the damping is negative, or the moment is not a finite square matrix.
        """
        if damping < 0:
            raise PlanError(f"shift_add: damping={damping} must not be negative (a share of the mean input energy)")
        square = moment.dim() == 2 and moment.shape[0] == moment.shape[1]
        if not square or not bool(torch.isfinite(moment).all()) or bool((moment.diagonal() < 0).any()):
            raise PlanError(
                f"shift_add: the second moment {list(moment.shape)} of the calibration data is no finite square "
                "matrix E[x xᵀ]; look for NaN or infinity in the activations of the original model"
            )
        form = moment.to(WIDE)
        form = (form + form.t()) / 2
        diagonal = form.diagonal()
        mean = float(diagonal.mean())
        mean = mean if mean > 0 else 1.0
        form = form + torch.diag(torch.where(diagonal > 0, 0.0, mean))
        order = torch.arange(len(form), device=form.device)
        if act_order:
            order = torch.argsort(form.diagonal(), descending=True, stable=True)
        share = damping
        while share <= max(damping, MAX_DAMPING):
            damped = form + share * mean * torch.eye(len(form), dtype=WIDE, device=form.device)
            factor = _factor(damped[order][:, order])
            if factor is not None:
                return cls(damped, order, factor, act_order)
            share = max(10 * share, 1e-6)
        raise PlanError(
            "shift_add: the second moment of the calibration data has negative eigenvalues; calibrate again"
        )

    def cost(self, error: Tensor) -> Tensor:
        """``e H eᵀ`` of each row of ``error [rows, in]``: ``[rows]`` float64."""
        return ((error @ self.form) * error).sum(-1)


def _factor(form: Tensor) -> Tensor | None:
    """U upper triangular with ``form⁻¹ = UᵀU``, or None where ``form`` is numerically not positive definite.

    ``form = L Lᵀ`` of the reversed rows and columns gives U = (reversed L)⁻¹ without inverting ``form`` itself.
    """
    lower, fault = torch.linalg.cholesky_ex(form.flip(0, 1))
    if bool(fault.any()) or not bool(torch.isfinite(lower).all()):
        return None
    unit = torch.eye(len(form), dtype=form.dtype, device=form.device)
    # form = V Vᵀ with V = reversed L upper triangular, so form⁻¹ = V⁻ᵀV⁻¹ = UᵀU with U = V⁻¹.
    return torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
