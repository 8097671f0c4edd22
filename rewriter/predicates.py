# SPDX-License-Identifier: Apache-2.0
"""Predicates: conditions on captured values, each with words for it, so that a miss can say what was expected."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.errors import PatternError
from rewriter.facts import Facts, same_shape, same_size


@dataclass(frozen=True)
class Predicate:
    """A condition on a node, a constant, or all captures together.

    Attributes:
        description: completes "expected ...", e.g. ``"a parameter or buffer"``.
        test: ``test(facts, value)``; the value is a node, a constant, or the mapping of captures.
        complaint: completes "<capture> ..." where the condition does not hold, e.g. ``"is computed"``.
        dtypes, rank: what the condition implies, where known; contradictions are found when a pattern is defined.
    """

    description: str
    test: Callable[[Facts, Any], bool]
    complaint: str | None = None
    dtypes: frozenset[torch.dtype] | None = None
    rank: int | None = None


Where = Predicate | Callable[..., bool] | None | tuple["Predicate | Callable[..., bool]", ...]


def predicates(where: Where, location: str) -> tuple[Predicate, ...]:
    """Predicates from what a pattern's author wrote: predicates, or functions of ``(value)`` or ``(facts, value)``.

    Raises:
        PatternError: a function takes neither one nor two arguments.
    """
    if where is None:
        return ()
    if isinstance(where, tuple):
        return tuple(p for item in where for p in predicates(item, location))
    if isinstance(where, Predicate):
        return (where,)
    try:
        arity = len(inspect.signature(where).parameters)
    except (TypeError, ValueError):
        arity = 1  # a builtin: it takes the value
    written = getattr(where, "__name__", "<lambda>")
    description = f"the condition at {location}" if written == "<lambda>" else written.replace("_", " ")
    if arity == 1:
        function = where
        return (Predicate(description, lambda facts, value: bool(function(value))),)
    if arity == 2:
        return (Predicate(description, where),)
    raise PatternError(f"{location}: a condition takes (value) or (facts, value), this one has {arity} arguments")


def has_dtype(*dtypes: torch.dtype) -> Predicate:
    """A tensor of one of the dtypes."""
    allowed = frozenset(dtypes)
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Predicate(f"dtype {names}", lambda facts, node: facts.dtype(node) in allowed, dtypes=allowed)


def has_rank(rank: int) -> Predicate:
    """A tensor with `rank` dimensions."""

    def test(facts: Facts, node: Any) -> bool:
        shape = facts.shape(node)
        return shape is not None and len(shape) == rank

    return Predicate(f"{rank} dimensions", test, rank=rank)


def has_shape(*sizes: int | None) -> Predicate:
    """A tensor of this shape; None stands for any size."""

    def test(facts: Facts, node: Any) -> bool:
        shape = facts.shape(node)
        if shape is None or len(shape) != len(sizes):
            return False
        return all(wanted is None or same_size(size, wanted) for size, wanted in zip(shape, sizes, strict=True))

    words = ", ".join("_" if size is None else str(size) for size in sizes)
    return Predicate(f"shape [{words}]", test, rank=len(sizes))


def shape_like(node_name: str, other_name: str) -> Predicate:
    """A relation between captures: two tensors of one shape."""

    def test(facts: Facts, captures: Mapping[str, Any]) -> bool:
        return same_shape(facts.shape(captures[node_name]), facts.shape(captures[other_name]))

    return Predicate(f"{node_name} and {other_name} of one shape", test)


def _is_floating(facts: Facts, node: Any) -> bool:
    dtype = facts.dtype(node) if isinstance(node, Node) else None
    return dtype is not None and dtype.is_floating_point


def _is_number(facts: Facts, value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


parameter = Predicate("a parameter or buffer", lambda facts, node: facts.is_parameter(node), "is computed")
floating = Predicate("a floating-point tensor", _is_floating)
number = Predicate("a finite number", _is_number)
