# SPDX-License-Identifier: Apache-2.0
"""ONNX export of a program: one file that plain ONNX Runtime runs, with compressed weights stored compressed.

graph of the dialect ──trace──▶ ExportedProgram with ai.rewriter nodes ──torch.onnx──▶ onnx_ir.Model
    ──simplify, name, narrow, add functions──▶ checked, written atomically
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx

from rewriter.codegen import onnx_model
from rewriter.codegen.onnx_functions import CONTRIB
from rewriter.codegen.onnx_lowering import Traced, trace
from rewriter.codegen.onnx_operator import CONTRIB_DOMAIN, DOMAIN, MIN_IR_VERSION, VERSION
from rewriter.errors import ExportError
from rewriter.files import atomic_file, check_writable
from rewriter.version import __version__

OPSETS = range(20, 26)  # what torch's exporter converts to and ONNX Runtime runs
DEFAULT_OPSET = 24
MAX_IR_VERSION = 13  # the newest ONNX Runtime loads

_MAX_WEIGHTS = 2**31 - 2**24  # bytes in one file: protobuf's limit less a reserve for everything that is not weights
_EXTERNAL_FROM_BYTES = 1024  # smaller tensors stay in the model file: shape inference reads them


@dataclass(frozen=True)
class Port:
    """An input or output of the file: name, ONNX element type (``"FLOAT"``), sizes or names of its axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ExportResult:
    """What was written. ``bytes`` counts the external data file too; ``functions`` are the operators called."""

    path: Path
    bytes: int
    opset: int
    ir_version: int
    external_data: bool
    functions: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def export_program(
    graph_module: fx.GraphModule,
    path: str | os.PathLike[str],
    example: Sequence[Tensor],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = DEFAULT_OPSET,
    narrow: bool = True,
    external_data: bool | None = None,
    contrib: bool = False,
) -> ExportResult:
    """Write a graph of the dialect as ONNX.

    Axes are dynamic where the placeholders' ``meta["val"]`` is symbolic. The model's tensors become initialisers
    under their own names (``lm_head.codebook``); codes stay uint8. Nodes are named by module path, which
    ``metadata_props["rewriter.path"]`` repeats.

    Args:
        graph_module: flat tensor placeholders, flat outputs; not changed.
        path: of the file; replaced only when everything has succeeded.
        example: one tensor per placeholder, of valid values.
        input_names: of the placeholders, in order (default: their own).
        output_names: of the outputs, in order (default: ``output``, or ``output_0``, ...).
        opset: 20 to 25.
        narrow: store float tensors whose values all are float16 values as float16, with a cast that a runtime folds.
        external_data: put the weights in ``<path>.data`` beside the file; by default only where one file cannot hold
            them (2 GB).
        contrib: use operators of ``com.microsoft`` where one means the same. They keep weights packed in memory, and
            only ONNX Runtime knows them.

    Raises:
        ExportError: a version, name or example that cannot be used, an operator without ONNX translation, a model
            that ONNX's checker refuses, or a path that cannot be written.
    """
    _check_opset(opset)
    target = check_writable(path, ExportError)
    inputs, outputs = _port_names(graph_module.graph, input_names, output_names)
    traced = trace(graph_module, example, inputs, opset, contrib)
    model = _translate(traced, opset, inputs, outputs)
    onnx_model.simplify(model)
    if contrib:
        for replace in CONTRIB:
            replace(model)
    functions = onnx_model.add_functions(model, opset)
    if narrow:
        onnx_model.narrow(model)
    onnx_model.name_axes(model, _axis_symbols(model, traced))
    onnx_model.name_nodes(model)
    _stamp(model, opset, contrib)
    external = _is_external(model, external_data)
    size = _write(model, target, external)
    ports = [tuple(_port(v) for v in values) for values in (model.graph.inputs, model.graph.outputs)]
    return ExportResult(target, size, opset, model.ir_version, external, functions, *ports)


# -- checks of what is asked for ---------------------------------------------------------------------------------


def _check_opset(opset: int) -> None:
    if isinstance(opset, bool) or opset not in OPSETS:
        raise ExportError(f"opset {opset!r} cannot be written; choose one of {', '.join(map(str, OPSETS))}")


