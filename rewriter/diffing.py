# SPDX-License-Identifier: Apache-2.0
"""Two programs side by side: what each site was and what stands there now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.errors import PlanError
from rewriter.program import Program
from rewriter.registry import nearest
from rewriter.rules import module_path, provenance

_OPEN_END = 2**63 - 1  # how aten writes the open end of a slice


@dataclass(frozen=True)
class NodeLine:
    """One node, readable.

    Attributes:
        name: of the FX node.
        op: the operator in full (``aten.linear.default``), or the name of the tensor that is read.
        operands: every argument in order, keyword arguments as ``name=value``.
        result: dtype and shape.
        rule: the rule that made the node; empty for one of the original.
        origin: nodes of the original it stands for.
        is_tensor: it reads a parameter, buffer or constant.
    """

    name: str
    op: str
    operands: tuple[str, ...]
    result: str
    rule: str = ""
    origin: tuple[str, ...] = ()
    is_tensor: bool = False

    @property
    def short_op(self) -> str:
        """Without the overload: ``aten.linear``."""
        return ".".join(self.op.split(".")[:2])


@dataclass(frozen=True)
class SiteDiff:
    """What one module path lost and gained."""

    path: str
    removed: tuple[NodeLine, ...]
    added: tuple[NodeLine, ...]


@dataclass(frozen=True)
class Diff:
    """The difference of a program before and after rewriting. Prints side by side; ``to_json`` for machines."""

    sites: tuple[SiteDiff, ...]
    unchanged: int

    @classmethod
    def between(cls, before: Program, after: Program) -> Diff:
        """Both must come from one capture (the rewritten program keeps the names of untouched nodes)."""
        old = {n.name: n for n in before.graph.nodes}
        new = {n.name: n for n in after.graph.nodes}
        removed = [n for name, n in old.items() if name not in new or _made(new[name])]
        added = [n for n in new.values() if _made(n)]
        moved = {origin: _place(n) for n in added for origin in _origins(n)}
        lost: dict[str, list[NodeLine]] = {}
        gained: dict[str, list[NodeLine]] = {}
        for n in removed:
            lost.setdefault(_former_place(n, moved), []).append(_line(n))
        for n in added:
            gained.setdefault(_place(n), []).append(_line(n))
        # In the order in which the model computes: tensors are read at the top of the graph.
        computing = [n for n in added if n.op != "get_attr"]
        paths = dict.fromkeys([_place(n) for n in computing] + list(gained) + list(lost))
        sites = [SiteDiff(path, tuple(lost.get(path, ())), tuple(gained.get(path, ()))) for path in paths]
        return cls(tuple(sites), len(old) - len(removed))

    def below(self, path: str | None) -> Diff:
        """Only places at or below a module path. Raises PlanError where nothing changed."""
        if path is None:
            return self
        sites = tuple(s for s in self.sites if s.path == path or s.path.startswith(path + "."))
        if not sites:
            raise PlanError(f"nothing changed at {path!r}{nearest(path, [s.path for s in self.sites])}")
        return Diff(sites, self.unchanged)

    def to_json(self) -> dict[str, Any]:
        def lines(nodes: tuple[NodeLine, ...]) -> list[dict[str, Any]]:
            return [
                {
                    "name": n.name,
                    "op": n.op,
                    "operands": list(n.operands),
                    "result": n.result,
                    "rule": n.rule,
                    "origin": list(n.origin),
                }
                for n in nodes
            ]

        return {
            "unchanged": self.unchanged,
            "sites": [{"path": s.path, "removed": lines(s.removed), "added": lines(s.added)} for s in self.sites],
        }

    def __rich__(self) -> Any:
        from rewriter.rendering import diff_table

        return diff_table(self)


def _made(node: Node) -> bool:
    return bool(provenance(node))


def _place(node: Node) -> str:
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else module_path(node)


def _former_place(node: Node, moved: Mapping[str, str]) -> str:
    """Where what took over from a removed node stands; a tensor goes with the first node that read it."""
    readers = node.users if node.op == "get_attr" else ()
    return next((moved[n.name] for n in (node, *readers) if n.name in moved), _place(node))


def _origins(node: Node) -> list[str]:
    """Names of the nodes a made node stands for (its own and those of rewrites before it)."""
    written = provenance(node)
    return [text.partition(":")[0] for text in [*written.get("from", ()), *written.get("origin", ())]]


def line(node: Node) -> NodeLine:
    """A node as people read it."""
    return _line(node)


def _line(node: Node) -> NodeLine:
    written = provenance(node)
    operands = (*map(_operand, node.args), *(f"{k}={_operand(v)}" for k, v in node.kwargs.items()))
    origin = tuple(written.get("origin") or written.get("from", ()))
    return NodeLine(
        node.name,
        _operator(node),
        operands,
        describe(node.meta.get("val")),
        written.get("rule", ""),
        origin,
        node.op == "get_attr",
    )


def _operator(node: Node) -> str:
    if node.op not in ("call_function", "get_attr"):
        return node.op
    plain = getattr(node.target, "__module__", "") in ("_operator", "math") and hasattr(node.target, "__name__")
    return f"operator.{node.target.__name__}" if plain else str(node.target)  # type: ignore[union-attr]


def _operand(value: Any) -> str:
    """An argument: a tensor by name, a size by its symbol, anything else as written."""
    if isinstance(value, Node):
        size = value.meta.get("val")
        if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            return str(size)
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_operand, value)) + "]"
    if value == _OPEN_END:
        return "end"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def describe(value: Any) -> str:
    """``f32[s0, 12, 64]`` for a (fake) tensor; sizes that are free print as their symbols."""
    if isinstance(value, list | tuple):
        return "(" + ", ".join(describe(v) for v in value) + ")"
    if not isinstance(value, Tensor):
        return "" if value is None else str(value)
    short = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("uint", "u").replace("int", "i")
    return f"{short}[{', '.join(str(s) for s in value.shape)}]"
