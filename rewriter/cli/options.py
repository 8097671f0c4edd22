# SPDX-License-Identifier: Apache-2.0
"""The arguments and options the commands share, with their help; grouped into panels so that help stays readable.

Options that go together are the fields of a dataclass; a command takes the dataclass, :func:`expanded` shows typer its fields.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

_WHAT = "What to rewrite"
_DATA = "Inputs and data"
_HOW = "How"
_OUT = "Output"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local transformers folder, or module:callable that returns a module.")
]
ModelOrSaved = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder written by --save, a local transformers folder, or module:callable.",
    ),
]
Passes = Annotated[
    str,
    typer.Option(
        "--passes",
        "-p",
        metavar="LIST",
        rich_help_panel=_WHAT,
        help="Passes in order, separated by commas; options follow after colons, as in shift_add:bits=4:group=64.",
    ),
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SITE=PASS",
        rich_help_panel=_WHAT,
        help="Where: a module path, or re: and a regular expression, =PASS; =none protects. Repeatable.",
    ),
]
Expect = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PASS=N",
        rich_help_panel=_WHAT,
        help="Refuse unless PASS takes N sites; prints the nearest misses. Repeatable.",
    ),
]
AllowUntrained = Annotated[
    bool,
    typer.Option(
        rich_help_panel=_WHAT,
        help="Apply rewrites that need training to be good without it.",
    ),
]

ExampleInputs = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_DATA,
        help="Safetensors with an example call, tensors named as forward's arguments; if it cannot be inferred.",
    ),
]
Static = Annotated[
    bool, typer.Option("--static-shapes", rich_help_panel=_DATA, help="Fix all sizes to those of the example.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        rich_help_panel=_DATA,
        help="Dtype to compute in; fp16 weights held in float32 still count as fp16.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_DATA,
        help="Safetensors with input_ids \\[n, length], or saved statistics.",
    ),
]
Rows = Annotated[
    int, typer.Option(metavar="N", min=1, rich_help_panel=_DATA, help="Rows of the calibration file to use.")
]
Evaluate = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_DATA,
        help="Held-out input_ids: measure perplexity, KL, top-1 agreement and latency before and after.",
    ),
]
EvaluateRows = Annotated[
    int, typer.Option(metavar="N", min=1, rich_help_panel=_DATA, help="Rows of the held-out file to use.")
]

Seed = Annotated[
    int,
    typer.Option(
        metavar="N", rich_help_panel=_HOW, help="Every random draw is a function of it, the site and the rule."
    ),
]
Target = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=_HOW, help="cpu, cuda or hip; default: where the parameters are.")
]
Strict = Annotated[bool, typer.Option(rich_help_panel=_HOW, help="Refuse to fall back to reference implementations.")]
KeepOriginal = Annotated[
    bool, typer.Option(rich_help_panel=_HOW, help="Keep replaced tensors in memory, so that sites can be undone.")
]

Onnx = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_OUT,
        help="Write ONNX, run it in ONNX Runtime and compare.",
    ),
]
Mlir = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_OUT,
        help="Write MLIR instead, by torch-mlir: bytecode where the name ends in .mlirbc, else text.",
    ),
]
Dialect = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_OUT,
        help="MLIR dialect: torch, linalg-on-tensors, stablehlo or tosa; all but torch need --static-shapes.",
    ),
]
Opset = Annotated[int, typer.Option(metavar="N", min=20, max=25, rich_help_panel=_OUT, help="ONNX opset, 20 to 25.")]
Save = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=_OUT,
        help="Write the rewritten model (safetensors and JSON; rewriter.load reads it).",
    ),
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", rich_help_panel=_OUT, help="Write the report as JSON.")
]
PlanOut = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", rich_help_panel=_OUT, help="Write the plan as JSON.")
]
AsJson = Annotated[bool, typer.Option("--json", rich_help_panel=_OUT, help="Print JSON, alone on stdout.")]


def examples(*lines: str) -> str:
    """An epilog: one example per line (an empty line between paragraphs is what keeps them apart)."""
    return "\n\n".join(["[bold]Examples[/]", *(f"  {line}" for line in lines)])


def expanded(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take dataclasses of options: typer sees their fields, the command gets them made.

    Args:
        defaults: of fields, for this command, by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        parameters = inspect.signature(command).parameters.values()
        groups = {p.name: hints[p.name] for p in parameters if dataclasses.is_dataclass(hints[p.name])}
        shown = []
        for parameter in parameters:
            name = parameter.name
            if name in groups:
                shown += _fields(groups[name], defaults)
            else:
                shown.append(_keyword(name, hints[name], parameter.default))

        @functools.wraps(command)
        def call(**given: Any) -> None:
            made = {
                name: group(**{f.name: given.pop(f.name) for f in dataclasses.fields(group)})
                for name, group in groups.items()
            }
            command(**made, **given)

        call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in shown}
        return call

    return decorate


def _fields(group: type, defaults: dict[str, object]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    own = {f.name: f.default for f in dataclasses.fields(group) if f.default is not dataclasses.MISSING} | defaults
    return [
        _keyword(f.name, hints[f.name], own.get(f.name, inspect.Parameter.empty)) for f in dataclasses.fields(group)
    ]


def _keyword(name: str, annotation: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
