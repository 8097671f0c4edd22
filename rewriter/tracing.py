# SPDX-License-Identifier: Apache-2.0
"""Patterns from plain Python: a function is traced to FX and translated, operator by operator, into the pattern language.

    @rewriter.traced
    def swish(x, y, *, scale):
        return x * torch.sigmoid(scale * x) + y

is ``pattern("swish", x * sigmoid(Const("scale", where=number) * x) + y)`` with ``x`` and ``y`` as `Var`. Positional
parameters stand for nodes, keyword-only parameters for numbers; several returned values are several outputs. An
operator that the pattern language has a name for becomes that operator under all its spellings; any other becomes one
from the torch operator's own schema. What cannot be translated is a `PatternError` naming the function's line.
"""

from __future__ import annotations

import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, Node, Proxy, Tracer

from rewriter import operators
from rewriter.errors import PatternError
from rewriter.expressions import Call, Const, Dim, Expression, Operator, Var, walk, written_at
from rewriter.pattern import Pattern, Transparent, pattern
from rewriter.predicates import Predicate, Where, number
from rewriter.schemas import base_name
from rewriter.spelling import IN_PLACE, Unspelled, spell

_TORCH = os.path.dirname(torch.__file__) + os.sep


@typing.overload
def traced(function: Callable[..., Any]) -> Pattern: ...
@typing.overload
def traced(
    *, name: str | None = None, where: Where = None, transparent: tuple[Transparent, ...] = ()
) -> Callable[[Callable[..., Any]], Pattern]: ...
def traced(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    where: Where = None,
    transparent: tuple[Transparent, ...] = (),
) -> Pattern | Callable[[Callable[..., Any]], Pattern]:
    """The pattern a function spells; also a decorator, with or without options.

    Args:
        function: of tensors (positional parameters, each a `Var`) and numbers (keyword-only parameters, each a
            `Const`). It may use torch functions, tensor methods, Python operators, torch operators, and expressions of
            the pattern language as arguments of methods: ``x.reshape(Anything())``. A parameter annotated with a
            `Predicate`, or a tuple of them, has to meet it. It runs once, on symbols, so it cannot ask for sizes or
            branch on values.
        name: of the pattern; the function's name unless given.
        where, transparent: as for `pattern`.

    Raises:
        PatternError: an operator that is not known or ambiguous, control flow, in-place operators, a parameter that is
            not used or has a default; the message names the line.
    """
    if function is None:
        return lambda given: _pattern_of(given, name, where, transparent)
    return _pattern_of(function, name, where, transparent)


def _pattern_of(
    function: Callable[..., Any], name: str | None, where: Where, transparent: tuple[Transparent, ...]
) -> Pattern:
    if not isinstance(function, FunctionType):
        raise PatternError(f"traced takes a Python function, not {function!r}")
    location = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
    with written_at(location):
        leaves = _leaves(function, location)
    outputs = _translate(_trace(function, location), leaves, location)
    used = {e.name for e in walk(*outputs) if isinstance(e, (Var, Const))}
    if unused := leaves.keys() - used:
        raise PatternError(f"{location}: {', '.join(sorted(unused))} of {function.__name__} is not used")
    with written_at(location):
        return pattern(name or function.__name__, *outputs, where=where, transparent=transparent)


def _leaves(function: FunctionType, location: str) -> dict[str, Expression]:
    """Parameter -> `Var` or `Const`. Raises PatternError for what a pattern has no use for."""
    leaves: dict[str, Expression] = {}
    for parameter in inspect.signature(function, eval_str=False).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PatternError(f"{location}: {function.__name__} takes *{parameter.name}; name each parameter")
        if parameter.default is not parameter.empty:
            raise PatternError(
                f"{location}: {parameter.name} of {function.__name__} has a default, which a pattern would not use; "
                "write one pattern for each case"
            )
        condition = _condition(function, parameter.annotation)
        if parameter.kind is parameter.KEYWORD_ONLY:
            leaves[parameter.name] = Const(parameter.name, number if condition is None else condition)
        else:
            leaves[parameter.name] = Var(parameter.name, condition)
    return leaves


def _condition(function: FunctionType, annotation: Any) -> Where:
    """An annotation that is a predicate or a tuple of predicates; any other is for readers and type checkers."""
    if isinstance(annotation, str):  # from __future__ import annotations
        try:
            annotation = eval(annotation, function.__globals__, dict(inspect.getclosurevars(function).nonlocals))
        except NameError:  # a name for type checkers only
            return None
    several = isinstance(annotation, tuple) and all(isinstance(item, Predicate) for item in annotation)
    return annotation if several or isinstance(annotation, Predicate) else None


