# SPDX-License-Identifier: Apache-2.0
"""Facts about the nodes of a captured graph: arguments, places, aliases, mutations, types.

Nothing here changes the graph. Every fact is computed when first asked for and kept; whoever edits the graph says so
with `Facts.forget` (one node) or `Facts.invalidate` (everything).
"""

from __future__ import annotations

import operator
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from rewriter.schemas import (
    ASSERTIONS,
    MODE_SWITCHES,
    declared_writes,
    may_write,
    named_arguments,
    nodes_in,
    viewed,
    written,
)

_HERE = os.path.dirname(__file__) + os.sep  # the capture's own wrapper is no line of the user's
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+?)\s*$')


Derived = TypeVar("Derived")


class Carrier(Protocol):
    """Anything that has facts: a `Program`."""

    @property
    def facts(self) -> Facts: ...


def facts_of(program: Facts | fx.GraphModule | Carrier) -> Facts:
    """The facts of a program; a bare graph module gets fresh ones."""
    if isinstance(program, Facts):
        return program
    if isinstance(program, fx.GraphModule):
        return Facts(program)
    return program.facts


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every input. Adds no guard: not known to be equal is different."""
    # A symbolic size may have turned out constant; its expression is then the number.
    one, other = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (a, b))
    return bool(one == other)


def same_shape(a: tuple[Any, ...] | None, b: tuple[Any, ...] | None) -> bool:
    """Whether two shapes are known, of one rank, and equal for every input."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(same_size(x, y) for x, y in zip(a, b, strict=True))


def path_of(node: Node) -> str:
    """Path of the module a node was recorded in; see `Facts.path`."""
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack")
    for key, entry in reversed((stack or {}).items()):
        if not str(key).startswith("_empty_nn_module_stack"):
            return str(entry[0]).partition("@")[0]
    return ""


def paths_of(node: Node) -> tuple[str, ...]:
    """Every original module path of a node; see `Facts.paths`."""
    kept = node.meta.get("custom", {}).get("rewriter", {}).get("paths")
    return tuple(kept) if kept else (path_of(node),)


