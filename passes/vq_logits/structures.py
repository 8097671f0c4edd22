# SPDX-License-Identifier: Apache-2.0
"""From a plan's choice to a fitted head: which structure has which tensors, and who fits it.

A choice is what the plan stores of a site: ``structure``, its sizes, and what an old plan does not say is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from rewriter.errors import PlanError
from rewriter.passes.vq_logits.exact import fit_exact
from rewriter.passes.vq_logits.heads import (
    CodebookHead,
    ExactHead,
    ProductHead,
    ProjectedHead,
    ResidualHead,
    TiersHead,
)
from rewriter.passes.vq_logits.product import fit_product
from rewriter.passes.vq_logits.projected import fit_projected
from rewriter.passes.vq_logits.residual import fit_residual
from rewriter.passes.vq_logits.tiers import fit_tiers

if TYPE_CHECKING:
    from rewriter.passes.vq_logits import VQLogits

STRUCTURES = ("auto", "product", "tiers", "pure", "residual", "lowrank")
_TOKENS_PER_CODE = 10  # of tiers and of a pure codebook, where nobody says otherwise
_CODES_PER_GROUP = 256  # of product and residual codebooks: one byte each
# Exact rows that structure="auto" tries, as tokens per row: 0, 0.4 and 1.6 % of the dense head's bytes.
_TOKENS_PER_EXACT_ROW = (256, 64)


def settle(options: VQLogits, tokens: int, width: int) -> dict[str, Any]:
    """The choice that the options make without measuring anything.

    Raises:
        PlanError: more codes or rows than tokens, or a rank that does not fit the width.
    """
    o = options
    if o.structure in ("tiers", "pure"):
        codes = o.codes if isinstance(o.codes, int) else max(1, tokens // _TOKENS_PER_CODE)
        return {"structure": o.structure, "codes": _checked(codes, tokens)}
    codes = _checked(o.codes if isinstance(o.codes, int) else min(_CODES_PER_GROUP, tokens), tokens)
    if o.structure == "residual":
        return {"structure": "residual", "codes": codes, "stages": o.stages}
    if o.structure == "lowrank":
        rank = o.rank if isinstance(o.rank, int) else max(o.dims, width // 2)
        if not min(o.dims, width) <= rank <= width:
            raise PlanError(f"vq_logits: rank={rank} for a head of width {width}: give {o.dims} to {width}")
        return {"structure": "lowrank", "codes": codes, "dims": o.dims, "rank": rank}
    rows = o.exact_rows if isinstance(o.exact_rows, int) else 0
    if rows > tokens:
        raise PlanError(f"vq_logits: exact_rows={rows} is more than the {tokens} tokens of the head; ask for fewer")
    choice: dict[str, Any] = {"structure": "product", "codes": codes, "dims": o.dims}
    return choice | ({"exact_rows": rows} if rows else {}) | ({"rotate": True} if o.rotate else {})


def exact_rows_to_try(options: VQLogits, tokens: int) -> tuple[int, ...]:
    """Numbers of exact rows among which ``structure="auto"`` chooses."""
    if isinstance(options.exact_rows, int):
        return (options.exact_rows,)
    return tuple(sorted({0, *(tokens // per for per in _TOKENS_PER_EXACT_ROW)}))


def head_type(choice: Mapping[str, Any]) -> type[CodebookHead]:
    """The kind of head a choice stands for."""
    structure = choice["structure"]
    if structure in ("tiers", "pure"):
        return TiersHead
    if structure == "residual":
        return ResidualHead
    if structure == "lowrank" or choice.get("rotate"):
        return ProjectedHead
    return ExactHead if choice.get("exact_rows") else ProductHead


def roles(options: VQLogits, choice: Mapping[str, Any]) -> tuple[str, ...]:
    """Roles of the head's tensors, in the order of its fields."""
    kind = head_type(choice)
    biased = choice["has_bias"] or (choice["structure"] == "tiers" and options.bias)
    fields = (f.name for f in dataclasses.fields(kind) if f.name != "singletons")
    return tuple(name for name in fields if biased or name not in ("bias", "token_bias"))


def fit(options: VQLogits, choice: Mapping[str, Any], weight: Tensor, known: Mapping[str, Any]) -> CodebookHead:
    """The head of this choice; ``known``: statistics, the dense bias and the generator, as the fits take them."""
    codes, shared = choice["codes"], {"metric": options.metric, **known}
    match choice["structure"]:
        case "tiers":
            singletons = cast(Any, options.singletons)
            return fit_tiers(weight, codes=codes, singletons=singletons, bias=options.bias, **shared)
        case "pure":
            return fit_tiers(weight, codes=codes, singletons=0, bias=False, **shared)
        case "residual":
            return fit_residual(weight, codes=codes, stages=choice["stages"], **shared)
        case "lowrank":
            return fit_projected(weight, codes=codes, dims=choice["dims"], rank=choice["rank"], **shared)
    if choice.get("rotate"):
        return fit_projected(weight, codes=codes, dims=choice["dims"], rank=weight.shape[1], **shared)
    if choice.get("exact_rows"):
        return fit_exact(weight, codes=codes, dims=choice["dims"], rows=choice["exact_rows"], **shared)
    return fit_product(weight, codes=codes, dims=choice["dims"], **shared)


def _checked(codes: int, tokens: int) -> int:
    if codes > tokens:
        raise PlanError(f"vq_logits: codes={codes} is more than the {tokens} tokens of the head; ask for fewer")
    return codes
