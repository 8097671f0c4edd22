# SPDX-License-Identifier: Apache-2.0
"""Tversky: linear layers and heads as similarities to prototypes on a bank of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from rewriter.errors import PlanError
from rewriter.kernels.tversky.reference import CONVENTIONS, DIFFERENCES, FORMS, INTERSECTIONS
from rewriter.passes.tversky import heads, rules
from rewriter.registry import nearest, register
from rewriter.rules import Contract, Pass, Rule

INITS: dict[str, type[rules.TverskyRule]] = {
    "low_rank": rules.LowRankRule,
    "signed_pair": rules.SignedPairRule,
    "sign_codes": rules.SignCodesRule,
    "bounded_head": heads.BoundedHeadRule,
    "single": rules.SingleRule,
}
SHARES = (None, "features", "embeddings")

# The only similarity that a linear layer equals.
_LINEAR = {"intersection": "product", "difference": "ignorematch", "form": "contrast"}


class _ByInit:
    """The contract of a pass is that of its initialisation; the class shows that of the default."""

    def __get__(self, one: Tversky | None, owner: type[Tversky]) -> Contract:
        return INITS[owner.init if one is None else one.init].contract


@register
@dataclass(frozen=True)
class Tversky(Pass):
    """Replace linear layers by similarities to prototypes: what they have in common less what tells them apart.

    Attributes:
        features: features per layer. low_rank: of the mirrored bank, stored; ``"auto"`` takes the fewest whose output
            error is within `max_error`, and leaves a layer alone where they take no less than its weight. single: both
            halves of the bank together, even; ``"auto"`` is two per input. The exact initialisations fix it.
        init: ``"low_rank"`` (CALIBRATED): the closest layer with fewer features, smaller than the dense one;
            ``"signed_pair"`` (EXACT): equal to any linear layer, saves nothing, the start of training; ``"sign_codes"``
            (EXACT): for weights that are signs times a magnitude per row or column; ``"bounded_head"`` (EXACT): a head
            behind a norm as a single pass, in float64; ``"single"`` (LEARNED): one pass, a third off until it is trained.
        share: ``"features"``: layers of equal input width have one bank; ``"embeddings"``: the prototypes of a tied
            head stay the token embeddings; None: neither.
        max_error: relative root-mean-square error of a layer's outputs that ``features="auto"`` may make.
        intersection: of common features: product, min, max, mean, gmean or softmin. All but single need the product.
        convention: ``"paper"``: per feature; ``"code"``: of the sums, as in the authors' program.
        difference: ``"ignorematch"`` or ``"subtractmatch"``; all inits but single need the first.
        form: ``"contrast"`` or ``"ratio"``; all inits but single need the first.
    """

    name: ClassVar[str] = "tversky"
    contract: ClassVar[Contract] = cast(Contract, _ByInit())
    features: int | str = "auto"
    init: str = "low_rank"
    share: str | None = None
    max_error: float = 0.05
    intersection: str = "product"
    convention: str = "paper"
    difference: str = "ignorematch"
    form: str = "contrast"

    def __post_init__(self) -> None:
        for what, name, known in (
            ("init", self.init, INITS),
            ("intersection", self.intersection, INTERSECTIONS),
            ("convention", self.convention, CONVENTIONS),
            ("difference", self.difference, DIFFERENCES),
            ("form", self.form, FORMS),
        ):
            if name not in known:
                raise PlanError(f"tversky: unknown {what} {name!r}{nearest(str(name), known)}; one of {', '.join(known)}")
        if self.share not in SHARES:
            raise PlanError(f'tversky: unknown share {self.share!r}; "features", "embeddings" or None')
        self._check_features()
        if not 0 < self.max_error < 1:
            raise PlanError(f"tversky: max_error={self.max_error} must lie between 0 and 1 (relative output error)")
        self._check_combination()

    def _check_features(self) -> None:
        k: Any = self.features
        if k != "auto" and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise PlanError(f'tversky: features={k!r} must be "auto" or an integer of at least 1')
        if k != "auto" and self.init not in ("low_rank", "single"):
            raise PlanError(f'tversky: init="{self.init}" fixes its features; leave features="auto"')
        if k != "auto" and self.init == "single" and k % 2:
            raise PlanError(f"tversky: features={k} must be even for a paired bank [G; −G]")

    def _check_combination(self) -> None:
        if self.init != "single":
            for option, value in _LINEAR.items():
                if getattr(self, option) != value:
                    raise PlanError(
                        f'tversky: init="{self.init}" starts from a linear layer, which only {option}="{value}" can equal; '
                        'init="single" takes any, and must be trained'
                    )
        if self.share is not None and self.init in ("sign_codes", "bounded_head"):
            raise PlanError(f'tversky: share="{self.share}" is for signed_pair, low_rank and single, not for {self.init}')
        if self.share == "features" and self.init == "single" and self.features != "auto":
            raise PlanError(
                'tversky: init="single" with fewer features takes them from each weight alone; '
                'share="features" needs features="auto" there'
            )
        if self.share == "embeddings" and self.init == "low_rank":
            raise PlanError(
                'tversky: share="embeddings" keeps the dense prototypes, low_rank replaces them by their scores; '
                "choose one of them"
            )

    def rules(self) -> tuple[Rule, ...]:
        return (INITS[self.init](self),)
