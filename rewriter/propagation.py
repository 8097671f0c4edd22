# SPDX-License-Identifier: Apache-2.0
"""The values (fake tensors) of new nodes: the operator run on descriptions, once per kind of call.

Running an operator on fake tensors takes 100-300 µs, and the sites of one rule ask for the same few calls over and
over. What a call yields is a function of the operator, its constants, and the shapes, strides, dtypes, devices and
gradient flags of its tensors, so equal calls share one value. Never shared are values that are views (they belong to
their base) and sizes that are only known when the program runs (each is a symbol of its own).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from rewriter.errors import LegalityError
from rewriter.replacing import known_equal
from rewriter.schemas import EXPANDED_ADDENDS, operator_name, viewed

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_OWN_SIZES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Propagation:
    """Values of calls, under one fake mode."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        self._known: dict[Any, Any] = {}
        self._tensors: dict[int, tuple[Tensor, Any]] = {}  # id -> the tensor, which stays, and its description

    def value(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the call yields; nodes among the arguments stand for their values (``meta["val"]``).

        Raises:
            LegalityError: the operator does not take operands of these shapes, dtypes or devices.
        """
        key = self._key(target, args, kwargs) if _is_repeatable(target) else None
        if key is not None and key in self._known:
            return self._known[key]
        fake_args, fake_kwargs = map_arg((args, dict(kwargs)), lambda node: node.meta["val"])
        try:
            with self.fake_mode, torch.enable_grad():
                value = target(*fake_args, **fake_kwargs)
        except (RuntimeError, ValueError, IndexError) as error:  # what operators raise for operands that do not fit
            reason = str(error).partition("\n")[0]
            raise LegalityError(f"{operator_name(target)} does not take these operands: {reason}") from error
        if target in EXPANDED_ADDENDS:
            _check_addend(target, fake_args, fake_kwargs, value)
        if key is not None:
            self._known[key] = value
        return value

    def _key(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Equal for calls that yield the same; None where that cannot be told."""
        try:
            described = self._described
            key = (target, described(args), tuple((name, described(kwargs[name])) for name in sorted(kwargs)))
            hash(key)
        except TypeError:
            return None
        return key

    def _described(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self._described(value.meta["val"])
        if isinstance(value, Tensor):
            known = self._tensors.get(id(value))
            if known is None:
                known = self._tensors[id(value)] = value, _description(value)
            return known[1]
        if isinstance(value, (tuple, list)):
            return tuple([self._described(item) for item in value])
        if isinstance(value, _SYMBOLS):
            return type(value), value.node.expr
        return type(value), value  # 1, 1.0 and True are three constants


def _description(value: Tensor) -> Any:
    return value.dtype, value.device, value.layout, value.requires_grad, _sizes(value.shape), _sizes(value.stride())


def _check_addend(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor) -> None:
    """Refuse an addend that makes the result larger than the product: the fake kernel takes it, the real one does not."""
    given = dict(zip((a.name for a in target._schema.arguments), args, strict=False)) | dict(kwargs)
    left, right = (given[name] for name in EXPANDED_ADDENDS[target])
    columns = right.shape[0] if target is torch.ops.aten.linear.default else right.shape[-1]
    product = (*left.shape[:-1], columns)
    if len(product) != value.dim() or not all(map(known_equal, product, value.shape)):
        raise LegalityError(
            f"{operator_name(target)} does not take these operands: the product has shape {list(product)}, the sum "
            f"{list(value.shape)}"
        )


@functools.cache
def _is_repeatable(target: Any) -> bool:
    if not isinstance(target, OpOverload) or viewed(target):
        return False
    return not any(tag in target.tags for tag in _OWN_SIZES)


def _sizes(sizes: Any) -> tuple[Any, ...]:
    return tuple([size if type(size) is int else size.node.expr for size in sizes])
