# SPDX-License-Identifier: Apache-2.0
"""Rules and passes: what a rewrite matches, what it promises, how weights become new parameters, what replaces what.

Rule = view or pattern + guards + contract + initialisation + replacement
Pass = a family's options and the rules they configure
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import Node

from rewriter.matcher import Match, Miss
from rewriter.regions import called, inside_bodies

if TYPE_CHECKING:
    from rewriter.calibration import Statistics
    from rewriter.editing import Editor
    from rewriter.program import Program


@dataclass(frozen=True)
class Contract:
    """What a rule promises about the outputs."""

    kind: str
    recipe: str = ""
    metric: str = ""
    eps: float = 0.0

    @property
    def exact(self) -> bool:
        return self.kind == "EXACT"

    def __str__(self) -> str:
        return f"{self.kind}({self.metric} ≤ {self.eps:g})" if self.metric else self.kind


EXACT = Contract("EXACT")


def BOUNDED(metric: str, eps: float) -> Contract:
    """The error is bounded by computation, not by hope."""
    return Contract("BOUNDED", metric=metric, eps=eps)


def CALIBRATED(recipe: str) -> Contract:
    """Closed form from weights (and calibration data); the error is measured per site."""
    return Contract("CALIBRATED", recipe=recipe)


def LEARNED(recipe: str) -> Contract:
    """Needs training to be good; applied without it, it warns and the report says "untrained"."""
    return Contract("LEARNED", recipe=recipe)


@dataclass(frozen=True)
class Address:
    """Where a site is, in terms that outlive torch releases: never an FX node name.

    Attributes:
        path: of the module.
        role: what the rule sees there (the view's name).
        ordinal: among the rule's sites of one path, in graph order.
        digest: of the rule and the shapes of what it replaces.
        round: how often the rule had been applied before it found this site: later rounds see what earlier ones made.
    """

    path: str
    role: str
    ordinal: int
    digest: str
    round: int = 0

    def __str__(self) -> str:
        number = f"#{self.ordinal}" if self.ordinal else ""
        again = f"~{self.round}" if self.round else ""
        return f"{self.path}:{self.role}{number}{again}@{self.digest}"


@dataclass(frozen=True)
class Site:
    """One place a rule applies to: all the matches that read the same parameters (a shared layer is one site)."""

    rule: Rule
    address: Address
    matches: tuple[Match, ...]
    paths: tuple[str, ...]

    @property
    def match(self) -> Match:
        return self.matches[0]

    @property
    def roots(self) -> frozenset[Node]:
        return frozenset(n for m in self.matches for n in self.rule.replaced_nodes(m))


class Kept(Exception):
    """Raised by :meth:`Rule.settle`: the site is better left as it is; the message says why, and how to insist."""


class Rule(ABC):
    """One rewrite. Subclasses are small: a view, guards, an initialisation and a replacement."""

    name: ClassVar[str]
    role: ClassVar[str]  # the view's name, part of every address
    contract: ClassVar[Contract]
    version: ClassVar[int] = 1
    parametric: ClassVar[bool] = False  # whether it replaces parameters, so that every program must have its sites
    specificity: ClassVar[int] = 0  # a more specific view wins a site: Head over Linear
    apart: ClassVar[bool] = False  # whether it builds each replacement before its own root (:meth:`Editor.before`)

    @abstractmethod
    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        """Matches in graph order, and near misses with their reasons."""

    def matches(self, program: Program) -> Sequence[Match]:
        """The matches of :meth:`find` alone; for rules that find them without looking for reasons."""
        return self.find(program)[0]

    def refusal(self, program: Program, match: Match) -> str | None:
        """Why this match must be left alone, or None."""
        return None

    def recall(self, program: Program, address: Address, choice: Mapping[str, Any]) -> Sequence[Match]:
        """Matches of a planned site in another program of the same model, where :meth:`find` no longer sees it."""
        return ()

    def replaced_nodes(self, match: Match) -> tuple[Node, ...]:
        """Nodes whose value the replacement takes over (several for several outputs)."""
        return (match.root,)

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        """Names of the tensors the new parameters stand for."""
        return ()

    def prefix(self, match: Match) -> str:
        """Module path the new parameters live under."""
        return module_path(match.root)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        """Choices made when planning (JSON values), e.g. a structure chosen by measured error.

        Raises:
            Kept: no choice would be worth it; the site is then a miss, and open to other rules.
        """
        return {}

    def settle_all(
        self,
        sites: Sequence[Site],
        choices: Sequence[dict[str, Any]],
        program: Program,
        statistics: Statistics | None,
    ) -> Sequence[dict[str, Any]]:
        """The choices of all sites this rule got, in graph order, each settled by itself: where they share a budget."""
        return choices

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        """Roles of the new parameters, in order; their names are ``<prefix>.<role>``."""
        return ()

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """New tensors by role, from the old ones: Parameters where they train, plain tensors for buffers."""
        return {}

    @abstractmethod
    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        """Build the replacement through ``edit``; return old node -> new node."""

    def needs(self, match: Match) -> Mapping[str, Node]:
        """Statistics wanted: kind (see :data:`rewriter.calibration.KINDS`) -> node whose values to observe."""
        return {}

    def measure(
        self,
        site: Site,
        before: Callable[[str], Tensor],
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        """Figures for the report, computed from the tensors at hand."""
        return {}

    def borrows(self, choice: Mapping[str, Any]) -> Mapping[str, str]:
        """Tensors of other modules that the site computes with, role -> name: :meth:`module` is given them too."""
        return {}

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        """The site as a module to stand in the user's class, or None where it cannot."""
        return None

    def attach(self, root: nn.Module, path: str, module: nn.Module) -> bool:
        """Hang :meth:`module`'s result into the restored model where it does not stand for the whole module at ``path``.

        Returns False (as here) to have it put in that module's place.
        """
        return False

    def restore(
        self, part: Callable[[int, int], Any], replaced: Sequence[str], choice: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """For a rule that merged tensors by rows: name of each original weight -> ``part(first row, last row + 1)``."""
        return None


@dataclass(frozen=True)
class Pass(ABC):
    """A family's options; subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]
    contract: ClassVar[Contract]

    @abstractmethod
    def rules(self) -> tuple[Rule, ...]:
        """The rules these options configure, in the order they apply."""

    def settings(self) -> dict[str, Any]:
        """The options as JSON values; ``type(self)(**settings)`` gives the pass back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class Refusals:
    """Sites found, and what was refused with reasons."""

    sites: tuple[Site, ...] = ()
    misses: tuple[Miss, ...] = field(default=())


def full_names(rule: Rule, site: Site, choice: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the parameters ``rule`` makes at ``site``."""
    prefix = rule.prefix(site.match)
    return tuple(f"{prefix}.{role}" if prefix else role for role in rule.roles(site.match, choice))


def locate(rule: Rule, program: Program, *, round: int = 0, explain: bool = True) -> Refusals:
    """All sites of ``rule`` in graph order, each with its address; refused matches become misses.

    Args:
        rule, program: what to look for, and where.
        round: becomes part of the addresses.
        explain: also say where the rule nearly applies (costs more than finding where it does).
    """
    matches: Sequence[Match]
    matches, missed = rule.find(program) if explain else (rule.matches(program), ())
    refused = near_misses(rule, program, missed) if explain else []
    kept: list[Match] = []
    blocked: dict[str, str] = {}  # tensor -> why a match that reads it was refused
    for match in matches:
        reason = rule.refusal(program, match) or disorder(rule, match)
        if reason is None:
            kept.append(match)
            continue
        blocked |= dict.fromkeys(rule.replaced_tensors(match), reason)
        refused.append(_refused(rule, program, match, reason))
    groups: dict[Any, list[Match]] = {}
    for match in kept:
        groups.setdefault(rule.replaced_tensors(match) or match.root, []).append(match)
    counted: dict[str, int] = {}
    sites = []
    for group in groups.values():
        shared = _read_elsewhere(rule, program, group, blocked)
        if shared is not None:
            refused += [_refused(rule, program, match, shared) for match in group]
            continue
        path = rule.prefix(group[0])
        ordinal = counted[path] = counted.get(path, -1) + 1
        address = Address(path, rule.role, ordinal, _digest(rule, group[0]), round)
        paths = dict.fromkeys(p for match in group for p in match.paths)
        sites.append(Site(rule, address, tuple(group), tuple(paths)))
    return Refusals(tuple(sites), tuple(refused))


def near_misses(rule: Rule, program: Program, missed: Sequence[Miss] | None = None) -> list[Miss]:
    """Where the rule nearly applies, under its own name (a view's misses carry the view's), and where it would but for
    the control-flow body around the place. ``missed`` is the second result of :meth:`Rule.find`, where it is at hand.
    """
    found = rule.find(program)[1] if missed is None else missed
    return [
        *(dataclasses.replace(miss, rule=rule.name) for miss in found),
        *inside_bodies(rule.name, program, rule.matches),
    ]


def disorder(rule: Rule, match: Match) -> str | None:
    """Why no single place in the graph lies after all inputs of a match and before all readers of its outputs."""
    roots = rule.replaced_nodes(match)
    if len(roots) < 2 or rule.apart:
        return None
    inside = {*match.nodes, *roots}
    latest = max((n for node in inside for n in node.all_input_nodes if n not in inside), default=None)
    if latest is None or latest < min(roots):
        return None
    early = [user for root in roots for user in root.users if user not in inside and not latest < user]
    return f"{early[0].name} reads one output before {latest.name}, an input of another, is computed" if early else None


def _refused(rule: Rule, program: Program, match: Match, reason: str) -> Miss:
    source = program.facts.source(match.root)
    return Miss(rule=rule.name, site=match.path, step="guard", reason=reason, source=source)


def _read_elsewhere(rule: Rule, program: Program, group: Sequence[Match], blocked: Mapping[str, str]) -> str | None:
    """Why the tensors of a site must stay although each of its matches may go: a shared layer changes whole or not.

    An exact rule must take every reader of the tensors it replaces, or the copies would be trained apart. Approximate
    rules may leave other uses alone (the embedding a head is tied to), but not another call of the same kind.
    """
    names = rule.replaced_tensors(group[0])
    for name in names:
        if name in blocked:
            return f"another place that reads {name} cannot be rewritten: {blocked[name]}"
    if not names:
        return None
    inside = {node for match in group for node in match.nodes}
    readers = {n for node in inside for n in node.all_input_nodes if n.op == "get_attr" and str(n.target) in names}
    for value in sorted(readers):
        for user in value.users:
            if isinstance(user.target, HigherOrderOperator):
                return f"{value.target} is also read inside a body of {called(user)}, where nothing is rewritten"
    if not rule.contract.exact:
        return None
    views = {node for match in group for node in match.shared}
    for value in sorted(readers | views):
        for user in program.facts.users(value):
            if user not in inside:
                return f"{value.target if value in readers else value.name} is also read by {user.name}"
    return None


def module_path(node: Node) -> str:
    """Path of the module a node stands in."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return str(list(stack.values())[-1][0])


def provenance(node: Node) -> dict[str, Any]:
    """What the rewriter wrote on a node it made: rule, site, and the nodes and paths it came from."""
    written: dict[str, Any] = (node.meta.get("custom") or {}).get("rewriter", {})
    return written


def _digest(rule: Rule, match: Match) -> str:
    """Structure of a site: its role and the shapes of what it replaces. The same in any dtype, mode, or call."""
    names = rule.replaced_tensors(match)
    if not names:
        return _hashed(f"{rule.name}/{rule.role}/[]")
    read = {str(n.target): n for node in match.nodes for n in node.all_input_nodes if n.op == "get_attr"}
    shapes = [tuple(int(s) for s in read[name].meta["val"].shape) for name in names]
    return _hashed(f"{rule.name}/{rule.role}/{shapes}")


@functools.cache
def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
