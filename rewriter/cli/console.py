# SPDX-License-Identifier: Apache-2.0
"""Where output goes: results on stdout (alone, as JSON, with ``--json``), progress and logs on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rewriter.errors import RewriterError

REFUSED = 1
INTERRUPTED = 130  # 128 + SIGINT, what shells expect
WIDTH = 100  # of output that goes to a file or pipe, unless COLUMNS says otherwise


def console(*, stderr: bool = False) -> Console:
    """A console on the present stdout or stderr."""
    stream = sys.stderr if stderr else sys.stdout
    unknown = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, width=WIDTH if unknown else None)


def show(renderable: Any, data: Any, as_json: bool) -> None:
    """Print the result for people, or the data for machines."""
    if as_json:
        typer.echo(json_text(data), nl=False)
    else:
        console().print(renderable)


def json_text(data: Any) -> str:
    """JSON as the standard has it: what is not finite is written as text."""
    return json.dumps(_plain(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def refusing() -> Iterator[None]:
    """Errors of the rewriter end the command with exit code 1 and their message, without a traceback."""
    err = console(stderr=True)
    try:
        yield
    except RewriterError as error:
        err.print(f"[bold red]{type(error).__name__}[/]", end=": ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(REFUSED) from error
    except KeyboardInterrupt:
        err.print("interrupted: nothing half-written remains", markup=False)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A progress callback (what, done, total) that draws one line per kind of work on stderr.

    The kind is the first word of ``what``; the rest says what is being worked on and goes when it is done.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def finish() -> None:
            for kind, task in tasks.items():
                total = next(t.total for t in bar.tasks if t.id == task)
                bar.update(task, completed=total, description=kind)

        def tell(what: str, done: int, total: int) -> None:
            kind = what.partition(" ")[0]
            if kind not in tasks:
                finish()
                tasks[kind] = bar.add_task(kind, total=max(total, 1))
            bar.update(tasks[kind], completed=done, total=max(total, 1), description=what)

        yield tell
        finish()


def quieten() -> None:
    """For a process that is only this command: warnings of the rewriter reach people, chatter of libraries does not."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, about itself, while it exports
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    handler = logging.StreamHandler()  # stderr
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("rewriter").addHandler(handler)
