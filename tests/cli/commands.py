# SPDX-License-Identifier: Apache-2.0
"""Reading what a command printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from click.testing import Result
from rich.cells import cell_len

VOCABULARY = 512
ALL = "fuse,shift_add:group=32:embeddings=true,vq_logits:dims=8"

Run = Callable[..., Result]


def done(result: Result) -> str:
    """The output of a command that succeeded."""
    assert result.exit_code == 0, result.stderr or repr(result.exception)
    return result.stdout


def data(result: Result) -> Any:
    """What ``--json`` printed: JSON and nothing else on stdout."""
    return json.loads(done(result))


def refused(result: Result) -> str:
    """The message of a command that refused: exit code 1, nothing on stdout, no traceback."""
    assert result.exit_code == 1, (result.exit_code, result.stdout, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def readable(text: str) -> list[str]:
    """Lines of at most 100 columns in which nothing was cut off with an ellipsis."""
    lines = text.splitlines()
    assert lines
    assert max(cell_len(line.rstrip()) for line in lines) <= 100
    assert not [line for line in lines if line.rstrip().endswith("…") or "…│" in line or "… │" in line]
    return lines
