# SPDX-License-Identifier: Apache-2.0
"""The folder where what is expensive to find again is kept: compiled sources, measured choices.

``$REWRITER_CACHE``, else ``$XDG_CACHE_HOME/rewriter``, else ``~/.cache/rewriter``. Everything in it can be deleted at
any time. Files are replaced whole, so that processes may share the folder; what cannot be read counts as absent.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def folder(name: str) -> Path:
    """``<cache>/<name>``, made if need be.

    Raises:
        OSError: it cannot be made; the environment variable ``REWRITER_CACHE`` names another place.
    """
    own = os.environ.get("REWRITER_CACHE")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rewriter"
    path = root / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, content: bytes) -> None:
    """Put a file in place whole: readers see the old one, the new one or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none or it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def merge_json(path: Path, entries: Mapping[str, Any]) -> None:
    """Add to the object in a file, which is made if need be. Writers wait for each other, so that nothing gets lost."""
    with _locked(path.with_suffix(".lock")):
        write(path, json.dumps({**read_json(path), **entries}, indent=1, sort_keys=True).encode())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process is inside. Without locks (Windows), the last of two writers at once may undo the other's entry."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
