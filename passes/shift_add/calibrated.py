# SPDX-License-Identifier: Apache-2.0
"""What a site does with calibration: whether it is compensated, in which metric, under scaled inputs, at how many bits.

Linear layers are rounded in the metric of their inputs, E[x xᵀ]. The rows of an embedding are its outputs: there an
error costs what it costs at the outputs of the model, E[g gᵀ] of the gradient (`rewriter.curvature`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.calibration import Statistics
from rewriter.errors import PlanError
from rewriter.passes.shift_add import awq, compensate, mixed, modes
from rewriter.passes.shift_add.groups import WIDE
from rewriter.passes.shift_add.hessian import Metric
from rewriter.passes.shift_add.modes import Codes, Mode
from rewriter.rules import Site

if TYPE_CHECKING:
    from rewriter.passes.shift_add import ShiftAdd

INPUT_SCALE = "input_scale"
_OF_INPUTS = frozenset({"second_moment", "channel_moment"})


def settle(options: ShiftAdd, kind: str, site: Site, statistics: Statistics | None) -> dict[str, Any]:
    """Choices of a site: ``compensate`` and ``scaled`` (inputs), where they are on.

    Args:
        options: of the pass.
        kind: of statistics that is the site's metric; "" where there is none.
        site: to settle.
        statistics: of the calibration data, if there was any.

    Raises:
        PlanError: an option needs calibration data that is not there.
    """
    moment = _moment(kind, site, statistics)
    choice: dict[str, Any] = {}
    if options.awq and kind in ("second_moment", "channel_moment"):
        _demand(moment, "awq=True", site)
        choice["scaled"] = True
    if options.compensate is True:
        _demand(moment, "compensate=True", site)
    if options.compensate is not False and moment is not None:
        choice["compensate"] = True
    return choice


def share_bits(
    options: ShiftAdd,
    mean_bits: float,
    kind: str,
    sites: Sequence[tuple[Site, Tensor]],
    statistics: Statistics | None,
) -> list[int]:
    """Bits of each site (given with its weight ``[out, in]``), ``mean_bits`` on average.

    Raises:
        PlanError: without calibration data of a site.
    """
    scores = []
    for site, weight in sites:
        moment = _demand(_moment(kind, site, statistics), f"mean_bits={mean_bits:g}", site)
        scores.append(mixed.sensitivity(weight, _metric(options, moment)))
    sizes = [weight.numel() for _, weight in sites]
    return mixed.allocate(scores, sizes, mean_bits, least=options.least_bits)


@dataclass(frozen=True, eq=False)
class Scaled:
    """Codes of W diag s together with 1/s ``[in]``: decodes to W. See `rewriter.passes.shift_add.awq`."""

    codes: Codes
    input_scale: Tensor

    def rows(self, start: int, end: int) -> Scaled:
        """The codes of rows ``start`` to ``end - 1``, sharing memory."""
        return Scaled(self.codes.rows(start, end), self.input_scale)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[out, in]`` in ``dtype`` (the scales' by default)."""
        dense = self.codes.decode(dtype)
        return dense * self.input_scale.to(dense.dtype)


def fit(
    options: ShiftAdd,
    mode: Mode,
    kind: str,
    site: Site,
    weight: Tensor,
    choice: Mapping[str, Any],
    statistics: Statistics | None,
) -> Mapping[str, Tensor]:
    """The stored tensors of a site by role, as ``choice`` says.

    Raises:
        PlanError: the plan was made with calibration data, and there is none of this site.
    """
    if not choice.get("compensate") and not choice.get("scaled"):
        return modes.fit(weight, mode, group=options.group).tensors()
    moment = _demand(_moment(kind, site, statistics), "the plan", site).to(device=weight.device, dtype=WIDE)
    inverse = None
    if choice.get("scaled"):
        inverse = awq.input_scale(weight, mode, moment, group=options.group)
        weight = (weight.to(WIDE) / inverse).to(weight.dtype)
        moment = moment * inverse * inverse.unsqueeze(-1)
    if choice.get("compensate"):
        fitted = compensate.fit(weight, mode, _metric(options, moment), group=options.group)
    else:
        fitted = modes.fit(weight, mode, group=options.group)
    scaled = {} if inverse is None else {INPUT_SCALE: inverse.to(weight.dtype)}
    return {**fitted.tensors(), **scaled}


def _metric(options: ShiftAdd, moment: Tensor) -> Metric:
    return Metric.of(moment, damping=options.damping, act_order=options.act_order)


def _moment(kind: str, site: Site, statistics: Statistics | None) -> Tensor | None:
    return None if statistics is None or not kind else statistics.get(kind, site.paths)


def _demand(moment: Tensor | None, what: str, site: Site) -> Tensor:
    if moment is not None:
        return moment
    raise PlanError(
        f"{site.rule.name} at {site.address.path}: {what} needs calibration data of this site; give calibration= some "
        "inputs of the model, leave the option at its default, or protect the site with select={path: None}"
    )
