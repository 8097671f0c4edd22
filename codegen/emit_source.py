# SPDX-License-Identifier: Apache-2.0
"""The text of an emitted file: what is fused, as aten and as a kernel, and how it is started.

A file is a function of the operators, shapes, dtypes and neighbours of a site, so that equal layers share one: in its head
their numbers are stars. Names of graph nodes do not occur in it; they change between releases of torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.codegen import emit_configs
from rewriter.codegen.emit_expressions import CASTS, ELEMENTS, Call, Unfit, expression_of, formula, name_of
from rewriter.codegen.emit_regions import Operand, Region
from rewriter.codegen.emit_templates import (
    ROWS,
    Insertions,
    Template,
    hooked,
    names_in,
    specialised,
)
from rewriter.codegen.emit_text import (
    LINE,
    comment,
    config_text,
    entries_of,
    imports,
    literal,
    schema,
    signature,
    starred,
)
from rewriter.facts import Facts, same_shape, same_size
from rewriter.kernels.emitted.loading import MARK, digest
from rewriter.rules import module_path, provenance

VERSION = 1


@dataclass(frozen=True)
class Source:
    """An emitted file before it is written.

    Attributes:
        stem: its name, ``<site>_<hash>``.
        text: its content.
        arguments: the values its operator takes, in order.
        formula: what it computes.
        kernels: names of the operator's kernels it has copies of.
    """

    stem: str
    text: str
    arguments: tuple[Node, ...]
    formula: str
    kernels: tuple[str, ...]


def write(facts: Facts, region: Region, template: Template) -> Source:
    """The file of a region. Raises Unfit where the operator's kernel cannot be specialised to it."""
    return _Writer(facts, region, template).source()


