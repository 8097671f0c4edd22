# SPDX-License-Identifier: Apache-2.0
"""`Work`: one row of the table, what is compared and what is asked of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import Call

OURS = "ours"


@dataclass(frozen=True)
class Work:
    """Something two or more sides compute.

    Attributes:
        group: the family, a heading of the table.
        name: what is computed.
        sides: makes the calls by name, "ours" among them; called when the row's turn comes, so that one row's weights are
            gone before the next one's are made.
        at_least: how many times faster than a side ours must be.
        nbytes: bytes that ours has to read and write; 0 where memory is not what bounds it.
        share: of the speed of memory, asked of ours; 0 where that is not the question.
        flops: operations of ours, and `dtype` they are in; 0 where arithmetic is not what bounds it.
        units: what a time is divided by, by side, where sides do unequal amounts of work.
    """

    group: str
    name: str
    sides: Callable[[], Mapping[str, Call]]
    at_least: Mapping[str, float] = field(default_factory=dict)
    nbytes: int = 0
    share: float = 0.0
    flops: int = 0
    dtype: torch.dtype = torch.float32
    units: Mapping[str, int] = field(default_factory=dict)


def rotating(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Call:
    """Calls ``function`` with the next of the inputs each time."""
    turn = itertools.cycle(inputs)
    return lambda: function(*next(turn))
