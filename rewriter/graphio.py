# SPDX-License-Identifier: Apache-2.0
"""Graphs as data: a versioned list of nodes in JSON, read back without running anything.

`graph_to_json` and `graph_from_json` are documented in docs/format.md. What a file may say is checked before
it reaches torch: operators come from a table (graphops), sizes from a small parser (symexpr), names are
identifiers (fx writes them into Python source), references point to earlier nodes.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.errors import ExportError, LoadError
from rewriter.graphops import check_call, lookup, spell
from rewriter.graphvals import (
    ValueReader,
    ValueWriter,
    device_of,
    dtype_name,
    dtype_of,
    float_from_json,
    float_to_json,
    recompute,
)
from rewriter.jsonfile import plain

Json = Any
GRAPH_VERSION = 1

MAX_NODES = 1_000_000
MAX_ARGUMENT_DEPTH = 16
MAX_GRAPH_DEPTH = 8
MAX_NAME = 512

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
_NODE_KEYS = {"name", "op", "target", "args", "kwargs", "value", "module", "source", "rewriter"}


# What a module has already: a tensor of that name would hide it.
_RESERVED = frozenset(dir(torch.nn.Module()))
_RESERVED_AT_ROOT = frozenset(dir(fx.GraphModule({}, fx.Graph())))


def is_safe_name(name: Any) -> bool:
    """Whether a tensor or sub-graph may be called so: dotted parts of letters, digits, `_` and inner `-`."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        return False
    parts = name.split(".")
    if parts[0] in _RESERVED_AT_ROOT:
        return False
    return all(_PATH_PART.fullmatch(p) and not p.startswith("__") and p not in _RESERVED for p in parts)


def graph_to_json(module: fx.GraphModule) -> dict[str, Json]:
    """The graph of `module` as JSON-able data; tensors are named, not stored.

    Raises:
        ExportError: an operator, argument, shape or name that the format does not know; the message names the
            node.
    """
    writer = _Writer()
    body = writer.graph(module, 0)
    return {
        "version": GRAPH_VERSION,
        "symbols": writer.values.symbols,
        "modules": [[list(entry) for entry in stack] for stack in writer.modules],
        "sources": list(writer.sources),
        **body,
    }


def graph_from_json(data: Json, resolve: Callable[[str], Tensor]) -> fx.GraphModule:
    """The graph module that `graph_to_json` described, with the tensors that `resolve` gives for their names.

    `resolve(name)` returns a `torch.nn.Parameter` or a tensor (registered as a buffer) and raises KeyError
    for an unknown name. Every node gets `meta["val"]` (fake tensors and symbolic sizes of one fresh shape
    environment), `nn_module_stack`, `stack_trace` and `custom["rewriter"]` where the file has them. No
    operator runs.

    Raises:
        LoadError: anything in `data` that is not as `graph_to_json` writes it; the message names the node.
    """
    header = {"version", "symbols", "modules", "sources", "nodes", "graphs"}
    if not isinstance(data, dict) or "version" not in data:
        raise LoadError("not a graph: no version")
    if type(data["version"]) is not int or data["version"] < 1:
        raise LoadError(f"not a graph: version {data['version']!r}")
    if data["version"] > GRAPH_VERSION:
        raise LoadError(
            f"the graph was written by a newer version of rewriter (graph format {data['version']}, this "
            f"version reads up to {GRAPH_VERSION}); update rewriter"
        )
    if data.keys() != header:
        raise LoadError(f"not a graph: expected the keys {sorted(header)}, found {sorted(map(str, data))}")
    return _Reader(data, resolve).graph(data["nodes"], data["graphs"], 0)


