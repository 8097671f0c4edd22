# SPDX-License-Identifier: Apache-2.0
"""`Program`: a captured computation — an FX graph in torch's training IR, the tensors it computes on, and facts.

There is no new IR. The graph is that of ``torch.export(..., strict=False)`` before any decomposition, brought into one
dialect by :mod:`rewriter.capturing`: flat tensor placeholders, one flat output, and one ``get_attr`` node per parameter
or buffer whose target is the tensor's dotted name in the model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from rewriter import store
from rewriter.errors import CaptureError
from rewriter.facts import Facts
from rewriter.structure import Template, call_text, flatten, key, leaves, rebuild


@dataclass(eq=False)
class Program:
    """A graph, the store it computes on, and how a call maps to flat tensors.

    Attributes:
        graph_module: ``graph_module(*flat_tensors)`` returns the flat outputs.
        root: the parameter store (see :mod:`rewriter.store`).
        call: template of ``(args, kwargs)``; result: template of the model's own output.
        aliases: tensor name -> every name it is known under (tied weights).
        constants: tensors the capture lifted out of the model's code.
        example: the flat tensors it was captured with.
        notes: what capturing changed or found, for the report.
    """

    graph_module: GraphModule
    root: nn.Module
    call: Template
    result: Template
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    constants: store.Namespace = field(default_factory=store.Namespace)
    bodies: dict[str, GraphModule] = field(default_factory=dict)
    example: tuple[Tensor, ...] = ()
    notes: tuple[str, ...] = ()
    training: bool = False

    @classmethod
    def from_graph_module(cls, graph_module: GraphModule, example: Sequence[Tensor] = ()) -> Program:
        """A program of any graph module with tensor inputs and outputs.

        The graph is copied into the dialect; its tensors are shared, not copied.

        Raises:
            CaptureError: an output is not a tensor.
        """
        from rewriter.capturing import program_of_graph  # capturing builds programs; the import points back once

        return program_of_graph(graph_module, tuple(example))

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    @cached_property
    def facts(self) -> Facts:
        return Facts(self.graph_module)

    def tensor(self, name: str) -> Tensor:
        """Parameter, buffer or lifted constant by name. Raises KeyError."""
        if name.startswith(store.CONSTANTS + "."):
            return store.get(self.constants, name.removeprefix(store.CONSTANTS + "."))
        return store.get(self.root, name)

    def tensors(self) -> dict[str, Tensor]:
        return dict(store.tensors(self.root))

    def parameter_nodes(self) -> dict[str, Node]:
        """Name -> ``get_attr`` node of every tensor the graph reads."""
        return {str(n.target): n for n in self.graph.find_nodes(op="get_attr") if str(n.target) not in self.bodies}

    def input_names(self) -> tuple[str, ...]:
        args, kwargs = self.call["tuple"]
        names = leaves(args, "arg") | leaves(kwargs)
        return tuple(names[i] for i in sorted(names))

    def output_names(self) -> tuple[str, ...]:
        names = leaves(self.result)
        return tuple(names[i] if names[i] != f"tensor_{i}" else "output" for i in range(len(names)))

    def run(self, *flat: Tensor) -> list[Tensor]:
        return list(self.graph_module(*flat))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call with the signature it was captured with; outputs have the model's own type."""
        flat: list[Tensor] = []
        if key(template := flatten((args, kwargs), flat)) != key(self.call):
            raise CaptureError(
                f"this program was captured for the call {call_text(self.call)}, not {call_text(template)}; capture again"
            )
        return rebuild(self.result, self.graph_module(*flat))

    def fork(self, root: nn.Module | None = None, *, compile: bool = True) -> Program:
        """A copy with a graph of its own, bound to ``root`` (default: the same store).

        Without ``compile`` the copy can be searched and edited, and runs after :meth:`rebind`.
        """
        root = self.root if root is None else root
        module = store.bind(copy.deepcopy(self.graph), root, self.constants, self.bodies, compile=compile)
        return Program(
            module,
            root,
            self.call,
            self.result,
            dict(self.aliases),
            self.constants,
            self.bodies,
            self.example,
            self.notes,
            self.training,
        )

    def rebind(self, compile: bool = True) -> None:
        """Compile the edited graph (unless more edits follow) and hang the store's present namespaces below it."""
        self.graph_module = store.bind(self.graph, self.root, self.constants, self.bodies, compile=compile)
        self.__dict__.pop("facts", None)

    def digest(self) -> str:
        """Structural hash: operators, wiring, and shapes of parameters; no names, dtypes, devices or sizes of inputs."""
        position = {node: i for i, node in enumerate(self.graph.nodes)}
        text = hashlib.sha256()
        for node in self.graph.nodes:
            what = str(node.target) if node.op in ("call_function", "get_attr") else node.op
            wiring = [position[i] for i in node.all_input_nodes]
            text.update(f"{what}{wiring}".encode())
            if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
                text.update(str([int(s) for s in node.meta["val"].shape]).encode())
        return text.hexdigest()[:16]
