# SPDX-License-Identifier: Apache-2.0
"""Edits of an exported ONNX model: simplify, name, narrow, and add the functions it calls.

Everything works in place on ``onnx_ir.Model``, whose tensors still share memory with torch.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnxscript import optimizer

from rewriter.codegen.onnx_functions import OPERATORS, function_protos, overload_of
from rewriter.codegen.onnx_operator import DOMAIN
from rewriter.narrow import fits_float16

PATH_KEY = "rewriter.path"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack"  # torch's placeholder for a node outside every module

# A stored cast costs about 200 bytes of file, so smaller tensors gain nothing.
_NARROW_FROM_ELEMENTS = 1024


def simplify(model: ir.Model) -> None:
    """Fold what depends on constants of the graph alone; the model's own tensors stay as and what they are.

    The exporter's optimiser would also fold weights (a transposed copy under another name) and merge equal ones.
    """
    tensors = set(model.graph.initializers)

    def keep_tensors(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in tensors for v in node.inputs) else None

    common.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=keep_tensors)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


# -- functions ---------------------------------------------------------------------------------------------------


def add_functions(model: ir.Model, opset: int) -> tuple[str, ...]:
    """Add the functions that the graph's ``ai.rewriter`` nodes call; returns the operators called."""
    called: set[tuple[str, str]] = set()
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            node.overload = overload_of(node.op_type, [v is not None for v in node.inputs])
            called.add((node.op_type, node.overload))
    for proto in function_protos(called, opset):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    return tuple(sorted({name for name, _ in called}))


# -- names -------------------------------------------------------------------------------------------------------


def name_nodes(model: ir.Model) -> None:
    """Name nodes by module path and operator (``model/layers/0/mlp/up_proj/MatMul``) and keep the path as metadata.

    The exporter's own metadata, stack traces with absolute file names among it, is dropped.
    """
    seen: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        path = _module_path(node)
        node.metadata_props.clear()
        node.doc_string = None
        if path:
            node.metadata_props[PATH_KEY] = path
        name = "/".join([*path.split("."), node.op_type]) if path else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
    for value in _values(model):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _module_path(node: ir.Node) -> str:
    """Deepest module a node was traced in: the exporter lists all enclosing paths, then its name for the node."""
    if PATH_KEY in node.metadata_props:
        return node.metadata_props[PATH_KEY]
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "[]"))
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    return "" if path.startswith(_NO_MODULE) else path


def name_axes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Replace torch's symbols by names in every shape, in expressions (``s0*s1``) too."""
    if not names:
        return

    def _named(found: re.Match[str]) -> str:
        return names[found[0]]

    symbol = re.compile(r"\b(" + "|".join(re.escape(s) for s in names) + r")\b")
    for value in _values(model):
        if value.shape is not None and not value.shape.is_static():
            sizes = [s if isinstance(s, int) else s.value for s in value.shape]
            value.shape = ir.Shape([symbol.sub(_named, s) if isinstance(s, str) else s for s in sizes])


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


# -- lossless narrowing ------------------------------------------------------------------------------------------


def narrow(model: ir.Model) -> int:
    """Store floating tensors as float16 where every value survives; returns the bytes saved.

    A ``Cast`` gives them their type back when a model is loaded (runtimes fold it); inputs that their function casts
    anyway are left to it.
    """
    saved = 0
    for name, value in list(model.graph.initializers.items()):
        tensor, uses = value.const_value, list(value.uses())
        inside = all(node.domain == DOMAIN and i in OPERATORS[node.op_type].casts for node, i in uses)
        if tensor is None or not uses or value.is_graph_output():
            continue
        if tensor.size < _NARROW_FROM_ELEMENTS and not inside:
            continue
        half = _as_half(tensor)
        if half is None:
            continue
        saved += tensor.nbytes - half.nbytes
        value.const_value, value.dtype = ir.tensor(half, name=name), ir.DataType.FLOAT16
        if not inside:
            _cast_back(model, value, name, tensor.dtype)
    return saved


def _as_half(tensor: ir.TensorProtocol) -> np.ndarray | None:
    """The tensor in float16 if that loses nothing, else None."""
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return None
    wide = tensor.numpy()
    return wide.astype(np.float16) if fits_float16(torch.from_numpy(wide)) else None


def _cast_back(model: ir.Model, value: ir.Value, name: str, dtype: ir.DataType) -> None:
    cast = ir.node("Cast", [value], {"to": int(dtype)})
    output = cast.outputs[0]
    output.name, output.dtype, output.shape = f"{name}.wide", dtype, value.shape
    if path := name.rpartition(".")[0]:
        cast.metadata_props[PATH_KEY] = path
    for node, i in list(value.uses()):
        if node is not cast:
            node.replace_input_with(i, output)
    first = next(iter(model.graph))
    model.graph.insert_before(first, cast)
