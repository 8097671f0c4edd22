# SPDX-License-Identifier: Apache-2.0
"""What is put into a kernel at its hooks: the operands are loaded as they lie over the tile, the nodes computed in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.codegen.emit_expressions import ELEMENTS, Call, expression_of
from rewriter.codegen.emit_regions import Operand
from rewriter.codegen.emit_site import Site
from rewriter.codegen.emit_templates import Insertions


def insertions(site: Site) -> Insertions:
    """Lines for the hooks of a site's kernels, and the arguments they need besides."""
    parameters: list[str] = []
    prologue = _prologue(site, parameters) if site.region.prologue else []
    epilogue = _epilogue(site, parameters) if site.region.epilogue else []
    return Insertions(tuple(parameters), tuple(prologue), tuple(epilogue))


def _prologue(site: Site, parameters: list[str]) -> list[str]:
    main, *others = site.region.before
    texts = {main.node: site.fresh("wide")}
    lines = [f"# prologue: {site.formula(site.activations, {main.node: 'x'})}"]
    lines.append(f"{texts[main.node]} = x.to(tl.float32)")
    for operand in others:
        texts[operand.node], loads = _load(site, operand, "features", site.features, parameters)
        lines += loads
    lines += _computed(site, site.region.prologue, texts)
    # Past the last feature stands 0, whatever the functions above make of it.
    lines.append(f"x = tl.where(features[None, :] < {site.features}, {texts[site.activations]}, 0.0)")
    lines.append(f"x = x.to({ELEMENTS[site.dtype]})")
    return lines


def _epilogue(site: Site, parameters: list[str]) -> list[str]:
    texts = {site.region.anchor: "acc"}
    lines = [f"# epilogue: {site.formula(site.region.root, {site.region.anchor: 'acc'})}"]
    for operand in site.region.after:
        texts[operand.node], loads = _load(site, operand, "columns", site.columns, parameters)
        lines += loads
    return [*lines, *_computed(site, site.region.epilogue, texts, last="acc")]


def _load(site: Site, operand: Operand, across: str, size: int, parameters: list[str]) -> tuple[str, list[str]]:
    """The variable that holds an operand, and the lines that load it; its arguments go to ``parameters``."""
    name = site.locals[operand.node]
    wanted, row = [f"{name}_ptr"], f"(rows % {name}_rows)" if operand.repeats else "rows"
    if site.is_limited(operand):
        wanted.append(f"{name}_rows")
    lines: list[str] = []
    address, mask, lift = f"{name}_ptr", "", ""
    if operand.form == "tile":
        step = str(size)
        if not site.is_dense(operand):
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


def _computed(site: Site, nodes: Iterable[Node], texts: dict[Node, str], last: str = "") -> Iterator[str]:
    nodes = tuple(nodes)
    for node in nodes:
        arguments = site.facts.arguments(node)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        dtypes = {n: n.meta["val"].dtype for n in tensors}
        texted = {n: texts[n] for n in tensors}
        expression = expression_of(node)(Call(arguments, texted, dtypes, node.meta["val"].dtype))
        if expression in texts.values() and node is not nodes[-1]:  # the same value
            texts[node] = expression
            continue
        texts[node] = last if last and node is nodes[-1] else site.values[node]
        yield f"{texts[node]} = {expression}"
