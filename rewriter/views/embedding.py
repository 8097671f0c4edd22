# SPDX-License-Identifier: Apache-2.0
"""The Embedding view: rows of a parameter looked up by integer ids.

Captures: `weight` get_attr node [rows, width]; `ids` node; `padding_idx` int or None. Embeddings that scale gradients
by frequency or ask for sparse gradients are left alone.
"""

from __future__ import annotations

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss, explain, find
from rewriter.operators import embedding
from rewriter.pattern import Const, Var, pattern
from rewriter.predicates import has_rank, parameter
from rewriter.views.base import View, with_captures

LOOKUP = pattern("embedding", embedding(Var("weight", (parameter, has_rank(2))), Var("ids"), Const("padding_idx")))


def _find(facts: Facts) -> list[Match]:
    return [_in_view_terms(match) for match in find(facts, LOOKUP)]


def _in_view_terms(match: Match) -> Match:
    # The schema's default, -1, stands for "no padding row".
    padding = match["padding_idx"]
    return with_captures(match, {**match.captures, "padding_idx": None if padding == -1 else padding})


def _explain(facts: Facts) -> list[Miss]:
    return [miss for miss in explain(facts, LOOKUP) if miss.node is not None]


EMBEDDING = View("embedding", _find, _explain)
