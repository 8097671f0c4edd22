# SPDX-License-Identifier: Apache-2.0
"""Rounds of rules until nothing changes, and what went wrong where that does not come.

One round runs every rule once, in order; a rule that found nothing is asked again only after the graph has changed. The
end is reached when no rule finds anything. It is not reached where rules undo each other's work (the graph comes back
to where it was), or where a rule feeds itself (the graph grows, or rounds run out): then the error names the rules and
shows what they did, and whoever called works on a copy, so that nothing is changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, Node

from rewriter.editing import Edit, Editor
from rewriter.errors import PlanError
from rewriter.rules import Rule

ROUNDS = 32
_PATIENCE = 3  # rounds before states are remembered: hashing costs a sweep, and few graphs need so many
_GROWTH = 4, 1000  # a graph of n nodes may grow to 4 n + 1000 nodes
_SHOWN = 6  # edits an error shows

Stage = Callable[[int], Sequence[Edit]]


def to_fixpoint(editor: Editor, rules: Sequence[Rule], stage: Stage, bound: int = ROUNDS) -> None:
    """Run stages until none of them changes anything.

    Args:
        editor: of the program that is rewritten.
        rules: what is run, by position.
        stage: applies the rule of that position once, wherever it applies, and returns its edits.
        bound: number of rounds after which this is given up.

    Raises:
        PlanError: the rules do not come to an end.
    """
    limit = _GROWTH[0] * len(editor.graph.nodes) + _GROWTH[1]
    sizes = [len(editor.graph.nodes)]
    states: dict[str, int] = {}
    quiet: set[int] = set()
    for number in range(bound):
        if not _round(rules, stage, quiet):
            return
        sizes.append(len(editor.graph.nodes))
        if sizes[-1] > limit:
            raise PlanError(_endless(editor, rules, stage, quiet, sizes))
        if number < _PATIENCE:
            continue
        state = structure(editor.graph)
        if state in states:
            raise PlanError(_fight(editor, rules, stage, quiet, number - states[state]))
        states[state] = number
    if _round(rules, stage, quiet):
        raise PlanError(_endless(editor, rules, stage, quiet, sizes))


def structure(graph: Graph) -> str:
    """Hash of operators, wiring, constants and names of tensors; not of the names of nodes, nor where tensors are read."""
    computing = [node for node in graph.nodes if node.op != "get_attr"]
    place = {node: number for number, node in enumerate(computing)}
    text = hashlib.sha256()
    for node in computing:
        text.update(repr((node.op, str(node.target), _placed(node.args, place), _placed(node.kwargs, place))).encode())
    return text.hexdigest()


def _round(rules: Sequence[Rule], stage: Stage, quiet: set[int]) -> list[Edit]:
    edits: list[Edit] = []
    for index in range(len(rules)):
        if index in quiet:
            continue
        made = stage(index)
        if made:
            quiet.clear()
            edits += made
        else:
            quiet.add(index)
    return edits


def _fight(editor: Editor, rules: Sequence[Rule], stage: Stage, quiet: set[int], length: int) -> str:
    """The message for a graph that came back to where it was ``length`` rounds before: once more, written down."""
    editor.spells = True
    edits = [edit for _ in range(length) for edit in _round(rules, stage, quiet)]
    names = list(dict.fromkeys(edit.rule for edit in edits))
    if len(names) == 1:
        claim = f"rule {names[0]} undoes its own work and would never come to an end"
    else:
        claim = f"rules {', '.join(names[:-1])} and {names[-1]} undo each other's work and would never come to an end"
    return f"{claim}:{_shown(edits)}\nleave one of them out, or narrow what it matches; nothing was changed"


def _endless(editor: Editor, rules: Sequence[Rule], stage: Stage, quiet: set[int], sizes: Sequence[int]) -> str:
    editor.spells = True
    edits = _round(rules, stage, quiet)
    names = ", ".join(dict.fromkeys(edit.rule for edit in edits))
    nodes = ", ".join(map(str, [*sizes[:3], "…", *sizes[-2:]] if len(sizes) > 6 else sizes))
    return (
        f"after {len(sizes) - 1} rounds these rules still apply: {names}; nodes of the graph by round: {nodes}"
        f"{_shown(edits)}\na rule must not match what it makes; nothing was changed"
    )


def _shown(edits: Sequence[Edit]) -> str:
    """The edits at the place of the first one."""
    if not edits:
        return ""
    place = edits[0].site.partition(":")[0]
    here = [edit for edit in edits if edit.site.partition(":")[0] == place]
    first_of_each = list({(edit.rule, edit.before, edit.after): edit for edit in reversed(here)}.values())[::-1]
    lines = [f"\n  {e.rule} at {e.site}: {e.before} → {e.after}" for e in first_of_each[:_SHOWN]]
    return "".join(lines)


def _placed(value: Any, place: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return f"%{place[value]}" if value in place else f"%{value.target}"
    if isinstance(value, (tuple, list)):
        return tuple(_placed(item, place) for item in value)
    if isinstance(value, dict):
        return tuple((key, _placed(value[key], place)) for key in sorted(value))
    if isinstance(value, slice):
        return ("slice", _placed((value.start, value.stop, value.step), place))
    return value
