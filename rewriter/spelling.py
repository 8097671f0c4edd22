# SPDX-License-Identifier: Apache-2.0
"""How Python code spells torch operators: which operator a torch function, tensor method or Python operator records.

Only what differs from the operator of the same name is listed; everything else is found by its name in `torch.ops.aten`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from rewriter.expressions import Anything, Expression, Operator
from rewriter.operators import cast, mul, rsub, swap_last

aten = torch.ops.aten
IN_PLACE = "a pattern has no in-place operators"
Spelled = tuple["Operator | OpOverload | OpOverloadPacket", tuple[Any, ...], Mapping[str, Any]]


class Unspelled(Exception):
    """A call that no operator is known for; completes "<function>: ..."."""


def spell(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Spelled:
    """Operator and arguments that ``target(*args, **kwargs)`` records in a graph.

    Args:
        target: a torch operator or function, a Python operator, or the name of a tensor method.

    Raises:
        Unspelled: it records none, or one that depends on what a pattern does not know.
    """
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return target, args, kwargs
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    if special := _SPECIAL.get(name):
        try:
            return special(*args, **kwargs)
        except TypeError as error:  # arguments that this spelling does not take
            raise Unspelled(str(error).partition("() ")[2]) from error
    if name.endswith("_"):
        raise Unspelled(IN_PLACE)
    packet = getattr(aten, _RENAMED.get(name, name), None)
    if not isinstance(packet, OpOverloadPacket):
        raise Unspelled("there is no torch operator of this name")
    args, kwargs = _gathered(name, args), dict(kwargs)
    for option, neutral in _PYTHON_ONLY.items():
        if option in kwargs and kwargs.pop(option) not in neutral:
            raise Unspelled(f"{option}= is not an argument of the operator")
    given = {_keyword(packet, keyword): value for keyword, value in kwargs.items()}
    return packet, args, {keyword: value for keyword, value in given.items() if value is not None}


# Python's operators whose names are not torch's.
_RENAMED = {
    "truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "and_": "bitwise_and", "or_": "bitwise_or",
    "xor": "bitwise_xor", "invert": "bitwise_not", "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift",
}  # fmt: skip
# Options of Python wrappers that no operator has, and their values that change nothing.
_PYTHON_ONLY: dict[str, tuple[Any, ...]] = {"inplace": (False,), "_stacklevel": (3,), "out": (None,)}
# Methods that take a list as separate arguments.
_SPREAD = frozenset({"view", "reshape", "permute", "expand", "repeat", "tile", "flip"})
# Keywords of Python signatures -> what schemas call them.
_KEYWORDS = {"input": "self", "training": "train", "axis": "dim", "shape": "size"}


def _keyword(packet: OpOverloadPacket, keyword: str) -> str:
    names = {a.name for o in packet.overloads() for a in getattr(packet, o)._schema.arguments}
    if keyword in names:
        return keyword
    return _KEYWORDS.get(keyword, keyword)


def _gathered(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``x.view(2, 3)`` as ``view(x, [2, 3])``."""
    if name not in _SPREAD or len(args) < 2 or isinstance(args[1], (list, tuple)):
        return args
    if len(args) == 2 and isinstance(args[1], Expression):
        return args  # x.view(Anything())
    return args[0], list(args[1:])


def _attribute(x: Any, name: str) -> Spelled:
    if name == "mT":
        return swap_last, (x,), {}
    if name == "T":
        return aten.numpy_T, (x,), {}
    raise Unspelled(f"a pattern cannot ask for .{name}; use Anything() for a size, a condition for a type")


def _sub(x: Any, y: Any, *, alpha: Any = 1) -> Spelled:
    """1 - x is recorded as rsub(x, 1)."""
    if not isinstance(x, Expression):
        return rsub, (y, x), {}
    return aten.sub, (x, y), {} if alpha == 1 else {"alpha": alpha}


def _div(x: Any, y: Any) -> Spelled:
    """2 / x is recorded as reciprocal(x) * 2."""
    if not isinstance(x, Expression):
        return mul, (Operator("reciprocal", (aten.reciprocal.default,), ("x",))(y), x), {}
    return aten.div, (x, y), {}


def _transpose(x: Any, dim0: Any, dim1: Any) -> Spelled:
    if {dim0, dim1} == {-1, -2}:
        return swap_last, (x,), {}
    return aten.transpose.int, (x, dim0, dim1), {}


def _to(x: Any, *args: Any, **kwargs: Any) -> Spelled:
    wanted = [*args, *kwargs.values()]
    if len(wanted) != 1 or not isinstance(wanted[0], torch.dtype):
        raise Unspelled("only casts to a dtype are known: x.to(torch.float32)")
    return cast, (x, wanted[0]), {}


def _cast(dtype: torch.dtype) -> Callable[..., Spelled]:
    return lambda x: (cast, (x, dtype), {})


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Spelled:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise Unspelled("only padding_idx= is known of its options")
    return aten.embedding, (weight, input), {} if padding_idx is None else {"padding_idx": padding_idx}


def _softmax(name: str) -> Callable[..., Spelled]:
    def spelled(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Spelled:
        if dim is None:
            raise Unspelled("name the dimension")
        return getattr(aten, name).int, (input, dim), {} if dtype is None else {"dtype": dtype}

    return spelled


def _layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-05) -> Spelled:
    # The last argument says how it is computed on some devices; graphs record the value of a global setting.
    return aten.layer_norm, (input, normalized_shape, weight, bias, eps, Anything()), {}


def _random(input: Any, p: Any = 0.5, training: Any = True, inplace: bool = False) -> Spelled:
    if inplace:
        raise Unspelled(IN_PLACE)
    return aten.dropout, (input, p, training), {}


def _nothing(*args: Any, **kwargs: Any) -> Spelled:
    raise Unspelled("a pattern cannot take a value apart; return several values, or use a torch operator")


_SPECIAL: Mapping[str, Callable[..., Spelled]] = {
    "getattr": _attribute,
    "getitem": _nothing,
    "sub": _sub,
    "truediv": _div,
    "transpose": _transpose,
    "t": lambda x: (swap_last, (x,), {}),
    "to": _to,
    "float": _cast(torch.float32),
    "double": _cast(torch.float64),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "int": _cast(torch.int32),
    "long": _cast(torch.int64),
    "bool": _cast(torch.bool),
    "embedding": _embedding,
    "softmax": _softmax("softmax"),
    "log_softmax": _softmax("log_softmax"),
    "layer_norm": _layer_norm,
    "dropout": _random,
}
