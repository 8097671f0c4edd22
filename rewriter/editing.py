# SPDX-License-Identifier: Apache-2.0
"""The editor: the only way rules change a graph. Every edit is journalled, every new node carries full metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from rewriter import store
from rewriter.matcher import Match
from rewriter.program import Program
from rewriter.rules import Site, provenance


@dataclass(frozen=True)
class Edit:
    """One journal entry: at one site a rule put ``added`` where ``removed`` stood.

    ``created`` and ``replaced`` are tensor names; names of nodes are for reading, never for finding.
    """

    rule: str
    site: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    created: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


class Editor:
    """Edits one program for the sites of one rule after another.

    ``substitutes`` maps nodes that earlier edits replaced to what stands for them now, so that matches found before
    an edit stay usable after it.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.journal: list[Edit] = []
        self.substitutes: dict[Node, Node] = {}
        values = [n.meta.get("val") for n in self.graph.find_nodes(op="placeholder")]
        self.fake_mode = detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)
        self._site: Site | None = None
        self._anchor: Node | None = None
        self._added: list[Node] = []

    @property
    def graph(self) -> Graph:
        return self.program.graph

    # ------------------------------------------------------------------------------------- what rules call

    def parameter(self, name: str, tensor: Tensor) -> Node:
        """The node that reads ``name`` from the store (made at the top of the graph if there is none)."""
        existing = self.program.parameter_nodes().get(name)
        if existing is not None:
            return existing
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.create_node("get_attr", name)
        with self.fake_mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        node.meta["val"] = fake.requires_grad_(tensor.requires_grad)
        return self._mark(node)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A new call before the site's root, with its value's shape and dtype computed on fake tensors."""
        args, kwargs = map_arg((args, kwargs), self.resolve)
        with self.graph.inserting_before(self._anchor or self.graph.output_node()):
            node = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode, torch.enable_grad():
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        return self._mark(node)

    def resolve(self, node: Node) -> Node:
        """What stands for ``node`` now."""
        while node in self.substitutes:
            node = self.substitutes[node]
        return node

    # ------------------------------------------------------------------------------------- what apply calls

    def rewrite(self, site: Site, tensors: Mapping[str, Tensor], choice: Mapping[str, Any]) -> Edit:
        """Replace every match of ``site``; ``tensors`` are its new parameters by full name."""
        prefix = site.rule.prefix(site.match)
        replaced = site.rule.replaced_tensors(site.match)
        added: list[str] = []
        removed: list[str] = []
        for match in site.matches:
            current = self._current(match)
            # After every input of every output: the last root in graph order is after all of them; a rule with
            # several outputs needs its nodes before the first one that is used.
            self._site, self._anchor, self._added = site, self._first_root(site, current), []
            parameters = {
                name.removeprefix(prefix + ".") if prefix else name: self.parameter(name, t)
                for name, t in tensors.items()
            }
            replacement = site.rule.rewrite(self, current, parameters, choice)
            for old, new in replacement.items():
                old.replace_all_uses_with(new)
                self.substitutes[old] = new
            added += [n.name for n in self._added]
            removed += self._sweep(current)
        edit = Edit(site.rule.name, str(site.address), tuple(added), tuple(removed), tuple(tensors), replaced)
        self.journal.append(edit)
        return edit

    def _current(self, match: Match) -> Match:
        """The match with captures that stand in the graph now."""

        def present(value: Any) -> Any:
            if isinstance(value, Match):
                return self._current(value)
            return self.resolve(value) if isinstance(value, Node) else value

        return dataclasses.replace(match, captures={k: present(v) for k, v in match.captures.items()})

    def _first_root(self, site: Site, match: Match) -> Node:
        roots = set(site.rule.replaced_nodes(match))
        return next(n for n in self.graph.nodes if n in roots)

    def _mark(self, node: Node) -> Node:
        """Metadata of a new node: where it stands, what the user wrote there, which rule made it out of what."""
        self._added.append(node)
        if (site := self._site) is None:
            return node
        root = site.match.root
        for name in ("stack_trace", "from_node"):
            if name in root.meta:
                node.meta[name] = root.meta[name]
        node.meta["nn_module_stack"] = self._stack(site, root)
        node.meta["custom"] = {
            "rewriter": {
                "rule": site.rule.name,
                "site": str(site.address),
                "paths": list(site.paths),
                "from": [f"{n.name}: {n.target}" for n in site.match.nodes],
                "origin": [o for n in site.match.nodes for o in provenance(n).get("from", ())],
            }
        }
        return node

    @staticmethod
    def _stack(site: Site, root: Node) -> dict[str, Any]:
        """The root's module stack, with the site's own path as its deepest entry."""
        stack = dict(root.meta.get("nn_module_stack") or {})
        path = site.rule.prefix(site.match)
        if stack and next(reversed(stack.values()))[0] != path:
            depth = path.rpartition(".")[0]
            stack = {k: v for k, v in stack.items() if v[0] == "" or depth == v[0] or depth.startswith(v[0] + ".")}
            stack[f"rewriter__{path}"] = (path, f"rewriter.{site.rule.name}")
        return stack

    def _sweep(self, match: Match) -> list[str]:
        """Erase what the match computed and nobody reads any more, deepest use first."""
        gone: list[str] = []
        pending = list(reversed(match.nodes))
        while pending:
            dead = [n for n in pending if not n.users and n.op == "call_function"]
            if not dead:
                return gone
            for node in dead:
                gone.append(node.name)
                self.graph.erase_node(node)
                pending.remove(node)
        return gone

    def finish(self) -> None:
        """Drop reads of tensors nobody uses any more, compile, and forget stale facts."""
        for name, node in self.program.parameter_nodes().items():
            if not node.users and name not in self.program.bodies:
                self.graph.erase_node(node)
        self.program.rebind()
        self.substitutes.clear()

    def unread(self, names: tuple[str, ...]) -> list[str]:
        """Those of ``names`` that the graph no longer reads."""
        read = self.program.parameter_nodes()
        return [n for n in names if n not in read or not read[n].users]


def adopt(root: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put new tensors into the store."""
    for name, tensor in tensors.items():
        store.put(root, name, tensor)
