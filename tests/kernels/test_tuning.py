# SPDX-License-Identifier: Apache-2.0
"""Which configuration of a kernel runs: the key of a choice, who measures it, and that it outlives processes.

No device is needed: the clock is handed in.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import OutOfResources

from rewriter.kernels import tuning
from rewriter.kernels.choosing import Choices, bucket
from rewriter.kernels.launching import Config, Request, Start


@triton.jit
def twice(x_ptr, out_ptr, n, scale, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + at, 2.0 * scale * tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def thrice(x_ptr, out_ptr, n, scale, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + at, 3.0 * scale * tl.load(x_ptr + at, mask=at < n), mask=at < n)


CONFIGS = (
    Config({"B": 64}),
    Config({"B": 128}, num_warps=8),
    Config({"B": 256}, only="cuda"),
    Config({"B": 32}, only="hip"),
)


def request(n: int = 100, dtype: torch.dtype = torch.float32, kernel: Any = twice, **changed: Any) -> Request:
    args = {"x_ptr": torch.ones(n, dtype=dtype), "out_ptr": torch.zeros(n, dtype=dtype), "n": n, "scale": 0.5}
    made = Request(kernel, lambda constants: (-(-n // constants["B"]),), args, {}, CONFIGS)
    return replace(made, **changed)


class Clock:
    """Says how long a start takes, and remembers what it was asked."""

    def __init__(self, times: Mapping[int, float], too_large: frozenset[int] = frozenset()) -> None:
        self.times, self.too_large = times, too_large
        self.asked: list[int] = []

    def __call__(self, start: Start) -> float:
        block = start.constants["B"]
        self.asked.append(block)
        if block in self.too_large:
            raise OutOfResources(300_000, 227 * 1024, "shared memory")
        start.args["out_ptr"].fill_(float("nan"))  # as a kernel writes what it was given
        return self.times[block]


CLOCK = {64: 3.0, 128: 1.0, 256: 2.0, 32: 0.5}


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choices:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    return Choices("triton.json")


def test_the_fastest_of_the_back_end_is_measured_once_and_kept(choices: Choices) -> None:
    clock = Clock(CLOCK)
    first = request()
    assert tuning.pick(first, backend="cuda", timer=clock, choices=choices) is CONFIGS[1]
    assert clock.asked == [64, 128, 256] and not first.args["out_ptr"].isnan().any()  # measured on copies
    assert tuning.pick(request(), backend="cuda", timer=clock, choices=choices) is CONFIGS[1]
    later = Choices("triton.json")  # another process
    assert tuning.pick(request(), backend="cuda", timer=clock, choices=later) is CONFIGS[1]
    assert clock.asked == [64, 128, 256]
    assert tuning.pick(request(), backend="hip", timer=clock, choices=choices) is CONFIGS[3]


def test_one_configuration_is_no_choice(choices: Choices) -> None:
    clock = Clock(CLOCK)
    assert tuning.pick(request(configs=CONFIGS[2:]), backend="hip", timer=clock, choices=choices) is CONFIGS[3]
    assert not clock.asked


def test_what_does_not_fit_the_device_is_left_out(choices: Choices) -> None:
    clock = Clock(CLOCK, too_large=frozenset({128}))
    assert tuning.pick(request(), backend="cuda", timer=clock, choices=choices) is CONFIGS[2]
    clock = Clock(CLOCK, too_large=frozenset({64, 128, 256}))
    with pytest.raises(
        RuntimeError, match="no configuration of twice fits this device: B=64, 4 warps, 2 stages; B=128"
    ):
        tuning.pick(request(dtype=torch.bfloat16), backend="cuda", timer=clock, choices=choices)


def test_nothing_is_measured_while_a_graph_is_recorded(choices: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(CLOCK)
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert tuning.pick(request(), backend="cuda", timer=clock, choices=choices) is CONFIGS[0]
    assert not clock.asked
    monkeypatch.setattr(tuning, "_capturing", lambda: False)
    assert tuning.pick(request(), backend="cuda", timer=clock, choices=choices) is CONFIGS[1]
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert tuning.pick(request(), backend="cuda", timer=clock, choices=choices) is CONFIGS[1]  # known by now


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_sizes_share_a_choice_within_a_bucket(n: int, other: int) -> None:
    same = tuning.key(request(n), "cuda") == tuning.key(request(other), "cuda")
    assert same == (bucket(n) == bucket(other))


def test_a_choice_is_made_anew_for_another_kernel_dtype_constant_or_set_of_configurations() -> None:
    requests = [
        request(),
        request(dtype=torch.bfloat16),
        request(kernel=thrice),
        request(constants={"PRECISION": "ieee"}),
        request(constants={"PRECISION": "tf32"}),
        request(configs=CONFIGS[:2]),
    ]
    keys = [tuning.key(one, backend) for one in requests for backend in ("cuda", "hip")]
    assert len(set(keys)) == len(keys)
    assert tuning.key(request(), "cuda") == keys[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"%s": "B=7, 4 warps, 2 stages"}', '{"%s": 1}', '{"%s": null}'])
def test_what_cannot_be_used_is_measured_again(choices: Choices, tmp_path: Path, content: str) -> None:
    name = tuning.key(request(), "cuda")
    path = tmp_path / "tuning" / "triton.json"
    path.parent.mkdir()
    path.write_text(content.replace("%s", name))
    assert tuning.pick(request(), backend="cuda", timer=Clock(CLOCK), choices=choices) is CONFIGS[1]
    assert json.loads(path.read_text())[name] == CONFIGS[1].text


def test_writers_at_once_lose_nothing(choices: Choices, tmp_path: Path) -> None:
    """Each with its own memory, as processes have; within one process a kind is measured by one thread only."""
    measured: list[str] = []

    def work(mine: Choices, name: str) -> None:
        for i in range(8):
            mine.among(f"{name}-{i}", ("a", "b"), lambda: "b")
            choices.among(f"common-{i}", ("a", "b"), lambda: measured.append("") or "a")  # type: ignore[func-returns-value]

    threads = [threading.Thread(target=work, args=(Choices("triton.json"), str(k))) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"{k}-{i}": "b" for k in range(6) for i in range(8)} | {f"common-{i}": "a" for i in range(8)}
    assert json.loads((tmp_path / "tuning" / "triton.json").read_text()) == expected
    assert len(measured) == 8


def test_without_a_place_to_keep_it_kernels_run_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "file"))
    clock, mine = Clock(CLOCK), Choices("triton.json")
    assert [tuning.pick(request(), backend="cuda", timer=clock, choices=mine) for _ in "12"] == [CONFIGS[1]] * 2
    assert clock.asked == [64, 128, 256]