# ------------------------------------------------------------------------------------------------------------ tracing


class _Symbol(Proxy):
    """A value of the traced function. FX would take ``x += y`` for ``x = x + y``, which a graph records otherwise."""

    def _refuse(self, other: Any) -> typing.NoReturn:
        raise TypeError(IN_PLACE)

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = __imatmul__ = _refuse
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = _refuse

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse(value)


class _Tracer(Tracer):
    """Traces a function, noting on each node the line that wrote it; expressions pass through as arguments."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self.location = location

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta["location"] = _caller() or self.location
        return node

    def proxy(self, node: Node) -> Proxy:
        return _Symbol(node, self)

    def create_arg(self, a: Any) -> Any:
        return a if isinstance(a, Expression) else super().create_arg(a)


def _caller() -> str | None:
    """``file:line`` of the innermost frame outside torch and this file; None where only the engine called."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((_TORCH, "<")):
            return f"{file}:{frame.f_lineno}"
        if frame.f_code is _trace.__code__:
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _trace(function: FunctionType, location: str) -> Graph:
    try:
        return _Tracer(location).trace(function)
    except PatternError:
        raise
    except Exception as error:
        raise PatternError(f"{_raised(error, function) or location}: {function.__name__}: {error}") from error


def _raised(error: Exception, function: FunctionType) -> str | None:
    """The line of the function's own file in which an error was raised."""
    place, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == function.__code__.co_filename:
            place = f"{function.__code__.co_filename}:{step.tb_lineno}"
        step = step.tb_next
    return place


# -------------------------------------------------------------------------------------------------------- translating


def _translate(graph: Graph, leaves: Mapping[str, Expression], location: str) -> tuple[Expression, ...]:
    """The outputs as expressions. One node is one expression object, which the pattern language takes for one node."""
    made: dict[Node, Expression] = {}

    def expression(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: expression(item) for name, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(expression(item) for item in value)
        return made[value] if isinstance(value, Node) else value

    for node in graph.nodes:
        place = node.meta.get("location", location)
        if node.op == "placeholder":
            made[node] = leaves[node.target]
        elif node.op == "output":
            returned = expression(node.args[0])
            outputs = returned if isinstance(returned, (tuple, list)) else (returned,)
            if not outputs or not all(isinstance(output, Expression) for output in outputs):
                raise PatternError(
                    f"{location}: a pattern returns a tensor or a tuple of tensors, not {node.args[0]!r}"
                )
            return tuple(outputs)
        elif node.op in ("call_function", "call_method"):
            if not node.users:
                raise PatternError(f"{place}: the value of {_called(node.target)} is not used")
            with written_at(place):
                made[node] = _call(node.target, expression(node.args), expression(node.kwargs), place)
        else:
            raise PatternError(f"{place}: {node.target} is a tensor or module of its own; pass it as a parameter")
    raise PatternError(f"{location}: the function returns nothing")


def _called(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], place: str) -> Call:
    """One call: under the pattern language's own operator where it has one, else under the torch operator's schema."""
    try:
        packet, args, kwargs = spell(target, args, kwargs)
        if isinstance(packet, Operator):
            return packet(*args, **kwargs)
        return _aten(packet, args, kwargs)
    except Unspelled as error:
        raise PatternError(f"{place}: {_called(target)}: {error}") from error


