# SPDX-License-Identifier: Apache-2.0
"""C++ for the CPU: compiled on first use for this processor, kept, and called through ctypes with data pointers.

A source includes nothing of torch, so that it compiles in about a second; what is fixed for a format (bits, layout)
are its macros. The result is kept under a digest of source, headers, macros, flags, compiler and processor, so it is
built once per machine, and never used for another.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import cache as files
from rewriter.kernels.launching import Unsupported

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
MINUTES = 5  # a compiler that takes longer hangs

Functions = Mapping[str, Sequence[Any]]

_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL | Unsupported] = {}


def library(
    source: Path, macros: Mapping[str, object], functions: Functions, flags: Sequence[str] = FLAGS
) -> ctypes.CDLL:
    """The compiled source, loaded; built if this machine has not built it yet.

    Args:
        source: a ``.cpp`` with ``extern "C"`` functions that return nothing; it may include headers of its folder.
        macros: defined for it (``-D``).
        functions: the types of their arguments, by name.
        flags: of the compiler.

    Raises:
        Unsupported: no compiler, or it refuses the source, or the cache cannot be written.
    """
    key = _key(source, macros, flags)
    with _lock:
        if key not in _loaded:
            try:
                _loaded[key] = _load(source, key, macros, functions, flags)
            except Unsupported as reason:
                _loaded[key] = reason  # asked once, not at every call
    found = _loaded[key]
    if isinstance(found, Unsupported):
        raise found
    return found


def address(tensor: Tensor | None) -> int | None:
    """Of a tensor's first element; its strides are the caller's business."""
    return None if tensor is None else tensor.data_ptr()


def threads(work: int, grain: int) -> int:
    """As many threads as torch may use (`torch.set_num_threads`), but none with less than ``grain`` of the work."""
    return max(1, min(torch.get_num_threads(), work // grain))


# ---------------------------------------------------------------------------------- building


def _load(
    source: Path, key: str, macros: Mapping[str, object], functions: Functions, flags: Sequence[str]
) -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise Unsupported(f"native kernels are built on Linux only, not on {sys.platform}")
    try:
        folder = files.folder("native")
        _check_owner(folder)
        path = folder / f"{source.stem}_{key}.so"
        if not _intact(path):
            files.write(path, _sealed(_compiled(source, macros, flags)))
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unsupported(f"{source.name}: {error}; the variable REWRITER_CACHE names another cache folder") from error
    for name, arguments in functions.items():
        function = getattr(found, name)
        function.argtypes, function.restype = list(arguments), None
    return found


def _compiled(source: Path, macros: Mapping[str, object], flags: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "kernel.so"
        defined = [f"-D{name}={value}" for name, value in macros.items()]
        command = [*compiler(), *flags, *defined, str(source), "-o", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
        except subprocess.TimeoutExpired as error:
            raise Unsupported(f"{command[0]} did not finish {source.name} within {MINUTES} minutes") from error
        if done.returncode:
            raise Unsupported(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
        return out.read_bytes()


def _sealed(content: bytes) -> bytes:
    """With its digest behind it, where a loader does not look: loading half a library kills the process."""
    return content + hashlib.sha256(content).digest()


def _intact(path: Path) -> bool:
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _check_owner(folder: Path) -> None:
    """A library is code: it comes from nobody else's folder."""
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o002:
        raise Unsupported(
            f"{folder} belongs to somebody else or is writable by everybody; "
            "name a folder of your own in the environment variable REWRITER_CACHE"
        )


# ---------------------------------------------------------------------------------- what a build depends on


def _key(source: Path, macros: Mapping[str, object], flags: Sequence[str]) -> str:
    parts = [_text(source), _version(compiler()), processor(), *flags, *(f"{k}={v}" for k, v in macros.items())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@cache
def _text(source: Path) -> str:
    return "\0".join(path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))


@cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler: ``$CXX``, else the first of g++, clang++, c++ that is installed.

    Raises:
        Unsupported: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return tuple(chosen)
    for name in ("g++", "clang++", "c++"):
        if (path := shutil.which(name)) is not None:
            return (path,)
    raise Unsupported("no C++ compiler; install g++ or name one in the environment variable CXX")


@cache
def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"the C++ compiler does not start: {error}") from error
    return done.stdout


@cache
def processor() -> str:
    """This processor, by name and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "CPU part", "CPU implementer", "Features")
    first = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in reversed(lines) if ":" in line}
    return "\0".join([platform.machine(), *(first.get(name, "") for name in names)])
