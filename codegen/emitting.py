# SPDX-License-Identifier: Apache-2.0
"""The code generator: Triton source specialised to the sites of a rewritten program.

    linear + bias ─▶ gelu ─▶ dropout (evaluation) ─▶ + residual        one kernel, one file, one node

`emit` finds the regions (:mod:`rewriter.codegen.emit_regions`), writes a file for each kind of them
(:mod:`rewriter.codegen.emit_source`) into the cache, loads it (:mod:`rewriter.kernels.emitted.loading`) and puts its
operator in the place of the fused nodes. The edit goes through the engine's editor like any exact rewrite: it is refused
where somebody could tell, and new nodes know where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import SymInt, Tensor
from torch.fx import Node

from rewriter.codegen import emit_source, emit_templates
from rewriter.codegen.calls import example_of, hinted
from rewriter.codegen.emit_expressions import Unfit
from rewriter.codegen.emit_regions import Region, Search
from rewriter.kernels import cache
from rewriter.kernels.emitted.loading import Emitted, load
from rewriter.kernels.launching import Request, recorded
from rewriter.kernels.spec import REGISTRY, Cost
from rewriter.matcher import Match, Miss
from rewriter.program import Program
from rewriter.rewriting import rewrite
from rewriter.rules import EXACT, Rule, locate, module_path, provenance

if TYPE_CHECKING:
    from rewriter.editing import Editor

RULE = "codegen.emit"


@dataclass(frozen=True)
class EmittedSite:
    """A site and its emitted kernel.

    Attributes:
        path: of the module.
        operator: what the kernel was made from, ``rewriter.bcq_linear.default``.
        rule: what had put that there; "" where the program came with it.
        fused: the operators fused into it, in order.
        formula: what it computes.
        kernels: names of the operator's kernels it has copies of.
        emitted: the file, its module and the operator in the program.
        until: why the region ends where it does; "" where nothing stood behind it.
        values: descriptions of the operator's arguments: tensors and sizes, symbolic where the program's are.
        cost: work of a call with the sizes of the example.
        node: name of its node in the program.
    """

    path: str
    operator: str
    rule: str
    fused: tuple[str, ...]
    formula: str
    kernels: tuple[str, ...]
    emitted: Emitted
    until: str
    values: tuple[Any, ...]
    cost: Cost
    node: str

    @property
    def name(self) -> str:
        """Of the operator, without namespace and overload."""
        return self.operator.split(".")[1]

    def requests(self, batch: int | None = None) -> list[Request]:
        """What a call would start, to be compiled ahead of time or costed; nothing runs.

        Args:
            batch: stands for the first size that is only known when the program runs; any other counts 1. Default: all
                sizes are those of the example.

        Raises:
            Unsupported: the reference would run.
        """
        known = hinted if batch is None else _sized(self.values, batch)
        with recorded() as requests:
            self.emitted.module.run(*(example_of(value, "meta", known) for value in self.values))
        return requests


@dataclass(frozen=True)
class Emission:
    """What `emit` made.

    Attributes:
        program: with the emitted operators.
        sites: in graph order.
        misses: operators with a kernel that run as they are, and why.
    """

    program: Program
    sites: tuple[EmittedSite, ...]
    misses: tuple[Miss, ...]


def emit(program: Program, *, folder: Path | None = None, dense: bool = False, expensive: bool = False) -> Emission:
    """Emit kernels for the sites of a program with something to fuse.

    Args:
        program: not changed; the result shares its tensors.
        folder: for the files; default: ``emitted`` in the package's cache folder.
        dense: also for linear layers that nothing has rewritten. Off, because nobody has measured that a Triton product
            with its neighbours is faster than the vendor's library and one more pass over the result.
        expensive: *before* a product, where every block of columns does it again, also fuse functions that cost much and
            operands as large as the activations. It pays where there are few rows.

    Raises:
        OSError: the folder cannot be written.
    """
    known = emit_templates.templates()
    if not dense:
        known = {op: template for op, template in known.items() if op in REGISTRY}
    rule = _Emit(known, cache.folder("emitted") if folder is None else folder, expensive)
    result = program.fork()
    rewrite(result, [rule])
    return Emission(result, *rule.found(result))


class _Emit(Rule):
    """A region becomes one call of its emitted operator."""

    name: ClassVar[str] = RULE
    role: ClassVar[str] = "emitted"
    contract = EXACT

    def __init__(self, templates: Mapping[Any, emit_templates.Template], folder: Path, expensive: bool) -> None:
        self.templates, self.folder, self.expensive = templates, folder, expensive
        self.sites: list[EmittedSite] = []
        self.misses: dict[tuple[str, str], Miss] = {}
        self._sources: dict[Node, emit_source.Source] = {}
        self._given: dict[Node, tuple[Any, ...]] = {}

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        facts, matches = program.facts, []
        anchors = {operator: template.activations for operator, template in self.templates.items()}
        self._sources.clear()
        self.misses.clear()  # of an earlier round
        for region in Search(facts, anchors, self.expensive).regions():
            path, reason = module_path(region.anchor), region.miss or "nothing around it can be fused"
            if region.fused:
                try:
                    template = self.templates[region.anchor.target]
                    self._sources[region.root] = emit_source.write(facts, region, template)
                    self._given[region.root] = tuple(facts.arguments(region.anchor).values())
                    matches.append(region.match())
                    continue
                except Unfit as unfit:
                    reason = str(unfit)
            self.misses[path, region.anchor.name] = Miss(RULE, path, "", reason, source=facts.source(region.anchor))
        return matches, ()

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        region: Region = match["region"]
        source = self._sources[match.root]
        emitted = load(_written(self.folder, source))
        values = tuple(node.meta["val"] for node in source.arguments)
        given = [value.meta["val"] if isinstance(value, Node) else value for value in self._given[match.root]]
        cost, made = _cost(region.anchor.target, given, values), edit.call(emitted.operator, *source.arguments)
        self.sites.append(
            EmittedSite(
                path=module_path(region.anchor),
                operator=str(region.anchor.target),
                rule=str(provenance(region.anchor).get("rule", "")),
                fused=tuple(str(node.target).removeprefix("aten.") for node in region.fused),
                formula=source.formula,
                kernels=source.kernels,
                emitted=emitted,
                until=region.miss,
                values=values,
                cost=cost,
                node=made.name,
            )
        )
        return {match.root: made}

    def found(self, program: Program) -> tuple[tuple[EmittedSite, ...], tuple[Miss, ...]]:
        """Sites that are in the finished program, and why its other operators are not."""
        present = {node.name for node in program.graph.nodes}
        refused = locate(self, program)  # regions whose replacement somebody could tell are still there
        sites = tuple(site for site in self.sites if site.node in present)
        reason = "fused, it could be told from the single nodes"
        left = [Miss(RULE, site.address.path, "replacement", reason) for site in refused.sites]
        return sites, (*self.misses.values(), *refused.misses, *left)


def _sized(values: Sequence[Any], batch: int) -> Callable[[int | SymInt], int]:
    """What stands for the sizes of some values: ``batch`` for the first symbol among them, 1 for the others."""
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else (value,))]
    symbols = [
        symbol for size in sizes if isinstance(size, SymInt) for symbol in sorted(size.node.expr.free_symbols, key=str)
    ]
    first = dict.fromkeys(symbols, 1) | dict.fromkeys(symbols[:1], batch)
    return lambda size: int(size.node.expr.subs(first)) if isinstance(size, SymInt) else size


def _cost(operator: Any, given: Sequence[Any], values: Sequence[Any]) -> Cost:
    """Work of an emitted call: the operator's on ``given``, and the bytes of what else is among ``values``.

    What is pointwise counts nothing: it happens while the tile is in registers.
    """
    given, values = ([example_of(value, "meta") for value in held] for held in (given, values))
    if operator in REGISTRY:
        own = REGISTRY[operator].cost(*given)
    else:  # aten.linear
        x, weight, *_ = given
        rows, (columns, features) = x.numel() // max(x.shape[-1], 1), weight.shape
        own = Cost(2 * rows * columns * features, _bytes(given), rows * columns * x.element_size())
    return own + Cost(0, max(_bytes(values) - _bytes(given), 0), 0)


def _bytes(values: Sequence[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _written(folder: Path, source: emit_source.Source) -> Path:
    """The file, written unless it is there."""
    path = folder / f"{source.stem}.py"
    content = source.text.encode()
    if not path.exists() or path.read_bytes() != content:
        cache.write(path, content)
    return path
