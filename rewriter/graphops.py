# SPDX-License-Identifier: Apache-2.0
"""The operators a saved graph may name, and the check of each call.

A name in a file is looked up in tables only, never by attribute access on what the file says. Allowed are

- `aten.<name>.<overload>`: public operators known to torch's dispatcher, and the private ones listed here.
  Refused are those that touch files, streams, storages, the autograd graph or the size of a tensor's storage,
  `out=` variants, and families that trust their arguments (sparse, quantised and vendor back ends).
- `rewriter.<name>.default`: operators registered by a `KernelSpec`.
- `operator.*`, `torch.sym_*`, `math.*` of short lists: arithmetic on sizes.
- `higher_order.*` of a short list, whose bodies are graphs in the same file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import operator
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from rewriter import kernels
from rewriter.errors import ExportError, LoadError
from rewriter.kernels.spec import REGISTRY

_OVERLOAD = re.compile(r"(aten|rewriter)\.(_{0,2}[a-zA-Z][a-zA-Z0-9_]*)\.([a-zA-Z][a-zA-Z0-9_]*)")

# Side effects beyond writing to a tensor argument.
_REFUSED = frozenset(
    {
        "from_file", "data", "get_gradients", "lift", "pin_memory", "record_stream", "requires_grad_",
        "resize", "resize_", "resize_as", "resize_as_", "retain_grad", "retains_grad",
        "set", "set_", "set_data",
    }
)  # fmt: skip
# Families reached by no captured model here, some of which do not check their arguments.
_REFUSED_FAMILIES = (
    "choose_qparams", "coalesce", "copy_sparse", "cudnn_", "fbgemm_", "mkldnn_", "miopen_", "mps_",
    "nested_", "q_", "quantize", "resize_as_sparse", "sparse_", "sspaddmm", "to_mkldnn", "to_sparse",
)  # fmt: skip
# Private aten operators that the training IR or its usual decompositions contain.
_PRIVATE = frozenset(
    {
        "__and__", "__iand__", "__ilshift__", "__ior__", "__irshift__", "__ixor__", "__lshift__", "__or__",
        "__rshift__", "__xor__", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_assert_async",
        "_assert_scalar", "_assert_tensor_metadata", "_conj", "_convolution", "_fused_rms_norm",
        "_is_all_true", "_is_any_true", "_local_scalar_dense", "_log_softmax", "_masked_softmax",
        "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
        "_native_batch_norm_legit_no_training", "_reshape_alias",
        "_safe_softmax", "_scaled_dot_product_attention_math", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_shape_as_tensor", "_softmax", "_stack", "_to_copy", "_unsafe_index", "_unsafe_view", "_weight_norm",
        "_weight_norm_interface",
    }
)  # fmt: skip
_REFUSED_TYPES = ("Storage", "Stream", "__torch__")

_BINARY = (
    "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow",
    "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_",
)  # fmt: skip
_SYMBOLIC = ("sym_float", "sym_int", "sym_not", "sym_sqrt", "sym_sum", "_sym_sqrt")
_MATH = ("ceil", "floor", "trunc", "sqrt", "log2", "exp")
# Name -> function and number of arguments.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    **{f"operator.{name}": (getattr(operator, name), 2) for name in _BINARY},
    "operator.neg": (operator.neg, 1),
    **{f"torch.{name}": (getattr(torch, name), 1) for name in _SYMBOLIC},
    "torch.sym_max": (torch.sym_max, 2),
    "torch.sym_min": (torch.sym_min, 2),
    "torch.sym_ite": (torch.sym_ite, 3),
    **{f"math.{name}": (getattr(math, name), 1) for name in _MATH},
    "math.pow": (math.pow, 2),
}
_NAME_OF = {function: name for name, (function, _) in _FUNCTIONS.items()}

# Name -> positions of the arguments that are graphs.
_HIGHER_ORDER: dict[str, tuple[int, ...]] = {
    "cond": (1, 2),
    "wrap_with_autocast": (4,),
    "wrap_with_set_grad_enabled": (1,),
}
DEVICE_TYPES = frozenset({"cpu", "cuda", "meta", "mps", "xpu"})


def spell(target: Any) -> str:
    """The name of an operator in a saved graph.

    Raises:
        ExportError: the operator is not on the list.
    """
    if isinstance(target, OpOverload):
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
        reason = _refusal(name)
        if reason is None:
            return name
        raise ExportError(f"operator {name} cannot be saved: {reason}")
    if isinstance(target, HigherOrderOperator) and _qualified(target) in _HIGHER_ORDER:
        return f"higher_order.{_qualified(target)}"
    if callable(target) and target in _NAME_OF:
        return _NAME_OF[target]
    raise ExportError(f"operator {target!r} cannot be saved: it is not on the list of operators a graph file may name")


def lookup(name: str) -> Callable[..., Any]:
    """The operator of that name.

    Raises:
        LoadError: there is none, or it is not on the list.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name][0]
    prefix, _, rest = name.partition(".")
    if prefix == "higher_order" and rest in _HIGHER_ORDER:
        return getattr(torch.ops.higher_order, rest)
    reason = _refusal(name)
    if reason is not None:
        raise LoadError(f"operator {name!r} is refused: {reason}")
    namespace, operator_name, overload = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), operator_name)
    return getattr(packet, overload)