class Facts:
    """What is known about each node of one graph.

    Args:
        graph_module: a module in the training IR (`torch.export`), parameters as `get_attr` nodes.

    Every query is O(1) or O(log n) after one sweep over the graph.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.invalidate()

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def invalidate(self) -> None:
        """Forget everything; for edits too large to name node by node."""
        self._arguments: dict[Node, Mapping[str, Any]] = {}
        self._positions: dict[Node, int] = {}
        self._roots: dict[Node, frozenset[Node]] = {}
        self._writers: dict[Node, list[Node]] | None = None
        self._switches: list[Node] | None = None
        self._bodies: dict[Node, tuple[Facts, ...]] = {}
        self._storages: dict[int, Node] | None = None
        self._derived: dict[Any, Any] = {}

    def derived(self, kind: Callable[[Facts], Derived]) -> Derived:
        """``kind(facts)``, kept until the graph changes: what is computed from the whole graph at once."""
        if kind not in self._derived:
            self._derived[kind] = kind(self)
        known: Derived = self._derived[kind]
        return known

    def forget(self, node: Node) -> None:
        """Forget what depends on `node`. Call it for every inserted node (once its users are rewired), every
        node whose arguments were changed, and every erased node.

        Costs as much as the node has users and views; where it writes, or is written to, a sweep on demand.
        """
        self._positions.clear()
        self._derived.clear()
        self._bodies.pop(node, None)
        if node.op == "get_attr":
            self._storages = None
        if node.target in MODE_SWITCHES:
            self._switches = None
        for stale in (node, *node.users):
            self._arguments.pop(stale, None)
        pending = [node]
        while pending:
            value = pending.pop()
            if self._roots.pop(value, None) is not None or value is node:
                pending.extend(user for user in value.users if user in self._roots and value in self.aliased(user))
        known = self._writers
        if known is not None and (node in known or (_concerns_storage(node) if known else self.written(node))):
            self._writers = None

    # -- operators

    def calls(self, targets: Collection[Any]) -> list[Node]:
        """Nodes that call one of the operators, grouped by operator; from the graph's own index."""
        return [n for target in targets for n in self.graph.find_nodes(op="call_function", target=target, sort=False)]

    def count(self, targets: Collection[Any]) -> int:
        """How many nodes call one of the operators. `find_nodes` would copy its index to tell."""
        table = self.graph._find_nodes_lookup_table.table
        return sum(len(table.get(("call_function", target), ())) for target in targets)

    # -- place

    def position(self, node: Node) -> int:
        """Index of the node in graph order. To compare two nodes, ``a < b`` is cheaper."""
        if node not in self._positions:
            self._positions = {n: i for i, n in enumerate(self.graph.nodes)}
        return self._positions[node]

    def path(self, node: Node) -> str:
        """Path of the module a node was recorded in (``""`` is the model itself); of a parameter, its owner."""
        return path_of(node)

    def paths(self, node: Node) -> tuple[str, ...]:
        """Every original module path of a node: several where an earlier rewrite merged sites."""
        return paths_of(node)

    def source(self, node: Node) -> str:
        """``file:line in function: code``: the innermost line outside torch and this package; ``""`` if unknown."""
        frames = [f for f in _frames(node.meta.get("stack_trace") or "") if not f[0].startswith(_HERE)]
        own = [frame for frame in frames if "/torch/" not in frame[0].replace("\\", "/")]
        if not frames:
            return ""
        file, line, function, code = (own or frames)[-1]
        return f"{file}:{line} in {function}: {code}" if code else f"{file}:{line} in {function}"

    # -- arguments and types

    def arguments(self, node: Node) -> Mapping[str, Any]:
        """The node's arguments by schema name, every default filled in.

        Arguments no schema names keep their place (``"*0"``) or keyword, so that nothing is ever dropped.
        """
        known = self._arguments.get(node)
        if known is None:
            known = self._arguments[node] = MappingProxyType(named_arguments(node))
        return known

    def dtype(self, node: Node) -> torch.dtype | None:
        value = node.meta.get("val")
        return value.dtype if isinstance(value, Tensor) else None

    def shape(self, node: Node) -> tuple[int | torch.SymInt, ...] | None:
        value = node.meta.get("val")
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def device(self, node: Node) -> torch.device | None:
        value = node.meta.get("val")
        return value.device if isinstance(value, Tensor) else None

    def tensor(self, node: Node) -> Tensor | None:
        """The parameter, buffer or constant a `get_attr` node reads; None for every other node."""
        if node.op != "get_attr":
            return None
        value: Any = self.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return value if isinstance(value, Tensor) else None

    def is_parameter(self, node: Any) -> TypeGuard[Node]:
        """Whether the node reads a parameter or buffer (whose values are known when a rewrite is planned)."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return False
        # The value's description is enough: a program whose tensors were replaced since still has its facts.
        return isinstance(node.meta.get("val"), Tensor) or self.tensor(node) is not None

    def is_assertion(self, node: Node) -> bool:
        """Whether the node only checks something."""
        if node.op == "call_module":
            return node.target == "_guards_fn"
        return node.op == "call_function" and node.target in ASSERTIONS

    def users(self, node: Node) -> tuple[Node, ...]:
        """The nodes that really use the value, assertions left out."""
        return tuple(user for user in node.users if not self.is_assertion(user))

    def escape(
        self, nodes: Collection[Node], outputs: Collection[Node], shared: Collection[Node] = ()
    ) -> tuple[Node, Node] | None:
        """A node of a group, neither output nor shared, and its user outside the group, if there is such a pair."""
        for node in nodes:
            if node in shared or node in outputs:
                continue
            for user in self.users(node):
                if user not in nodes:
                    return node, user
        return None

    def is_random(self, node: Node) -> bool:
        """Whether the node draws random numbers *as it is called*: dropout in evaluation does not."""
        if isinstance(node.target, HigherOrderOperator):
            return any(body.is_random(inner) for body in self.bodies(node) for inner in body.graph.nodes)
        if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
            return False
        arguments = self.arguments(node)
        if arguments.get("train") is False or arguments.get("training") is False:
            return False
        rates = ["dropout_p", "dropout", *(["p"] if "dropout" in node.target._schema.name else [])]
        return not any(arguments.get(rate) == 0 for rate in rates if rate in arguments)

    def bodies(self, node: Node) -> tuple[Facts, ...]:
        """Facts of the graphs a higher-order operator runs (control flow, autocast and grad regions)."""
        if not isinstance(node.target, HigherOrderOperator):
            return ()
        if node not in self._bodies:
            readers = [n for n in node.all_input_nodes if n.op == "get_attr"]
            modules = [getattr(self.graph_module, str(n.target), None) for n in readers]
            self._bodies[node] = tuple(Facts(m) for m in modules if isinstance(m, fx.GraphModule))
        return self._bodies[node]

    # -- aliases and mutations

    def aliased(self, node: Node) -> tuple[Node, ...]:
        """The arguments whose storage the node's result may share, by schema (``Tensor(a)``) and known lies."""
        if node.op != "call_function":
            return ()
        if node.target is operator.getitem:
            return tuple(nodes_in(node.args[0]))
        if isinstance(node.target, HigherOrderOperator):
            views = any(_returns_input(body) for body in self.bodies(node))
            return tuple(n for n in node.all_input_nodes if self.shape(n) is not None) if views else ()
        if not isinstance(node.target, OpOverload):
            return ()
        names = viewed(node.target)
        if not names:  # of most operators; their arguments need not be looked up
            return ()
        arguments = self.arguments(node)
        return tuple(n for name in names for n in nodes_in(arguments.get(name)))

    def alias_roots(self, node: Node) -> frozenset[Node]:
        """The base values whose storage the node may share: itself, unless it is a view."""
        pending = [node]
        while pending:
            value = pending[-1]
            missing = [base for base in self.aliased(value) if base not in self._roots]
            if missing and value not in self._roots:
                pending.extend(missing)
                continue
            pending.pop()
            if value not in self._roots:
                self._roots[value] = self._roots_from_bases(value)
        return self._roots[node]

    def alias_root(self, node: Node) -> Node:
        """The base value of a view (of several, the earliest); the node itself if it owns its storage."""
        return min(self.alias_roots(node))

    def written(self, node: Node) -> tuple[Node, ...]:
        """The arguments the node writes to, by schema (``Tensor(a!)``) and the known lies."""
        if isinstance(node.target, OpOverload):
            if not may_write(node.target):
                return ()
        elif isinstance(node.target, HigherOrderOperator):
            writes = any(_writes_input(body) for body in self.bodies(node))
            return tuple(n for n in node.all_input_nodes if self.shape(n) is not None) if writes else ()
        else:
            return ()
        arguments = self.arguments(node)
        return tuple(n for name in written(node.target, arguments) for n in nodes_in(arguments.get(name)))

    def any_writers(self) -> bool:
        """Whether any node writes in place: most graphs have none, and then nothing needs to be asked."""
        if self._writers is None:
            self._writers = self._collect_writers()
        return bool(self._writers)

    def writers(self, value: Node) -> list[Node]:
        """Every node that writes to the storage of `value`, in graph order."""
        if self._writers is None:
            self._writers = self._collect_writers()
        if not self._writers:
            return []
        found = {writer for root in self.alias_roots(value) for writer in self._writers.get(root, ())}
        return sorted(found)

    def writes_between(self, value: Node, first: Node, last: Node) -> list[Node]:
        """Nodes that write to the storage of `value` strictly between two nodes of the graph."""
        writers = self.writers(value)
        return writers[bisect_right(writers, first) : bisect_left(writers, last)]

    def epoch(self, value: Node, at: Node) -> int:
        """How often the storage of `value` has been written before `at`: equal epochs read equal contents."""
        return bisect_left(self.writers(value), at)

    def mode_switches_between(self, first: Node, last: Node) -> list[Node]:
        """Nodes strictly between two others that switch autocast or grad mode."""
        if self._switches is None:
            self._switches = [n for n in self.graph.nodes if n.op == "call_function" and n.target in MODE_SWITCHES]
        return self._switches[bisect_right(self._switches, first) : bisect_left(self._switches, last)]

    def _roots_from_bases(self, node: Node) -> frozenset[Node]:
        bases = self.aliased(node)
        if bases:
            return frozenset[Node]().union(*(self._roots[base] for base in bases))
        return frozenset({self._storage_owner(node)})

    def _storage_owner(self, node: Node) -> Node:
        """The first `get_attr` that reads the same storage (two names of one tensor alias each other)."""
        if node.op != "get_attr":
            return node
        if self._storages is None:
            self._storages = {}
            for reader in self.graph.find_nodes(op="get_attr"):
                tensor = self.tensor(reader)
                if tensor is not None:
                    self._storages.setdefault(_storage_key(tensor), reader)
        tensor = self.tensor(node)
        return node if tensor is None else self._storages[_storage_key(tensor)]

    def _collect_writers(self) -> dict[Node, list[Node]]:
        table: dict[Node, list[Node]] = {}
        called = {target for op, target in self.graph._find_nodes_lookup_table.table if op == "call_function"}
        writing = [t for t in called if isinstance(t, HigherOrderOperator) or (isinstance(t, OpOverload) and may_write(t))]
        for node in sorted(self.calls(writing)):
            roots = {root for value in self.written(node) for root in self.alias_roots(value)}
            for root in roots:
                table.setdefault(root, []).append(node)
        # A caller may pass tensors that overlap: a write to one input may be a write to any.
        to_inputs = {writer for root, writers in table.items() if root.op == "placeholder" for writer in writers}
        if to_inputs:
            table |= {given: sorted(to_inputs) for given in self.graph.find_nodes(op="placeholder")}
        return table


