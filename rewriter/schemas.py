# SPDX-License-Identifier: Apache-2.0
"""What operator schemas say about a call: its arguments, what its result may alias, what it writes.

Schemas are believed; the few that are known not to tell the truth are listed here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

aten = torch.ops.aten

# Nodes that check something and compute nothing: they do not count as users.
ASSERTIONS: frozenset[Any] = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten._functional_assert_async.msg,
        aten._functional_assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)

# Calls that switch a mode for all that follows them: nothing may be moved across one.
MODE_SWITCHES: frozenset[Any] = frozenset(
    {
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    }
)

# Operators that may return (a view of) an argument although their schema does not say so.
UNDECLARED_VIEWS: Mapping[Any, tuple[str, ...]] = MappingProxyType(
    {
        aten.dropout.default: ("input",),
        aten.feature_dropout.default: ("input",),
        aten.alpha_dropout.default: ("input",),
        aten.feature_alpha_dropout.default: ("input",),
        aten.type_as.default: ("self",),
        aten.sum_to_size.default: ("self",),
        aten.atleast_1d.default: ("self",),
        aten.atleast_2d.default: ("self",),
        aten.atleast_3d.default: ("self",),
        aten.broadcast_tensors.default: ("tensors",),
        aten.meshgrid.default: ("tensors",),
        aten.meshgrid.indexing: ("tensors",),
        aten.einsum.default: ("tensors",),
    }
)

# Operators that update running statistics in training although their schema does not say so:
# operator -> (flag that turns it on, arguments written).
UNDECLARED_WRITES: Mapping[Any, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        aten.batch_norm.default: ("training", ("running_mean", "running_var")),
        aten.native_batch_norm.default: ("training", ("running_mean", "running_var")),
        aten.instance_norm.default: ("use_input_stats", ("running_mean", "running_var")),
    }
)

# Operators that add something to a product and only expand it to the product's shape, while their fake kernels broadcast
# the two against each other: operator -> the two factors.
EXPANDED_ADDENDS: Mapping[Any, tuple[str, str]] = MappingProxyType(
    {
        aten.linear.default: ("input", "weight"),
        aten.addmm.default: ("mat1", "mat2"),
        aten.baddbmm.default: ("batch1", "batch2"),
    }
)

# Names for the operands of the Python operators that occur in graphs.
_PYTHON_OPERANDS: Mapping[Any, tuple[str, ...]] = MappingProxyType({operator.getitem: ("self", "index")})


def nodes_in(value: Any) -> Iterator[Node]:
    """Every node inside an argument, left to right."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from nodes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from nodes_in(item)
    elif isinstance(value, slice):
        yield from nodes_in((value.start, value.stop, value.step))


def operator_name(target: Any) -> str:
    """An operator as a reader knows it: ``add.Tensor``, ``softmax.int``, ``linear``, ``getitem``."""
    if not isinstance(target, OpOverload):
        return str(getattr(target, "__name__", target))
    name = str(target._schema.name).split("::")[1]
    return f"{name}.{target._schema.overload_name}" if target._schema.overload_name else name


def base_name(target: Any) -> str:
    """An operator without its overload: ``add``, ``view``, ``getitem``."""
    return operator_name(target).partition(".")[0]


def describe(value: Any) -> str:
    """A node or constant for a message: ``add.Tensor (add_3)``, ``placeholder input_ids``, ``0.5``."""
    if not isinstance(value, Node):
        return repr(value)
    if value.op == "call_function":
        return f"{operator_name(value.target)} ({value.name})"
    if value.op == "get_attr":
        return f"parameter {value.target}"
    return f"{value.op} {value.target}"


def named_arguments(node: Node) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in; what no schema names keeps its place or keyword."""
    if not isinstance(node.target, OpOverload):
        names = _PYTHON_OPERANDS.get(node.target, ())
        placed = {(names[i] if i < len(names) else f"*{i}"): value for i, value in enumerate(node.args)}
        return placed | dict(node.kwargs)
    schema = node.target._schema.arguments
    given: dict[str, Any] = {}
    for index, value in enumerate(node.args):
        given[schema[index].name if index < len(schema) else f"*{index}"] = value
    given |= node.kwargs
    return given | {name: value for name, value in defaults(node.target).items() if name not in given}


@cache
def defaults(target: OpOverload) -> Mapping[str, Any]:
    """The default value of every argument that has one."""
    values = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    # A schema stores its default memory format as the number 0; graphs say torch.contiguous_format.
    if isinstance(values.get("memory_format"), int):
        values["memory_format"] = torch.contiguous_format
    return MappingProxyType(values)


@cache
def viewed(target: OpOverload) -> tuple[str, ...]:
    """Names of the arguments whose storage the result may share (``Tensor(a)`` in and out, and known lies)."""
    schema = target._schema
    returned = {name for r in schema.returns if r.alias_info is not None for name in r.alias_info.before_set}
    declared = [
        argument.name
        for argument in schema.arguments
        # `split` writes Tensor(a -> *) self -> Tensor(a)[]: the elements of the list are the views.
        if (alias := argument.alias_info) is not None and ("*" in alias.after_set or returned & alias.before_set)
    ]
    return (*declared, *UNDECLARED_VIEWS.get(target, ()))


@cache
def declared_writes(target: OpOverload) -> tuple[str, ...]:
    """Names of the arguments the schema says are written: ``Tensor(a!)``."""
    return tuple(a.name for a in target._schema.arguments if a.alias_info and a.alias_info.is_write)


@cache
def may_write(target: OpOverload) -> bool:
    """Whether some call of the operator writes to an argument."""
    return bool(declared_writes(target)) or target in UNDECLARED_WRITES


def written(target: OpOverload, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the arguments this call writes, known lies included."""
    flag, running = UNDECLARED_WRITES.get(target, ("", ()))
    return declared_writes(target) + (running if arguments.get(flag) else ())