class _Writer:
    def __init__(self) -> None:
        self.values = ValueWriter()
        # Tables: a module path or a stack trace is shared by many nodes, which hold its index.
        self.modules: dict[Any, int] = {}
        self.sources: dict[str, int] = {}

    def graph(self, module: fx.GraphModule, depth: int) -> dict[str, Json]:
        if depth > MAX_GRAPH_DEPTH:
            raise ExportError(f"graphs nested deeper than {MAX_GRAPH_DEPTH} cannot be saved")
        nodes = []
        graphs: dict[str, Json] = {}
        for node in module.graph.nodes:
            try:
                nodes.append(self.node(node))
                body = _attribute(module, node.target) if node.op == "get_attr" else None
                if isinstance(body, fx.GraphModule):
                    graphs[node.target] = self.graph(body, depth + 1)
            except ExportError as reason:
                raise ExportError(f"node {node.name!r}: {reason}") from reason
        return {"nodes": nodes, "graphs": graphs}

    def node(self, node: fx.Node) -> dict[str, Json]:
        if not _is_identifier(node.name):
            raise ExportError("its name is not an identifier")
        record: dict[str, Json] = {"name": node.name, "op": node.op}
        if node.op == "call_function":
            record["target"] = spell(node.target)
            misfit = check_call(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
            if misfit is not None:
                raise ExportError(f"a call of {record['target']} that does not fit its schema: {misfit}")
        elif node.op == "get_attr":
            if not is_safe_name(node.target):
                raise ExportError(f"tensor name {node.target!r} cannot be saved; use letters, digits, '_' and '-'")
            record["target"] = node.target
        elif node.op not in ("placeholder", "output"):
            raise ExportError(f"{node.op} nodes cannot be saved")
        if node.op in ("call_function", "output"):
            record["args"] = [self.argument(a) for a in node.args]
        if node.kwargs:
            record["kwargs"] = {name: self.argument(a) for name, a in node.kwargs.items()}
        if node.op != "output" and "val" in node.meta:
            record["value"] = self.values.describe(node.meta["val"])
        return record | self.provenance(node)

    def provenance(self, node: fx.Node) -> dict[str, Json]:
        record: dict[str, Json] = {}
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = tuple((str(key), str(path), _type_name(kind)) for key, (path, kind) in stack.items())
            record["module"] = self.modules.setdefault(path, len(self.modules))
        if isinstance(node.meta.get("stack_trace"), str):
            record["source"] = self.sources.setdefault(node.meta["stack_trace"], len(self.sources))
        provenance = (node.meta.get("custom") or {}).get("rewriter")
        if provenance is not None:
            record["rewriter"] = plain(provenance, ExportError)
        return record

    def argument(self, value: Any, depth: int = 0) -> Json:
        if depth > MAX_ARGUMENT_DEPTH:
            raise ExportError(f"an argument is nested deeper than {MAX_ARGUMENT_DEPTH}")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, int):
            if abs(value) > 2**63:
                raise ExportError(f"integer {value} is beyond 64 bits")
            return value
        if isinstance(value, float):
            return float_to_json(value)
        if isinstance(value, list):
            return [self.argument(v, depth + 1) for v in value]
        if isinstance(value, tuple):
            return {"tuple": [self.argument(v, depth + 1) for v in value]}
        if isinstance(value, slice):
            return {"slice": [self.argument(v, depth + 1) for v in (value.start, value.stop, value.step)]}
        return self.named(value)

    def named(self, value: Any) -> Json:
        """Arguments that are written by name."""
        if isinstance(value, str):
            return {"text": value}
        if isinstance(value, torch.SymInt):
            return {"size": self.values.size(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        for kind, table in (("layout", _LAYOUTS), ("memory_format", _MEMORY_FORMATS)):
            for name, member in table.items():
                if value is member:
                    return {kind: name}
        raise ExportError(f"an argument of type {type(value).__name__} cannot be saved")


def _type_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


class _Reader:
    def __init__(self, data: dict[str, Json], resolve: Callable[[str], Tensor]) -> None:
        self.resolve = resolve
        self.values = ValueReader(data["symbols"])
        self.modules = [_module_stack(entry) for entry in _list(data["modules"], "the table of modules")]
        self.sources = _list(data["sources"], "the table of sources")
        if not all(isinstance(source, str) for source in self.sources):
            raise LoadError("the table of sources holds something that is not a text")

    def graph(self, nodes: Json, graphs: Json, depth: int) -> fx.GraphModule:
        if depth > MAX_GRAPH_DEPTH:
            raise LoadError(f"graphs are nested deeper than {MAX_GRAPH_DEPTH}")
        if not isinstance(nodes, list) or not 0 < len(nodes) <= MAX_NODES:
            raise LoadError("the list of nodes is missing, empty or too long")
        attributes: dict[str, Any] = self.bodies(graphs, depth)
        used: set[str] = set()
        graph = fx.Graph()
        known: dict[str, fx.Node] = {}
        for position, record in enumerate(nodes):
            name = _node_name(record, position, known)
            try:
                known[name] = node = self.node(graph, record, known, attributes)
                if node.op == "get_attr":
                    used.add(str(node.target))
            except LoadError as reason:
                raise LoadError(f"node {name!r}: {reason}") from reason
            if (node.op == "output") != (position == len(nodes) - 1):
                raise LoadError(f"node {name!r}: the output must be the one last node")
        _check_attributes(attributes)
        return fx.GraphModule({target: attributes[target] for target in sorted(used)}, graph)

    def bodies(self, graphs: Json, depth: int) -> dict[str, Any]:
        if not isinstance(graphs, dict):
            raise LoadError("the table of graphs is not an object")
        bodies = {}
        for name, body in graphs.items():
            if not is_safe_name(name) or not isinstance(body, dict) or body.keys() != {"nodes", "graphs"}:
                raise LoadError(f"graph {name[:80]!r} is malformed")
            bodies[name] = self.graph(body["nodes"], body["graphs"], depth + 1)
        return bodies

    def node(
        self, graph: fx.Graph, record: dict[str, Json], known: dict[str, fx.Node], attributes: dict[str, Any]
    ) -> fx.Node:
        op, name = record["op"], record["name"]
        args = tuple(self.argument(a, known) for a in _list(record.get("args", []), "args"))
        kwargs = self.keywords(record.get("kwargs", {}), known)
        if op == "call_function":
            target: Any = lookup(_text(record.get("target"), "the operator"))
            misfit = check_call(target, args, kwargs)
            if misfit is not None:
                raise LoadError(f"a call of {record['target']} that does not fit its schema: {misfit}")
        elif op == "output":
            target = "output"
            if len(args) != 1 or kwargs or "target" in record:
                raise LoadError("an output has one argument")
        elif op in ("placeholder", "get_attr"):
            target = name if op == "placeholder" else record.get("target")
            if args or kwargs or (op == "placeholder" and "target" in record):
                raise LoadError(f"a {op} has no arguments")
        else:
            raise LoadError(f"unknown kind of node {str(op)[:80]!r}")
        if op == "get_attr":
            self.attribute(target, attributes)
        node = graph.create_node(op, target, args, kwargs, name=name)
        if op == "placeholder":
            node.target = node.name  # the argument's name in the source; fx renames what it keeps for itself
        self.metadata(node, record)
        if op == "get_attr":
            _check_tensor(node, attributes[target])
        return node

    def attribute(self, target: Json, attributes: dict[str, Any]) -> None:
        if not is_safe_name(target):
            raise LoadError(f"tensor name {str(target)[:80]!r} is refused")
        if target in attributes:
            return
        try:
            attributes[target] = self.resolve(target)
        except KeyError as reason:
            raise LoadError(f"there is no tensor {target!r}") from reason

    def metadata(self, node: fx.Node, record: dict[str, Json]) -> None:
        if "value" in record:
            value = self.values.rebuild(record["value"], lambda: recompute(node))
            if value is not None or record["value"] == {"constant": None}:
                node.meta["val"] = value
        if "module" in record:
            node.meta["nn_module_stack"] = dict(_entry(self.modules, record["module"], "modules"))
        if "source" in record:
            node.meta["stack_trace"] = _entry(self.sources, record["source"], "sources")
        if "rewriter" in record:
            node.meta["custom"] = {"rewriter": plain(record["rewriter"], LoadError)}

    def keywords(self, kwargs: Json, known: Mapping[str, fx.Node]) -> dict[str, Any]:
        if not isinstance(kwargs, dict) or not all(_IDENTIFIER.fullmatch(name) for name in kwargs):
            raise LoadError("keyword arguments are not an object with identifiers as keys")
        return {name: self.argument(value, known) for name, value in kwargs.items()}

    def argument(self, value: Json, known: Mapping[str, fx.Node], depth: int = 0) -> Any:
        if depth > MAX_ARGUMENT_DEPTH:
            raise LoadError(f"an argument is nested deeper than {MAX_ARGUMENT_DEPTH}")
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            if abs(value) > 2**63:
                raise LoadError("an integer is beyond 64 bits")
            return value
        if isinstance(value, list):
            return [self.argument(v, known, depth + 1) for v in value]
        if not isinstance(value, dict) or len(value) != 1:
            raise LoadError(f"not an argument: {str(value)[:80]!r}")
        ((kind, content),) = value.items()
        if kind == "node":
            if not isinstance(content, str) or content not in known:
                raise LoadError(f"it uses {str(content)[:80]!r}, which is no earlier node")
            return known[content]
        if kind == "tuple":
            return tuple(self.argument(v, known, depth + 1) for v in _list(content, "a tuple"))
        if kind == "slice" and isinstance(content, list) and len(content) == 3:
            return slice(*(self.argument(v, known, depth + 1) for v in content))
        return self.named(kind, content)

    def named(self, kind: str, content: Json) -> Any:
        if kind == "text":
            return _text(content, "a text")
        if kind == "size":
            return self.values.size(content)
        if kind == "float":
            return float_from_json({kind: content})
        if kind == "dtype":
            return dtype_of(content)
        if kind == "device":
            return device_of(content)
        if kind == "layout" and content in _LAYOUTS:
            return _LAYOUTS[content]
        if kind == "memory_format" and content in _MEMORY_FORMATS:
            return _MEMORY_FORMATS[content]
        raise LoadError(f"not an argument: {str({kind: content})[:80]!r}")


def _node_name(record: Json, position: int, known: Mapping[str, fx.Node]) -> str:
    if not isinstance(record, dict) or not {"name", "op"} <= record.keys() <= _NODE_KEYS:
        raise LoadError(f"node {position} is malformed")
    name = record["name"]
    if not _is_identifier(name):
        raise LoadError(f"node {position} has the name {str(name)[:80]!r}, which is not an identifier")
    if name in known:
        raise LoadError(f"two nodes are called {name!r}")
    return str(name)


def _is_identifier(name: Any) -> bool:
    """Whether fx can write the name into the source it compiles: a plain variable, not the module itself."""
    if not isinstance(name, str) or len(name) > MAX_NAME or name == "self":
        return False
    return _IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


def _check_tensor(node: fx.Node, value: Any) -> None:
    """The tensor in the file must be the one that the graph was made for."""
    expected = node.meta.get("val")
    if isinstance(value, fx.GraphModule):
        return
    if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
        raise LoadError("a get_attr must name a tensor or a graph, and describe the tensor")
    if value.dtype != expected.dtype or tuple(value.shape) != tuple(expected.shape):
        raise LoadError(
            f"tensor {node.target!r} is {dtype_name(value.dtype)}{list(value.shape)}, the graph was made for "
            f"{dtype_name(expected.dtype)}{list(expected.shape)}"
        )


def _check_attributes(attributes: Mapping[str, Any]) -> None:
    """No name may be the parent of another: "a" a tensor and "a.b" inside it."""
    for name in attributes:
        parts = name.split(".")
        for end in range(1, len(parts)):
            if ".".join(parts[:end]) in attributes:
                raise LoadError(f"tensor {'.'.join(parts[:end])!r} cannot hold {name!r}")


def _module_stack(entry: Json) -> dict[str, tuple[str, str]]:
    stack = {}
    for item in _list(entry, "a module path"):
        if not isinstance(item, list) or len(item) != 3 or not all(isinstance(text, str) for text in item):
            raise LoadError("a module path is malformed")
        stack[item[0]] = (item[1], item[2])
    return stack


def _entry(table: list[Any], index: Json, what: str) -> Any:
    if type(index) is not int or not 0 <= index < len(table):
        raise LoadError(f"there is no entry {str(index)[:80]!r} in the table of {what}")
    return table[index]


def _list(value: Json, what: str) -> list[Json]:
    if not isinstance(value, list):
        raise LoadError(f"{what}: a list is expected, not {str(value)[:80]!r}")
    return value


def _text(value: Json, what: str) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise LoadError(f"{what}: a short text is expected, not {str(value)[:80]!r}")
    return value
