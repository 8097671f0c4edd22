# SPDX-License-Identifier: Apache-2.0
"""x Wqᵀ + bq, x Wkᵀ + bk, x Wvᵀ + bv  =  split(x [Wq; Wk; Wv]ᵀ + [bq; bk; bv])"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rewriter.matcher import Match, Miss
from rewriter.passes.fuse.merge import MergeLinears
from rewriter.program import Program
from rewriter.rules import provenance
from rewriter.views import QKV
from rewriter.views.qkv import attentions_fed, joined


class FuseQKV(MergeLinears):
    """q, k and v of one attention, or two of them where the third has another input."""

    name: ClassVar[str] = "fuse.qkv"
    role: ClassVar[str] = "qkv"
    members: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        made = [node for node in program.graph.nodes if provenance(node).get("rule") == self.name]
        done = attentions_fed(program.facts, made) if made else ()  # one linear, because this rule was here
        misses = [m for m in QKV.explain(program) if m.node is not None and m.node not in done]
        return QKV.find(program), misses

    def regroup(self, linears: Mapping[str, Match]) -> Match:
        return joined(linears, None)

    def module_name(self, members: Sequence[str]) -> str:
        return "".join(members) + "_proj"

    def members_at(self, path: str) -> Sequence[str]:
        return [m for m in self.members if m in path.rpartition(".")[2].removesuffix("_proj")]
