# SPDX-License-Identifier: Apache-2.0
"""The GLU view: act(gate) · up with gate and up two linears of one input, or the two halves of one linear.

    gate = Wg x + bg,  up = Wu x + bu                  gate_proj and up_proj
    [gate, up] = W x + b, split in two halves          gate_up_proj (packed)

act is silu (SwiGLU), gelu or gelu_tanh (GeGLU), relu (ReGLU) or sigmoid (the original GLU), each as its operator or
written out where a view knows it.

Captures:
    x           node the linears read
    gate, up    matches of the linear view; None where packed
    packed      match of the linear view; None where there are two linears
    gate_first  bool; whether the gate is the first half of a packed linear; None where there are two linears
    activation  ``"silu" | "gelu" | "gelu_tanh" | "relu" | "sigmoid"``
    activated   the node whose value is act(gate)

The root is the value of act(gate) · up. The match consists of the product, the activation and the split; the linears
are its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss
from rewriter.operators import ALIAS, EVAL_DROPOUT, NOOP_CAST, mul
from rewriter.views.base import View, miss_at
from rewriter.views.gelu import GELU
from rewriter.views.linear import LINEAR

aten = torch.ops.aten
_SINGLE = {aten.silu.default: "silu", aten.relu.default: "relu", aten.sigmoid.default: "sigmoid"}
_THROUGH = (NOOP_CAST, ALIAS, EVAL_DROPOUT)
_HALVES = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)

# (name, the node it is a function of, the nodes it consists of)
Activation = tuple[str, Node, tuple[Node, ...]]
# (the linear, which half of it or None for all, the nodes in between)
Part = tuple[Match, int | None, tuple[Node, ...]]


def _find(facts: Facts) -> list[Match]:
    return [found for found in _judge(facts) if isinstance(found, Match)]


def _explain(facts: Facts) -> list[Miss]:
    return [found for found in _judge(facts) if isinstance(found, Miss)]


def _judge(facts: Facts) -> Iterator[Match | Miss]:
    """Every product of an activation with another value: as a GLU, or as the reason why it is none."""
    activations = _activations(facts)
    if not activations:
        return
    linears = {match.root: match for match in LINEAR.find(facts)}
    inside = {node for name, _, nodes in activations.values() for node in nodes if name.startswith("gelu")}
    for node in _products(facts):
        factors = [value for value in node.all_input_nodes if _behind(facts, value)[0] in activations]
        if node in inside or not factors or len(node.all_input_nodes) != 2:
            continue
        results = [_glu(facts, node, factor, activations, linears) for factor in factors]
        yield next((result for result in results if isinstance(result, Match)), results[0])


def _products(facts: Facts) -> list[Node]:
    return sorted(n for target in mul.targets for n in facts.graph.find_nodes(op="call_function", target=target))


def _activations(facts: Facts) -> dict[Node, Activation]:
    """Node -> the activation whose value it is."""
    found: dict[Node, Activation] = {}
    for target, name in _SINGLE.items():
        for node in facts.graph.find_nodes(op="call_function", target=target):
            found[node] = (name, node.all_input_nodes[0], (node,))
    for match in GELU.find(facts):
        name = "gelu" if match["approximate"] == "none" else "gelu_tanh"
        found[match.root] = (name, match["x"], match.nodes)
    return found


def _glu(
    facts: Facts, root: Node, factor: Node, activations: Mapping[Node, Activation], linears: Mapping[Node, Match]
) -> Match | Miss:
    """The GLU whose root is this product and whose gate is this factor, or why there is none."""
    activated, passed = _behind(facts, factor)
    name, argument, nodes = activations[activated]
    other = next(value for value in root.all_input_nodes if value is not factor)
    gate, up = _part(facts, argument, linears), _part(facts, other, linears)
    if gate is None:
        return miss_at(facts, "glu", root, f"what {name} is taken of is not a linear, or half of one", len(nodes))
    if up is None:
        alone = f"what {name} is multiplied by is not a linear, or half of one"
        return miss_at(facts, "glu", root, alone, len(nodes) + 1)
    mismatch = _mismatch(gate, up)
    if mismatch is not None:
        return miss_at(facts, "glu", root, mismatch, len(nodes) + 2)
    packed = gate[1] is not None
    captures: dict[str, Any] = {
        "x": gate[0]["x"],
        "gate": None if packed else gate[0],
        "up": None if packed else up[0],
        "packed": gate[0] if packed else None,
        "gate_first": gate[1] == 0 if packed else None,
        "activation": name,
        "activated": activated,
    }
    everything = tuple(sorted({root, *nodes, *passed, *gate[2], *up[2]}))
    return Match("glu", root, MappingProxyType(captures), everything, outputs=(root,))


def _mismatch(gate: Part, up: Part) -> str | None:
    """Why two parts of linears are no gate and up; None if they are."""
    if (gate[1] is None) != (up[1] is None):
        return "one factor is a linear and the other is half of one"
    if gate[1] is None:
        if gate[0].root is up[0].root:
            return "the gate and what it is multiplied by are one value"
        return None if gate[0]["x"] is up[0]["x"] else "the linears of gate and up have different inputs"
    if gate[0].root is not up[0].root:
        return "the factors are halves of two linears"
    return None if {gate[1], up[1]} == {0, 1} else "both factors are one half of the linear"


def _part(facts: Facts, value: Node, linears: Mapping[Node, Match]) -> Part | None:
    """The linear a value is the result of, or one of the two halves of."""
    node, passed = _behind(facts, value)
    if node in linears:
        return linears[node], None, passed
    if node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return None
    split, index = node.args[0], node.args[1]
    if split.target not in _HALVES or not isinstance(index, int):
        return None
    source, further = _behind(facts, split.all_input_nodes[0])
    halves = split.meta.get("val")
    if source not in linears or not isinstance(halves, (list, tuple)) or len(halves) != 2:
        return None
    first, second = (half.shape[-1] for half in halves)
    width = (facts.shape(source) or (0,))[-1]
    # The halves of another dimension than the last have the full width.
    return (linears[source], index % 2, (*passed, node, split, *further)) if first == second != width else None


def _behind(facts: Facts, value: Node) -> tuple[Node, tuple[Node, ...]]:
    """The value behind nodes that change nothing, and these nodes."""
    passed: list[Node] = []
    while value.op == "call_function" and any(
        value.target in kind.targets and kind.test(facts, value) for kind in _THROUGH
    ):
        passed.append(value)
        value = value.all_input_nodes[0]
    return value, tuple(passed)


GLU = View("glu", _find, _explain)
