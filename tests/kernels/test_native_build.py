# SPDX-License-Identifier: Apache-2.0
"""Compiling C++ on first use: kept, rebuilt when damaged, refused in words, and no second OpenMP runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rewriter.kernels import native
from rewriter.kernels.launching import Unsupported

SOURCE = """
#include "value.h"
#include <cstdint>
extern "C" void fill(int32_t* to, long count) { for (long i = 0; i < count; i++) to[i] = VALUE + OFFSET; }
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
static void count(void* to) { __atomic_fetch_add((int32_t*)to, 1, __ATOMIC_RELAXED); }
extern "C" void team(int32_t* to, int threads) { GOMP_parallel(count, to, (unsigned)threads, 0); }
"""
FUNCTIONS = {"fill": [ctypes.c_void_p, ctypes.c_long], "team": [ctypes.c_void_p, ctypes.c_int]}
FLAGS = ("-O1", "-fPIC", "-shared")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source with a header, and an empty cache of its own."""
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", {})
    (tmp_path / "value.h").write_text("#define VALUE 40\n")
    path = tmp_path / "filled.cpp"
    path.write_text(SOURCE)
    yield path
    native.compiler.cache_clear()
    native._text.cache_clear()


def _filled(source: Path, offset: int = 2) -> int:
    found = torch.zeros(3, dtype=torch.int32)
    native.library(source, {"OFFSET": offset}, FUNCTIONS, FLAGS).fill(native.address(found), 3)
    assert (found == found[0]).all()
    return int(found[0])


def _built(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "native").glob("*.so"))


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", {})
    native._text.cache_clear()


def test_each_set_of_macros_is_built_once_and_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [_filled(source), _filled(source, 5), _filled(source)] == [42, 45, 42]
    kept = {path: path.stat().st_mtime_ns for path in _built(source)}
    assert len(kept) == 2
    _forget(monkeypatch)  # as another process would
    monkeypatch.setattr(native, "_compiled", lambda *_: pytest.fail("built again"))
    assert [_filled(source), _filled(source, 5)] == [42, 45]
    assert {path: path.stat().st_mtime_ns for path in _built(source)} == kept


def test_a_changed_header_or_flag_is_another_build(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _filled(source) == 42
    (source.parent / "value.h").write_text("#define VALUE 50\n")
    _forget(monkeypatch)
    assert _filled(source) == 52
    native.library(source, {"OFFSET": 2}, FUNCTIONS, (*FLAGS, "-O2"))
    assert len(_built(source)) == 3


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None], ids=["empty", "cut off", "a bit flipped"])
def test_a_damaged_file_is_built_anew(source: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None) -> None:
    _filled(source)
    (path,) = _built(source)
    good = path.read_bytes()
    path.unlink()  # the loaded one stays mapped
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:] if damage is None else damage)
    _forget(monkeypatch)
    assert _filled(source) == 42
    assert native._intact(path)


def test_threads_of_one_process_build_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    compiled = native._compiled
    monkeypatch.setattr(native, "_compiled", lambda *given: built.append(given) or compiled(*given))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: _filled(source), range(4))) == [42] * 4
    assert len(built) == 1


def test_without_a_compiler_the_reason_says_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(source.parent))
    native.compiler.cache_clear()
    with pytest.raises(Unsupported, match=r"no C\+\+ compiler; install g\+\+ or name one in .* CXX"):
        _filled(source)


def test_cxx_names_the_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    native.compiler.cache_clear()
    assert native.compiler() == ("/nowhere/g++", "-m64")
    with pytest.raises(Unsupported, match="the C\\+\\+ compiler does not start"):
        _filled(source)


def test_a_source_that_does_not_compile_is_tried_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("#error broken")
    for _ in range(2):
        with pytest.raises(Unsupported, match=r"(?s)-DOFFSET=2.*failed:.*#error broken"):
            _filled(source)
        monkeypatch.setattr(native, "_compiled", lambda *_: pytest.fail("tried again"))


def test_a_folder_everybody_can_write_to_is_not_trusted(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _filled(source)
    _forget(monkeypatch)
    (source.parent / "cache" / "native").chmod(0o777)
    with pytest.raises(Unsupported, match="writable by everybody"):
        _filled(source)


def test_a_cache_that_cannot_be_made_is_a_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(source))  # a file
    with pytest.raises(Unsupported, match="REWRITER_CACHE"):
        _filled(source)


def test_the_openmp_runtime_is_the_one_torch_loaded(source: Path) -> None:
    before = _openmp_runtimes()
    library = native.library(source, {"OFFSET": 2}, FUNCTIONS, FLAGS)
    met = torch.zeros(1, dtype=torch.int32)
    library.team(native.address(met), 2)
    assert int(met) == 2  # one call per thread asked for, whatever torch.get_num_threads() says
    assert before and _openmp_runtimes() == before


def _openmp_runtimes() -> set[str]:
    maps = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return {path for path in maps if any(name in Path(path).name for name in ("libgomp", "libiomp", "libomp"))}


def test_threads_follow_torch_and_the_size_of_the_work() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert [native.threads(work, 100) for work in (0, 99, 199, 200, 10**9)] == [1, 1, 1, 2, 2]
        torch.set_num_threads(1)
        assert native.threads(10**9, 100) == 1
    finally:
        torch.set_num_threads(before)
