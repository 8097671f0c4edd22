# SPDX-License-Identifier: Apache-2.0
"""A graph of the dialect becomes core aten that torch-mlir imports: inlined, traced again, decomposed, located."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import Dim, ExportedProgram
from torch.fx import traceback
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from rewriter import store
from rewriter.codegen import mlir_decompositions
from rewriter.codegen.decomposition import inline
from rewriter.codegen.mlir_process import Origin
from rewriter.errors import ExportError
from rewriter.facts import path_of
from rewriter.schemas import ASSERTIONS

ROOT = "root"  # stands for the path of the model itself

# Higher-order operators torch-mlir's importer has a translation for.
_IMPORTED = frozenset({"while_loop"})

# What leaves the value of a byte alone. TOSA has no unsigned integers: anything else there would compute with signs.
_MOVES = frozenset(
    "alias cat clone constant_pad_nd convert_element_type detach embedding expand flip full_like gather index index_select"
    " permute select slice squeeze transpose unsqueeze view".split()
)


class _Interpreted(nn.Module):
    """Holds exactly the tensors a graph reads, under their names, and interprets the graph on them.

    All are persistent buffers: the importer finds no others. Nothing is trained here.
    """

    interpreted: fx.Graph

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.interpreted = graph_module.graph
        for node in graph_module.graph.find_nodes(op="get_attr"):
            value = _attribute(graph_module, str(node.target))
            if isinstance(value, fx.GraphModule):
                self._modules[str(node.target)] = value
            else:
                store.put(self, str(node.target), value.detach())

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        with traceback.preserve_node_meta():
            return tuple(fx.Interpreter(self, graph=self.interpreted).run(*flat))


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def is_dynamic(graph: fx.Graph) -> bool:
    """Whether a placeholder has a size that is not a number."""
    return any(dimensions(node) for node in graph.find_nodes(op="placeholder"))


def dimensions(node: fx.Node) -> dict[int, Any]:
    """The symbolic dimensions of a placeholder, as `torch.export` asks for them."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise ExportError(f"input {node.name!r} carries no tensor meta['val']; capture the model with rewriter.capture")
    # DYNAMIC and not named Dims: torch then infers ranges and relations instead of refusing.
    return {d: Dim.DYNAMIC for d, size in enumerate(value.shape) if not is_concrete_int(size)}


def trace(graph_module: fx.GraphModule, example: Sequence[Tensor], *, static: bool) -> ExportedProgram:
    """Core aten, functional, with our operators and attention inlined.

    Args:
        graph_module: a graph of the dialect; not changed.
        example: one tensor per placeholder.
        static: make every size that of the example.

    Raises:
        ExportError: the example does not fit, torch cannot trace the graph, or a higher-order operator is left.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example):
        raise ExportError(f"the graph takes {len(placeholders)} tensors, the example has {len(example)}")
    dynamic = None if static else (tuple(dimensions(n) for n in placeholders),)
    inlined = inline(graph_module, mlir_decompositions.inlined())
    try:
        with torch.inference_mode(False), torch.no_grad():
            program = torch.export.export(
                _Interpreted(inlined), _enlarged(example, dynamic), dynamic_shapes=dynamic, strict=False
            )
            program = program.run_decompositions(mlir_decompositions.lowered())
    except ExportError:
        raise
    except Exception as reason:
        raise ExportError(f"the graph cannot be traced for MLIR: {_what(reason)}") from reason
    _drop_assertions(program.graph)
    _check_control_flow(program.graph)
    _copy_weights_in_lists(program)
    return program


def _enlarged(example: Sequence[Tensor], dynamic: tuple[tuple[dict[int, Any], ...]] | None) -> tuple[Tensor, ...]:
    """The example with every dynamic size 1 doubled: export would take a 1 for a constant."""
    tensors = [tensor.detach() for tensor in example]  # new objects: export marks the ones it is given
    for i, dims in enumerate(dynamic[0] if dynamic else ()):
        for d in dims:
            if tensors[i].shape[d] == 1:
                tensors[i] = torch.cat([tensors[i], tensors[i]], dim=d)
    return tuple(tensors)


def locate(graph: fx.Graph) -> tuple[Origin, ...]:
    """Give every node its module path as location, and return what stands at each number.

    The importer reads a node's location from ``meta["stack_trace"]``: file and line of its last frame. Module path and
    number of the node take their place, which say more, are the same on every machine, and name no source file.
    """
    origins = tuple(_origin(node) for node in graph.nodes)
    for number, (node, origin) in enumerate(zip(graph.nodes, origins, strict=True)):
        node.meta["stack_trace"] = f'File "{origin.site}", line {number}, in forward'
    return origins


def _drop_assertions(graph: fx.Graph) -> None:
    """Compiled code asserts nothing; what only fed assertions goes with them."""
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _copy_weights_in_lists(program: ExportedProgram) -> None:
    """Read a weight that is an element of a list (``cat([weight, x])``) through a copy, which torch-mlir folds away.

    Its importer knows weights as arguments of their own; in a list it takes one for a number and gives up.
    """
    given = set(program.graph_signature.user_inputs)
    for weight in program.graph.find_nodes(op="placeholder"):
        inside = [user for user in weight.users if any(isinstance(a, (list, tuple)) and weight in a for a in user.args)]
        if weight.name in given or not inside:
            continue
        with program.graph.inserting_before(inside[0]):
            copy = program.graph.call_function(torch.ops.aten.clone.default, (weight,))
        # Provenance alone: ``tensor_meta`` is the result's.
        kept = {key: inside[0].meta[key] for key in ("nn_module_stack", "stack_trace") if key in inside[0].meta}
        copy.meta = {"val": weight.meta["val"], **kept}
        for user in inside:
            user.replace_input_with(weight, copy)


def _check_control_flow(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and node.target.name() not in _IMPORTED:
            raise ExportError(
                f"{node.target.name()} at {path_of(node) or ROOT}: torch-mlir does not import this control flow; write it "
                "without (a loop of known length unrolls), or export to ONNX, which has it"
            )


def byte_arithmetic(graph: fx.Graph) -> Origin | None:
    """The first operator that computes with unsigned bytes."""
    return next((_origin(node) for node in graph.nodes if _computes_with_bytes(node)), None)


def _origin(node: fx.Node) -> Origin:
    return Origin(str(node.target), (path_of(node) if node.op == "call_function" else "") or ROOT)


def _computes_with_bytes(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    values = [n.meta.get("val") for n in node.all_input_nodes]
    touched = any(isinstance(v, Tensor) and v.dtype is torch.uint8 for v in values)
    return touched and node.target._schema.name.partition("::")[2] not in _MOVES


def _what(reason: BaseException) -> str:
    """The message without the traceback that torch appends."""
    text = str(reason).partition("Original traceback:")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n  ".join(lines[:6]) or type(reason).__name__