def _aten(packet: OpOverload | OpOverloadPacket, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    fitting = _fitting(packet, args, kwargs)
    overload, given = next(iter(fitting.items()))
    for known in _KNOWN.get(overload, ()):
        operands = {schema: operand for operand, schema in known.targets[overload].items()}
        if given.keys() <= operands.keys():
            return known(**{operands[name]: value for name, value in given.items()})
    # Every operand that the call names, and those before it in the schema.
    schema = [argument.name for argument in overload._schema.arguments]
    operands_named = tuple(schema[: 1 + max(map(schema.index, given))])
    safe = {name: f"{name}_" if name in ("self", "from") else name for name in operands_named}
    name = base_name(overload)
    operator = Operator(name, tuple(fitting), tuple(safe.values()), new_dims=_NEW_DIMS.get(name, 0))
    return operator(**{safe[name]: value for name, value in given.items()})


def _fitting(
    packet: OpOverload | OpOverloadPacket, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[OpOverload, dict[str, Any]]:
    """The overloads that the call may be in a graph -> its arguments by schema name; all name them alike."""
    candidates = Operator("", (packet,), ()).targets
    strict: dict[OpOverload, dict[str, Any]] = {}
    lenient: dict[OpOverload, dict[str, Any]] = {}
    for overload in candidates:
        for chosen, numbers_as_tensors in ((strict, False), (lenient, True)):
            bound = _bind(overload, args, kwargs, numbers_as_tensors)
            if bound is not None:
                chosen[overload] = bound
                break
    # A number in a tensor's place is how graphs spell x // 2; it only counts where it is the same call.
    fitting = strict or lenient
    if not fitting:
        raise Unspelled(f"no overload of {packet} takes these arguments")
    names = list(next(iter(fitting.values())))
    if any(list(bound) != names for bound in fitting.values()):
        listed = ", ".join(str(overload) for overload in fitting)
        raise Unspelled(f"it may be {listed}; call the one you mean")
    alike = fitting | {o: bound for o, bound in lenient.items() if list(bound) == names}
    single = {o: bound for o, bound in alike.items() if len(o._schema.returns) == 1}
    if not single:
        raise Unspelled(f"{packet} returns several values, which a pattern cannot take apart")
    return single


def _bind(
    overload: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], numbers_as_tensors: bool
) -> dict[str, Any] | None:
    """Arguments by schema name, in schema order, or None where the overload does not take them."""
    schema = overload._schema.arguments
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    if len(args) > len(positional):
        return None
    given = dict(zip(positional, args, strict=False)) | dict(kwargs)
    if len(given) != len(args) + len(kwargs) or not given.keys() <= {argument.name for argument in schema}:
        return None
    bound: dict[str, Any] = {}
    for argument in schema:
        if argument.name not in given:
            if not argument.has_default_value():
                return None
            continue
        kind = str(argument.real_type)
        value = given[argument.name]
        if not _fits(value, kind, numbers_as_tensors):
            return None
        bound[argument.name] = _listed(argument.name, value, kind)
    return bound


def _fits(value: Any, kind: str, numbers_as_tensors: bool) -> bool:
    """Whether a value can be an argument of that schema type (as torch prints it)."""
    optional = kind.startswith("Optional[")
    kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
    if value is None:
        return optional
    if isinstance(value, Const):
        return kind in ("int", "SymInt", "float", "number", "bool") or (numbers_as_tensors and kind == "Tensor")
    if isinstance(value, (Var, Call)):
        return kind == "Tensor"
    if isinstance(value, Expression):  # Anything(), an alternative, ...: the author knows
        return True
    if isinstance(value, (list, tuple)):
        return kind.startswith("List[") and all(_fits(item, kind[5:].removesuffix("]"), False) for item in value)
    if isinstance(value, (bool, int, float)) and kind == "Tensor":
        return numbers_as_tensors
    kinds: tuple[tuple[type, tuple[str, ...]], ...] = (
        (bool, ("bool", "number")),
        (int, ("int", "SymInt", "number", "float", "List[int]", "List[SymInt]")),
        (float, ("float", "number")),
        (str, ("str",)),
        (torch.dtype, ("ScalarType",)),
        (torch.device, ("Device",)),
        (torch.layout, ("Layout",)),
        (torch.memory_format, ("MemoryFormat",)),
    )
    return next((kind in allowed for python, allowed in kinds if isinstance(value, python)), False)


def _listed(name: str, value: Any, kind: str) -> Any:
    """A value as graphs have it: a lone number where the schema has a list is a list, dimensions stay modular."""
    if name.startswith("dim"):
        if isinstance(value, (list, tuple)) and len(value) == 1:
            return value[0]
        return [Dim(d) for d in value] if isinstance(value, (list, tuple)) else value
    return [value] if "List[" in kind and isinstance(value, int) else list(value) if isinstance(value, tuple) else value


def _known() -> dict[OpOverload, tuple[Operator, ...]]:
    """Overload -> the pattern language's operators it may be; not those that read more than the schema says."""
    known: dict[OpOverload, tuple[Operator, ...]] = {}
    for name in operators.__all__:
        operator = getattr(operators, name)
        if isinstance(operator, Operator) and operator.read is None:
            for target in operator.targets:
                known[target] = (*known.get(target, ()), operator)
    return known


_KNOWN = _known()
# Operators whose dimensions are counted in the result, which has more than the operands.
_NEW_DIMS = {"stack": 1, "diag_embed": 1}
