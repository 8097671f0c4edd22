# SPDX-License-Identifier: Apache-2.0
"""VQ-logits: the output head as a codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.errors import PlanError
from rewriter.passes.vq_logits.rules import HeadRule
from rewriter.passes.vq_logits.structures import STRUCTURES as STRUCTURES
from rewriter.registry import nearest, register
from rewriter.rules import CALIBRATED, Contract, Pass, Rule

METRICS = ("auto", "plain", "whitened", "kl")
DIMS = (2, 3, 4, 6, 8)


@register
@dataclass(frozen=True)
class VQLogits(Pass):
    """Replace the vocabulary head by a codebook: logits from sums of table look-ups, or from clusters of tokens.

    Attributes:
        structure: ``"product"``: 256 codes per `dims` dimensions, every token keeps its identity; ``"tiers"``: frequent
            tokens keep their row, the rest share the rows of clusters; ``"pure"``: clusters only, all tokens of one are
            equally likely; ``"residual"``: rows are sums of one whole-row code from each of `stages`; ``"lowrank"``:
            a projection to `rank` dimensions, then a product codebook; ``"auto"``: with calibration the smallest
            product codebook (with some exact rows or none) whose measured KL stays under `max_kl`, without it 256
            codes per 4 dimensions.
        codes: codebook rows (tiers, pure; "auto": one per ten tokens), codes per stage (residual; "auto": 256) or
            codes per group (product, lowrank; "auto": 256).
        dims: dimensions per group of a product codebook; 2, 3, 4, 6 or 8.
        exact_rows: tokens that keep their own row beside a product codebook: those whose coded rows would cost most.
            "auto": none, but ``structure="auto"`` tries one per 256 and one per 64 tokens.
        rotate: a learned rotation of the hidden state before a product codebook; it is stored too, in 2·d² bytes.
        rank: dimensions that ``"lowrank"`` keeps; "auto": half of the width.
        stages: codebooks that ``"residual"`` adds up.
        max_kl: KL(original ‖ rewritten) in nats per token that ``"auto"`` may spend on the head.
        singletons: tokens of tiers that keep their own row, or "auto".
        bias: a bias per token inside its cluster (tiers; the dense head's own bias is always kept).
        metric: what "near" means when rows are clustered: plain, whitened (by calibration's second moment), kl, or auto.
    """

    name: ClassVar[str] = "vq_logits"
    contract: ClassVar[Contract] = CALIBRATED("clustering of the head's rows")
    structure: str = "auto"
    codes: int | str = "auto"
    dims: int = 4
    exact_rows: int | str = "auto"
    rotate: bool = False
    rank: int | str = "auto"
    stages: int = 2
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
        sizes = {"codes": (self.codes, 1), "singletons": (self.singletons, 0)}
        sizes |= {"exact_rows": (self.exact_rows, 0), "rank": (self.rank, 1)}
        for what, (value, least) in sizes.items():
            if value != "auto" and (not isinstance(value, int) or value < least):
                raise PlanError(f'vq_logits: {what}={value!r} must be "auto" or an integer of at least {least}')
        if not isinstance(self.stages, int) or self.stages < 1:
            raise PlanError(f"vq_logits: stages={self.stages!r} must be an integer of at least 1")
        self._check_that_options_fit_the_structure()

    def _check_that_options_fit_the_structure(self) -> None:
        """An option that would do nothing is an error."""
        asked = {
            "exact_rows": (self.exact_rows not in ("auto", 0), ("auto", "product")),
            "rotate": (self.rotate, ("product",)),
            "rank": (self.rank != "auto", ("lowrank",)),
            "stages": (self.stages != 2, ("residual",)),
            "singletons": (self.singletons != "auto", ("tiers",)),
            "bias": (not self.bias, ("tiers",)),
            "dims": (self.dims != 4, ("auto", "product", "lowrank")),
        }
        for option, (given, structures) in asked.items():
            if given and self.structure not in structures:
                raise PlanError(
                    f"vq_logits: {option}={getattr(self, option)!r} does nothing with structure={self.structure!r}; "
                    f"use structure={' or '.join(map(repr, structures))}"
                )
        if self.rotate and self.exact_rows not in ("auto", 0):
            raise PlanError("vq_logits: exact_rows and rotate exclude each other; choose one of them")

    def rules(self) -> tuple[Rule, ...]:
        return (HeadRule(self),)
