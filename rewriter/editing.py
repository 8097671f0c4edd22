# SPDX-License-Identifier: Apache-2.0
"""The editor: the only way rules change a graph. Every edit is journalled, every new node carries full metadata.

An edit costs what its site is large, whatever the size of the graph around it: build the replacement, compare it with
what it replaces, rewire, sweep. Nothing is rewired before every replacement of the site has been compared, so that a
refused site leaves the graph as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.fx.traceback import NodeSource, NodeSourceAction

from rewriter import claims, replacing, store
from rewriter.errors import LegalityError, PlanError
from rewriter.matcher import Match
from rewriter.program import Program
from rewriter.propagation import Propagation
from rewriter.rules import Site, provenance
from rewriter.slices import Region

_METADATA_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


@dataclass(frozen=True)
class Edit:
    """One journal entry: at one site a rule put ``added`` where ``removed`` stood.

    ``created`` and ``replaced`` are tensor names; names of nodes are for reading, never for finding. ``based_on`` are
    addresses of sites whose nodes were rewritten in turn. ``before`` and ``after`` are the values as formulas, written
    down only where the editor is told to (:attr:`Editor.spells`).
    """

    rule: str
    site: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    created: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    based_on: tuple[str, ...] = ()
    before: str = ""
    after: str = ""


class Editor:
    """Edits one program for the sites of one rule after another.

    Attributes:
        program: what is edited.
        journal: every edit so far.
        substitutes: nodes that earlier edits replaced -> what stands for them now, so that matches found before an
            edit stay usable after it.
        readers: tensor name -> the node that reads it.
        spells: write before and after into the journal.
        rewired: nodes that read something else since the last :meth:`finish`, because what they read was replaced.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.journal: list[Edit] = []
        self.substitutes: dict[Node, Node] = {}
        self.spells = False
        self.rewired: set[Node] = set()
        values = [n.meta.get("val") for n in self.graph.find_nodes(op="placeholder")]
        self.fake_mode = detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)
        self._values = Propagation(self.fake_mode)
        self.readers = program.parameter_nodes()
        self._remade: dict[str, Node] = {}  # of the present site: tensor -> its new reader
        self._marks: _Marks | None = None
        self._anchor: Node | None = None
        self._added: list[Node] = []

    @property
    def graph(self) -> Graph:
        return self.program.graph

    # ------------------------------------------------------------------------------------- what rules call

    def parameter(self, name: str, tensor: Tensor) -> Node:
        """The node that reads ``name`` from the store (made at the top of the graph if there is none)."""
        existing = self._remade.get(name)
        if existing is None and not (self._marks and name in self._marks.replaced):
            existing = self.readers.get(name)
        if existing is not None:
            return existing
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.create_node("get_attr", name)
        with self.fake_mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        node.meta["val"] = fake.requires_grad_(tensor.requires_grad)
        self._remade[name] = node
        return self._mark(node)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A new call before the site's root, with its value's shape and dtype computed on fake tensors."""
        args, kwargs = map_arg((args, kwargs), self.resolve)
        with self.graph.inserting_before(self._anchor or self.graph.output_node()):
            node = self.graph.call_function(target, args, kwargs)
        self._added.append(node)
        node.meta["val"] = self._values.value(target, args, kwargs)
        if self._marks is not None:
            node.meta.update(self._marks.metadata())
        return node

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """New calls stand before ``node``; for rules that replace several nodes far apart (:attr:`Rule.apart`)."""
        kept, self._anchor = self._anchor, node
        try:
            yield
        finally:
            self._anchor = kept

    def resolve(self, node: Node) -> Node:
        """What stands for ``node`` now."""
        while node in self.substitutes:
            node = self.substitutes[node]
        return node

    # ------------------------------------------------------------------------------------- what apply calls

    def rewrite(self, site: Site, tensors: Mapping[str, Tensor], choice: Mapping[str, Any]) -> Edit:
        """Replace every match of ``site``; ``tensors`` are its new parameters by full name.

        Raises:
            LegalityError: somebody could tell a replacement from what it replaces; the graph is as it was.
            PlanError: the rule claims a change and made none, or made one and does not claim it.
        """
        self._begin(site)
        try:
            built = [self._build(site, match, tensors, choice) for match in site.matches]
            based_on = self._bases(built)
            before, after = self._spelled(built) if self.spells else ("", "")
            for one in built:
                for old, new in one.replacement.items():
                    one.values |= replacing.check(self.program.facts, old, new, self._added, self.fake_mode)
            self._check_remade(built)
        except LegalityError as error:
            self._withdraw()
            raise LegalityError(f"{site.rule.name} at {site.address}: {error}") from error
        added = tuple(n.name for n in self._added)
        removed = [name for one in built for name in self._carry_out(one)]
        self._drop_unread(self._marks.replaced if self._marks else ())
        self.readers |= self._remade
        replaced = site.rule.replaced_tensors(site.match)
        edit = Edit(
            site.rule.name, str(site.address), added, tuple(removed), tuple(tensors), replaced, based_on, before, after
        )
        self.journal.append(edit)
        self._marks, self._remade, self._added = None, {}, []
        return edit

    def finish(self, compile: bool = True) -> None:
        """After the sites of one rule: drop reads of tensors nobody uses any more, and forget stale facts."""
        self._drop_unread([name for name in self.readers if name not in self.program.bodies])
        self.program.rebind(compile)
        self.substitutes.clear()
        self.rewired.clear()

    def unread(self, names: tuple[str, ...]) -> list[str]:
        """Those of ``names`` that the graph no longer reads."""
        return [n for n in names if n not in self.readers or not self.readers[n].users]

    # ---------------------------------------------------------------------------------------------- one site

    def _begin(self, site: Site) -> None:
        self._marks, self._remade, self._added, self._anchor = _Marks.of(site), {}, [], None

    def _build(self, site: Site, match: Match, tensors: Mapping[str, Tensor], choice: Mapping[str, Any]) -> _Built:
        """Make the new nodes of one match; nothing reads them yet."""
        current = self._current(match)
        roots = site.rule.replaced_nodes(current)
        self._anchor = min(roots) if site.rule.apart else _place(roots, current.nodes)
        prefix = site.rule.prefix(site.match)
        parameters = {
            name.removeprefix(prefix + ".") if prefix else name: self.parameter(name, tensor)
            for name, tensor in tensors.items()
        }
        first = len(self._added)
        witness = claims.Witness(self.graph, current.nodes, roots)
        replacement = dict(site.rule.rewrite(self, current, parameters, choice))
        added = self._added[first:]
        if (complaint := witness.complaint(replacement, added, tensors)) is not None:
            raise PlanError(f"{site.rule.name} at {site.address}: {complaint}")
        return _Built(current, replacement, added)

    def _carry_out(self, built: _Built) -> list[str]:
        """Let the new nodes take over, and erase what nobody reads any more; returns the names of what is gone."""
        for node, value in built.values.items():
            node.meta["val"] = value
        facts = self.program.facts
        for old, new in built.replacement.items():
            self.rewired.update(old.replace_all_uses_with(new))
            self.substitutes[old] = new
            facts.forget(new)
        for node in (*built.added, *(user for new in built.replacement.values() for user in new.users)):
            if any(node < operand for operand in node.all_input_nodes):
                raise PlanError(f"{node.name} would read what is computed after it; this is a fault of the engine")
        gone: list[str] = []
        for node in reversed(built.match.nodes):  # readers stand after what they read
            if node.op != "call_function" or node._erased:
                continue
            if node.users and all(user.target is _METADATA_ASSERTION for user in node.users):
                for user in list(node.users):  # it asserts what is no longer computed
                    self.graph.erase_node(user)
            if not node.users:
                gone.append(node.name)
                facts.forget(node)
                self.graph.erase_node(node)
        for node in reversed(built.added):  # what a rule built for readers that turned out to be gone
            if not node.users and not node.is_impure():
                facts.forget(node)
                self.graph.erase_node(node)
        return gone

    def _withdraw(self) -> None:
        """Erase what was built for a site that is refused."""
        for node in reversed(self._added):
            self.graph.erase_node(node)
        self._marks, self._remade, self._added = None, {}, []

    def _current(self, match: Match) -> Match:
        """The match with captures that stand in the graph now."""
        if not self.substitutes:
            return match

        def present(value: Any) -> Any:
            if isinstance(value, Match):
                return self._current(value)
            if isinstance(value, tuple):
                return tuple(map(present, value))
            if isinstance(value, Region):
                exit = self.resolve(value.exit)
                return value if exit is value.exit else dataclasses.replace(value, exit=exit)
            return self.resolve(value) if isinstance(value, Node) else value

        captures = {name: present(value) for name, value in match.captures.items()}
        if all(value is match.captures[name] for name, value in captures.items()):
            return match
        return dataclasses.replace(match, captures=captures)

    def _check_remade(self, built: list[_Built]) -> None:
        """A tensor that is made anew under its own name must have no reader that expects the old one."""
        inside = {node for one in built for node in one.match.nodes}
        for name in self._remade:
            old = self.readers.get(name)
            for user in old.users if old is not None else ():
                if user not in inside:
                    raise LegalityError(f"{name} is made anew, and {user.name} still reads the old one")

    def _bases(self, built: list[_Built]) -> tuple[str, ...]:
        """Addresses of the sites that made nodes which are now replaced."""
        written = (provenance(node).get("site") for one in built for node in one.match.nodes)
        return tuple(dict.fromkeys(address for address in written if address))

    def _spelled(self, built: list[_Built]) -> tuple[str, str]:
        """The replaced and the new values of the first match as formulas."""
        first = built[0]
        return (
            ", ".join(claims.formula(old, first.match.nodes) for old in first.replacement),
            ", ".join(claims.formula(new, first.added) for new in first.replacement.values()),
        )

    def _drop_unread(self, names: Any) -> None:
        for name in names:
            node = self.readers.get(name)
            if node is not None and not node.users:
                self.graph.erase_node(node)
                del self.readers[name]

    def _mark(self, node: Node) -> Node:
        self._added.append(node)
        if self._marks is not None:
            node.meta.update(self._marks.metadata())
        return node


@dataclass
class _Built:
    """The replacement of one match, not wired in yet."""

    match: Match
    replacement: dict[Node, Node]
    added: list[Node]
    values: dict[Node, Any] = dataclasses.field(default_factory=dict)  # what changes downstream, strides that is


@dataclass(frozen=True)
class _Marks:
    """Metadata of a site's new nodes: where they stand, what the user wrote there, which rule made them out of what."""

    replaced: frozenset[str]
    stack_trace: str
    from_node: NodeSource
    nn_module_stack: Mapping[str, Any]
    written: Mapping[str, Any]

    @classmethod
    def of(cls, site: Site) -> _Marks:
        root, nodes = site.match.root, site.match.nodes
        traced = (n.meta["stack_trace"] for n in (root, *nodes) if n.meta.get("stack_trace"))
        source = NodeSource(None, f"rewriter.{site.rule.name}", NodeSourceAction.REPLACE)
        # NodeSource(root, …) would copy the whole chain behind the root, which nobody changes.
        source.node_info = NodeSource.NodeInfo(root.name, str(root.target), id(root.graph))
        source.from_node = list(root.meta.get("from_node", ()))
        written = {
            "rule": site.rule.name,
            "site": str(site.address),
            "paths": list(site.paths),
            "from": [f"{n.name}: {n.target}" for n in nodes],
            "origin": _origins(nodes),
        }
        replaced = frozenset(name for match in site.matches for name in site.rule.replaced_tensors(match))
        return cls(replaced, next(traced, ""), source, _stack(site, root), written)

    def metadata(self) -> dict[str, Any]:
        return {
            "stack_trace": self.stack_trace,
            "from_node": [self.from_node],
            "nn_module_stack": self.nn_module_stack,
            "custom": {"rewriter": self.written},
        }