def _qualified(operator: OpOverload | HigherOrderOperator) -> str:
    return str(operator.name())  # type: ignore[no-untyped-call]


def _refusal(name: str) -> str | None:
    """Why the file may not name this overload; None if it may."""
    match = _OVERLOAD.fullmatch(name)
    if match is None:
        return "it is not on the list of operators a graph file may name"
    namespace, base, overload = match.groups()
    if namespace == "rewriter":
        return _refusal_of_own(base, overload)
    return _refusal_of_aten(base, overload)


@functools.cache
def _refusal_of_aten(base: str, overload: str) -> str | None:
    if f"aten::{base}" + ("" if overload == "default" else f".{overload}") not in _registered():
        return "this version of torch has no such operator"
    if base.startswith("_") and base not in _PRIVATE:
        return "private operators are allowed by name only"
    if base in _REFUSED or base.startswith(_REFUSED_FAMILIES):
        return "it does more than compute tensors"
    schema = getattr(getattr(torch.ops.aten, base), overload)._schema
    if any(argument.is_out for argument in schema.arguments):
        return "variants with out= are refused"
    if any(mark in str(argument.type) for argument in schema.arguments for mark in _REFUSED_TYPES):
        return "it takes storages, streams or objects"
    return None


def _refusal_of_own(base: str, overload: str) -> str | None:
    _register_kernels()
    names = {_qualified(operator) for operator in REGISTRY}
    if overload != "default" or f"rewriter::{base}" not in names:
        return "this version of rewriter has no such operator"
    return None


@functools.cache
def _registered() -> frozenset[str]:
    return frozenset(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))


@functools.cache
def _register_kernels() -> None:
    """Import every `rewriter.kernels.<operator>.op`, which registers the operators with torch."""
    for package in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = f"{package.name}.op"
        if package.ispkg and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


def check_call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with a call as read from a file; None if it fits the operator.

    Checked are the number and names of arguments, that texts stand only where the schema says `str`, and that
    graphs stand where a higher-order operator expects them. Values are left to the operator's own checks.
    """
    if isinstance(target, OpOverload):
        return _misfit(target, args, kwargs)
    if kwargs:
        return "it takes no keyword arguments"
    if isinstance(target, HigherOrderOperator):
        return _misfit_of_higher_order(_qualified(target), args)
    _, count = _FUNCTIONS[_NAME_OF[target]]
    if len(args) != count:
        return f"it takes {count} arguments, not {len(args)}"
    return "it takes no text" if _holds_text(args) else None


def _misfit(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    arguments = target._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    if len(args) > len(positional):
        return f"it takes {len(positional)} positional arguments, not {len(args)}"
    given = {a.name: value for a, value in zip(positional, args, strict=False)}
    known = {a.name: a for a in arguments}
    for name, value in kwargs.items():
        if name not in known or name in given:
            return f"unknown or repeated argument {name!r}"
        given[name] = value
    for name, argument in known.items():
        if name not in given and not argument.has_default_value():
            return f"argument {name!r} is missing"
        if name in given and _holds_text(given[name]) and str(argument.type) not in ("str", "Optional[str]"):
            return f"argument {name!r} is not a text"
    return None


def _misfit_of_higher_order(name: str, args: Sequence[Any]) -> str | None:
    bodies = _HIGHER_ORDER[name]
    if len(args) <= max(bodies):
        return f"it takes more than {max(bodies)} arguments"
    for position in bodies:
        if not (isinstance(args[position], fx.Node) and args[position].op == "get_attr"):
            return f"argument {position} is not a graph"
    if name == "wrap_with_autocast":
        if args[0] not in DEVICE_TYPES:
            return f"unknown device type {args[0]!r}"
        args = args[1:]
    return "it takes no text" if _holds_text(args) else None


def _holds_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_text, value))
    return isinstance(value, str)
