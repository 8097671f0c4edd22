# SPDX-License-Identifier: Apache-2.0
"""Python code for the flat graphs of programs, written in one pass.

torch's generator serves every kind of graph and takes longer than matching and rewriting together (0.2 s for 10 000
nodes). Programs need little of it: placeholders, reads of parameters, calls, one output. The code is the same in what
it does, releasing each value after its last use included; operators are globals of the function instead of attribute
look-ups. Anything else, and everything printed for reading, is left to torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.graph import CodeGen, PythonCode, _format_target, _Namespace

_OPS = ("placeholder", "get_attr", "call_function", "output")
_LITERALS = frozenset({int, bool, str, type(None)})


class FlatCode(CodeGen):
    """The code generator of a program's graph; see :meth:`torch.fx.Graph.set_codegen`."""

    def _gen_python_code(
        self, nodes: Any, root_module: str, namespace: _Namespace, *, verbose: bool = False, **shown: Any
    ) -> PythonCode:
        nodes = list(nodes)
        if verbose or any(shown.values()) or not all(map(_is_plain, nodes)):
            code: PythonCode = super()._gen_python_code(nodes, root_module, namespace, verbose=verbose, **shown)
            return code
        return _Function(nodes, root_module).code()


def _is_plain(node: Node) -> bool:
    if node.op == "placeholder":
        return not node.args and str(node.target).isidentifier()
    return node.op in _OPS and node.type is None


class _Function:
    """The function of one list of nodes."""

    def __init__(self, nodes: list[Node], root: str) -> None:
        self.nodes, self.root = nodes, root
        self.globals: dict[str, Any] = {"torch": torch}
        self.names: dict[Any, str] = {}  # operator -> its global name
        self.taken = {node.name for node in nodes} | {root, "torch", "slice"}

    def code(self) -> PythonCode:
        arguments = [node.name for node in self.nodes if node.op == "placeholder"]
        head = f"def forward({', '.join(('self', *arguments))}):"
        indexed = list(self._lines())
        body = [f"    {line}" for _, line in indexed] or ["    pass"]
        # torch expects two empty lines and counts from the head, for tracebacks that show the node.
        lines: dict[int, int | None] = {number: index for number, (index, _) in enumerate(indexed, start=1)}
        return PythonCode("\n".join(("\n\n", head, *body)), self.globals, _lineno_map=lines, _prologue_start=4)

    def _lines(self) -> Iterator[tuple[int, str]]:
        released = _last_uses(self.nodes)
        for index, node in enumerate(self.nodes):
            if node.op == "output":
                yield index, f"return {self._value(node.args[0])}"
                continue
            if node.op == "placeholder":
                continue
            free = "".join(f"{dead.name} = " for dead in released.get(node, ()))
            made = self._call(node) if node.op == "call_function" else _format_target(self.root, str(node.target))
            yield index, f"{node.name} = {made}" + (f";  {free}None" if free else "")

    def _call(self, node: Node) -> str:
        arguments = [self._value(value) for value in node.args]
        arguments += [f"{name} = {self._value(value)}" for name, value in node.kwargs.items()]
        return f"{self._operator(node.target)}({', '.join(arguments)})"

    def _operator(self, target: Any) -> str:
        name = self.names.get(target)
        if name is None:
            written = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "function")
            name = self.names[target] = self._global("".join(c if c.isalnum() else "_" for c in written), target)
        return name

    def _global(self, hint: str, value: Any) -> str:
        name = hint if hint.isidentifier() else f"_{hint}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        self.globals[name] = value
        return name

    def _value(self, value: Any) -> str:
        """An argument as Python text; what has no literal becomes a global."""
        if isinstance(value, Node):
            return value.name
        if type(value) in _LITERALS or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, tuple) and type(value) is tuple:
            return f"({', '.join(map(self._value, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self._value(k)}: {self._value(v)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({', '.join(map(self._value, (value.start, value.stop, value.step)))})"
        if isinstance(value, torch.dtype):
            return repr(value)
        return self._global("constant", value)


def _last_uses(nodes: Iterable[Node]) -> dict[Node, list[Node]]:
    """For each node, the values nobody reads after it: its operands, or itself where nobody reads it at all."""
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(list(nodes)):
        done = [operand for operand in node.all_input_nodes if operand not in seen]
        if node not in seen and node.op not in ("output", "placeholder") and not node.users:
            done.append(node)
        seen.update(done)
        if done and node.op != "output":
            last[node] = done
    return last
