# SPDX-License-Identifier: Apache-2.0
"""Atomic files: the old content or the new content, never half of one.

What is written goes to a hidden sibling first (same file system), is flushed to the disk, and takes the place
of the old content by one rename. An exception on the way, Ctrl-C included, removes the sibling and leaves the
old content; a killed process leaves at most a hidden sibling, which nothing reads.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rewriter.errors import ExportError, RewriterError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h: swap two paths in one step


def check_writable(path: str | os.PathLike[str], error: type[RewriterError] = ExportError) -> Path:
    """Refuse an unwritable output path before long work; return it with symbolic links resolved.

    Tries what a save will do: creates (and removes) a hidden sibling in the nearest existing parent folder.
    Permission bits alone do not tell (root, read-only and full file systems).

    Raises:
        error: the path cannot be written; the message names the path and the reason.
    """
    target = _resolve(path, error)
    parent = target.parent
    try:
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise error(f"cannot write {target}: {parent} is not a folder; choose another path")
        probe = parent / _temporary_name(target)
        _touch(probe)
        probe.unlink()
    except OSError as reason:
        raise error(_unwritable(target, reason)) from reason
    return target


@contextmanager
def atomic_file(path: str | os.PathLike[str], error: type[RewriterError] = ExportError) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path`, on any exception it disappears.

    Missing parent folders are created. The temporary name keeps the suffix of `path`. An existing file keeps
    its permission bits; a symbolic link keeps pointing where it did and its target is replaced.

    Raises:
        error: `path` is a folder or cannot be written, or the body wrote nothing.
    """
    target = _resolve(path, error)
    if os.path.isdir(target):
        raise error(f"cannot write {target}: it is a folder; give the name of a file")
    temporary = target.parent / _temporary_name(target)
    try:
        _create(target, error, lambda: _touch(temporary))
        yield temporary
        with _reported(target, error):
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str],
    replaceable: Callable[[Path], bool],
    error: type[RewriterError] = ExportError,
) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`, on any exception it disappears.

    An existing folder at `path` is replaced as a whole, and only if it is empty or `replaceable(path)` says
    that its content is ours to delete. The two folders are swapped in one step where the system can (Linux).

    Raises:
        error: `path` is a file, holds something else, or cannot be written.
    """
    target = _resolve(path, error)
    check_replaceable(target, replaceable, error)
    temporary = target.parent / _temporary_name(target)
    try:
        _create(target, error, lambda: os.mkdir(temporary))
        yield temporary
        with _reported(target, error):
            for file in sorted(temporary.rglob("*"), reverse=True):
                _flush(file)
            _flush(temporary)
        check_replaceable(target, replaceable, error)  # again: someone may have written there meanwhile
        with _reported(target, error):
            _take_place(temporary, target)
            _flush(target.parent)
    finally:
        # After a swap the temporary name holds the old folder.
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(
    path: Path, replaceable: Callable[[Path], bool], error: type[RewriterError] = ExportError
) -> None:
    """Refuse a path whose present content must not be deleted; see `atomic_directory`."""
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        raise error(f"cannot write {path}: it is a file, and a folder is written here; choose another path")
    if any(path.iterdir()) and not replaceable(path):
        raise error(
            f"cannot write {path}: the folder exists and holds files that were not written by this function; "
            "choose another path or empty the folder yourself"
        )


def _resolve(path: str | os.PathLike[str], error: type[RewriterError]) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as reason:  # ValueError: a null byte in the path
        raise error(f"cannot write {os.fspath(path)!r}: {reason}; choose another path") from reason


def _temporary_name(target: Path) -> str:
    return f".{secrets.token_hex(6)}.tmp.{target.name}"


def _touch(path: Path) -> None:
    """Create an empty file that was not there, with the permissions of any new file."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _create(target: Path, error: type[RewriterError], create: Callable[[], None]) -> None:
    with _reported(target, error):
        target.parent.mkdir(parents=True, exist_ok=True)
        create()


@contextmanager
def _reported(target: Path, error: type[RewriterError]) -> Iterator[None]:
    """Turn the system's errors into ours; only around our own steps, never around the caller's body."""
    try:
        yield
    except OSError as reason:
        raise error(_unwritable(target, reason)) from reason


def _unwritable(target: Path, reason: OSError) -> str:
    return f"cannot write {target}: {reason.strerror or reason}; choose another path or free the place"


def _flush(path: Path) -> None:
    """Ask the system to put a file, or the entries of a folder, on the disk."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as reason:
        if reason.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _take_place(temporary: Path, target: Path) -> None:
    """Put a finished folder in its place; the old content, if any, ends up under the temporary name."""
    if not target.exists():
        os.rename(temporary, target)
        return
    if _exchange(temporary, target):
        return
    # Without a swap there is a moment with no folder at `target`; the old one is put back if the second step
    # fails.
    aside = temporary.with_name(temporary.name + ".old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (renameat2); False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    ctypes.set_errno(0)
    status = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
