# SPDX-License-Identifier: Apache-2.0
"""Pointwise aten operators as Triton expressions: what the code generator can compute while a tile is in registers.

Values are float32, or boolean. Where eager rounds every intermediate value to the graph's dtype, a fused chain does not;
only a cast the model itself makes is carried out. So a fused chain is as exact as eager or more exact, and where eager's
half precision overflows in between it stays finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

aten = torch.ops.aten

ELEMENTS = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
DTYPES = (*ELEMENTS, torch.bool)


class Unfit(Exception):
    """Why a node cannot be part of an emitted kernel, in one sentence."""


@dataclass(frozen=True)
class Call:
    """One node while its expression is written.

    Attributes:
        arguments: by schema name, defaults filled in.
        texts: the variable that holds each operand.
        dtypes: of operands; a variable is boolean where its operand is.
        dtype: of the node.
    """

    arguments: Mapping[str, Any]
    texts: Mapping[Node, str]
    dtypes: Mapping[Node, torch.dtype]
    dtype: torch.dtype

    def number(self, name: str) -> str:
        value = self.arguments[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise Unfit(f"{name} is {value}, not a number known beforehand")
        return repr(float(value)) if math.isfinite(value) else f'float("{"-" if value < 0 else ""}inf")'

    def real(self, name: str) -> str:
        """An operand as float32."""
        value = self.arguments[name]
        if value not in self.texts:
            return self.number(name)
        text = self.texts[value]
        return f"{text}.to(tl.float32)" if self.dtypes[value] is torch.bool else text

    def truth(self, name: str) -> str:
        """An operand as a boolean."""
        value = self.arguments[name]
        if value not in self.texts:
            raise Unfit(f"{name} is {value}, not a tensor")
        text = self.texts[value]
        return text if self.dtypes[value] is torch.bool else f"({text} != 0.0)"


Expression = Callable[[Call], str]


def _form(template: str) -> Expression:
    """``"{self} * {other}"``: every operand a number in float32."""
    names = [part.partition("}")[0] for part in template.split("{")[1:]]
    return lambda call: template.format(**{name: call.real(name) for name in names})


def _logic(template: str) -> Expression:
    names = [part.partition("}")[0] for part in template.split("{")[1:]]

    def write(call: Call) -> str:
        if call.dtype is not torch.bool:
            raise Unfit("it computes with the bits of integers")
        return template.format(**{name: call.truth(name) for name in names})

    return write


def _scaled(sign: str, term: str = "other", base: str = "self") -> Expression:
    """``self ± alpha · other``"""

    def write(call: Call) -> str:
        if call.arguments["alpha"] == 1:
            return f"{call.real(base)} {sign} {call.real(term)}"
        return f"{call.real(base)} {sign} {call.number('alpha')} * {call.real(term)}"

    return write


def _power(call: Call) -> str:
    x, exponent = call.real("self"), call.arguments["exponent"]
    known = {
        0.5: f"tl.sqrt({x})", -0.5: f"1.0 / tl.sqrt({x})", 1: x, -1: f"1.0 / {x}",
        2: f"{x} * {x}", 3: f"{x} * {x} * {x}", 4: f"({x} * {x}) * ({x} * {x})", -2: f"1.0 / ({x} * {x})",
    }  # fmt: skip
    if exponent not in known:
        raise Unfit(f"the power {exponent} has no short product")
    return known[exponent]


def _gelu(call: Call) -> str:
    function = {"none": "gelu", "tanh": "gelu_tanh"}[call.arguments["approximate"]]
    return f"functions.{function}({call.real('self')})"


def _elu(call: Call) -> str:
    if call.arguments["scale"] != 1 or call.arguments["input_scale"] != 1:
        raise Unfit("this elu is scaled")
    return f"functions.elu({call.real('self')}, {call.number('alpha')})"


def _clamp(call: Call) -> str:
    text = call.real("self")
    if call.arguments.get("min") is not None:
        text = f"functions.clamp_min({text}, {call.real('min')})"
    if call.arguments.get("max") is not None:
        text = f"functions.clamp_max({text}, {call.real('max')})"
    return text


def _chosen(call: Call) -> str:
    return f"tl.where({call.truth('condition')}, {call.real('self')}, {call.real('other')})"


def _filled(call: Call) -> str:
    return f"tl.where({call.truth('mask')}, {call.real('value')}, {call.real('self')})"


def _cast(call: Call) -> str:
    source = call.arguments["self"]
    if call.dtype is torch.bool:
        return call.truth("self")
    if call.dtype is torch.float32 or call.dtype is call.dtypes[source] or call.dtypes[source] is torch.bool:
        return call.real("self")
    return f"{call.real('self')}.to({ELEMENTS[call.dtype]}).to(tl.float32)"


def _same(call: Call) -> str:
    source: Any = call.arguments.get("self", call.arguments.get("input"))
    return call.texts[source]


def _dropout(call: Call) -> str:
    if call.arguments["train"] and call.arguments["p"] != 0:
        raise Unfit("it draws random numbers")
    return _same(call)


# Same elements in the same order; that the last dimension stays is for the region to check.
VIEWS: frozenset[OpOverload] = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.flatten.using_ints,
    }
)

# No computing: nothing is gained where a region has only these.
IDENTITIES: frozenset[OpOverload] = VIEWS | {
    aten.dropout.default, aten.alias.default, aten.contiguous.default, aten.clone.default,
}  # fmt: skip

CASTS: frozenset[OpOverload] = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default})

_SCALED = {
    aten.add: _scaled("+"),
    aten.sub: _scaled("-"),
    aten.rsub: _scaled("-", term="self", base="other"),
}
_BINARY = {
    aten.mul: _form("{self} * {other}"),
    aten.div: _form("{self} / {other}"),
    aten.gt: _form("{self} > {other}"),
    aten.ge: _form("{self} >= {other}"),
    aten.lt: _form("{self} < {other}"),
    aten.le: _form("{self} <= {other}"),
    aten.eq: _form("{self} == {other}"),
    aten.ne: _form("{self} != {other}"),
}

# What costs more than a few instructions per element: not worth doing again for every block of columns.
EXPENSIVE: Mapping[OpOverload, Expression] = MappingProxyType(
    {
        aten.exp.default: _form("tl.exp({self})"),
        aten.log.default: _form("tl.log({self})"),
        aten.erf.default: _form("tl.erf({self})"),
        aten.sigmoid.default: _form("functions.sigmoid({self})"),
        aten.silu.default: _form("functions.silu({self})"),
        aten.tanh.default: _form("functions.tanh({self})"),
        aten.gelu.default: _gelu,
        aten.elu.default: _elu,
        aten.expm1.default: _form("functions.expm1({self})"),
        aten.log1p.default: _form("functions.log1p({self})"),
        aten.softplus.default: _form("functions.softplus({self}, {beta}, {threshold})"),
    }
)

EXPRESSIONS: Mapping[OpOverload, Expression] = MappingProxyType(
    {
        **{getattr(op, kind): write for op, write in (_SCALED | _BINARY).items() for kind in ("Tensor", "Scalar")},
        aten.neg.default: _form("-{self}"),
        aten.abs.default: _form("tl.abs({self})"),
        aten.sqrt.default: _form("tl.sqrt({self})"),
        aten.rsqrt.default: _form("1.0 / tl.sqrt({self})"),
        aten.reciprocal.default: _form("1.0 / {self}"),
        aten.square.default: _form("{self} * {self}"),
        aten.pow.Tensor_Scalar: _power,
        aten.relu.default: _form("functions.relu({self})"),
        aten.leaky_relu.default: _form("tl.where({self} > 0.0, {self}, {negative_slope} * {self})"),
        aten.hardtanh.default: _form("functions.clamp_max(functions.clamp_min({self}, {min_val}), {max_val})"),
        aten.clamp.default: _clamp,
        aten.clamp.Tensor: _clamp,
        aten.clamp_min.default: _form("functions.clamp_min({self}, {min})"),
        aten.clamp_max.default: _form("functions.clamp_max({self}, {max})"),
        aten.maximum.default: _form("functions.maximum({self}, {other})"),
        aten.minimum.default: _form("functions.minimum({self}, {other})"),
        aten.where.self: _chosen,
        aten.where.ScalarOther: _chosen,
        aten.where.ScalarSelf: _chosen,
        aten.masked_fill.Scalar: _filled,
        aten.logical_not.default: _logic("{self} == 0"),
        aten.logical_and.default: _logic("{self} & {other}"),
        aten.logical_or.default: _logic("{self} | {other}"),
        aten.bitwise_not.default: _logic("{self} == 0"),
        aten.bitwise_and.Tensor: _logic("{self} & {other}"),
        aten.bitwise_or.Tensor: _logic("{self} | {other}"),
        aten.__and__.Tensor: _logic("{self} & {other}"),
        aten.__or__.Tensor: _logic("{self} | {other}"),
        **dict.fromkeys(IDENTITIES, _same),
        **dict.fromkeys(CASTS, _cast),
        aten.dropout.default: _dropout,
        **EXPENSIVE,
    }
)

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "·",
    "div": "/",
    "gt": ">",
    "ge": "≥",
    "lt": "<",
    "le": "≤",
    "eq": "=",
    "ne": "≠",
}


def expression_of(node: Node) -> Expression:
    """How a node is written. Raises Unfit."""
    found = EXPRESSIONS.get(node.target) if isinstance(node.target, OpOverload) else None
    if found is None:
        raise Unfit("it is not pointwise")
    return found


def name_of(node: Node) -> str:
    """``add`` of ``aten.add.Tensor``."""
    return str(node.target).split(".")[1].strip("_")


def is_identity(node: Node) -> bool:
    """Whether a node computes nothing: views, dropout in evaluation, casts to the dtype a value has."""
    if node.target in CASTS:
        return node.meta["val"].dtype is node.all_input_nodes[0].meta["val"].dtype
    return node.target in IDENTITIES


def formula(node: Node, names: Mapping[Node, str], arguments: Callable[[Node], Mapping[str, Any]]) -> str:
    """A value as mathematics, for people; ``names`` are the values it is computed from."""
    return _written(node, names, arguments)[0]


def _written(value: Any, names: Mapping[Node, str], arguments: Callable[[Node], Mapping[str, Any]]) -> tuple[str, bool]:
    """The text, and whether it needs parentheses inside another."""
    if not isinstance(value, Node):
        return f"{value:g}" if isinstance(value, float) else str(value), False
    if value in names:
        return names[value], False
    given = arguments(value)
    if is_identity(value):
        return _written(given.get("self", given.get("input")), names, arguments)
    operator = name_of(value)
    if value.target in CASTS:
        operator, given = str(given["dtype"]).removeprefix("torch."), {"self": given["self"]}
    if operator in _INFIX and "other" in given and given.get("alpha", 1) == 1:
        sides = [_written(given[side], names, arguments) for side in ("self", "other")]
        return f" {_INFIX[operator]} ".join(f"({text})" if compound else text for text, compound in sides), True
    shown = [a for a in given.values() if a is not None and a != "none"]
    return f"{operator}({', '.join(_written(a, names, arguments)[0] for a in shown)})", False
