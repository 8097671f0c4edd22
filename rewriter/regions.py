# SPDX-License-Identifier: Apache-2.0
"""Graphs inside the graph: the bodies that control flow, autocast and grad regions run.

Rules rewrite the main graph. What they would match inside a body is not passed over in silence: it is a miss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from rewriter.facts import path_of
from rewriter.matcher import Match, Miss

if TYPE_CHECKING:
    from rewriter.program import Program


def bodies(program: Program) -> Iterator[tuple[Node, Program]]:
    """Every body of the program, nested ones too, as a program on the same store, with the node that runs it.

    The node is the one of the main graph, also for a body inside a body.
    """
    if not program.bodies:  # then nothing needs to be searched
        return
    for reader in program.graph.find_nodes(op="get_attr"):
        module = program.bodies.get(str(reader.target))
        runs = [user for user in reader.users if isinstance(user.target, HigherOrderOperator)]
        if module is None or not runs:
            continue
        nested = {name: child for name, child in module.named_children() if isinstance(child, GraphModule)}
        inner = dataclasses.replace(program, graph_module=module, bodies=nested)
        for run in runs:
            yield run, inner
            yield from ((run, deeper) for _, deeper in bodies(inner))


def inside_bodies(name: str, program: Program, find: Callable[[Program], Iterable[Match]]) -> list[Miss]:
    """What ``find`` finds in bodies, as misses under ``name``."""
    return [_miss(name, run, inner, match) for run, inner in bodies(program) for match in find(inner)]


def called(run: Node) -> str:
    """Name of the operator that runs a body: ``cond``."""
    target: Any = run.target
    return str(target.name() if isinstance(target, HigherOrderOperator) else target)


def _miss(name: str, run: Node, inner: Program, match: Match) -> Miss:
    where = path_of(run) or "the top level"
    sources = (inner.facts.source(match.root), inner.facts.source(run))
    written = (text for text in sources if text and not text.startswith("<"))  # "<eval_with_key>": traced twice
    return Miss(
        rule=name,
        site=match.path or path_of(run),
        step="region",
        reason=f"it lies inside a body of {called(run)} at {where}; rules rewrite the main graph only",
        found=match.root.name,
        source=next(written, ""),
        depth=len(match.nodes),
        node=run,
    )
