# SPDX-License-Identifier: Apache-2.0
"""Python code for the flat graphs of programs, written in one pass.

torch's generator serves every kind of graph and takes longer than matching and rewriting together (0.2 s for 10 000
nodes). Programs need little of it: placeholders, reads of parameters, calls, one output. The code is the same in what
it does, releasing each value after its last use included; operators are globals of the function instead of attribute
look-ups. Anything else, and everything printed for reading, is left to torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen, PythonCode, _format_target, _Namespace
from torch.fx.graph_module import _forward_from_src

_OPS = ("placeholder", "get_attr", "call_function", "output")
_VARIABLE = re.compile(r"v\d+")
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


class FlatModule(GraphModule):
    """A graph module that compiles without `Graph.python_code`, which renames every node for its own generator first.

    Copies and pickles of it are ordinary graph modules.
    """

    def recompile(self) -> PythonCode:
        nodes = list(self._graph.nodes)
        if "forward" not in vars(type(self)) or not all(map(_is_plain, nodes)):
            return super().recompile()  # sets up calling, the first time
        code = _Function(nodes, "self").code()
        self._code, self._lineno_map, self._prologue_start = code.src, code._lineno_map, code._prologue_start
        type(self).forward = _forward_from_src(code.src, code.globals, {})
        return code


class _Function:
    """The function of one list of nodes.

    A value is kept in a variable until its last use, and the result of that use takes the variable over: so values are
    released as early as by `del`, which is left for what dies beside it, and the text is a third shorter.
    """

    def __init__(self, nodes: list[Node], root: str) -> None:
        self.nodes, self.root = nodes, root
        self.globals: dict[str, Any] = {"torch": torch}
        self.names: dict[int, str] = {}  # id of an operator (cheaper than its hash) -> its global name
        self.variables: dict[Node, str] = {n: n.name for n in nodes if n.op == "placeholder"}
        self.free: list[str] = []
        self.count = 0
        self.taken = {root, "torch", "slice", *self.variables.values()}

    def code(self) -> PythonCode:
        head = f"def forward({', '.join(('self', *self.variables.values()))}):"
        indexed = list(self._lines())
        body = [f"    {line}" for _, line in indexed] or ["    pass"]
        # torch expects two empty lines and counts from the head, for tracebacks that show the node.
        lines: dict[int, int | None] = {number: index for number, (index, _) in enumerate(indexed, start=1)}
        return PythonCode("\n".join(("\n\n", head, *body)), self.globals, _lineno_map=lines, _prologue_start=4)

    def _lines(self) -> Iterator[tuple[int, str]]:
        last = _last_uses(self.nodes)
        for index, node in enumerate(self.nodes):
            if node.op == "output":
                yield index, f"return {self._value(node.args[0])}"
                continue
            if node.op == "placeholder":
                continue
            made = self._call(node) if node.op == "call_function" else _format_target(self.root, str(node.target))
            released = [self.variables.pop(dead) for dead in last.get(node, ())]
            if not node.users:
                yield index, made + (f"; del {', '.join(released)}" if released else "")
                self.free += released
                continue
            variable = self.variables[node] = released.pop(0) if released else self._variable()
            yield index, f"{variable} = {made}" + (f"; del {', '.join(released)}" if released else "")
            self.free += released

    def _variable(self) -> str:
        if self.free:
            return self.free.pop()
        name = f"v{self.count}"
        self.count += 1
        return self._variable() if name in self.taken else name

    def _call(self, node: Node) -> str:
        known = self.variables
        arguments = [known[value] if value.__class__ is Node else self._value(value) for value in node.args]
        if node.kwargs:
            arguments += [f"{name} = {self._value(value)}" for name, value in node.kwargs.items()]
        return f"{self._operator(node.target)}({', '.join(arguments)})"

    def _operator(self, target: Any) -> str:
        name = self.names.get(id(target))
        if name is None:
            written = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "function")
            name = self.names[id(target)] = self._global("".join(c if c.isalnum() else "_" for c in written), target)
        return name

    def _global(self, hint: str, value: Any) -> str:
        name = hint if hint.isidentifier() and not _VARIABLE.fullmatch(hint) else f"_{hint}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        self.globals[name] = value
        return name

    def _value(self, value: Any) -> str:
        """An argument as Python text; what has no literal becomes a global."""
        if isinstance(value, Node):
            return self.variables[value]
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


def _last_uses(nodes: list[Node]) -> dict[Node, list[Node]]:
    """For each node, the operands nobody reads after it."""
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(nodes):
        if node.op == "output":
            seen.update(node.all_input_nodes)
            continue
        done = [operand for operand in node.all_input_nodes if operand not in seen]
        if done:
            seen.update(done)
            last[node] = done
    return last
