# SPDX-License-Identifier: Apache-2.0
"""The grammar of sizes: Python's arithmetic without Python."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from rewriter.errors import ExportError, LoadError
from rewriter.symexpr import MAX_DEPTH, MAX_LENGTH, parse, to_text

SYMBOLS = ("s0", "s7", "s53", "u1")


def texts() -> st.SearchStrategy[str]:
    """Texts of the grammar, with and without superfluous parentheses and spaces."""
    leaves = st.integers(0, 20).map(str) | st.sampled_from(SYMBOLS)

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        binary = st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner, st.sampled_from(["", " "]))
        return (
            binary.map(lambda t: t[3].join(t[:3]))
            | inner.map(lambda t: f"({t})")
            | inner.map(lambda t: f"-{t}")
            | st.tuples(st.sampled_from(["max", "min"]), st.lists(inner, min_size=1, max_size=3)).map(
                lambda t: f"{t[0]}({', '.join(t[1])})"
            )
        )

    return st.recursive(leaves, grow, max_leaves=12)


def python_value(text: str, bindings: dict[str, int]) -> int | None:
    """The oracle: Python itself, on texts this test made."""
    try:
        # Python's max and min want two arguments or more.
        extremes = {"max": lambda *operands: max(operands), "min": lambda *operands: min(operands)}
        return int(eval(text, {"__builtins__": {}}, extremes | bindings))
    except ZeroDivisionError:
        return None


@settings(deadline=None, max_examples=200)
@given(texts(), st.lists(st.integers(1, 50), min_size=4, max_size=4))
def test_value_is_pythons_and_text_round_trips(text: str, values: list[int]) -> None:
    bindings = dict(zip(SYMBOLS, values, strict=True))
    expression = parse(text)
    assert parse(str(expression)) == expression
    assert expression.symbols() <= set(SYMBOLS)
    expected = python_value(text, bindings)
    if expected is None:
        with pytest.raises(LoadError, match="divides by zero"):
            expression.evaluate(bindings)
        return
    assert expression.evaluate(bindings) == expected


def sympy_expressions() -> st.SearchStrategy[Any]:
    """Sizes as torch makes them, of positive symbols."""
    leaves = st.sampled_from([sympy.Symbol(s, positive=True, integer=True) for s in SYMBOLS]) | st.integers(-3, 9).map(
        sympy.Integer
    )
    divisors = st.integers(2, 7).map(sympy.Integer)
    return st.recursive(
        leaves,
        lambda inner: (
            st.tuples(inner, inner).map(sum)
            | st.tuples(inner, inner).map(lambda t: t[0] * t[1])
            | st.tuples(inner, st.integers(2, 3)).map(lambda t: t[0] ** t[1])
            | st.tuples(inner, divisors).map(lambda t: FloorDiv(*t))
            | st.tuples(inner, divisors).map(lambda t: PythonMod(*t))
            | st.tuples(inner, inner).map(lambda t: Max(*t))
            | st.tuples(inner, inner).map(lambda t: Min(*t))
        ),
        max_leaves=6,
    )


@settings(deadline=None, max_examples=60)
@given(sympy_expressions(), st.lists(st.integers(2, 40), min_size=4, max_size=4))
def test_sympy_expressions_keep_their_value(expression: Any, values: list[int]) -> None:
    bindings = dict(zip(SYMBOLS, values, strict=True))
    by_symbol = {sympy.Symbol(k, positive=True, integer=True): v for k, v in bindings.items()}
    assert parse(to_text(expression)).evaluate(bindings) == int(expression.subs(by_symbol))


def test_mod_of_nonnegative_operands() -> None:
    size = sympy.Symbol("s0", positive=True, integer=True)
    assert parse(to_text(Mod(size, sympy.Integer(4)))).evaluate({"s0": 11}) == 3


def test_symints_stay_symbolic() -> None:
    env = ShapeEnv()
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    symbol = env.create_symbol(7, ConstantSource("x"), dynamic_dim=DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=7)
    assert isinstance(size, torch.SymInt)
    name = symbol.name
    text = to_text((size * size + 2 * size) // 3)
    value = parse(text).evaluate({name: size})
    assert isinstance(value, torch.SymInt) and value.node.hint == 21
    largest = parse(f"max({name}, 9)").evaluate({name: size})
    assert isinstance(largest, torch.SymInt) and not env.guards


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "s0 +", "+ s0", "s0 s1", "(s0", "s0)", "max()", "max(s0,)", "max", "s0(1)", "s", "t0", "S0",
        "1.5", "1e9", "0x10", "1_000", "s0 / 2", "s0 ** 2", "s0 < 2", "s0 if s0 else 1", "lambda: 0",
        "s0.real", "s0[0]", "'a'", "9223372036854775808", "9" * 4000,
        "__import__('os').system('true')", "exec", "s0;s1",
        "(1).__class__", "eval('1')", "max.__self__", "s0\x00", "²", "s٣", "abs(s0)", "[s0]", "{}", "~s0",
        "s0 and s1", ":=",
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match="not a shape expression"):
        parse(text)


@pytest.mark.parametrize("nest", ["({})", "-{}", "max({})", "(({})+1)"])
def test_depth_and_length_are_bounded(nest: str) -> None:
    text = "s0"
    for _ in range(MAX_DEPTH // 2):
        text = nest.format(text)
    parse(text)
    for _ in range(MAX_DEPTH + 1):
        text = nest.format(text)
    with pytest.raises(LoadError, match="nested deeper"):
        parse(text)
    with pytest.raises(LoadError, match="longer than"):
        parse("1+" * MAX_LENGTH + "1")


def test_long_chains_need_no_depth() -> None:
    assert parse("+".join(["s0"] * 1000)).evaluate({"s0": 3}) == 3000


def test_unknown_symbol_and_non_text() -> None:
    with pytest.raises(LoadError, match="unknown symbol 's1'"):
        parse("s0 + s1").evaluate({"s0": 1})
    with pytest.raises(LoadError, match="not a text"):
        parse(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "expression",
    [
        sympy.Rational(1, 2),
        sympy.Symbol("s0", positive=True, integer=True) ** sympy.Rational(1, 2),
        sympy.Symbol("s0", positive=True, integer=True) ** -1,
        sympy.Symbol("s0", positive=True, integer=True) ** 99,
        sympy.Symbol("os"),
        sympy.sin(sympy.Symbol("s0")),
        True,
    ],
)
def test_unsupported_expressions_are_not_written(expression: Any) -> None:
    with pytest.raises(ExportError):
        to_text(expression)