def _port_names(
    graph: fx.Graph, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    placeholders = [n.name for n in graph.find_nodes(op="placeholder")]
    count = len(graph.output_node().args[0])  # type: ignore[arg-type]
    default = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    inputs = tuple(placeholders if input_names is None else input_names)
    outputs = tuple(default if output_names is None else output_names)
    for kind, names, expected in (("input", inputs, len(placeholders)), ("output", outputs, count)):
        if len(names) != expected:
            raise ExportError(f"{len(names)} {kind} names for {expected} {kind}s: {', '.join(names)}")
    if len({*inputs, *outputs}) != len(inputs) + len(outputs):
        raise ExportError(f"names of inputs and outputs repeat: {', '.join((*inputs, *outputs))}")
    return inputs, outputs


# -- translation -------------------------------------------------------------------------------------------------


def _translate(traced: Traced, opset: int, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    options: dict[str, Any] = {
        "input_names": list(inputs),
        "output_names": list(outputs),
        "opset_version": opset,
    }
    try:
        with _quiet():
            exported = torch.onnx.export(traced.program, dynamo=True, optimize=False, verbose=False, **options)
    except Exception as reason:
        causes = [line for line in str(reason).splitlines() if line.strip()]
        raise ExportError("torch.onnx cannot translate the program: " + "\n  ".join(causes[-4:])) from reason
    model: ir.Model = exported.model  # type: ignore[union-attr]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the exporter's notes that torchvision's operators are missing, written at every export without it."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def relevant(record: logging.LogRecord) -> bool:
        return "torchvision" not in record.getMessage()

    logger.addFilter(relevant)
    try:
        yield
    finally:
        logger.removeFilter(relevant)


def _axis_symbols(model: ir.Model, traced: Traced) -> dict[str, str]:
    """Torch's symbol of each dynamic axis -> its name.

    Raises:
        ExportError: tracing made an axis static.
    """
    names: dict[str, str] = {}
    for value, named in zip(model.graph.inputs, traced.axes, strict=True):
        for d, name in named.items():
            size = value.shape[d] if value.shape is not None else None
            if not isinstance(size, ir.SymbolicDim) or size.value is None:
                raise ExportError(f"axis {d} of input {value.name!r} was captured dynamic and became static ({size})")
            names[size.value] = name
    return names


def _stamp(model: ir.Model, opset: int, contrib: bool) -> None:
    """Set producer and versions.

    Raises:
        ExportError: the model is not at the opset asked for, or needs a newer IR than ONNX Runtime loads.
    """
    stamped = model.opset_imports.get("")
    if stamped != opset:
        raise ExportError(
            f"torch.onnx could not convert the program to opset {opset} and left it at {stamped}; "
            f"try opset {DEFAULT_OPSET}"
        )
    foreign = set(model.opset_imports) - {"", DOMAIN, *([CONTRIB_DOMAIN] if contrib else [])}
    if foreign:
        raise ExportError(f"the program needs operators of {', '.join(sorted(foreign))}, which plain ONNX has not")
    if model.functions:
        model.opset_imports[DOMAIN] = VERSION
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = max(needed, MIN_IR_VERSION)
    if model.ir_version > MAX_IR_VERSION:
        raise ExportError(
            f"opset {opset} needs IR version {model.ir_version}; ONNX Runtime loads up to {MAX_IR_VERSION}"
        )
    model.producer_name, model.producer_version = "rewriter", __version__


def _port(value: ir.Value) -> Port:
    sizes = value.shape if value.shape is not None else ()
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in sizes)
    return Port(str(value.name), value.dtype.name if value.dtype is not None else "UNDEFINED", shape)


# -- writing -----------------------------------------------------------------------------------------------------


def _is_external(model: ir.Model, asked: bool | None) -> bool:
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    needed = weights > _MAX_WEIGHTS
    if needed and asked is False:
        raise ExportError(f"the weights take {weights} bytes, more than one ONNX file holds; allow external_data")
    return needed if asked is None else asked


def _write(model: ir.Model, target: Path, external: bool) -> int:
    if not external:
        with atomic_file(target, ExportError) as temporary:
            ir.save(model, temporary)
            _check(temporary)
            return temporary.stat().st_size
    data = target.with_name(target.name + ".data")
    # The data takes its place first: a model file never names data that is not there yet.
    with atomic_file(target, ExportError) as temporary, atomic_file(data, ExportError) as temporary_data:
        proto = _move_weights(model, temporary_data, data.name)
        _check(_without_external(proto))
        temporary.write_bytes(proto.SerializeToString())
        return temporary.stat().st_size + temporary_data.stat().st_size


def _move_weights(model: ir.Model, file: Path, name: str) -> onnx.ModelProto:
    """Write the large tensors to ``file``; the model returned finds them under ``name``."""
    ir.external_data.unload_from_model(model, file.parent, file.name, size_threshold_bytes=_EXTERNAL_FROM_BYTES)
    if not any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values()):
        raise ExportError("the model has no tensor large enough for an external file; leave external_data out")
    proto = ir.to_proto(model)
    for initializer in proto.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = name
    return proto


def _without_external(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with external tensors as inputs: the checker can read it before the data is in its place."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    del copied.graph.initializer[:]
    for initializer in proto.graph.initializer:
        if initializer.data_location != onnx.TensorProto.EXTERNAL:
            copied.graph.initializer.append(initializer)
            continue
        value = onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, initializer.dims)
        copied.graph.input.append(value)
    return copied


def _check(model: onnx.ModelProto | Path) -> None:
    try:
        onnx.checker.check_model(model if isinstance(model, onnx.ModelProto) else str(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as reason:
        raise ExportError(f"ONNX's checker refuses the exported model: {reason}") from reason
