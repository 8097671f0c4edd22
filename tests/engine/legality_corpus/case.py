# SPDX-License-Identifier: Apache-2.0
"""What a case is: a model, inputs, a tempting rewrite, and what a sound engine does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .rules import Rewrite

Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Rewritten:
    """The rewrite is sound: it is made at this many sites, and no caller can tell.

    Attributes:
        sites: where this engine makes it; of: where it would be sound, if that is more.
    """

    sites: int = 1
    of: int = 0


@dataclass(frozen=True)
class Refused:
    """The rewrite is not made, and the reason holds these words.

    Attributes:
        kind: of the legality reason, or ``"guard"`` (the rule's own), ``"replacement"`` (seen when it was built),
            ``"pattern"`` (no match, with the reason why), ``"region"`` (in a graph of its own), ``"absent"`` (the
            pattern's operators do not occur: nothing to explain).
        words: what the reason must say.
        possible: whether a sound rewrite exists that the engine leaves out; it is then no merit to refuse.
    """

    kind: str
    words: str = ""
    possible: bool = False


@dataclass(frozen=True)
class Case:
    """One adversarial graph.

    Attributes:
        name: unique; theme: the file it stands in; about: its docstring.
        build: makes the model, the same one each time.
        inputs: makes the inputs, the same ones each time, with strides, aliases and requires_grad as the case wants.
        rewrite: what is tried on it.
        expect: what a sound engine does.
        dynamic: whether sizes are captured as symbols.
    """

    name: str
    theme: str
    about: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    rewrite: Rewrite
    expect: Rewritten | Refused
    dynamic: bool = False

    @property
    def sound(self) -> bool:
        """Whether a sound rewrite exists."""
        return isinstance(self.expect, Rewritten) or self.expect.possible

    @property
    def sites(self) -> int:
        """At how many sites a sound rewrite exists (at least)."""
        return max(self.expect.sites, self.expect.of) if isinstance(self.expect, Rewritten) else int(self.expect.possible)


CASES: dict[str, Case] = {}
SEED = 20


class Function(nn.Module):
    """A plain function as a model without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def case(
    rewrite: Rewrite, expect: Rewritten | Refused, inputs: Inputs | None = None, dynamic: bool = False, train: bool = False
) -> Callable[[Any], Any]:
    """Make a case of the decorated function, or module class (built without arguments under a fixed seed)."""

    def declare(made: Any) -> Any:
        def build() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                model = made().double() if inspect.isclass(made) else Function(made)
            return model.train(train)

        name = made.__name__.lower().replace("_", " ").strip()
        theme = made.__module__.rpartition(".")[2]
        if name in CASES:
            raise ValueError(f"two cases are called {name!r}")
        about = inspect.getdoc(made) or ""
        CASES[name] = Case(name, theme, about, build, inputs or matrices(1), rewrite, expect, dynamic)
        return made

    return declare


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    generator = torch.Generator().manual_seed(SEED + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def matrices(count: int, shape: tuple[int, ...] = (3, 4), dtype: torch.dtype = torch.float64, grad: bool = True) -> Inputs:
    """That many matrices of numbers, which require grad unless told otherwise."""

    def make() -> tuple[Tensor, ...]:
        return tuple(numbers(*shape, seed=i, dtype=dtype).requires_grad_(grad and dtype.is_floating_point) for i in range(count))

    return make


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict([*model.named_parameters(), *model.named_buffers()])
