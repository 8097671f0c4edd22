# SPDX-License-Identifier: Apache-2.0
"""Captures small models as the graph dialect: training IR, flat tensor inputs, one flat list of outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree


def capture_graph(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """Export `model` (in the mode it is in) and normalise the result to the dialect.

    Returns a graph module whose placeholders are the used tensor leaves of the call, whose parameters and buffers
    are one `get_attr` each, and whose output is a flat list of tensor nodes.
    """
    program = torch.export.export(model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _flatten_output(module.graph)
    _drop_unused_inputs(module.graph)
    _inline_grad_regions(module)
    _drop_metadata_assertions(module.graph)
    _merge_parameters(module)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.graph.lint()
    return fx.GraphModule(module, module.graph)  # without the hooks that check the original signature


def trace(function: Callable[..., Any], *inputs: Tensor, **parameters: Tensor) -> fx.GraphModule:
    """Capture a plain function; keyword tensors become parameters (floating) or buffers of a wrapper module."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in parameters.items():
                if value.is_floating_point():
                    self.register_parameter(name, nn.Parameter(value))
                else:
                    self.register_buffer(name, value)

        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors, **{name: getattr(self, name) for name in parameters})

    return capture_graph(Wrapper().eval(), inputs)


def by_target(module: fx.GraphModule, packet: Any) -> list[fx.Node]:
    """Nodes that call an overload of the packet, in graph order."""
    overloads = {getattr(packet, name) for name in packet.overloads()}
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target in overloads]


def _flatten_output(graph: fx.Graph) -> None:
    output = graph.output_node()
    leaves = pytree.tree_leaves(output.args[0])
    output.args = ([leaf for leaf in leaves if isinstance(leaf, fx.Node)],)


def _drop_unused_inputs(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)


def _drop_metadata_assertions(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _inline_grad_regions(module: fx.GraphModule) -> None:
    """`wrap_with_set_grad_enabled(False, body, ...)` becomes the body's nodes with `detach` on its outputs."""
    region = torch.ops.higher_order.wrap_with_set_grad_enabled
    for node in [n for n in module.graph.nodes if n.target is region]:
        enabled, body_node, *arguments = node.args
        assert enabled is False
        body = getattr(module, str(body_node.target))
        mapping = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), arguments, strict=True))
        with module.graph.inserting_before(node):
            values = module.graph.graph_copy(body.graph, mapping)
            values = values if isinstance(values, (tuple, list)) else (values,)
            detached = [_detach(module.graph, value) for value in values]
        for user in list(node.users):
            user.replace_all_uses_with(detached[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        module.graph.erase_node(body_node)


def _detach(graph: fx.Graph, value: fx.Node) -> fx.Node:
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def _merge_parameters(module: fx.GraphModule) -> None:
    """Keep one `get_attr` per tensor, at the top of the graph, under the first name it is known by."""
    first: dict[int, fx.Node] = {}
    anchor = next(iter(module.graph.nodes))
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        value = _attribute(module, str(node.target))
        if not isinstance(value, Tensor):
            continue
        kept = first.setdefault(id(value), node)
        if kept is node:
            if node is not anchor:
                anchor.prepend(node)
            continue
        node.replace_all_uses_with(kept)
        module.graph.erase_node(node)


def _attribute(module: fx.GraphModule, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
