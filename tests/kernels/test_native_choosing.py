# SPDX-License-Identifier: Apache-2.0
"""A choice between ways is measured once per kind of call and outlives the process."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewriter.kernels import choosing


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    choosing.CPU.forget()
    yield tmp_path / "tuning" / choosing.CPU.file
    choosing.CPU.forget()


def _ways(calls: Counter[str]) -> dict[str, Callable[[], None]]:
    def way(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return run

    return {"slow": way("slow", 0.02), "quick": way("quick", 0)}


def test_the_fastest_is_measured_once_and_kept(file: Path) -> None:
    calls: Counter[str] = Counter()
    assert choosing.fastest("a kind", _ways(calls)) == "quick"
    assert calls == {"slow": choosing.REPEATS + 1, "quick": choosing.REPEATS + 1}
    choosing.CPU.forget()  # another process
    assert choosing.fastest("a kind", _ways(calls)) == "quick"
    assert calls.total() == 2 * (choosing.REPEATS + 1)
    assert choosing.fastest("another kind", _ways(calls)) == "quick"
    assert calls.total() == 4 * (choosing.REPEATS + 1)
    assert json.loads(file.read_text()) == {"a kind": "quick", "another kind": "quick"}


@pytest.mark.parametrize("content", ["{", "[]", '{"a kind": "a way of an older version"}', '{"a kind": 3}'])
def test_what_cannot_be_used_is_measured_again(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert choosing.fastest("a kind", _ways(Counter())) == "quick"
    assert json.loads(file.read_text()) == {"a kind": "quick"}


def test_what_others_found_meanwhile_stays(file: Path) -> None:
    choosing.fastest("a kind", _ways(Counter()))
    file.write_text('{"theirs": "slow"}')
    choosing.fastest("another kind", _ways(Counter()))
    assert json.loads(file.read_text()) == {"theirs": "slow", "another kind": "quick"}


def test_without_a_place_to_keep_it_a_process_measures_for_itself(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "file"))
    calls: Counter[str] = Counter()
    assert [choosing.fastest("a kind", _ways(calls)) for _ in range(2)] == ["quick"] * 2
    assert calls.total() == 2 * (choosing.REPEATS + 1)


def test_sizes_are_kept_apart_by_powers_of_two() -> None:
    assert [choosing.bucket(size) for size in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128]
