# SPDX-License-Identifier: Apache-2.0
"""The text of a Python function while it is being written: indentation, constants, and which variables are bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Text:
    """Lines of one function.

    Attributes:
        lines: the body so far.
        functions: local functions, to stand before the body.
        constants: name -> value of what the text refers to.
        certain: variables that are bound whenever execution gets past the last line.
        open: variables that were bound on some ways only; they need an initial value.
    """

    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants = constants
        self.lines: list[str] = []
        self.functions: list[str] = []
        self.certain: set[str] = set()
        self.open: dict[str, None] = {}
        self._depth = 1
        self._conditional = 0  # inside how many branches
        self._failure = "no"  # what a failure returns here
        self._assigned: dict[str, None] = {}  # in the local function being written
        self._fresh = 0

    def line(self, text: str) -> None:
        self.lines.append("    " * self._depth + text)

    def fail_if(self, condition: str) -> None:
        self.line(f"if {condition}: {self.fail}")

    @property
    def fail(self) -> str:
        return f"return {self._failure}"

    @property
    def local(self) -> bool:
        """Whether the text written now is that of a local function, which may run several times."""
        return self._failure != "no"

    @contextmanager
    def branch(self, head: str) -> Iterator[None]:
        """What is written inside stands below `head`, and what is bound there is not certain after it."""
        self.line(head + ":")
        start = len(self.lines)
        self._depth += 1
        self._conditional += 1
        yield
        if len(self.lines) == start:
            self.line("pass")
        self._depth -= 1
        self._conditional -= 1

    @contextmanager
    def function(self, head: str) -> Iterator[None]:
        """What is written inside is a local function; a failure in it returns False, its end True."""
        outside = self.lines, self._depth, self._failure, self._assigned
        self.lines, self._depth, self._failure, self._assigned = [], 2, "False", {}
        self._conditional += 1
        yield
        self._conditional -= 1
        self.line("return True")
        nonlocals = f"        nonlocal {', '.join(('no', *self._assigned))}"
        self.functions += [f"    def {head}:", nonlocals, *self.lines]
        self.lines, self._depth, self._failure, self._assigned = outside

    def bound(self, variable: str) -> None:
        """A variable that outlives its branch was assigned."""
        if not self._conditional:
            self.certain.add(variable)
        elif variable not in self.certain:
            self.open.setdefault(variable)
        self._assigned.setdefault(variable)

    def constant(self, value: Any) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def fresh(self) -> str:
        """A variable of this branch's own."""
        self._fresh += 1
        return f"a{self._fresh}"
