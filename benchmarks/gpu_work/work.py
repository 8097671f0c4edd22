# SPDX-License-Identifier: Apache-2.0
"""A case of the GPU benchmark: an operator with arguments of a real size, and what one would use instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Call:
    """A function and its arguments, of which the floating ones get gradients."""

    function: Any
    arguments: Sequence[Any]

    def run(self) -> object:
        return self.function(*self.arguments)


@dataclass(frozen=True)
class Built:
    """A case made.

    Attributes:
        call: of an operator of ours.
        rivals: what computes what it stands for.
        absent: why others are not among them.
        chooses: its results are chosen by their size, so that rounding decides where gradients go: they are not compared.
    """

    call: Call
    rivals: Mapping[str, Call] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    chooses: bool = False


class Draw:
    """Random tensors on a device; on the meta device shapes alone, with no generator."""

    def __init__(self, device: str, generator: Generator | None) -> None:
        self.device = device
        self._options: dict[str, Any] = {"device": device, "generator": generator}

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, **self._options).to(dtype)

    def codes(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, below, shape, **self._options).to(dtype)


@dataclass(frozen=True)
class Case:
    """``build(draw, small)`` makes it; called again, it makes one like it of other numbers."""

    name: str
    build: Callable[[Draw, bool], Built]
