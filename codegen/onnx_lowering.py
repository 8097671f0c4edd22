# SPDX-License-Identifier: Apache-2.0
"""A graph of the dialect becomes an ``ExportedProgram`` whose rewriter operators are ONNX nodes.

The graph is traced again node by node, so that every new node keeps the module path of the node it comes from. An
operator with an ONNX function becomes one symbolic ``ai.rewriter`` node; one without is traced as its aten decomposition.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx import traceback
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from rewriter import store
from rewriter.codegen.onnx_functions import FAMILIES
from rewriter.errors import ExportError
from rewriter.kernels.spec import NAMESPACE, REGISTRY

# Operator (by schema name) -> what stands for it; argument names are the operator's own.
LOWERINGS: Mapping[str, Callable[..., Tensor]] = {
    f"{NAMESPACE}::{name}": function for family in FAMILIES for name, function in family.LOWERINGS.items()
}
# With ``contrib=True`` these come first: nodes of ONNX Runtime's own domain.
CONTRIB_LOWERINGS: Mapping[str, Callable[..., Any]] = {
    f"{NAMESPACE}::{name}": function
    for family in FAMILIES
    for name, function in getattr(family, "CONTRIB_LOWERINGS", {}).items()
}


# -- attention ---------------------------------------------------------------------------------------------------
# A query whose mask shows it no key is 0 in torch; one whose keys all carry the same huge negative number sees them all
# alike. Exporter and runtime each get some of these rows wrong, so the program says what it means.

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_ATTENTION_OPSET = 23  # the first with ONNX's Attention


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    """One ``Attention`` node where ONNX Runtime's kernel means the same as torch, else the parts.

    The kernel takes a row of lowest numbers for one without keys: half of the lowest is as good a mask and none to it.
    In float16 it adds the mask in float16, where a huge number swallows the scores; float64 has no kernel.
    """
    additive = attn_mask is not None and attn_mask.dtype is not torch.bool
    if query.dtype is torch.float64 or (additive and query.dtype is not torch.float32):
        return _attention_by_parts(query, key, value, attn_mask, *rest, **options)
    if attn_mask is not None and additive:
        lowest = torch.finfo(attn_mask.dtype).min
        attn_mask = torch.where(attn_mask == lowest, lowest / 2, attn_mask)
    result: Tensor = _ATTENTION(query, key, value, attn_mask, *rest, **options)
    return result


def _attention_by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v in at least float32; rows without a key are 0."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if enable_gqa:
        heads = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(heads, dim=-3), value.repeat_interleave(heads, dim=-3)
    if is_causal:
        attn_mask = query.new_ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
    scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        zero, hidden = scores.new_zeros(()), scores.new_full((), -torch.inf)
        bias = torch.where(attn_mask, zero, hidden) if attn_mask.dtype is torch.bool else attn_mask.to(dtype)
        scores = scores + bias
    weights = torch.dropout(torch.softmax(scores, dim=-1), dropout_p, train=dropout_p > 0)
    result = (weights @ value.to(dtype)).to(query.dtype)
    if attn_mask is None:
        return result
    return torch.where((bias > -torch.inf).any(dim=-1, keepdim=True), result, 0.0)


def _replacement(target: Any, opset: int, contrib: bool) -> Callable[..., Any] | None:
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target is _ATTENTION:
        return _attention if opset >= _ATTENTION_OPSET else _attention_by_parts
    lowerings = {**LOWERINGS, **CONTRIB_LOWERINGS} if contrib else LOWERINGS
    lowering = lowerings.get(target._schema.name)
    if lowering is None and target in REGISTRY:
        return REGISTRY[target].decomposition or REGISTRY[target].reference
    return lowering


def _substitute(graph: fx.Graph, opset: int, contrib: bool) -> fx.Graph:
    """A copy of the graph that calls the replacements."""
    copied = copy.deepcopy(graph)
    for node in copied.nodes:
        replacement = _replacement(node.target, opset, contrib) if node.op == "call_function" else None
        node.target = node.target if replacement is None else replacement
    return copied


# -- tracing again -----------------------------------------------------------------------------------------------


class _Traced(nn.Module):
    """Holds exactly the tensors a graph reads, under their names, and interprets the graph on them."""

    interpreted: fx.Graph

    def __init__(self, graph_module: fx.GraphModule, opset: int, contrib: bool) -> None:
        super().__init__()
        self.interpreted = _substitute(graph_module.graph, opset, contrib)
        for node in graph_module.graph.find_nodes(op="get_attr"):
            name, value = str(node.target), _attribute(graph_module, str(node.target))
            if isinstance(value, fx.GraphModule):
                self._modules[name] = _lowered_body(value, opset, contrib)
            else:
                # Nothing is trained here, and the choice among attention kernels, whose results differ in their
                # strides, looks at what might be: it has to be the same in each of the traces to come.
                constant = value.detach()
                kept = isinstance(value, nn.Parameter)
                store.put(self, name, nn.Parameter(constant, requires_grad=False) if kept else constant)

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        with traceback.preserve_node_meta():
            return tuple(fx.Interpreter(self, graph=self.interpreted).run(*flat))


def _lowered_body(body: fx.GraphModule, opset: int, contrib: bool) -> fx.GraphModule:
    """The body of a higher-order operator, bodies within it included."""
    lowered = fx.GraphModule(body, _substitute(body.graph, opset, contrib))
    for node in lowered.graph.find_nodes(op="get_attr"):
        nested = _attribute(body, str(node.target))
        if isinstance(nested, fx.GraphModule):
            setattr(lowered, str(node.target), _lowered_body(nested, opset, contrib))
    return lowered


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


@dataclass(frozen=True)
class Traced:
    """An exported program and the name of every dynamic axis: ``axes[input][dimension]``."""

    program: ExportedProgram
    axes: tuple[Mapping[int, str], ...]


def trace(
    graph_module: fx.GraphModule,
    example: Sequence[Tensor],
    input_names: Sequence[str],
    opset: int,
    contrib: bool = False,
) -> Traced:
    """Export the graph again with its rewriter operators lowered; dynamic where its placeholders are symbolic.

    Raises:
        ExportError: the example does not fit the placeholders, or torch cannot trace the graph.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    symbols = [_symbols(node) for node in placeholders]
    _check_example(placeholders, symbols, example)
    axes = _axis_names(symbols, input_names)
    # DYNAMIC and not named Dims: torch then infers ranges (at most 512 positions) and relations instead of refusing.
    dynamic = tuple(dict.fromkeys(named, Dim.DYNAMIC) for named in axes)
    try:
        with torch.inference_mode(False), torch.no_grad():
            program = torch.export.export(
                _Traced(graph_module, opset, contrib),
                _enlarged(example, symbols),
                dynamic_shapes=(dynamic,),
                strict=False,
            )
    except ExportError:
        raise
    except Exception as reason:
        raise ExportError(f"the graph cannot be traced for ONNX: {_first_lines(reason)}") from reason
    return Traced(program, axes)


