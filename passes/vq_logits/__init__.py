# SPDX-License-Identifier: Apache-2.0
"""VQ-logits: the output head as a codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.errors import PlanError
from rewriter.passes.vq_logits.rules import HeadRule
from rewriter.registry import nearest, register
from rewriter.rules import CALIBRATED, Contract, Pass, Rule

STRUCTURES = ("auto", "product", "tiers")
METRICS = ("auto", "plain", "whitened", "kl")
DIMS = (2, 3, 4, 6, 8)


@register
@dataclass(frozen=True)
class VQLogits(Pass):
    """Replace the vocabulary head by a codebook: logits from sums of table look-ups, or from clusters of tokens.

    Attributes:
        structure: ``"product"``: 256 codes per `dims` dimensions, every token keeps its identity; ``"tiers"``: frequent
            tokens keep their row, the rest share the rows of clusters; ``"auto"``: with calibration the smallest
            product codebook whose measured KL stays under `max_kl`, without it 256 codes per 4 dimensions.
        codes: codebook rows (tiers; "auto": one per ten tokens) or codes per group (product; "auto": 256).
        dims: dimensions per group of a product codebook; 2, 3, 4, 6 or 8.
        max_kl: KL(original ‖ rewritten) in nats per token that ``"auto"`` may spend on the head.
        singletons: tokens of tiers that keep their own row, or "auto".
        bias: a bias per token inside its cluster (tiers).
        metric: what "near" means when rows are clustered: plain, whitened (by calibration's second moment), kl, or auto.
    """

    name: ClassVar[str] = "vq_logits"
    contract: ClassVar[Contract] = CALIBRATED("clustering of the head's rows")
    structure: str = "auto"
    codes: int | str = "auto"
    dims: int = 4
    max_kl: float = 0.05
    singletons: int | str = "auto"
    bias: bool = True
    metric: str = "auto"

    def __post_init__(self) -> None:
        for what, name, known in (("structure", self.structure, STRUCTURES), ("metric", self.metric, METRICS)):
            if name not in known:
                raise PlanError(
                    f"vq_logits: unknown {what} {name!r}{nearest(str(name), known)}; one of {', '.join(known)}"
                )
        if self.dims not in DIMS:
            raise PlanError(f"vq_logits: dims={self.dims} must be one of {', '.join(map(str, DIMS))}")
        if not self.max_kl > 0:
            raise PlanError(f"vq_logits: max_kl={self.max_kl} must be positive (nats per token)")
        for what, value, least in (("codes", self.codes, 1), ("singletons", self.singletons, 0)):
            if value != "auto" and (not isinstance(value, int) or value < least):
                raise PlanError(f'vq_logits: {what}={value!r} must be "auto" or an integer of at least {least}')

    def rules(self) -> tuple[Rule, ...]:
        return (HeadRule(self),)
