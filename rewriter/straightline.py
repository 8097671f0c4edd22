# SPDX-License-Identifier: Apache-2.0
"""A graph at fixed shapes as one Python function, without sizes, masks and views that change nothing.

A captured program serves every size and every way of calling, and a single token pays for that with calls that come out
the same each time. Here a graph is run once, call by call (a Llama of four layers: 313 calls, of which 195 are left), and
what each yields decides what becomes of it:

    nothing that varies reaches it    a constant from then on
    a number, a size                  likewise: shapes are fixed
    an operand, or one in memory      that operand: casts to the own dtype, slices of everything
    another view of an earlier value  one ``as_strided`` of it, whatever views led there
    anything else                     a line of the function

Operators are called below the dispatcher, and aten through torch's own Python functions where these give the same bits:
both cost a fraction. So the function must not be called where gradients, autocast or tracing are wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from rewriter.errors import LegalityError
from rewriter.kernels.spec import REGISTRY
from rewriter.schemas import named_arguments

_RANDOM = torch.Tag.nondeterministic_seeded
_BINDINGS = (torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase)


class Variable(NamedTuple):
    """A value of the function: its name, and what it was when the graph was run.

    ``own`` names the variable whose memory this is a view of, itself where it has its own; None where it is an
    argument's, which may lie anywhere in its storage the next time.
    """

    name: str
    value: Any
    own: str | None


class _Line(NamedTuple):
    target: str
    text: str
    reads: frozenset[str]


@torch.no_grad()
def straight(
    graph: Graph, varying: Mapping[str, Tensor], fixed: Mapping[str, Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a graph, ``(*tensors of varying, in its order) -> outputs``.

    Args:
        graph: of aten operators and ours, without writes and random numbers.
        varying: examples of what differs from call to call, by name of the placeholder, contiguous; shapes, strides and
            dtypes are those of every call.
        fixed: all other placeholders and attributes, by name.

    Raises:
        LegalityError: an operator that writes, draws random numbers, or is none of torch's.
    """
    return _Writer(varying, fixed).function(graph)


