# SPDX-License-Identifier: Apache-2.0
"""What `rewriter inspect` and `rewriter passes` show: the module tree, the nodes of one module, the passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from rewriter import planner, rendering, store
from rewriter.diffing import describe, line
from rewriter.errors import PlanError
from rewriter.layout import Flowing, add, counted, heading, human_bytes, table
from rewriter.planner import Plan
from rewriter.program import Program
from rewriter.registry import nearest
from rewriter.rules import Pass
from rewriter.sizes import stored_bytes, total

# ------------------------------------------------------------------------------------------------------------ passes


def pass_list(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line per pass."""
    rows = table("pass", "contract", "what it does")
    for one in found:
        rows.add_row(Text(one["name"], "bold"), rendering.contract(one["contract"]), Text(one["summary"]))
    return Group(rows, Text("rewriter passes NAME shows the options of one", style="dim"))


def pass_options(one: Mapping[str, Any]) -> RenderableType:
    """Every option of a pass, with its default and meaning."""
    title = Text.assemble((one["name"], "bold"), " · ", rendering.contract(one["contract"]))
    rows = table("option", "default", "type", "meaning")
    for option in one["options"]:
        default = option["default"]
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        add(rows, Text(option["name"], "bold"), shown, option["type"], option["meaning"])
    return Group(title, Text(one["summary"]), rows)


# -------------------------------------------------------------------------------------------------------------- tree


@dataclass
class _Branch:
    """A module: its own name, what it holds, what would take it, what lies below."""

    name: str
    size: tuple[int, int]
    passes: tuple[str, ...]
    children: list[_Branch] = field(default_factory=list)

    def content(self) -> Any:
        """Equal for modules that differ in their name only."""
        return self.size, self.passes, tuple((c.name, c.content()) for c in self.children)


def overview(kind: str, program: Program, passes: Sequence[Pass]) -> tuple[RenderableType, dict[str, Any]]:
    """The tree, and the same as data. Each pass is planned alone: this shows what it *could* take."""
    plans = {p.name: planner.plan(program, [p]) for p in passes}
    taken: dict[str, list[str]] = {}
    for name, plan in plans.items():
        for site in plan.sites:
            for path in site.paths:
                taken.setdefault(path, []).append(name)
    sizes = _sizes(program)
    root = _tree(kind, program, sizes, taken)
    rows = table("module", "parameters", "as stored", "could be taken by", right=("parameters", "as stored"))
    _rows(rows, root, "", "", 1)
    skipped = rendering.misses([m for plan in plans.values() for m in plan.misses])
    data = {
        "model": kind,
        "modules": [
            {"path": p, "parameters": n, "bytes": b, "passes": taken.get(p, [])} for p, (n, b) in sizes.items()
        ],
        "sites": {name: len(plan.sites) for name, plan in plans.items()},
        "misses": [
            {"pass": n, "rule": m.rule, "site": m.site, "reason": m.reason}
            for n, plan in plans.items()
            for m in plan.misses
        ],
        "inputs": _inputs(program),
        "nodes": len(program.graph.nodes),
        "notes": list(program.notes),
    }
    return Group(rows, _legend(plans), Text(), skipped, _footer(program)), data


def _tree(kind: str, program: Program, sizes: Mapping[str, tuple[int, int]], taken: Mapping[str, list[str]]) -> _Branch:
    def branch(name: str, path: str) -> _Branch:
        return _Branch(name, sizes.get(path, (0, 0)), tuple(dict.fromkeys(taken.get(path, ()))))

    root = branch(kind, "")
    branches = {"": root}
    for path in _ordered(program, taken):
        parent, _, name = path.rpartition(".")
        branches[path] = branch(name, path)
        branches[parent].children.append(branches[path])
    return root


def _rows(rows: Any, node: _Branch, lead: str, below: str, count: int) -> None:
    """One row per module; siblings called by numbers that are alike are one row."""
    many = f"{count} × " if count > 1 else ""
    elements, size = (f"{many}{node.size[0]:,}", many + human_bytes(node.size[1])) if node.size[0] else ("", "")
    name = Text.assemble((lead, "dim"), (node.name, "bold" if node.passes else ""), overflow="fold")
    rows.add_row(name, Text(elements), Text(size), Text(", ".join(node.passes), "green"))
    runs = list(_alike(node.children))
    for i, run in enumerate(runs):
        last = i == len(runs) - 1
        first = run[0]
        shown = (
            _Branch(f"{first.name} … {run[-1].name}", first.size, first.passes, first.children)
            if len(run) > 1
            else first
        )
        _rows(rows, shown, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), len(run))


