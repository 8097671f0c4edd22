# SPDX-License-Identifier: Apache-2.0
"""The GELU view: x · Φ(x), exactly or by its tanh approximation, as one operator or written out.

    none   x/2 · (1 + erf(x / √2))  =  x · Φ(x)
    tanh   x/2 · (1 + tanh(u))  =  x · σ(2u),   u = √(2/π) · (x + 0.044715 x³)

in any association of the products, x³ as a power or as products, constants to seven digits (see `near`).

Captures:
    x            node
    approximate  ``"none"`` or ``"tanh"``
    deviation    largest relative error of the constants as written; 0.0 for the operator
    spelling     ``"gelu"`` or ``"written"``

``x · σ(1.702 x)`` is another function and is not GELU.
"""

from __future__ import annotations

import math

from rewriter.facts import Facts
from rewriter.matcher import Match, Miss, explain, find
from rewriter.operators import ALIAS, NOOP_CAST, erf, gelu, ndtr, sigmoid, square, tanh
from rewriter.pattern import Const, Expression, Var, pattern
from rewriter.predicates import floating
from rewriter.views.base import View, with_captures
from rewriter.views.spellings import deviation, near

CUBIC = 0.044715
CONSTANTS = {
    "half": 0.5,
    "two": 2.0,
    "a": CUBIC,
    "c": math.sqrt(2 / math.pi),
    "ac": CUBIC * math.sqrt(2 / math.pi),
    "c_twice": 2 * math.sqrt(2 / math.pi),
    "r": math.sqrt(0.5),
    "s": math.sqrt(2),
}
_half, _two, _a, _c, _ac, _c_twice, _r, _s = (Const(name, near(value)) for name, value in CONSTANTS.items())

_x = Var("x", floating)
_square = _x * _x | _x**2 | square(_x)
_a_square = _square * _a | (_x * _a) * _x
_a_cube = (_x**3 | _square * _x) * _a | _a_square * _x | _square * (_x * _a)
_sum = _x + _a_cube
_stretch = _a_square + 1  # u = c x (1 + a x²)
_u = (
    _sum * _c
    | (_x * _c) * _stretch
    | _x * (_stretch * _c)
    | (_x * _stretch) * _c
    | _x * _c + (_x**3 | _square * _x) * _ac
)
_z = _x * _r | _x / _s

_tanh = tanh(_u).named("tanh")
_curve = _tanh | erf(_z).named("erf")


def _halved(value: Expression) -> Expression:
    return value * _half | value / _two


_twice_cdf = _curve + 1
_cdf = _halved(_twice_cdf) | _curve * _half + _half | ndtr(_x) | sigmoid(_sum * _c_twice).named("sigmoid")
_written = _halved(_x) * _twice_cdf | _x * _cdf | (_x * _twice_cdf) * _half | (_x * _twice_cdf) / _two

WRITTEN = pattern("gelu", _written, transparent=(NOOP_CAST, ALIAS), anchor=_curve)
OPERATOR = pattern("gelu", gelu(Var("x"), Const("approximate")))


def _find(facts: Facts) -> list[Match]:
    written = [_in_view_terms(match) for match in find(facts, WRITTEN)]
    single = [
        with_captures(m, {**m.captures, "deviation": 0.0, "spelling": "gelu"}) for m in find(facts, OPERATOR)
    ]
    return sorted((*written, *single), key=lambda match: facts.position(match.root))


def _explain(facts: Facts) -> list[Miss]:
    return [miss for miss in explain(facts, WRITTEN) if miss.node is not None]


def _in_view_terms(match: Match) -> Match:
    approximate = any(match[name] is not None for name in ("tanh", "sigmoid"))
    return with_captures(
        match,
        {
            "x": match["x"],
            "approximate": "tanh" if approximate else "none",
            "deviation": deviation(match.captures, CONSTANTS),
            "spelling": "written",
        },
    )


GELU = View("gelu", _find, _explain)
