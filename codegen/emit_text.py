# SPDX-License-Identifier: Apache-2.0
"""Pieces of the text of emitted files: imports, signatures, values as Python spells them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.codegen.emit_expressions import Unfit
from rewriter.codegen.emit_templates import Hooked, Template, imports_of
from rewriter.kernels.launching import Config

LINE = 120  # characters, as in every file of the package
RUNNING = ("Specialised", "flat", "fused")  # of `rewriter.kernels.emitted.running`


def starred(path: str) -> str:
    """A module path with stars for layer numbers."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def comment(text: str) -> str:
    """Text that stays in one line of a comment: names may come from files, and must not become code."""
    return "".join(c if c.isprintable() else "?" for c in text)


def literal(value: Any, names: Mapping[Node, str]) -> str:
    """An argument of a node as Python. Raises Unfit."""
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(literal(item, names) for item in value)}]"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.memory_format)):
        return repr(value)
    raise Unfit(f"{value!r} cannot be written down")


def entries_of(values: Mapping[str, Any]) -> list[str]:
    """Of a dictionary of numbers, flags and words."""
    return [f'"{name}": ' + (f'"{value}"' if isinstance(value, str) else repr(value)) for name, value in values.items()]


def config_text(config: Config) -> str:
    constants = ", ".join(entries_of(config.constants))
    only = f', only="{config.only}"' if config.only else ""
    return f"Config({{{constants}}}, num_warps={config.num_warps}, num_stages={config.num_stages}{only})"


def schema(arguments: Mapping[Node, str]) -> str:
    """The line that says the operator's schema."""
    given = [f"{'Tensor' if _is_tensor(node) else 'SymInt'} {name}" for node, name in arguments.items()]
    line = f'SCHEMA = "({", ".join(given)}) -> Tensor"'
    if len(line) <= LINE:
        return line
    half = len(given) // 2
    parts = [f'    "({", ".join(given[:half])}, "', f'    "{", ".join(given[half:])}) -> Tensor"']
    return "\n".join(["SCHEMA = (", *parts, ")"])


def signature(name: str, arguments: Mapping[Node, str]) -> list[str]:
    """The head of a function of the operator's arguments."""
    given = [f"{argument}: {'torch.Tensor' if _is_tensor(node) else 'int'}" for node, argument in arguments.items()]
    line = f"def {name}({', '.join(given)}) -> torch.Tensor:"
    if len(line) <= LINE:
        return [line]
    return [f"def {name}(", *(f"    {argument}," for argument in given), ") -> torch.Tensor:"]


def imports(template: Template, kernels: Sequence[Hooked], text: str) -> str:
    """What the other parts of a file need."""
    package = template.module.rpartition(".")[0]
    running = ", ".join(name for name in RUNNING if re.search(rf"\b{name}\(", text))
    lines = [
        f"from {template.module} import {template.function} as implementation",
        f"from rewriter.kernels.emitted.running import {running}",
        "from rewriter.kernels.launching import Config",
    ]
    if "functions." in text:
        lines.append("from rewriter.kernels.emitted import functions")
    helpers: dict[str, set[str]] = {}
    for kernel in kernels:
        for name, (module, original) in imports_of(kernel.kernel).items():
            helpers.setdefault(module, set()).add(original if name == original else f"{original} as {name}")
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in helpers.items()]
    note = "  # registers the operator that the reference calls"
    registers = [f"import {package}.op{note}", ""] if find_spec(f"{package}.op") is not None else []
    return "\n".join(["import torch", "import triton", "import triton.language as tl", "", *registers, *sorted(lines)])


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
