# SPDX-License-Identifier: Apache-2.0
"""Templates: an operator's own kernel, read as text, and specialised.

There is one source of every kernel's mathematics: the function in ``kernels/<family>/kernels.py``. What a site needs of
it is learned by asking the operator's device implementation what it would start, for several numbers of rows, without
starting it. Arguments that are the same for all of them are constants of the site; where the kernel says
``# hook: prologue(x, rows, features)`` or ``# hook: epilogue(acc, rows, columns, inside)``, lines are put in.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.codegen.emit_expressions import Unfit
from rewriter.kernels.launching import Request, Unsupported, recorded
from rewriter.kernels.spec import REGISTRY

PROLOGUE = "# hook: prologue(x, rows, features)"
EPILOGUE = "# hook: epilogue(acc, rows, columns, inside)"
# One row of a decoding step up to a training batch: implementations choose another kernel or configuration by these.
ROWS = (1, 2, 8, 16, 32, 64, 256, 4096)


@dataclass(frozen=True)
class Template:
    """An operator that can be specialised.

    Attributes:
        operator: as in graphs.
        module, function: its device implementation.
        activations: the argument whose rows are the rows of the result.
    """

    operator: Any
    module: str
    function: str
    activations: str


def templates() -> dict[Any, Template]:
    """The dense linear layer, and every registered operator with an implementation for GPUs and one activation."""
    dense = Template(torch.ops.aten.linear.default, "rewriter.kernels.dense.launch", "linear", "input")
    found = {dense.operator: dense}
    for operator, spec in REGISTRY.items():
        if "cuda" in spec.implementations and len(spec.autocast) == 1:
            module, _, function = spec.implementations["cuda"].partition(":")
            found[operator] = Template(operator, module, function, spec.autocast[0])
    return found


@dataclass(frozen=True)
class Hooked:
    """A kernel of an operator as a site would start it.

    Attributes:
        kernel: under ``@triton.jit``.
        requests: by number of rows.
        folded: arguments that are the same in all of them: numbers, flags, and what is left out.
        activations: the argument that points to the activations.
    """

    kernel: Any
    requests: tuple[Request, ...]
    folded: Mapping[str, Any]
    activations: str

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


def hooked(
    template: Template, arguments: Mapping[str, Any], rows: Sequence[int], features: int, dtype: torch.dtype
) -> tuple[Hooked, ...]:
    """The kernels a site would start, with hooks, in order of their names.

    Args:
        arguments: of the node, by schema name; nodes stand for tensors.
        rows: numbers of rows to ask for.
        features, dtype: of the activations.

    Raises:
        Unfit: there is no kernel for the site, or it cannot be specialised; the sentence says why.
    """
    others = tuple((name, _described(name, value)) for name, value in arguments.items() if name != template.activations)
    position = list(arguments).index(template.activations)
    return _hooked(template, position, others, tuple(rows), features, dtype)


@dataclass(frozen=True)
class _Shape:
    """A tensor without its data."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def _described(name: str, value: Any) -> Any:
    """An argument as something equal for equal sites."""
    if not isinstance(value, Node):
        return tuple(value) if isinstance(value, list) else value
    tensor = value.meta.get("val")
    if not isinstance(tensor, Tensor) or not all(isinstance(size, int) for size in tensor.shape):
        raise Unfit(f"{name} has a size that is only known when the program runs")
    return _Shape(tuple(tensor.shape), tensor.dtype)


@lru_cache(maxsize=1024)
def _hooked(
    template: Template,
    position: int,
    others: tuple[tuple[str, Any], ...],
    rows: tuple[int, ...],
    features: int,
    dtype: torch.dtype,
) -> tuple[Hooked, ...]:
    kernels: dict[Any, list[tuple[Request, str]]] = {}
    try:
        implementation = getattr(import_module(template.module), template.function)
        args = [
            torch.empty(value.sizes, dtype=value.dtype, device="meta") if isinstance(value, _Shape) else value
            for _, value in others
        ]
        for count, stride in product(rows, (1, 2)):
            # Rows lie that much farther apart than they could: no site has a right to its strides.
            x = torch.empty((count, features * stride), dtype=dtype, device="meta")[:, :features]
            request, pointer = _started(implementation, [*args[:position], x, *args[position:]], x)
            kernels.setdefault(request.kernel, []).append((request, pointer))
    except Unsupported as reason:
        raise Unfit(f"no kernel: {reason}") from reason
    found = []
    for kernel in sorted(kernels, key=lambda kernel: str(kernel.__name__)):
        requests = tuple(request for request, _ in kernels[kernel])
        found.append(Hooked(kernel, requests, _constant(requests), kernels[kernel][0][1]))
    return tuple(found)


def _started(implementation: Any, args: Sequence[Any], x: Tensor) -> tuple[Request, str]:
    """The one hooked kernel a call starts, which is to be its last, and its pointer to the activations."""
    with recorded() as requests:
        implementation(*args)
    with_hook = [request for request in requests if EPILOGUE in inspect.getsource(request.kernel.fn)]
    if len(with_hook) != 1 or with_hook[0] is not requests[-1]:
        raise Unfit(f"for {x.shape[0]} rows the last kernel {implementation.__name__} starts has no epilogue hook")
    storage = x.untyped_storage()._cdata
    given = with_hook[0].args.items()
    own = [name for name, a in given if isinstance(a, Tensor) and a.untyped_storage()._cdata == storage]
    # None where scattered rows are copied first; the pointer goes by the same name then.
    return with_hook[0], own[0] if own else ""


