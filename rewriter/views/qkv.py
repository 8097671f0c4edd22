# SPDX-License-Identifier: Apache-2.0
"""The QKV view: two or three linears of one input whose results become q, k and v of one attention.

    q = x Wqᵀ + bq,  k = x Wkᵀ + bk,  v = x Wvᵀ + bv   is   x [Wq; Wk; Wv]ᵀ + [bq; bk; bv], split

All weights are stored the same way, and all of the linears have a bias or none. Between a linear and the attention may
stand what works on heads: reshapes, transposes, rotary embedding, norms written out, repetition of heads.

Captures: `x` node; `attention` its match; `q_linear`, `k_linear`, `v_linear` linear matches, None for one that has
another input (cross attention). The outputs are the linears' results in the order q, k, v.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch.fx import Node

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.schemas import base_name
from rewriter.views.attention import ATTENTION
from rewriter.views.base import View, miss_at
from rewriter.views.linear import LINEAR

ROLES = ("q", "k", "v")

# Head-wise work between a projection and the attention, by operator name.
_BETWEEN = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute contiguous clone alias expand"
    " slice select to _to_copy type_as add sub mul div neg cat stack cos sin pow mean rsqrt rms_norm layer_norm"
    " repeat_interleave getitem split split_with_sizes chunk unbind dropout".split()
)
# No projection is farther from its attention than this many nodes; others need not be followed to the end.
_REACH = 64

Feeds = Mapping[Node, frozenset[tuple[Node, str]]]


def _find(facts: Facts) -> list[Match]:
    groups, _ = _groups(facts)
    return groups


def _explain(facts: Facts) -> list[Miss]:
    _, misses = _groups(facts)
    return misses


def _groups(facts: Facts) -> tuple[list[Match], list[Miss]]:
    attentions = ATTENTION.find(facts)
    inputs = _inputs(attentions)
    fed: dict[tuple[Node, str], list[Match]] = {}
    for linear in LINEAR.find(facts):
        for place in _places_fed(facts, linear.root, inputs):
            fed.setdefault(place, []).append(linear)
    found: list[Match] = []
    misses: list[Miss] = []
    for attention in attentions:
        result = _group(facts, attention, {r: fed.get((attention.root, r), []) for r in ROLES})
        if isinstance(result, Match):
            found.append(result)
        else:
            misses.append(miss_at(facts, "qkv", attention.root, result))
    return sorted(found, key=lambda match: facts.position(match.root)), misses


def attentions_fed(facts: Facts, values: Iterable[Node]) -> set[Node]:
    """The roots of the attentions whose q, k or v one of ``values`` becomes, through head-wise work only."""
    inputs = _inputs(ATTENTION.find(facts))
    return {root for value in values for root, _ in _places_fed(facts, value, inputs)}


def _inputs(attentions: Iterable[Match]) -> dict[Node, set[tuple[Node, str]]]:
    """The (attention, role) pairs each value is read as."""
    inputs: dict[Node, set[tuple[Node, str]]] = {}
    for attention in attentions:
        for role in ROLES:
            inputs.setdefault(attention[role], set()).add((attention.root, role))
    return inputs


def _places_fed(facts: Facts, start: Node, inputs: Mapping[Node, set[tuple[Node, str]]]) -> set[tuple[Node, str]]:
    """The (attention, role) pairs a value becomes, through head-wise work only."""
    places: set[tuple[Node, str]] = set()
    seen = {start}
    pending = [start]
    while pending and len(seen) <= _REACH:
        node = pending.pop(0)
        places |= inputs.get(node, set())
        for user in facts.users(node):
            if user not in seen and base_name(user.target) in _BETWEEN:
                seen.add(user)
                pending.append(user)
    return places


def _group(facts: Facts, attention: Match, feeding: Mapping[str, list[Match]]) -> Match | str:
    """The group of one attention, or why there is none."""
    single = {role: linears[0] for role, linears in feeding.items() if len(linears) == 1}
    if len(single) < 2:
        return "fewer than two of q, k, v come from one linear each"
    if len({linear.root for linear in single.values()}) < len(single):
        return "q, k and v already come from one linear"
    by_input: dict[Node, list[str]] = {}
    for role, linear in single.items():
        by_input.setdefault(linear["x"], []).append(role)
    roles = max(by_input.values(), key=len)
    if len(roles) < 2:
        return "the linears of q, k and v have different inputs"
    members = {role: single[role] for role in roles}
    if len({linear["transposed"] for linear in members.values()}) > 1:
        return "the linears of q, k and v store their weights in different ways"
    if len({linear["bias"] is None for linear in members.values()}) > 1:
        return "some of the linears of q, k and v have a bias and some have none"
    return joined(members, attention)


def joined(members: Mapping[str, Match], attention: Match | None) -> Match:
    """Linears of one input, by role, as a match of this view; ``attention`` is the one they feed, where it is known."""
    linears = list(members.values())
    nodes = tuple(sorted(node for linear in linears for node in linear.nodes))
    captures = {f"{role}_linear": members.get(role) for role in ROLES}
    return Match(
        name="qkv",
        root=max(linear.root for linear in linears),
        captures=MappingProxyType({"x": linears[0]["x"], "attention": attention, **captures}),
        nodes=nodes,
        outputs=tuple(linear.root for linear in linears),
        casts=frozenset().union(*(linear.casts for linear in linears)),
        shared=frozenset().union(*(linear.shared for linear in linears)),
        location=linears[0].location,
    )


QKV = View("qkv", _find, _explain)