def _origins(nodes: tuple[Node, ...]) -> list[str]:
    """Nodes of the original that stand behind nodes which rewrites made; empty where all are the original's own."""
    if not any(map(provenance, nodes)):
        return []
    found: dict[str, None] = {}
    for node in nodes:
        written = provenance(node)
        found |= dict.fromkeys(written.get("origin") or written.get("from") or [f"{node.name}: {node.target}"])
    return list(found)


def _stack(site: Site, root: Node) -> dict[str, Any]:
    """The root's module stack, with the site's own path as its deepest entry."""
    stack = dict(root.meta.get("nn_module_stack") or {})
    path = site.rule.prefix(site.match)
    if stack and next(reversed(stack.values()))[0] != path:
        depth = path.rpartition(".")[0]
        stack = {k: v for k, v in stack.items() if v[0] == "" or depth == v[0] or depth.startswith(v[0] + ".")}
        stack[f"rewriter__{path}"] = (path, f"rewriter.{site.rule.name}")
    return stack


def _place(roots: tuple[Node, ...], nodes: tuple[Node, ...]) -> Node:
    """The node before which a replacement stands: after everything it may read, before everyone who reads it.

    That is the root, or the first of several; unless an input of a later one comes after it (:func:`rules.disorder`
    has refused matches where the two cannot be had together).
    """
    first = min(roots)
    if len(roots) == 1:
        return first
    inside = {*nodes, *roots}
    latest = max((n for node in inside for n in node.all_input_nodes if n not in inside), default=first)
    return first if latest < first else latest.next


def adopt(root: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put new tensors into the store."""
    for name, tensor in tensors.items():
        store.put(root, name, tensor)