def _alike(children: Sequence[_Branch]) -> Iterator[list[_Branch]]:
    """Runs of neighbours called by numbers with equal content; every other child alone."""
    for _, run in groupby(enumerate(children), key=lambda c: c[1].content() if c[1].name.isdigit() else c[0]):
        yield [child for _, child in run]


def _ordered(program: Program, taken: Mapping[str, list[str]]) -> list[str]:
    """Module paths in the order of the model: those that hold tensors, their parents, and sites without tensors."""
    paths: dict[str, None] = {}
    for path in [*(name.rpartition(".")[0] for name, _ in store.tensors(program.root)), *taken]:
        parts = path.split(".") if path else []
        paths |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    return list(paths)


def _sizes(program: Program) -> dict[str, tuple[int, int]]:
    """Module path -> (elements, bytes as stored) of the distinct tensors below it."""
    below: dict[str, dict[int, Any]] = {"": {}}
    for name, tensor in store.tensors(program.root):
        if not (isinstance(tensor, nn.Parameter) or store.is_persistent(program.root, name)):
            continue
        parts = name.split(".")[:-1]
        for i in range(len(parts) + 1):
            below.setdefault(".".join(parts[:i]), {})[id(tensor)] = tensor
    return {path: (sum(t.numel() for t in held.values()), total(held.values())) for path, held in below.items()}


def _legend(plans: Mapping[str, Plan]) -> RenderableType:
    """How many sites each pass could take; their order and conflicts are the plan's business."""
    return heading(*(f"{name}: {counted(len(plan.sites), 'site')}" for name, plan in plans.items()))


def _footer(program: Program) -> RenderableType:
    inputs = Flowing("inputs: " + ", ".join(_inputs(program)), after=" ", style="dim")
    return Group(inputs, *(Flowing(f"note: {note}", after=" ", style="dim") for note in program.notes))


def _inputs(program: Program) -> list[str]:
    """``input_ids i64[s0, s1]``: sizes that are free print as symbols, the same ones as in the nodes."""
    values = [n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")]
    return [f"{name} {describe(value)}" for name, value in zip(program.input_names(), values, strict=False)]


# -------------------------------------------------------------------------------------------------------------- site


def site(program: Program, path: str) -> tuple[RenderableType, dict[str, Any]]:
    """The nodes at or below a module path, with shapes, under the source lines they come from.

    Raises:
        PlanError: no node belongs to the path; names the nearest.
    """
    facts = program.facts
    nodes = [
        n
        for n in program.graph.nodes
        if n.op == "call_function" and (facts.path(n) == path or facts.path(n).startswith(path + "."))
    ]
    if not nodes:
        known = sorted({facts.path(n) for n in program.graph.nodes} - {""})
        raise PlanError(f"no node belongs to {path!r}{nearest(path, known)}")
    parts: list[RenderableType] = [heading(path, counted(len(nodes), "node"))]
    for source, group in groupby(nodes, key=facts.source):
        parts += [Text(), Flowing(_short(source), after=" .(", indent=4, style="cyan")]
        parts += [Flowing("  " + rendering.node_text(line(n), path), after=" (", indent=6) for n in group]
    read = {
        str(n.target)
        for node in nodes
        for n in node.all_input_nodes
        if n.op == "get_attr" and str(n.target) not in program.bodies
    }
    tensors = {name: (describe(program.tensor(name)), stored_bytes(program.tensor(name))) for name in sorted(read)}
    rows = table("tensor", "", "as stored", right=("as stored",))
    for name, (shape, size) in tensors.items():
        add(rows, Flowing(name), shape, human_bytes(size))
    data = {
        "path": path,
        "inputs": _inputs(program),
        "nodes": [
            {
                "name": n.name,
                "op": line(n).op,
                "operands": list(line(n).operands),
                "result": line(n).result,
                "path": facts.path(n),
                "source": facts.source(n),
            }
            for n in nodes
        ],
        "tensors": {name: {"type": shape, "bytes": size} for name, (shape, size) in tensors.items()},
    }
    return Group(*parts, *([Text(), rows] if tensors else [Text()]), _footer(program)), data


def _short(source: str) -> str:
    """``…/modeling_llama.py:123 in forward: code`` -> file name, line and code."""
    if not source:
        return "(no source line)"
    place, _, rest = source.partition(" in ")
    return f"{place.rpartition('/')[2]}  {rest.partition(': ')[2]}".strip()
