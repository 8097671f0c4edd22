# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: old content or new content, whatever happens in between."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from rewriter import files
from rewriter.errors import ExportError, PlanError
from rewriter.files import atomic_directory, atomic_file, check_writable


def anything(path: Path) -> bool:
    return True


def nothing(path: Path) -> bool:
    return False


def test_file_appears_with_its_content(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out.json"
    with atomic_file(target) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["out.json"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_file_leaves_the_old_one(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    with pytest.raises(failure), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise failure
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_file_keeps_permissions_and_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with atomic_file(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640


def test_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_file(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_body_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the body's own") as caught, atomic_file(tmp_path / "a"):
        raise OSError("the body's own")
    assert not isinstance(caught.value, ExportError)


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target, nothing) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("swap", [True, False])
def test_directory_is_replaced_as_a_whole(tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swap:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_directory(target, anything) as temporary:
        (temporary / "new").write_text("new")
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failed_directory_leaves_the_old_one(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(failure), atomic_directory(target, anything) as temporary:
        (temporary / "half").write_text("half")
        raise failure
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_failed_second_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename, calls = os.rename, []

    def failing(source: Path, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, anything) as temporary:
        (temporary / "new").write_text("new")
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    with (
        pytest.raises(ExportError, match="holds files that were not written"),
        atomic_directory(tmp_path, nothing),
    ):
        pytest.fail("the body must not run")
    assert (tmp_path / "precious").read_text() == "keep"


def test_files_that_arrive_meanwhile_are_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ExportError, match="not written"), atomic_directory(target, nothing) as temporary:
        (temporary / "new").write_text("new")
        target.mkdir()
        (target / "guest").write_text("guest")
    assert os.listdir(target) == ["guest"]


def test_wrong_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ExportError, match="it is a folder"), atomic_file(tmp_path):
        pytest.fail("the body must not run")
    with pytest.raises(ExportError, match="it is a file"), atomic_directory(tmp_path / "file", anything):
        pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "keep"


@pytest.mark.parametrize("tail", ["file/below", "file/below/deeper", "n" * 300, "null\0byte"])
def test_unwritable_paths_are_told_before_the_work(tmp_path: Path, tail: str) -> None:
    (tmp_path / "file").write_text("keep")
    path = str(tmp_path / "file")[:-4] + tail
    with pytest.raises(ExportError, match=r"cannot write .* choose another path"):
        check_writable(path)
    with pytest.raises(ExportError, match="cannot write"), atomic_file(path):
        pytest.fail("the body must not run")
    with pytest.raises(ExportError, match="cannot write"), atomic_directory(path, anything):
        pytest.fail("the body must not run")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system nobody can write to")
def test_read_only_file_system_and_own_error_class() -> None:
    with pytest.raises(PlanError, match=r"cannot write /proc/.*plan\.json"):
        check_writable("/proc/self/plan.json", PlanError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="Permission denied"):
        check_writable(tmp_path / "a")


def test_check_leaves_no_trace(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a" / "b") == tmp_path.resolve() / "a" / "b"
    assert os.listdir(tmp_path) == []


def write_half(target: Path, started: Connection) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
    with atomic_directory(target, anything) as folder:
        (folder / "a").write_text("half")
        started.send("writing")
        time.sleep(60)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_the_old_content(tmp_path: Path, end: signal.Signals) -> None:
    """A real process stopped in the middle of writing; the parent looks at what is left."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    processes = multiprocessing.get_context("fork")
    ours, theirs = processes.Pipe()
    writer = processes.Process(target=write_half, args=(target, theirs))
    writer.start()
    assert ours.poll(30) and ours.recv() == "writing"
    assert writer.pid is not None
    os.kill(writer.pid, end)
    writer.join(30)
    assert writer.exitcode not in (0, None)
    assert (target / "a").read_text() == "old"
    left = [name for name in os.listdir(tmp_path) if name != "out"]
    assert left == [] if end == signal.SIGINT else all(name.startswith(".") for name in left)