def _constant(requests: Sequence[Request]) -> dict[str, Any]:
    """Arguments with one value in all requests. Others are settings, not shapes, and stay arguments."""
    first = requests[0]
    given = [{**request.args, **request.constants} for request in requests]
    return {
        name: value
        for name, value in {**first.args, **first.constants}.items()
        if (value is None or isinstance(value, (int, float)))
        and all(name in other and type(other[name]) is type(value) and other[name] == value for other in given)
    }


# --- text -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Insertions:
    """What is put into a kernel.

    Attributes:
        parameters: new arguments.
        prologue, epilogue: lines at the hooks.
    """

    parameters: tuple[str, ...]
    prologue: tuple[str, ...]
    epilogue: tuple[str, ...]


def names_in(kernel: Any) -> set[str]:
    """Every name a kernel uses, so that new ones can differ."""
    return {name for names in _names(kernel) for name in names}


def imports_of(kernel: Any) -> dict[str, tuple[str, str]]:
    """Globals of a kernel, Triton's modules left out: name -> module and name there."""
    read, own = _names(kernel)
    found = {}
    # Triton's interpreter leaves names of its own among the globals, builtins and others: what is local stays local.
    for name in sorted((read - own) & set(kernel.fn.__globals__)):
        value = kernel.fn.__globals__[name]
        if name in ("tl", "triton") or hasattr(builtins, name):
            continue
        function = getattr(value, "fn", value)
        home = getattr(function, "__module__", None) if callable(function) else None
        found[name] = (home or kernel.fn.__module__, getattr(function, "__name__", name) if home else name)
    return found


def _names(kernel: Any) -> tuple[set[str], set[str]]:
    """Names a kernel reads, and names that are its arguments and variables."""
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))))
    named = [node for node in nodes if isinstance(node, ast.Name)]
    read = {node.id for node in named if isinstance(node.ctx, ast.Load)}
    own = {node.id for node in named if isinstance(node.ctx, ast.Store)}
    return read, own | {node.arg for node in nodes if isinstance(node, ast.arg)}


def specialised(hooked: Hooked, name: str, put: Insertions, operand: str) -> str:
    """The text of a kernel under a new name, with constants for arguments and lines for hooks.

    Args:
        operand: dtype of the products' operand that comes from the activations, in Triton's words. The kernel says "the
            dtype the activations have in memory", which is another where a prologue casts.

    Raises:
        Unfit: a hook that is needed is not there.
    """
    kernel, folded = hooked.kernel, hooked.folded
    source = textwrap.dedent(inspect.getsource(kernel.fn))
    if put.prologue:
        source = source.replace(f"{hooked.activations}.dtype.element_ty", operand)
    lines = source.splitlines()
    definition = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    decorators = lines[definition.decorator_list[0].lineno - 1 : definition.lineno - 1]
    end = _header_end(source, definition.lineno)
    body = lines[end:]
    if put.prologue and PROLOGUE not in source:
        raise Unfit(f"{kernel.__name__} has no prologue hook")
    constants = [f"    {key}: tl.constexpr = {value!r}" for key, value in folded.items()]
    header = _signature(definition, name, folded, put.parameters)
    # A docstring stays the first statement.
    documented = isinstance(definition.body[0], ast.Expr) and isinstance(definition.body[0].value, ast.Constant)
    first = (definition.body[0].end_lineno or 0) - end if documented else 0
    return "\n".join([*decorators, *header, *body[:first], *constants, *_hooked_lines(body[first:], put)])


def _signature(definition: ast.FunctionDef, name: str, folded: Mapping[str, Any], new: Sequence[str]) -> list[str]:
    """One argument a line: those of the original that are left, the new ones, the compile-time ones."""
    kept = [argument for argument in definition.args.args if argument.arg not in folded]
    constexpr = [argument for argument in kept if argument.annotation is not None]
    ordered = [*(ast.unparse(a) for a in kept if a.annotation is None), *new, *(ast.unparse(a) for a in constexpr)]
    return [f"def {name}(", *(f"    {text}," for text in ordered), "):"]


def _header_end(source: str, first: int) -> int:
    """Number of the line that ends the function's signature."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[0] < first or token.type != tokenize.OP:
            continue
        depth += (token.string in "([{") - (token.string in ")]}")
        if token.string == ":" and depth == 0:
            return token.start[0]
    raise Unfit("the kernel's signature does not end")


def _hooked_lines(body: Sequence[str], put: Insertions) -> list[str]:
    """The body with the hooks replaced; hooks nothing is put at are dropped."""
    lines: list[str] = []
    for line in body:
        inserted = {PROLOGUE: put.prologue, EPILOGUE: put.epilogue}.get(line.strip())
        if inserted is None:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        lines += [indent + text for text in inserted]
    return lines
