# SPDX-License-Identifier: Apache-2.0
"""JSON files from strangers: bounded, strict, regular files only; digests that tell truncation and mixing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from rewriter.errors import LoadError, RewriterError

Json = Any
MAX_DEPTH = 100  # of any value: above what nested graphs and arguments need
_FOREIGN = {
    b"\x80": "a pickle",
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x89HDF": "an HDF5 file",
}
_SAFETENSORS = b"\0\0\0\0{"  # from byte 4: the upper half of the header's 64-bit length (below 4 GiB), and the header


def plain(value: Any, error: type[RewriterError], depth: int = 0) -> Json:
    """A copy of JSON-able data (tuples become lists); `error` if it is not, or too deep."""
    if depth > MAX_DEPTH:
        raise error(f"data nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise error("data holds an infinity or NaN, which JSON cannot say")
        return value
    if isinstance(value, (list, tuple)):
        return [plain(v, error, depth + 1) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: plain(v, error, depth + 1) for k, v in value.items()}
    raise error(f"data holds a {type(value).__name__}, which is not JSON")


def write(path: Path, value: Json, indent: int | None = None) -> None:
    """Write JSON in ASCII with one line break at the end. The value must be plain (`plain`)."""
    separators = (",", ":") if indent is None else (",", ": ")
    path.write_text(json.dumps(value, allow_nan=False, indent=indent, separators=separators) + "\n", "ascii")


def read(path: Path, limit: int) -> Json:
    """Read JSON of at most `limit` bytes.

    Refused are symbolic links and other special files, NaN and infinities, repeated keys, and nesting that
    the parser does not survive.

    Raises:
        LoadError: with the path and the reason.
    """
    with os.fdopen(_open(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise LoadError(f"{path}: larger than {limit} bytes")
    _refuse_foreign(path, content[:9])
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except LoadError as reason:
        raise LoadError(f"{path}: {reason}") from reason
    except RecursionError as reason:
        raise LoadError(f"{path}: nested too deeply") from reason
    except ValueError as reason:  # not UTF-8, not JSON, or a number of thousands of digits
        raise LoadError(f"{path}: truncated or not JSON ({reason})") from reason


def digest(path: Path) -> dict[str, Json]:
    """Size in bytes and SHA-256 of a file."""
    with os.fdopen(_open(path), "rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def check_digest(path: Path, expected: Json) -> None:
    """Compare a file with a recorded digest.

    Raises:
        LoadError: missing, truncated, of another save, or not a regular file.
    """
    fields = {"bytes": int, "sha256": str}
    if not isinstance(expected, dict) or {k: type(v) for k, v in expected.items()} != fields:
        raise LoadError(f"{path}: its digest in the manifest is malformed")
    with os.fdopen(_open(path), "rb") as file:
        _refuse_foreign(path, file.read(9))
        size = os.fstat(file.fileno()).st_size
    if size != expected["bytes"]:
        raise LoadError(f"{path}: truncated or of another save ({size} bytes, {expected['bytes']} expected)")
    if digest(path)["sha256"] != expected["sha256"]:
        raise LoadError(f"{path}: damaged or of another save (its SHA-256 is not the one in the manifest)")


def _open(path: Path) -> int:
    """A descriptor of a regular file; links are not followed, and a pipe does not block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as reason:
        why = "it is a symbolic link" if path.is_symlink() else reason.strerror
        raise LoadError(f"{path}: cannot be opened ({why})") from reason
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LoadError(f"{path}: not a regular file")
    return descriptor


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Name the format of a file that is not ours, by its first nine bytes. Raises LoadError."""
    if start[4:] == _SAFETENSORS:
        return  # its first four bytes are a length: any number, also one that starts like a pickle
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic):
            raise LoadError(f"{path}: it is {kind}, which is never opened here")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise LoadError("an object has a key twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise LoadError(f"{name} is not JSON")
