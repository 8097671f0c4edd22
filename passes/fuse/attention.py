# SPDX-License-Identifier: Apache-2.0
"""softmax(scale · q kᵀ + bias + mask) v  =  sdpa(q, k, v, attn_mask=bias + mask, scale=scale)

A mask that fills hidden scores with a number c is added as (c where hidden, else 0): where a row sees a key, exp(c + s)
vanishes beside its maximum. A row that sees none is uniform and without gradient when filled, but not when added to;
so every row has to see a key, whatever the inputs (`rewriter.masks`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import same_size
from rewriter.masks import classify
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.schemas import named_arguments
from rewriter.views import ATTENTION

aten = torch.ops.aten
_MASK_DEPTH = 200  # nodes of a mask's computation that are searched for -inf
_HIDES = -1e9  # beside any other score its exponential is zero


class FuseAttention(Rule):
    """The mask keeps its value: an additive one stays additive, so rows that see no key come out as before."""

    name: ClassVar[str] = "fuse.attention"
    role: ClassVar[str] = "attention"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        matches = [m for m in ATTENTION.find(program) if m["spelling"] == "eager"]
        return matches, [m for m in ATTENTION.explain(program) if m.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        if match["dropout_p"] > 0:
            return f"drops out with p={match['dropout_p']}: the operator would draw other random numbers"
        if match["softcap"] is not None:
            return f"caps the scores with {match['softcap']:g} · tanh, which the operator cannot do"
        if (reason := legality.refusal(program.facts, match)) is not None:
            return str(reason)
        for name in ("bias", "mask"):
            if (reason_ := _term_refusal(program, match, name)) is not None:
                return reason_
        return _sees_nothing(program, match)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        q, k, v = (_split(edit, match, match[name]) for name in ("q", "k", "v"))
        terms = [term for term in (_bias(edit, match), _mask(edit, match)) if term is not None]
        mask = edit.call(aten.add.Tensor, *terms) if len(terms) == 2 else next(iter(terms), None)
        new = edit.call(aten.scaled_dot_product_attention.default, q, k, v, mask, scale=match["scale"])
        if match["split"] is not None:
            new = edit.call(aten.flatten.using_ints, new, 0, 1)
        return {match.root: new}


def _term_refusal(program: Program, match: Match, name: str) -> str | None:
    """Why bias or mask cannot be the operator's mask."""
    facts, term = program.facts, match[name]
    if term is None:
        return None
    if len(facts.shape(term) or ()) < 2:
        return f"the {name} has fewer than two dimensions, which the operator does not take"
    added = name == "bias" or match["mask_form"] == "added"
    if added and facts.dtype(term) != facts.dtype(match["q"]):
        return f"the {name} is {facts.dtype(term)}, q is {facts.dtype(match['q'])}: adding them widens the scores"
    return None


def _sees_nothing(program: Program, match: Match) -> str | None:
    """Why a row that sees no key would come out differently, if there may be one."""
    form, fill, mask = match["mask_form"], match["fill"], match["mask"]
    if form is None or (form == "added" and not _holds_minus_infinity(mask)):
        return None
    if form == "added":
        what = "the mask holds -inf: a row that sees no key is NaN as written and zero in the operator"
    else:
        lowest = torch.finfo(program.facts.dtype(match["q"]) or torch.float32).min
        if fill > _HIDES and fill != lowest:
            return f"hidden scores become {fill:g}, which is not far below every other score"
        what = f"hidden scores become {fill:g}: a row that sees no key has no gradient as written"
    kind = classify(program.facts, mask, form, at=match.root)
    return None if kind.every_row_sees_a_key else f"{what} (the mask is {kind})"


def _split(edit: Editor, match: Match, value: Node) -> Node:
    """[batch · heads, ...] as [batch, heads, ...], where the scores are viewed so."""
    if match["split"] is None:
        return value
    _, sizes = named_arguments(match["split"]).values()
    return edit.call(aten.unflatten.int, value, 0, list(sizes[:2]))


def _bias(edit: Editor, match: Match) -> Node | None:
    bias = match["bias"]
    if bias is None:
        return None
    if match["bias_scale"] != 1.0:
        bias = edit.call(aten.mul.Tensor, bias, match["bias_scale"])
    # One bias for all heads and batches needs no splitting: it broadcasts as it is.
    shape, products = bias.meta["val"].shape, match["q"].meta["val"].shape
    each = match["blended"] and len(shape) == len(products) == 3 and same_size(shape[0], products[0])
    return _split(edit, match, bias) if each else bias


def _mask(edit: Editor, match: Match) -> Node | None:
    """The mask as something to add: itself, or the fill where it hides and 0 elsewhere."""
    mask: Node | None = match["mask"]
    form = match["mask_form"]
    if form in (None, "added"):
        return mask
    zero = edit.call(aten.new_zeros.default, match["q"], [])
    if form == "keep":
        return edit.call(aten.where.ScalarOther, mask, zero, match["fill"])
    return edit.call(aten.where.ScalarSelf, mask, match["fill"], zero)


def _holds_minus_infinity(mask: Node) -> bool:
    """Whether -inf is written anywhere in the computation of the mask, as a literal."""
    pending, seen = [mask], {mask}
    while pending and len(seen) < _MASK_DEPTH:
        node = pending.pop()
        if any(isinstance(a, float) and math.isinf(a) and a < 0 for a in (*node.args, *node.kwargs.values())):
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending += new
    return False
