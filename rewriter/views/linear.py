# SPDX-License-Identifier: Apache-2.0
"""The Linear view: y = x Wᵀ + b with W a parameter, under the spellings of the training IR.

    linear(x, W, b)      nn.Linear
    addmm(b, x, V)       transformers' Conv1D: V is stored [in, out], so W = Vᵀ  (transposed)
    x @ V + b, x @ V     written by hand, with V or with Wᵀ

Captures: `x` node; `weight` get_attr node, [out, in], or [in, out] where `transposed` is True; `bias` get_attr node of
shape [out] or None. The root is the node whose value is y.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from rewriter.facts import Facts, same_size
from rewriter.matcher import Match, Miss, explain, find
from rewriter.operators import NOOP_CAST, addmm, linear, matmul, swap_last
from rewriter.pattern import Optional, Var, pattern
from rewriter.predicates import Predicate, has_rank, parameter
from rewriter.views.base import View, with_captures

x, weight, bias = Var("x"), Var("weight", (parameter, has_rank(2))), Var("bias", (parameter, has_rank(1)))


def _bias_fits(facts: Facts, captures: Mapping[str, Any]) -> bool:
    if captures["bias"] is None:
        return True
    size = _shape(facts, captures["bias"])[0]
    return any(same_size(size, out) for out in _shape(facts, captures["weight"]))


# W may be read as it is or as a transposed view, which other nodes may use as well.
_kernel = weight | swap_last(weight).shared()
_product = x @ _kernel
_plain = linear(x, weight, Optional(bias)) | addmm(bias, x, _kernel) | _product
_fits = Predicate("a bias of one value per output", _bias_fits)

BARE = pattern("linear", _plain, where=(_fits,), transparent=(NOOP_CAST,))
BIASED = pattern("linear", _product + bias, where=(_fits,), transparent=(NOOP_CAST,))


def _find(facts: Facts) -> list[Match]:
    biased = find(facts, BIASED)
    inside = {node for match in biased for node in match.nodes}
    bare = [match for match in find(facts, BARE) if match.root not in inside]
    return sorted((_in_view_terms(match) for match in (*biased, *bare)), key=lambda match: facts.position(match.root))


def _explain(facts: Facts) -> list[Miss]:
    covered = {node for match in _find(facts) for node in match.nodes}
    return [miss for miss in explain(facts, BARE) if miss.node is not None and miss.node not in covered]


def _in_view_terms(match: Match) -> Match:
    captures = {name: match.captures.get(name) for name in ("x", "weight", "bias")}
    return with_captures(match, captures | {"transposed": _is_transposed(match)})


def _is_transposed(match: Match) -> bool:
    """Whether a matrix product reads the weight as stored (then it is [in, out])."""
    products = set(matmul.targets) | set(addmm.targets)
    return any(node.target in products and match["weight"] in node.all_input_nodes for node in match.nodes)


def features(facts: Facts, match: Match) -> tuple[int, int]:
    """(in_features, out_features) of a linear match."""
    rows, columns = (int(size) for size in _shape(facts, match["weight"]))
    return (rows, columns) if match["transposed"] else (columns, rows)


def _shape(facts: Facts, node: Node) -> tuple[Any, ...]:
    return facts.shape(node) or ()


LINEAR = View("linear", _find, _explain)
