# SPDX-License-Identifier: Apache-2.0
"""`@rule`: one's own rewrite from a pattern and a function that builds what stands there instead.

x, y = Var("x"), Var("y")

@rewriter.rule(pattern("distribute", x * y + x), contract=rewriter.EXACT)
def factor(edit, x, y):
    \"\"\"x·y + x = x·(y + 1)\"\"\"
    return edit.call(aten.mul.Tensor, x, edit.call(aten.add.Tensor, y, 1))

opt = rewriter.optimize(model, passes=[factor])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from rewriter import legality, matcher, registry
from rewriter.editing import Editor
from rewriter.errors import PatternError
from rewriter.matcher import Match, Miss
from rewriter.pattern import Pattern
from rewriter.program import Program
from rewriter.rules import EXACT, Contract, Pass, Rule
from rewriter.views import View

Builder = Callable[..., Any]


def rule(of: Pattern | View, *, contract: Contract = EXACT, name: str | None = None) -> Callable[[Builder], Pass]:
    """Make a pass of one rule from a pattern or view and the decorated function.

    The function is called as ``build(edit, **captures)`` with those captures it has parameters for, and returns the
    node that replaces the match's root (a tuple of nodes where the pattern has several outputs). The pass is known
    under the function's name from then on, also in stored plans.

    Raises:
        PatternError: the function has a parameter the pattern does not capture.
    """

    def declare(build: Builder) -> Pass:
        called = name or build.__name__
        wanted = [p.name for p in inspect.signature(build).parameters.values()][1:]
        if isinstance(of, Pattern) and (unknown := [w for w in wanted if w not in of.names]):
            raise PatternError(
                f"rule {called}: {', '.join(unknown)} not captured by {of.name} ({of.location}); it has {', '.join(of.names)}"
            )
        kind = type(
            f"{called}_rule",
            (_Declared,),
            {"name": called, "role": of.name, "contract": contract, "__doc__": build.__doc__},
        )
        made: Rule = kind(of, build, wanted)
        members = {
            "name": called,
            "contract": contract,
            "rules": lambda self: (made,),
            "__doc__": build.__doc__ or called,
        }
        return registry.register(type(called, (Pass,), members))()

    return declare


class _Declared(Rule):
    """A rule made by :func:`rule`."""

    def __init__(self, of: Pattern | View, build: Builder, wanted: Sequence[str]) -> None:
        self.of, self.build, self.wanted = of, build, wanted

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        of = self.of
        misses = of.explain(program) if isinstance(of, View) else matcher.explain(program, of)
        return self.matches(program), [miss for miss in misses if miss.node is not None]

    def matches(self, program: Program) -> Sequence[Match]:
        return self.of.find(program) if isinstance(self.of, View) else matcher.find(program, self.of)

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def replaced_nodes(self, match: Match) -> tuple[Node, ...]:
        return match.outputs

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        built = self.build(edit, **{name: match[name] for name in self.wanted})
        new = built if isinstance(built, tuple) else (built,)
        if len(new) != len(match.outputs):
            raise PatternError(
                f"rule {self.name} returned {len(new)} nodes for a pattern with {len(match.outputs)} outputs"
            )
        return dict(zip(match.outputs, new, strict=True))
