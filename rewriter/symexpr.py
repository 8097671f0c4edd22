# SPDX-License-Identifier: Apache-2.0
"""Integer expressions over symbolic sizes: the text form of shapes in saved graphs.

    expression := term (("+" | "-") term)*
    term       := factor (("*" | "//" | "%") factor)*
    factor     := "-" factor | atom
    atom       := INTEGER | SYMBOL | ("max" | "min") "(" expression ("," expression)* ")" | "(" expression ")"
    SYMBOL     := ("s" | "u") DIGITS              a size known at run time; u: one that depends on data

Precedence and the rounding of `//` and `%` (towards minus infinity) are Python's. Nothing is evaluated by
Python or sympy: the text is tokenised, parsed by recursive descent with bounds on length and depth, and
computed by arithmetic.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from rewriter.errors import ExportError, LoadError

MAX_LENGTH = 4096  # characters
MAX_DEPTH = 48  # nested parentheses, calls and signs
MAX_INTEGER = 2**63 - 1  # sizes are int64
MAX_EXPONENT = 16

SYMBOL = re.compile(r"[su][0-9]{1,9}")
_TOKEN = re.compile(r"\s*(?:(?P<integer>[0-9]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign>//|[-+*%(),]))")

# An int, or a torch.SymInt: both know the arithmetic used here.
Int = Any


@dataclass(frozen=True)
class Expr:
    """An expression; `str` gives its text, and `parse(str(e)) == e` for every `e` that `parse` returned."""

    def evaluate(self, bindings: Mapping[str, Int]) -> Int:
        """The value under `bindings` (symbol -> int or SymInt).

        Raises:
            LoadError: a symbol has no binding, or a division by zero.
        """
        try:
            return self._value(bindings)
        except ZeroDivisionError as reason:
            raise LoadError(f"shape expression {str(self)!r} divides by zero") from reason

    def symbols(self) -> frozenset[str]:
        """Names of the symbols in the expression."""
        return frozenset()

    def _value(self, bindings: Mapping[str, Int]) -> Int:
        raise NotImplementedError


@dataclass(frozen=True)
class Integer(Expr):
    value: int

    def __str__(self) -> str:
        return str(self.value)

    def _value(self, bindings: Mapping[str, Int]) -> Int:
        return self.value


@dataclass(frozen=True)
class Symbol(Expr):
    name: str

    def __str__(self) -> str:
        return self.name

    def symbols(self) -> frozenset[str]:
        return frozenset((self.name,))

    def _value(self, bindings: Mapping[str, Int]) -> Int:
        if self.name not in bindings:
            raise LoadError(f"shape expression uses the unknown symbol {self.name!r}")
        return bindings[self.name]


@dataclass(frozen=True)
class Negation(Expr):
    operand: Expr

    def __str__(self) -> str:
        return f"-{_factor_text(self.operand)}"

    def symbols(self) -> frozenset[str]:
        return self.operand.symbols()

    def _value(self, bindings: Mapping[str, Int]) -> Int:
        return -self.operand._value(bindings)


@dataclass(frozen=True)
class Chain(Expr):
    """Operands of one precedence, from left to right: `a + b - c` or `a * b // c`."""

    first: Expr
    rest: tuple[tuple[str, Expr], ...]

    def __str__(self) -> str:
        # An operand with an operator of its own is always in parentheses, so the tree survives the text.
        return _factor_text(self.first) + "".join(f" {sign} {_factor_text(e)}" for sign, e in self.rest)

    def symbols(self) -> frozenset[str]:
        return self.first.symbols().union(*(e.symbols() for _, e in self.rest))

    def _value(self, bindings: Mapping[str, Int]) -> Int:
        value = self.first._value(bindings)
        for sign, operand in self.rest:
            value = _OPERATORS[sign](value, operand._value(bindings))
        return value


@dataclass(frozen=True)
class Extreme(Expr):
    """`max(...)` or `min(...)`."""

    function: str
    operands: tuple[Expr, ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.operands))})"

    def symbols(self) -> frozenset[str]:
        return frozenset[str]().union(*(e.symbols() for e in self.operands))

    def _value(self, bindings: Mapping[str, Int]) -> Int:
        return functools.reduce(_EXTREMES[self.function], (e._value(bindings) for e in self.operands))


_OPERATORS: dict[str, Callable[[Int, Int], Int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}
# torch's, because Python's compare, and comparing a SymInt specialises the program.
_EXTREMES: dict[str, Callable[[Int, Int], Int]] = {"max": torch.sym_max, "min": torch.sym_min}


def _factor_text(expression: Expr) -> str:
    return f"({expression})" if isinstance(expression, Chain) else str(expression)


def parse(text: str) -> Expr:
    """Read an expression.

    Raises:
        LoadError: the text is not of the grammar above, longer than `MAX_LENGTH`, nested deeper than
            `MAX_DEPTH`, or holds an integer above 2^63 - 1. The message quotes it.
    """
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        if not isinstance(text, str) or len(text) > MAX_LENGTH:
            raise self.error(f"longer than {MAX_LENGTH} characters" if isinstance(text, str) else "not a text")
        self.tokens = self.tokenise()
        self.position = 0

    def parse(self) -> Expr:
        expression = self.expression(0)
        if self.peek() is not None:
            raise self.error(f"unexpected {self.peek()!r}")
        return expression

    def tokenise(self) -> list[str]:
        tokens: list[str] = []
        position, text = 0, self.text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error(f"unexpected {text[position]!r}")
            tokens.append(match.group(match.lastgroup or 0))
            position = match.end()
        return tokens

    def peek(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise self.error("it ends too early")
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        found = self.take()
        if found != token:
            raise self.error(f"expected {token!r}, found {found!r}")

    def expression(self, depth: int) -> Expr:
        return self.chain(("+", "-"), lambda: self.term(depth))

    def term(self, depth: int) -> Expr:
        return self.chain(("*", "//", "%"), lambda: self.factor(depth))

    def chain(self, signs: tuple[str, ...], operand: Callable[[], Expr]) -> Expr:
        first = operand()
        rest: list[tuple[str, Expr]] = []
        while self.peek() in signs:
            rest.append((self.take(), operand()))
        return Chain(first, tuple(rest)) if rest else first

    def factor(self, depth: int) -> Expr:
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH}")
        token = self.take()
        if token == "-":
            return Negation(self.factor(depth + 1))
        if token == "(":
            inner = self.expression(depth + 1)
            self.expect(")")
            return inner
        if token in _EXTREMES:
            return Extreme(token, self.operands(depth + 1))
        if token[0].isdigit():
            return self.integer(token)
        if SYMBOL.fullmatch(token):
            return Symbol(token)
        raise self.error(f"unexpected {token!r}")

    def operands(self, depth: int) -> tuple[Expr, ...]:
        self.expect("(")
        operands = [self.expression(depth)]
        while self.peek() == ",":
            self.take()
            operands.append(self.expression(depth))
        self.expect(")")
        return tuple(operands)

    def integer(self, token: str) -> Integer:
        if len(token) > 19 or int(token) > MAX_INTEGER:
            raise self.error("an integer beyond 2^63 - 1")
        return Integer(int(token))

    def error(self, reason: str) -> LoadError:
        return LoadError(f"not a shape expression ({reason}): {_shortened(self.text)}")


def _shortened(text: object) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= 120 else quoted[:117] + "..."


def to_text(value: int | torch.SymInt | sympy.Expr) -> str:
    """The text of a size: an int, a SymInt, or the sympy expression inside one.

    Raises:
        ExportError: the expression is not of the grammar (a fraction, a root, an unknown function).
    """
    if isinstance(value, bool):
        raise ExportError(f"not a size: {value!r}")
    if isinstance(value, int):
        return str(value)
    expression = value.node.expr if isinstance(value, torch.SymInt) else value
    text = _sympy_text(expression)
    if len(text) > MAX_LENGTH:
        raise ExportError(f"shape expression longer than {MAX_LENGTH} characters: {_shortened(text)}")
    return text


def _sympy_text(expression: sympy.Expr) -> str:
    if isinstance(expression, sympy.Integer):
        return str(int(expression))
    if isinstance(expression, sympy.Symbol) and SYMBOL.fullmatch(expression.name):
        return str(expression.name)
    if type(expression).__name__ in ("Pow", "PowByNatural"):
        return _power_text(expression)
    printer = _PRINTERS.get(type(expression).__name__)
    if printer is None:
        kind = type(expression).__name__
        raise ExportError(f"shape expression {_shortened(str(expression))} cannot be saved: unsupported {kind}")
    return printer([_operand_text(e) for e in expression.args])


def _operand_text(expression: sympy.Expr) -> str:
    text = _sympy_text(expression)
    return text if SYMBOL.fullmatch(text) or text.isdigit() else f"({text})"


def _power_text(expression: sympy.Expr) -> str:
    base, exponent = expression.args
    if not isinstance(exponent, sympy.Integer) or not 1 <= int(exponent) <= MAX_EXPONENT:
        raise ExportError(f"shape expression {expression} cannot be saved: only powers 1..{MAX_EXPONENT}")
    return " * ".join([_operand_text(base)] * int(exponent))


def _joined(sign: str) -> Callable[[list[str]], str]:
    return lambda operands: f" {sign} ".join(operands)


def _called(function: str) -> Callable[[list[str]], str]:
    return lambda operands: f"{function}({', '.join(operands)})"


# sympy's classes and torch's own, by class name: torch has moved its classes between releases.
_PRINTERS: dict[str, Callable[[list[str]], str]] = {
    "Add": _joined("+"),
    "Mul": _joined("*"),
    "FloorDiv": _joined("//"),
    "CleanDiv": _joined("//"),
    "Mod": _joined("%"),
    "PythonMod": _joined("%"),
    "Max": _called("max"),
    "Min": _called("min"),
}