class _Writer:
    def __init__(self, facts: Facts, region: Region, template: Template) -> None:
        self.facts, self.region, self.template = facts, region, template
        self.given = facts.arguments(region.anchor)
        self.activations: Node = self.given[template.activations]
        self.dtype: torch.dtype = self.activations.meta["val"].dtype
        self.features = self._features()
        self.columns = _static(region.anchor.meta["val"].shape[-1], "the number of columns")
        self.main = region.before[0] if region.before else None
        self.kernels = hooked(template, self.given, self._rows(), self.features, self.dtype)
        taken = {
            "x",
            "acc",
            "rows",
            "columns",
            "features",
            "inside",
            "tl",
            "torch",
            "triton",
            "functions",
            "implementation",
        }
        self.taken = taken.union(*(names_in(kernel.kernel) for kernel in self.kernels))
        self.arguments = self._named_arguments()
        self.values = self._named_values()
        own = {value for value in self.given.values() if isinstance(value, Node)}
        operands = [operand for operand in (*region.before, *region.after) if operand is not self.main]
        # In the kernel, operands that are also arguments of the operator have a name besides.
        self.locals = {o.node: self._fresh(o.form) if o.node in own else self.arguments[o.node] for o in operands}

    def _features(self) -> int:
        """Where the program leaves their number open, that of the example; kernels refuse calls with another."""
        size = self.activations.meta["val"].shape[-1]
        if isinstance(size, int):
            return size
        if self.region.prologue or size.node.hint is None:
            raise Unfit("the number of features is only known when the program runs")
        return int(size.node.hint)

    def _rows(self) -> Sequence[int]:
        """Numbers of rows the site may have: the one it has, or some of all."""
        sizes = self.activations.meta["val"].shape[:-1]
        if not all(isinstance(size, int) for size in sizes):
            return ROWS
        count = 1
        for size in sizes:
            count *= size
        return (count,)

    # -- names

    def _fresh(self, base: str) -> str:
        name, number = base, 0
        suffixes = ("", "_ptr", "_rows", "_stride", "_at", "_inside")
        while any(name + suffix in self.taken for suffix in suffixes):
            number += 1
            name = f"{base}_{number}"
        self.taken |= {name + suffix for suffix in suffixes}
        return name

    def _named_arguments(self) -> dict[Node, str]:
        """The operator's tensors under its own names, then the operands, then sizes that views name."""
        names: dict[Node, str] = {}
        for name, value in self.given.items():
            if isinstance(value, Node):
                read = self.main.node if self.main and name == self.template.activations else value
                names.setdefault(read, "x" if name == "input" else name)
        self.taken |= set(names.values())
        for operand in (*self.region.before, *self.region.after):
            if operand.node not in names:
                names[operand.node] = self._fresh(operand.form)
        for node in (*self.region.prologue, *self.region.epilogue):
            for value in node.all_input_nodes:
                if not isinstance(value.meta.get("val"), Tensor) and value not in names:
                    names[value] = self._fresh("size")
        return names

    def _named_values(self) -> dict[Node, str]:
        nodes = (*self.region.prologue, self.region.anchor, *self.region.epilogue)
        return {node: self._fresh(name_of(node)) for node in nodes}

    # -- kernels

    def _insertions(self) -> Insertions:
        parameters: list[str] = []
        prologue = self._prologue(parameters) if self.region.prologue else []
        epilogue = self._epilogue(parameters) if self.region.epilogue else []
        return Insertions(tuple(parameters), tuple(prologue), tuple(epilogue))

    def _prologue(self, parameters: list[str]) -> list[str]:
        main, *others = self.region.before
        texts = {main.node: self._fresh("wide")}
        lines = [f"# prologue: {self._formula(self.activations, {main.node: 'x'})}"]
        lines.append(f"{texts[main.node]} = x.to(tl.float32)")
        for operand in others:
            texts[operand.node], loads = self._load(operand, "features", self.features, parameters)
            lines += loads
        lines += self._computed(self.region.prologue, texts)
        # Past the last feature stands 0, whatever the functions above make of it.
        lines.append(f"x = tl.where(features[None, :] < {self.features}, {texts[self.activations]}, 0.0)")
        lines.append(f"x = x.to({ELEMENTS[self.dtype]})")
        return lines

    def _epilogue(self, parameters: list[str]) -> list[str]:
        texts = {self.region.anchor: "acc"}
        lines = [f"# epilogue: {self._formula(self.region.root, {self.region.anchor: 'acc'})}"]
        for operand in self.region.after:
            texts[operand.node], loads = self._load(operand, "columns", self.columns, parameters)
            lines += loads
        return [*lines, *self._computed(self.region.epilogue, texts, last="acc")]

    def _load(self, operand: Operand, across: str, size: int, parameters: list[str]) -> tuple[str, list[str]]:
        """The variable that holds an operand, and the lines that load it; its arguments go to ``parameters``."""
        name = self.locals[operand.node]
        wanted, row = [f"{name}_ptr"], f"(rows % {name}_rows)" if operand.repeats else "rows"
        if self._limited(operand):
            wanted.append(f"{name}_rows")
        lines: list[str] = []
        address, mask, lift = f"{name}_ptr", "", ""
        if operand.form == "tile":
            step = str(size)
            if not self._is_dense(operand):
                wanted.append(step := f"{name}_stride")
            lines.append(f"{name}_at = {address} + {row}[:, None].to(tl.int64) * {step} + {across}[None, :]")
            address, mask = f"{name}_at", "inside"
            if across == "features":
                past = "" if operand.repeats else f"(rows[:, None] < {name}_rows) & "
                lines.append(f"{name}_inside = {past}(features[None, :] < {size})")
                mask = f"{name}_inside"
        elif operand.form == "column":
            address, mask, lift = f"{address} + {across}", f"{across} < {size}", "[None, :]"
        elif operand.form == "row":
            address, mask, lift = f"{address} + {row}", "" if operand.repeats else f"rows < {name}_rows", "[:, None]"
        parameters += [parameter for parameter in wanted if parameter not in parameters]
        loaded = f"tl.load({address}{f', mask={mask}, other=0' if mask else ''})"
        truth = operand.node.meta["val"].dtype is torch.bool
        value = f"({loaded} != 0)" if truth and lift else f"{loaded} != 0" if truth else f"{loaded}.to(tl.float32)"
        return name, [*lines, f"{name} = {value}{lift}"]

    def _computed(self, nodes: Iterable[Node], texts: dict[Node, str], last: str = "") -> Iterator[str]:
        nodes = tuple(nodes)
        for node in nodes:
            arguments = self.facts.arguments(node)
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            dtypes = {n: n.meta["val"].dtype for n in tensors}
            texted = {n: texts[n] for n in tensors}
            expression = expression_of(node)(Call(arguments, texted, dtypes, node.meta["val"].dtype))
            if expression in texts.values() and node is not nodes[-1]:  # the same value
                texts[node] = expression
                continue
            texts[node] = last if last and node is nodes[-1] else self.values[node]
            yield f"{texts[node]} = {expression}"

    def _formula(self, node: Node, names: Mapping[Node, str]) -> str:
        named = {**{n: name for n, name in self.arguments.items() if n not in self.values}, **names}
        return formula(node, named, self.facts.arguments)

    # -- the file

    def source(self) -> Source:
        put = self._insertions()
        site = starred(module_path(self.region.anchor))
        slug = "_".join(re.findall(r"[A-Za-z][A-Za-z_0-9]*", site)[-2:]) or "site"
        written = self._formulas()
        kernels = {kernel.name: f"{slug}_{kernel.name}" for kernel in self.kernels}
        parts = [
            self._head(site, written),
            "",
            schema(self.arguments),
            self._reference(),
            *(specialised(kernel, kernels[kernel.name], put, ELEMENTS[self.dtype]) for kernel in self.kernels),
            self._table(kernels),
            self._run(),
        ]
        parts[1] = imports(self.template, self.kernels, "\n".join(parts))
        text = "\n\n\n".join(parts) + "\n"
        content = digest(text)
        text = text.replace(MARK, MARK + content, 1)
        return Source(f"{slug}_{content}", text, tuple(self.arguments), "; ".join(written), tuple(kernels))

    def _formulas(self) -> list[str]:
        """The result in terms of the product, and the product."""
        anchor = self.region.anchor
        product = self._formula(anchor, {})
        return [self._formula(self.region.root, {anchor: "y"}), f"y = {product}"] if self.region.epilogue else [product]

    def _head(self, site: str, written: Sequence[str]) -> str:
        rule = provenance(self.region.anchor).get("rule", "none: it is the model's own")
        fused = ", ".join(name_of(node) for node in self.region.fused)
        formulas = "\n#           ".join(written)
        return f"""\
# Emitted by rewriter.codegen.emitting, version {VERSION}. It runs without the generator; edits are refused by the hash.
#
# site      {comment(site) or "<root>"}
# operator  {self.region.anchor.target}
# rule      {comment(str(rule))}
# fused     {fused}
# formula   {formulas}
{MARK}"""

    def _reference(self) -> str:
        names = {**self.values, **self.arguments}
        lines = [*signature("reference", self.arguments), '    """The nodes the kernel stands for, one by one."""']
        nodes = (*self.region.prologue, self.region.anchor, *self.region.epilogue)
        for node in nodes:
            target = "return" if node is nodes[-1] else f"{self.values[node]} ="
            lines.append(f"    {target} {self._call(node, names)}")
        return "\n".join(lines)

    def _call(self, node: Node, names: Mapping[Node, str]) -> str:
        """A node as Python."""
        if node.target in CASTS:  # without the device, which is the operand's
            return f"{names[node.all_input_nodes[0]]}.to({self.facts.arguments(node)['dtype']})"
        if node is self.region.anchor:
            return f"torch.ops.{node.target}({', '.join(literal(value, names) for value in self.given.values())})"
        given = [literal(value, names) for value in node.args]
        given += [f"{name}={literal(value, names)}" for name, value in node.kwargs.items()]
        return f"torch.ops.{node.target}({', '.join(given)})"

    def _table(self, kernels: Mapping[str, str]) -> str:
        lines = ["KERNELS = {"]
        for kernel in self.kernels:
            configs = emit_configs.fitting(kernel, self._pressure())
            lines.append(f'    "{kernel.name}": Specialised(')
            lines.append(f"        {kernels[kernel.name]},")
            lines += [
                "        folded={",
                *(f"            {entry}," for entry in entries_of(kernel.folded)),
                "        },",
            ]
            lines.append("        configs=(")
            lines += [f"            {config_text(config)}," for config in configs]
            lines += ["        ),", "    ),"]
        return "\n".join([*lines, "}"])

    def _pressure(self) -> int:
        """Tiles besides the accumulator that are in registers at once: operands of its size."""
        return sum(operand.form == "tile" for operand in self.region.after)

    def _run(self) -> str:
        lines = [*signature("run", self.arguments), '    """The same by the kernels. Raises Unsupported."""']
        names = {**self.values, **self.arguments}
        options = ""
        if self.main is not None:
            names[self.activations] = x = self.arguments[self.main.node]
            if self.main.node.meta["val"].dtype is not self.dtype:
                lines.append(f"    {x} = {x}.contiguous()")
                lines.append(
                    f"    seen = torch.empty_like({x}, dtype={self.dtype})  # what the operator is to see; not read"
                )
                names[self.activations] = "seen"
                options += f", standing_in=(seen, {x})"
        if self.region.root.meta["val"].dtype is not self.region.anchor.meta["val"].dtype:
            options += f", dtype={self.region.root.meta['val'].dtype}"
        entries: list[str] = []
        for node, name in self.locals.items():
            made, added = self._passed(self._operand(node), name)
            lines += made
            entries += added
        args = ", ".join(literal(value, names) for value in self.given.values())
        lines += ["    operands = {", *(f"        {entry}," for entry in entries), "    }"] if entries else []
        passed = "operands" if entries else "{}"
        call = f"    return fused(implementation, ({args}), KERNELS, {passed}{options}){self._shaped()}"
        if len(call) > LINE:
            lines += [f"    args = ({args})"]
            call = call.replace(f"({args})", "args", 1)
        return "\n".join([*lines, call])

    def _passed(self, operand: Operand, name: str) -> tuple[list[str], list[str]]:
        """Lines that prepare an operand, and its entries among the kernel's arguments."""
        given = self.arguments[operand.node]
        if operand.node.meta["val"].dtype is torch.bool:  # kernels read bytes
            given = f"{given}.view(torch.uint8)"
        if operand.form != "tile":
            entries = [f'"{name}_ptr": {given}.contiguous()']
            return [], entries + ([f'"{name}_rows": {given}.numel()'] if self._limited(operand) else [])
        width = self.features if operand in self.region.before else self.columns
        dense = self._is_dense(operand)
        entries = [f'"{name}_ptr": {name}_flat', *([] if dense else [f'"{name}_stride": {name}_flat.stride(0)'])]
        entries += [f'"{name}_rows": {name}_flat.shape[0]'] if self._limited(operand) else []
        return [f"    {name}_flat = flat({given}, {width}){'.contiguous()' if dense else ''}"], entries

    def _is_dense(self, operand: Operand) -> bool:
        """Whether its rows follow each other in memory, as those of the result do: then both have one address."""
        value = operand.node.meta["val"]
        return value.dim() > 1 and same_size(value.stride(-1), 1) and same_size(value.stride(-2), value.shape[-1])

    def _operand(self, node: Node) -> Operand:
        return next(o for o in (*self.region.before, *self.region.after) if o.node is node)

    def _limited(self, operand: Operand) -> bool:
        tile_before = operand.form == "tile" and operand in self.region.before
        return operand.repeats or operand.form == "row" or tile_before

    def _shaped(self) -> str:
        """The call that brings the result into the root's shape, where the operator's differs."""
        root = tuple(self.region.root.meta["val"].shape)
        read = self.main.node if self.main else self.activations
        if same_shape(root, (*read.meta["val"].shape[:-1], root[-1])):
            return ""
        sizes = [self._size(size) for size in root]
        if sizes.count(None) > 1:
            raise Unfit("the result has a shape that none of the operands tells")
        return f".view({', '.join('-1' if size is None else size for size in sizes)})"

    def _size(self, size: int | torch.SymInt) -> str | None:
        if isinstance(size, int):
            return str(size)
        for node, name in self.arguments.items():
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return name
            for position, other in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if same_size(size, other):
                    return f"{name}.shape[{position}]"
        return None


def _static(size: Any, what: str) -> int:
    if not isinstance(size, int):
        raise Unfit(f"{what} is only known when the program runs")
    return size