def _frames(trace: str) -> list[tuple[str, str, str, str]]:
    """The frames of a stack trace, outermost first: (file, line, function, code)."""
    frames: list[tuple[str, str, str, str]] = []
    lines = trace.splitlines()
    for index, text in enumerate(lines):
        found = _FRAME.match(text)
        if found is None:
            continue
        following = lines[index + 1].strip() if index + 1 < len(lines) else ""
        code = "" if _FRAME.match(following) else following
        frames.append((found["file"], found["line"], found["function"], code))
    return frames


def _concerns_storage(node: Node) -> bool:
    """Whether a node may write, or pass another's storage on."""
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return node.op == "get_attr" or node.op == "call_function"
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    return bool(viewed(node.target) or declared_writes(node.target))


def _storage_key(tensor: Tensor) -> int:
    """Identity of the tensor's storage; tensors without one (subclasses, functional wrappers) are themselves."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _inputs(body: Facts) -> set[Node]:
    return set(body.graph.find_nodes(op="placeholder"))


def _returns_input(body: Facts) -> bool:
    inputs = _inputs(body)
    results = nodes_in(body.graph.output_node().args)
    return any(inputs & body.alias_roots(result) for result in results)


def _writes_input(body: Facts) -> bool:
    inputs = _inputs(body)
    return any(inputs & body.alias_roots(value) for node in body.graph.nodes for value in body.written(node))