class _Writer:
    def __init__(self, varying: Mapping[str, Tensor], fixed: Mapping[str, Any]) -> None:
        self.fixed, self.arguments = fixed, list(varying)
        self.known = {name: Variable(f"_{name}", tensor, None) for name, tensor in varying.items()}
        self.variables: dict[Node, Any] = {}  # of nodes that vary; a list where an operator has several results
        self.constants: dict[Node, Any] = {}
        self.roots: dict[str, Variable] = {}
        self.lines: list[_Line] = []
        self.scope: dict[str, Any] = {}
        self.scope_names: dict[int, str] = {}

    def function(self, graph: Graph) -> Callable[..., tuple[Tensor, ...]]:
        results: list[str] = []
        for node in graph.nodes:
            if node.op == "output":
                results = [self._text(self._operand(value)) for value in node.args[0]]
            elif node.op == "call_function":
                self._call(node)
            elif node.name in self.known:
                self.variables[node] = self.known[node.name]
            else:
                self.constants[node] = self.fixed[str(node.target)]
        head = f"def function({', '.join(f'_{name}' for name in self.arguments)}):"
        body = [f"    {line.target} = {line.text}" for line in _needed(self.lines, results)]
        source = "\n".join((head, *body, f"    return ({', '.join(results)},)"))
        exec(compile(source, "<straight>", "exec"), self.scope)  # text written above: nothing of it is input
        made: Callable[..., tuple[Tensor, ...]] = self.scope["function"]
        return made

    def _call(self, node: Node) -> None:
        args, kwargs = (_mapped(a, self._operand) for a in (node.args, node.kwargs))
        operands = [a for a in tree_leaves((args, kwargs), is_leaf=_is_variable) if _is_variable(a)]
        real = tree_map_only(Variable, lambda v: v.value, (args, kwargs), is_leaf=_is_variable)
        if node.target is operator.getitem and isinstance(args[0], list):
            self._keep(node, args[0][args[1]])
            return
        function = _below_dispatcher(node, [v for v in tree_leaves(real) if isinstance(v, Tensor)])
        value = function(*real[0], **real[1])
        if not operands or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            self.constants[node] = value
        elif isinstance(value, Tensor):
            self._keep(node, self._result(node, function, (args, kwargs), real, value, operands))
        else:
            self._keep(node, list(self._results(node, function, (args, kwargs), value, operands)))

    def _keep(self, node: Node, value: Any) -> None:
        self.variables[node] = value

    def _result(
        self, node: Node, function: Any, given: Any, real: Any, value: Tensor, operands: Sequence[Variable]
    ) -> Variable:
        same = next((v for v in operands if _is_same(v.value, value)), None)
        if same is not None:
            return same
        base = self._base(value, operands)
        if base is not None and base.own is not None:
            return self._view(self.roots[base.own], value)
        function = function if base is not None else _binding(node.target, function, real, value)
        made = Variable(f"v{len(self.lines)}", value, None)
        self._line(made.name, function, given)
        return self._root(made) if base is None else made

    def _results(
        self, node: Node, function: Any, given: Any, values: Sequence[Any], operands: Sequence[Variable]
    ) -> Iterator[Variable]:
        """Of an operator with several: each is an element of what the line yields, or a view."""
        made = f"v{len(self.lines)}"
        self._line(made, function, given)
        for index, value in enumerate(values):
            base = self._base(value, operands)
            if base is not None and base.own is not None:
                yield self._view(self.roots[base.own], value)
                continue
            one = Variable(f"v{len(self.lines)}", value, None)
            self.lines.append(_Line(one.name, f"{made}[{index}]", frozenset({made})))
            yield self._root(one) if base is None else one

    def _root(self, made: Variable) -> Variable:
        self.roots[made.name] = made._replace(own=made.name)
        return self.roots[made.name]

    def _base(self, value: Tensor, operands: Sequence[Variable]) -> Variable | None:
        """The operand whose memory a value shares."""
        storage = value.untyped_storage()._cdata
        return next((v for v in operands if v.value.untyped_storage()._cdata == storage), None)

    def _view(self, root: Variable, value: Tensor) -> Variable:
        name = f"v{len(self.lines)}"
        layout = (list(value.shape), list(value.stride()), value.storage_offset())
        self._line(name, torch.as_strided, ((root, *layout), {}))
        return Variable(name, value, root.name)

    def _line(self, target: str, function: Any, given: Any) -> None:
        args, kwargs = given
        texts = [*map(self._text, args), *(f"{name}={self._text(value)}" for name, value in kwargs.items())]
        reads = {v.name for v in tree_leaves(given, is_leaf=_is_variable) if _is_variable(v)}
        self.lines.append(_Line(target, f"{self._constant(function)}({', '.join(texts)})", frozenset(reads)))

    def _operand(self, value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        return self.variables[value] if value in self.variables else self.constants[value]

    def _text(self, value: Any) -> str:
        if isinstance(value, Variable):
            return value.name
        if type(value) in (bool, int, str, type(None)):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        name = self.scope_names.get(id(value))
        if name is None:
            name = self.scope_names[id(value)] = f"c{len(self.scope)}"
            self.scope[name] = value
        return name


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments of a node with every leaf mapped."""
    if isinstance(value, Mapping):
        return {name: _mapped(v, function) for name, v in value.items()}
    if isinstance(value, list):
        return [_mapped(v, function) for v in value]
    if type(value) is tuple:
        return tuple(_mapped(v, function) for v in value)
    return function(value)


def _is_variable(value: Any) -> bool:
    return isinstance(value, Variable)


def _is_same(one: Any, other: Tensor) -> bool:
    """The same elements of the same memory."""
    if one is other:
        return True
    return other.numel() > 0 and one.data_ptr() == other.data_ptr() and _form(one) == _form(other)


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def _below_dispatcher(node: Node, tensors: Collection[Tensor]) -> Callable[..., Any]:
    """What a node calls.

    Raises:
        LegalityError: see `straight`.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        if getattr(target, "__module__", "") in ("_operator", "math", "torch"):
            return target  # type: ignore[return-value]
        raise LegalityError(f"{node.name} calls {target}, which is no operator")
    draws = _RANDOM in target.tags and named_arguments(node).get("train") is not False  # dropout that is switched off
    if target._schema.is_mutable or draws:
        raise LegalityError(f"{node.name} calls {target}, which writes to memory or draws random numbers")
    if target not in REGISTRY:
        return target
    return REGISTRY[target].on(next(iter(tensors)).device.type)


def _binding(target: Any, function: Any, real: Any, expected: Tensor) -> Any:
    """torch's Python function of an aten operator, where it takes the same arguments and yields the same bits."""
    if target in REGISTRY or not isinstance(target, OpOverload) or target.namespace != "aten":
        return function
    for module in _BINDINGS:
        candidate = getattr(module, target._schema.name.partition("::")[2], None)
        if candidate is None:
            continue
        try:
            value = candidate(*real[0], **real[1])
        except (TypeError, ValueError, RuntimeError):
            continue  # takes its arguments in another form
        if isinstance(value, Tensor) and _form(value) == _form(expected) and torch.equal(value, expected):
            return candidate
    return function


def _needed(lines: Sequence[_Line], results: Collection[str]) -> list[_Line]:
    """Lines whose values are used."""
    used, kept = set(results), []
    for line in reversed(lines):
        if line.target in used:
            used |= line.reads
            kept.append(line)
    return kept[::-1]
