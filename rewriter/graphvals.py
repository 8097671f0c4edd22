# SPDX-License-Identifier: Apache-2.0
"""What a node's value looks like (`meta["val"]`) as JSON, and back as fake tensors over a fresh shape
environment.

    value  := {"tensor": {"dtype", "shape": [size...], "stride": [size...], "device", "requires_grad"}}
            | {"int": size} | {"symbolic": "bool" | "float"} | {"constant": true | 1.5 | {"float": "inf"} |
            null} | {"list": [value...]} | {"tuple": [value...]}
    size   := integer | text of a shape expression (see symexpr)
    symbols := {"s0": {"hint": 7, "min": 2, "max": null}, ...}      hint null: the size depends on data

A fake tensor is made from its recorded description; no operator runs. Symbols keep their names where torch
allows.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from rewriter import symexpr
from rewriter.errors import ExportError, LoadError
from rewriter.graphops import DEVICE_TYPES

Json = Any
MAX_DIMENSIONS = 64
MAX_SYMBOLS = 10_000

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
        "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
        "complex64", "complex128",
    )
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DEVICE = re.compile(r"([a-z]+)(?::([0-9]{1,3}))?")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `"float32"`; ExportError for dtypes the format does not know."""
    if dtype not in _DTYPE_NAMES:
        raise ExportError(f"dtype {dtype} cannot be saved")
    return _DTYPE_NAMES[dtype]


def dtype_of(name: Json) -> torch.dtype:
    """`"float32"` -> `torch.float32`; LoadError for anything else."""
    if not isinstance(name, str) or name not in DTYPES:
        raise LoadError(f"unknown dtype {name!r}")
    return DTYPES[name]


def device_of(text: Json) -> torch.device:
    """`"cuda:1"` -> `torch.device("cuda:1")`; LoadError for anything that is not TYPE or TYPE:INDEX."""
    match = _DEVICE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match.group(1) not in DEVICE_TYPES:
        raise LoadError(f"unknown device {text!r}")
    return torch.device(text)


def float_to_json(value: float) -> Json:
    """The float as it is, or `{"float": "inf" | "-inf" | "nan"}`, which JSON has no literals for."""
    return value if math.isfinite(value) else {"float": str(value)}


def float_from_json(value: Json) -> float:
    """Reverse of `float_to_json` for the object form; LoadError for anything else."""
    if not isinstance(value, dict) or value.keys() != {"float"} or value["float"] not in ("inf", "-inf", "nan"):
        raise LoadError(f"not a float: {str(value)[:80]!r}")
    return float(value["float"])


class ValueWriter:
    """Describes values; collects the symbols they use."""

    def __init__(self) -> None:
        self._symbols: dict[str, Json] = {}

    @property
    def symbols(self) -> dict[str, Json]:
        return dict(sorted(self._symbols.items()))

    def describe(self, value: Any) -> Json:
        """JSON of a value: fake or real tensor, size, list of them.

        Raises:
            ExportError: a value that the format does not know, or a shape outside the expression grammar.
        """
        if isinstance(value, Tensor):
            return {"tensor": self._describe_tensor(value)}
        if isinstance(value, (torch.SymBool, torch.SymFloat)):
            return {"symbolic": "bool" if isinstance(value, torch.SymBool) else "float"}
        if value is None or isinstance(value, (bool, float)):
            return {"constant": float_to_json(value) if isinstance(value, float) else value}
        if isinstance(value, (int, torch.SymInt)):
            return {"int": self.size(value)}
        if isinstance(value, (list, tuple)):
            return {"list" if isinstance(value, list) else "tuple": [self.describe(v) for v in value]}
        raise ExportError(f"a node's value of type {type(value).__name__} cannot be saved")

    def size(self, value: int | torch.SymInt) -> int | str:
        """An int, or the text of a shape expression."""
        if isinstance(value, int):
            return value
        expression = value.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self._remember(symbol, value.node.shape_env)
        text = symexpr.to_text(expression)
        return int(text) if text.isdigit() else text

    def _describe_tensor(self, value: Tensor) -> Json:
        if value.layout is not torch.strided:
            raise ExportError(f"a {value.layout} tensor cannot be saved; make it dense")
        return {
            "dtype": dtype_name(value.dtype),
            "shape": [self.size(n) for n in value.shape],
            "stride": [self.size(n) for n in value.stride()],
            "device": str(value.device),
            "requires_grad": value.requires_grad,
        }

    def _remember(self, symbol: sympy.Symbol, env: ShapeEnv) -> None:
        if symbol.name in self._symbols:
            return
        bounds = env.bound_sympy(symbol)
        hint = env.backed_var_to_val.get(symbol)
        self._symbols[symbol.name] = {
            "hint": None if hint is None else int(hint),
            "min": _finite(bounds.lower),
            "max": _finite(bounds.upper),
        }


def _finite(bound: Any) -> int | None:
    return int(bound) if isinstance(bound, (int, sympy.Integer)) and abs(int(bound)) <= symexpr.MAX_INTEGER else None


class _NamedShapeEnv(ShapeEnv):
    """Names a symbol after the number in its source ("s53" -> s53), so that a saved name comes back.

    Only for readable graphs: sizes are bound by the table of `ValueReader`, whatever the symbols are called.
    """

    def _generate_unique_id(self, source_name: str) -> int:
        match = re.search(r"s([0-9]+)", source_name)
        number = int(match.group(1)) if match else 0
        while number in self.unique_ids:
            number += 1
        self.unique_ids.add(number)
        return number


