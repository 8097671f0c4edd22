# SPDX-License-Identifier: Apache-2.0
"""act(x Wgᵀ + bg) · (x Wuᵀ + bu)  =  act(g) · u,  [g, u] = split(x [Wg; Wu]ᵀ + [bg; bu])"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from rewriter.matcher import Match, Miss
from rewriter.passes.fuse.merge import MergeLinears
from rewriter.program import Program
from rewriter.views import GLU
from rewriter.views.base import miss_at


class FuseGateUp(MergeLinears):
    """Gate and up of one gated linear unit; one whose linear is packed already is left alone."""

    name: ClassVar[str] = "fuse.gate_up"
    role: ClassVar[str] = "gate_up"
    members: ClassVar[tuple[str, ...]] = ("gate", "up")

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        matches: list[Match] = []
        misses = [m for m in GLU.explain(program) if m.node is not None]
        seen: set[tuple[object, object]] = set()
        for unit in GLU.find(program):
            gate, up = unit["gate"], unit["up"]
            if unit["packed"] is not None or (gate.root, up.root) in seen:
                continue
            seen.add((gate.root, up.root))
            if (reason := _unlike(gate, up)) is not None:
                misses.append(miss_at(program.facts, self.name, unit.root, reason, depth=len(unit.nodes)))
            else:
                matches.append(self.regroup({"gate": gate, "up": up}))
        return sorted(matches, key=lambda match: program.facts.position(match.root)), misses

    def regroup(self, linears: Mapping[str, Match]) -> Match:
        parts = [linears[name] for name in self.members]
        captures = {"x": parts[0]["x"], **{f"{name}_linear": linears[name] for name in self.members}}
        return Match(
            name=self.role,
            root=max(part.root for part in parts),
            captures=MappingProxyType(captures),
            nodes=tuple(sorted(node for part in parts for node in part.nodes)),
            outputs=tuple(part.root for part in parts),
            casts=frozenset().union(*(part.casts for part in parts)),
            shared=frozenset().union(*(part.shared for part in parts)),
        )

    def module_name(self, members: Sequence[str]) -> str:
        return "gate_up_proj"

    def members_at(self, path: str) -> Sequence[str]:
        return self.members


def _unlike(gate: Match, up: Match) -> str | None:
    """Why two linears cannot be one matrix; None if they can."""
    if gate["transposed"] != up["transposed"]:
        return "gate and up store their weights in different ways"
    if (gate["bias"] is None) != (up["bias"] is None):
        return "one of gate and up has a bias and one has none"
    return None
