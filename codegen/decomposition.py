# SPDX-License-Identifier: Apache-2.0
"""Inlining: the rewriter's operators are replaced by their aten references inside a captured graph.

Eager execution keeps one operator per site. A compiler that sees an operator as opaque (Inductor, MLIR) gets the
inlined graph instead, from one project-wide table: :func:`rewriter.kernels.spec.decompositions`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.errors import ExportError
from rewriter.kernels.spec import decompositions

Table = Mapping[OpOverload, Callable[..., Any]]

# What a new node takes from the node it replaces; ``val`` is its own.
_PROVENANCE = ("nn_module_stack", "stack_trace", "from_node", "custom", "seq_nr")


def inline(graph_module: fx.GraphModule, table: Table | None = None) -> fx.GraphModule:
    """A copy of the graph in which each operator of ``table`` is replaced by its reference's aten operators.

    Args:
        graph_module: a graph of the dialect, every node with ``meta["val"]``; not changed. Tensors are shared.
        table: operator -> reference (default: every registered rewriter operator).

    The copy works for the same symbolic shapes; new nodes carry the provenance of the node they come from. Bodies of
    higher-order operators are inlined too.

    Raises:
        ExportError: a node has no ``meta["val"]``, or a reference cannot be traced.
    """
    table = decompositions() if table is None else table
    inlined = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    inlined.meta = dict(graph_module.meta)
    for node in list(inlined.graph.nodes):
        if node.op == "get_attr":
            _inline_body(inlined, node, table)
        elif node.op == "call_function" and node.target in table:
            _splice(inlined.graph, node, _trace(node, table[node.target]))
    inlined.graph.lint()
    inlined.recompile()
    return inlined


def _inline_body(graph_module: fx.GraphModule, node: fx.Node, table: Table) -> None:
    name = str(node.target)
    body = getattr(graph_module, name, None) if "." not in name else None
    if isinstance(body, fx.GraphModule):
        setattr(graph_module, name, inline(body, table))


def _trace(node: fx.Node, reference: Callable[..., Any]) -> fx.Graph:
    """The reference as a graph over the node's operands (its ``all_input_nodes``, in order)."""
    operands = node.all_input_nodes
    values = _fake_values(node)

    def call(*flat: Any) -> Any:
        value_of = dict(zip(operands, flat, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: value_of[n])
        return reference(*args, **kwargs)

    # Tensors that the reference makes itself (arange of a symbolic length) have to be fake as well.
    mode = detect_fake_mode(values)
    try:
        # pre_dispatch keeps composite operators whole (linear, not t + mm), as the training IR does.
        with mode or nullcontext():
            return make_fx(call, tracing_mode="real", pre_dispatch=True)(*values).graph
    except Exception as reason:
        raise ExportError(f"the reference of {node.target} cannot be traced at {node.name!r}: {reason}") from reason


def _fake_values(node: fx.Node) -> list[Any]:
    """The operands' ``meta["val"]``, all in one fake mode (parameters may carry real tensors)."""
    missing = [n.name for n in node.all_input_nodes if "val" not in n.meta]
    if missing:
        raise ExportError(
            f"{', '.join(missing)} (operands of {node.name!r}) carry no meta['val']; capture the model again"
        )
    values = [n.meta["val"] for n in node.all_input_nodes]
    mode = detect_fake_mode(values) or FakeTensorMode()
    return [mode.from_tensor(v, static_shapes=True) if isinstance(v, Tensor) and not _is_fake(v) else v for v in values]


def _is_fake(value: Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _splice(graph: fx.Graph, node: fx.Node, body: fx.Graph) -> None:
    """Put ``body`` in the place of ``node``."""
    value_of: dict[fx.Node, fx.Node] = dict(zip(body.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    provenance = {key: node.meta[key] for key in _PROVENANCE if key in node.meta}
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "get_attr":
                raise ExportError(
                    f"the reference of {node.target} holds the constant {inner.target}; compute it in aten"
                )
            if inner.op in ("placeholder", "output"):
                continue
            value_of[inner] = graph.node_copy(inner, lambda n: value_of[n])
            value_of[inner].meta = {"val": inner.meta.get("val"), **provenance}
    result: Any = body.output_node().args[0]
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(value_of[result])
    else:  # an operator with several results: its users are getitem nodes
        for user in list(node.users):
            position: Any = user.args[1]
            user.replace_all_uses_with(value_of[result[position]])
            graph.erase_node(user)
    graph.erase_node(node)
