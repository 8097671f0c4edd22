# SPDX-License-Identifier: Apache-2.0
"""sdpa(q, k, v, M)  =  sdpa(q, k, v, is_causal=True)   where M shows query i exactly the keys j ≤ i
   sdpa(q, k, v, M)  =  sdpa(q, k, v)                   where M shows every query every key

In both cases every row sees a key, without which the two sides differ by whole units.
"""  # fmt: skip

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from rewriter import legality
from rewriter.editing import Editor
from rewriter.facts import same_size
from rewriter.masks import MaskKind, classify, unknown
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Rule
from rewriter.views import ATTENTION
from rewriter.views.base import with_captures

aten = torch.ops.aten


class FuseMask(Rule):
    """A mask the operator has a flag for is not computed and not read."""

    name: ClassVar[str] = "fuse.mask"
    role: ClassVar[str] = "attention mask"
    contract: ClassVar[Contract] = EXACT

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        kinds: dict[Node, MaskKind] = {}
        matches = []
        for match in ATTENTION.find(program):
            mask = match["mask"]
            if match["spelling"] != "sdpa" or mask is None:
                continue
            if mask not in kinds:  # layers share their masks
                kinds[mask] = _kind(program, match)
            matches.append(with_captures(match, {**match.captures, "kind": kinds[mask]}, "attention mask"))
        return matches, ()

    def refusal(self, program: Program, match: Match) -> str | None:
        kind = match["kind"]
        if kind.kind not in ("causal", "full"):
            return f"the mask is {kind}"
        if kind.kind == "causal" and not _square(program, match):
            return "there may be more keys than queries: the operator would align the triangle to the first"
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        facts = edit.program.facts
        given = facts.arguments(match.root)
        causal = match["kind"].kind == "causal"
        new = edit.call(
            aten.scaled_dot_product_attention.default,
            match["q"],
            match["k"],
            match["v"],
            is_causal=causal,
            scale=given["scale"],
            enable_gqa=given["enable_gqa"],
        )
        return {match.root: new}


def _kind(program: Program, match: Match) -> MaskKind:
    if match["is_causal"]:
        return unknown("the operator is causal, too")
    if match["dropout_p"] > 0:
        return unknown("the operator drops out")
    return classify(program.facts, match["mask"], at=match.root)


def _square(program: Program, match: Match) -> bool:
    """As many queries as keys, whatever the input."""
    q, k, mask = (program.facts.shape(match[name]) or () for name in ("q", "k", "mask"))
    return same_size(q[-2], k[-2]) and same_size(q[-2], mask[-2]) and same_size(k[-2], mask[-1])
