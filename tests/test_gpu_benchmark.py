# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark without a GPU: its cases, what it calls wrong, and that one case that fails costs no other."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rewriter.kernels.spec import REGISTRY

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """benchmarks/gpu.py; scripts find their neighbours because their own folder is on the path."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gpu")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def measuring(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_work.measure")


def test_every_operator_with_a_gpu_kernel_has_a_case(measuring: ModuleType) -> None:
    """Called by it; gradients, and a loss that computes them at once, run where the case is differentiated."""
    built = [case.build(measuring.Draw("cpu", torch.Generator().manual_seed(0)), True) for case in measuring.cases()]
    called = {REGISTRY[one.call.function].name for one in built}
    kernels = {
        spec.name for spec in REGISTRY.values() if "cuda" in spec.implementations and "_backward" not in spec.name
    }
    mean = next(case for case in measuring.cases() if case.name.startswith("linear + cross entropy, mean"))
    assert kernels - called <= set(measuring.measure(mean, "cpu", True).ran)


def test_the_page_has_the_least_times_of_today(gpu: ModuleType) -> None:
    """They follow from the cost models; `benchmarks/gpu.py --bounds` writes them."""
    assert gpu.markdown() in (BENCHMARKS.parent / "docs" / "kernels.md").read_text()


def test_a_case_that_raises_costs_no_other(measuring: ModuleType) -> None:
    names = [case.name for case in measuring.cases()]
    wrong, right = measuring.work("cpu", True, ["no such case", next(n for n in names if n.startswith("hybrid"))])
    assert wrong.failed.startswith("KeyError") and not wrong.right
    assert right.right and not right.failed
    assert set(right.ran) == {"hybrid_attention", "hybrid_attention_backward"}
    assert measuring.Result.read(json.loads(json.dumps(measuring.asdict(right)))) == right


@pytest.mark.parametrize("spoil", [1.01, float("nan")])
def test_a_wrong_gradient_is_seen(measuring: ModuleType, monkeypatch: pytest.MonkeyPatch, spoil: float) -> None:
    """The results are right; the gradient is one per cent off, or NaN, which is larger than nothing."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
            return grad * spoil

    case = next(case for case in measuring.cases() if case.name.startswith("softmax"))
    built = case.build(measuring.Draw("cpu", torch.Generator().manual_seed(0)), True)
    reference = REGISTRY[built.call.function].reference
    bad = measuring.Built(measuring.Call(lambda x, dim: reference(Spoilt.apply(x), dim), built.call.arguments))
    fine, _ = measuring._checks(built, reference)
    found, _ = measuring._checks(bad, reference)
    assert [check.right for check in fine] == [True, True]
    assert [check.right for check in found] == [True, False]


# A process that answers for every case but those whose names say what happens to it.
WORKER = """
import json, os, sys, time
for name in json.loads(sys.argv[1]):
    if name == "lost": os._exit(3)
    print("BEGIN " + name, flush=True)
    if name == "crash": os._exit(4)
    if name == "hang": time.sleep(60)
    print("a warning of some library", flush=True)
    print("RESULT " + json.dumps({"name": name, "rivals": {}, "times": None, "right": True}), flush=True)
    if name == "takes the GPU with it": os._exit(5)
"""


def test_a_process_that_dies_or_hangs_costs_one_case(gpu: ModuleType) -> None:
    names = ["first", "crash", "takes the GPU with it", "second", "hang", "third"]
    found = list(gpu.results(names, [sys.executable, "-c", WORKER], 2.0))
    assert [(r.name, r.failed) for r in found] == [
        ("first", ""),
        ("crash", "its process ended with status 4"),
        ("takes the GPU with it", ""),
        ("second", ""),
        ("hang", "no answer in 2 s"),
        ("third", ""),
    ]


def test_a_process_that_never_begins_ends_the_run_nevertheless(gpu: ModuleType) -> None:
    assert [r.failed for r in gpu.results(["lost", "fine"], [sys.executable, "-c", WORKER], 5.0)] == [
        "its process ended with status 3",
        "",
    ]