def _symbols(node: fx.Node) -> dict[int, str]:
    """Dimension -> symbolic size of a placeholder, as text: equal texts are equal sizes."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise ExportError(f"input {node.name!r} carries no tensor meta['val']; capture the model with rewriter.capture")
    return {d: str(size) for d, size in enumerate(value.shape) if not is_concrete_int(size)}


def _check_example(nodes: Sequence[fx.Node], symbols: Sequence[dict[int, str]], example: Sequence[Tensor]) -> None:
    if len(nodes) != len(example):
        raise ExportError(f"the graph takes {len(nodes)} tensors, the example has {len(example)}")
    for node, named, tensor in zip(nodes, symbols, example, strict=True):
        expected = node.meta["val"]
        fits = expected.dim() == tensor.dim() and expected.dtype is tensor.dtype
        if not fits or any(d not in named and int(s) != tensor.shape[d] for d, s in enumerate(expected.shape)):
            raise ExportError(
                f"input {node.name!r} is {tuple(expected.shape)} {expected.dtype}, "
                f"the example gives {tuple(tensor.shape)} {tensor.dtype}"
            )


def _axis_names(symbols: Sequence[dict[int, str]], input_names: Sequence[str]) -> tuple[Mapping[int, str], ...]:
    """One name per distinct size: the first seen on axis 0 is ``batch``, on axis 1 ``sequence``, others by input."""
    names: dict[str, str] = {}
    for input_name, named in zip(input_names, symbols, strict=True):
        for d, symbol in named.items():
            short = {0: "batch", 1: "sequence"}.get(d, f"dim{d}")
            taken = short in names.values() or d > 1
            prefix = "".join(c if c.isalnum() else "_" for c in input_name)
            names.setdefault(symbol, f"{prefix}_{short}" if taken else short)
    return tuple({d: names[symbol] for d, symbol in named.items()} for named in symbols)


def _enlarged(example: Sequence[Tensor], symbols: Sequence[dict[int, str]]) -> tuple[Tensor, ...]:
    """The example with every dynamic size 1 doubled: export would take a 1 for a constant."""
    tensors = [tensor.detach() for tensor in example]  # new objects: export marks the ones it is given
    for i, named in enumerate(symbols):
        for d in named:
            if tensors[i].shape[d] == 1:
                tensors[i] = torch.cat([tensors[i], tensors[i]], dim=d)
    return tuple(tensors)


def _first_lines(reason: BaseException, count: int = 6) -> str:
    lines = [line for line in str(reason).splitlines() if line.strip()]
    return "\n  ".join(lines[:count]) or type(reason).__name__