class ValueReader:
    """Builds fake tensors and symbolic sizes from their descriptions, in one fresh shape environment."""

    def __init__(self, symbols: Json) -> None:
        self.env = _NamedShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self._bindings: dict[str, int | torch.SymInt] = {}
        self._sizes: dict[str, int | torch.SymInt] = {}
        if not isinstance(symbols, dict) or len(symbols) > MAX_SYMBOLS:
            raise LoadError("the table of symbols is not an object, or too large")
        for name, record in symbols.items():
            self._bindings[name] = self._symbol(name, record)

    def size(self, value: Json) -> int | torch.SymInt:
        """An integer as it is; a text as the value of the expression."""
        if isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > symexpr.MAX_INTEGER:
                raise LoadError(f"size {value} is beyond 2^63 - 1")
            return value
        if not isinstance(value, str):
            raise LoadError(f"not a size: {value!r}")
        if value not in self._sizes:
            self._sizes[value] = symexpr.parse(value).evaluate(self._bindings)
        return self._sizes[value]

    def rebuild(self, value: Json, recompute: Callable[[], Any], depth: int = 0) -> Any:
        """The value described; `recompute` gives symbolic booleans and floats from the node's arguments."""
        if depth > 8 or not isinstance(value, dict) or len(value) != 1:
            raise LoadError(f"not the description of a value: {str(value)[:80]!r}")
        ((kind, content),) = value.items()
        if kind == "tensor":
            return self._tensor(content)
        if kind == "int":
            return self.size(content)
        if kind == "constant" and (content is None or isinstance(content, (bool, float, dict))):
            return float_from_json(content) if isinstance(content, dict) else content
        if kind == "symbolic" and content in ("bool", "float"):
            return recompute()
        if kind in ("list", "tuple") and isinstance(content, list):
            items = [self.rebuild(item, recompute, depth + 1) for item in content]
            return items if kind == "list" else tuple(items)
        raise LoadError(f"unknown kind of value {kind!r}")

    def _symbol(self, name: str, record: Json) -> int | torch.SymInt:
        from torch._dynamo.source import ConstantSource  # here, because it takes a second to import

        if (
            not symexpr.SYMBOL.fullmatch(name)
            or not isinstance(record, dict)
            or record.keys() != {"hint", "min", "max"}
        ):
            raise LoadError(f"symbol {name!r} is malformed")
        for value in record.values():
            if value is not None and (type(value) is not int or abs(value) > symexpr.MAX_INTEGER):
                raise LoadError(f"symbol {name!r} has a bound or hint that is not an integer")
        lower, upper, hint = record["min"], record["max"], record["hint"]
        lower = -int_oo if lower is None else lower
        upper = int_oo if upper is None else upper
        if not lower <= upper or (hint is not None and not max(0, lower) <= hint <= upper):
            raise LoadError(f"symbol {name!r} has a hint outside its bounds")
        if hint is None:
            symbol = self.env.create_unbacked_symint()
            torch._check(symbol >= max(0, lower))
            if record["max"] is not None:
                torch._check(symbol <= upper)
            return symbol
        expression = self.env.create_symbol(
            hint,
            source=ConstantSource(name),
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=StrictMinMaxConstraint(vr=ValueRanges(max(0, lower), upper), warn_only=False)
            if lower != upper
            else None,
            do_not_specialize_zero_one=True,
        )
        return self.env.create_symintnode(expression, hint=hint, source=ConstantSource(name))

    def _tensor(self, record: Json) -> Tensor:
        keys = {"dtype", "shape", "stride", "device", "requires_grad"}
        if not isinstance(record, dict) or record.keys() != keys or not isinstance(record["requires_grad"], bool):
            raise LoadError(f"not the description of a tensor: {str(record)[:80]!r}")
        shape, stride = self._sizes_of(record["shape"]), self._sizes_of(record["stride"])
        dtype, device = dtype_of(record["dtype"]), device_of(record["device"])
        if len(shape) != len(stride):
            raise LoadError("a tensor has unlike numbers of sizes and strides")
        try:
            with self.mode:
                value = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                return value.requires_grad_() if record["requires_grad"] else value
        except (RuntimeError, ValueError, TypeError, OverflowError) as reason:
            raise LoadError(f"impossible tensor description {str(record)[:120]}: {reason}") from reason

    def _sizes_of(self, values: Json) -> Sequence[int | torch.SymInt]:
        if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
            raise LoadError(f"not a list of sizes: {str(values)[:80]!r}")
        sizes = [self.size(value) for value in values]
        if any(isinstance(size, int) and size < 0 for size in sizes):
            raise LoadError(f"a negative size or stride in {str(values)[:80]}")
        return sizes


_SCALARS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
# Cheap on any scalars (no power), so that a file cannot make loading slow.
_RECOMPUTED = frozenset(
    {
        operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_,
        operator.or_, operator.add, operator.sub, operator.mul, operator.truediv, operator.neg,
        torch.sym_float, torch.sym_not, torch.sym_max, torch.sym_min, torch.sym_sqrt,
    }
)  # fmt: skip


def recompute(node: fx.Node) -> Any:
    """A symbolic boolean or float, computed from the values of the node's arguments; None if it cannot be."""
    arguments = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args]
    if node.target not in _RECOMPUTED or not all(isinstance(a, _SCALARS) for a in arguments):
        return None
    try:
        return node.target(*arguments)  # type: ignore[operator]
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as reason:
        raise LoadError(f"the value of node {node.name!r} cannot be computed: {reason}") from reason
