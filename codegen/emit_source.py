# SPDX-License-Identifier: Apache-2.0
"""The text of an emitted file: what is fused, as aten and as a kernel, and how it is started.

A file is a function of the operators, shapes, dtypes and neighbours of a site, so that equal layers share one: in its head
their numbers are stars. Names of graph nodes do not occur in it; they change between releases of torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.codegen import emit_configs
from rewriter.codegen.emit_expressions import CASTS, ELEMENTS, Unfit, name_of
from rewriter.codegen.emit_insertions import insertions
from rewriter.codegen.emit_regions import Operand, Region
from rewriter.codegen.emit_site import Site
from rewriter.codegen.emit_templates import Template, specialised
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
_LIES = {"tile": "one per element", "column": "one per column", "row": "one per row", "scalar": "a single number"}


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
    return _Writer(Site(facts, region, template)).source()


class _Writer:
    def __init__(self, site: Site) -> None:
        self.site, self.region = site, site.region

    def source(self) -> Source:
        put = insertions(self.site)
        site = starred(module_path(self.region.anchor))
        slug = "_".join(re.findall(r"[A-Za-z][A-Za-z_0-9]*", site)[-2:]) or "site"
        written = self._formulas()
        kernels = {kernel.name: f"{slug}_{kernel.name}" for kernel in self.site.kernels}
        parts = [
            self._head(site, written),
            "",
            schema(self.site.arguments),
            self._reference(),
            *(
                specialised(kernel, kernels[kernel.name], put, ELEMENTS[self.site.dtype])
                for kernel in self.site.kernels
            ),
            self._table(kernels),
            self._run(),
        ]
        parts[1] = imports(self.site.template, self.site.kernels, "\n".join(parts))
        text = "\n\n\n".join(parts) + "\n"
        content = digest(text)
        text = text.replace(MARK, MARK + content, 1)
        return Source(f"{slug}_{content}", text, tuple(self.site.arguments), "; ".join(written), tuple(kernels))

    def _formulas(self) -> list[str]:
        """The result in terms of the product, and the product."""
        anchor = self.region.anchor
        product = self.site.formula(anchor, {})
        if not self.region.epilogue:
            return [product]
        return [self.site.formula(self.region.root, {anchor: "y"}), f"y = {product}"]

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
# formula   {formulas}{self._operands()}
{MARK}"""

    def _operands(self) -> str:
        """Lines that say what is read besides: of a parameter the end of its name, in which equal layers agree."""
        lines = []
        for node, name in self.site.locals.items():
            whose = ".".join(str(node.target).split(".")[-2:]) + ", " if node.op == "get_attr" else ""
            lines.append(f"{name}: {comment(whose)}{_LIES[self.site.operand(node).form]}")
        return "\n# operands  " + "\n#           ".join(lines) if lines else ""

    def _reference(self) -> str:
        names = {**self.site.values, **self.site.arguments}
        lines = [*signature("reference", self.site.arguments), '    """The nodes the kernel stands for, one by one."""']
        nodes = (*self.region.prologue, self.region.anchor, *self.region.epilogue)
        for node in nodes:
            target = "return" if node is nodes[-1] else f"{self.site.values[node]} ="
            lines.append(f"    {target} {self._call(node, names)}")
        return "\n".join(lines)

    def _call(self, node: Node, names: Mapping[Node, str]) -> str:
        """A node as Python."""
        if node.target in CASTS:  # without the device, which is the operand's
            return f"{names[node.all_input_nodes[0]]}.to({self.site.facts.arguments(node)['dtype']})"
        if node is self.region.anchor:
            return f"torch.ops.{node.target}({', '.join(literal(value, names) for value in self.site.given.values())})"
        given = [literal(value, names) for value in node.args]
        given += [f"{name}={literal(value, names)}" for name, value in node.kwargs.items()]
        return f"torch.ops.{node.target}({', '.join(given)})"

    def _table(self, kernels: Mapping[str, str]) -> str:
        lines = ["KERNELS = {"]
        for kernel in self.site.kernels:
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
        lines = [*signature("run", self.site.arguments), '    """The same by the kernels. Raises Unsupported."""']
        names = {**self.site.values, **self.site.arguments}
        options = ""
        if self.site.main is not None:
            names[self.site.activations] = x = self.site.arguments[self.site.main.node]
            if self.site.main.node.meta["val"].dtype is not self.site.dtype:
                lines.append(f"    {x} = {x}.contiguous()")
                lines.append(
                    f"    seen = torch.empty_like({x}, dtype={self.site.dtype})  # what the operator is to see; not read"
                )
                names[self.site.activations] = "seen"
                options += f", standing_in=(seen, {x})"
        if self.region.root.meta["val"].dtype is not self.region.anchor.meta["val"].dtype:
            options += f", dtype={self.region.root.meta['val'].dtype}"
        entries: list[str] = []
        for node, name in self.site.locals.items():
            made, added = self._passed(self.site.operand(node), name)
            lines += made
            entries += added
        args = ", ".join(literal(value, names) for value in self.site.given.values())
        lines += ["    operands = {", *(f"        {entry}," for entry in entries), "    }"] if entries else []
        passed = "operands" if entries else "{}"
        call = f"    return fused(implementation, ({args}), KERNELS, {passed}{options}){self._shaped()}"
        if len(call) > LINE:
            lines += [f"    args = ({args})"]
            call = call.replace(f"({args})", "args", 1)
        return "\n".join([*lines, call])

    def _passed(self, operand: Operand, name: str) -> tuple[list[str], list[str]]:
        """Lines that prepare an operand, and its entries among the kernel's arguments."""
        given = self.site.arguments[operand.node]
        if operand.node.meta["val"].dtype is torch.bool:  # kernels read bytes
            given = f"{given}.view(torch.uint8)"
        if operand.form != "tile":
            entries = [f'"{name}_ptr": {given}.contiguous()']
            return [], entries + ([f'"{name}_rows": {given}.numel()'] if self.site.is_limited(operand) else [])
        width = self.site.features if operand in self.region.before else self.site.columns
        dense = self.site.is_dense(operand)
        entries = [f'"{name}_ptr": {name}_flat', *([] if dense else [f'"{name}_stride": {name}_flat.stride(0)'])]
        entries += [f'"{name}_rows": {name}_flat.shape[0]'] if self.site.is_limited(operand) else []
        return [f"    {name}_flat = flat({given}, {width}){'.contiguous()' if dense else ''}"], entries

    def _shaped(self) -> str:
        """The call that brings the result into the root's shape, where the operator's differs."""
        root = tuple(self.region.root.meta["val"].shape)
        read = self.site.main.node if self.site.main else self.site.activations
        if same_shape(root, (*read.meta["val"].shape[:-1], root[-1])):
            return ""
        sizes = [self._size(size) for size in root]
        if sizes.count(None) > 1:
            raise Unfit("the result has a shape that none of the operands tells")
        return f".view({', '.join('-1' if size is None else size for size in sizes)})"

    def _size(self, size: int | torch.SymInt) -> str | None:
        if isinstance(size, int):
            return str(size)
        for node, name in self.site.arguments.items():
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return name
            for position, other in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if same_size(size, other):
                    return f"{name}.shape[{position}]"
        return None
