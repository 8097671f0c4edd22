# SPDX-License-Identifier: Apache-2.0
"""One case of `benchmarks/gpu.py` after the other, in a process of its own, so that a crash of one is not the end of all.

    python -m gpu_work.measure DEVICE small|full '["case", ...]'        prints BEGIN and RESULT lines

Whether it is right: each result and each gradient is no further from the reference in float64 than twice what the reference
in the case's own dtype is, or one rounding of it. How long it takes: the GPU is made to wait while Python queues a call, so
that events around it see the GPU alone; the calls take turns over so many copies of the operands that none is in a cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_work.cases import cases
from gpu_work.work import Built, Call, Case, Draw
from rewriter.codegen import roofline
from rewriter.kernels.launching import Unsupported, recorded
from rewriter.kernels.spec import REGISTRY, Cost

BEGIN, RESULT = "BEGIN ", "RESULT "
RUNS = 15  # timed calls, of which the median counts
CACHED = 256 << 20  # bytes: what the largest cache holds (MI300X: 256 MB behind its L2; H200: 50 MB of L2)
COPIES = 32  # of the operands at the most; fewer where they would fill the memory
CLOCK = 2e9  # cycles per second of a GPU, about; only how long it waits depends on it


@dataclass(frozen=True)
class Times:
    """Milliseconds on the GPU, medians: forward, and forward with backward (None where there is no gradient)."""

    forward: float
    training: float | None


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        ran: operators of ours that ran, backward included: "kernel", or why it was the reference.
        error, eager_error: of the result or gradient that is worst beside what is allowed: largest distance to float64 of
            the operator and of the reference in the same dtype, in units of the largest magnitude.
        right: whether all results and gradients are.
        times: None where nothing was timed.
        rivals: those of the others, by name; one that could not run is in ``absent`` with the reason.
        flops, nbytes: of the cost model, forward.
        bound: milliseconds of the forward at the peaks of ``peaks``; and by which of them.
        failed: what went wrong, empty if nothing did.
    """

    name: str
    ran: Mapping[str, str] = field(default_factory=dict)
    error: float | None = None
    eager_error: float | None = None
    right: bool = False
    times: Times | None = None
    rivals: Mapping[str, Times] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    flops: int = 0
    nbytes: int = 0
    bound: float | None = None
    bound_by: str = ""
    failed: str = ""

    @property
    def share(self) -> float | None:
        """Of the roofline."""
        return None if self.times is None or self.bound is None else self.bound / self.times.forward

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Result:
        """From JSON."""
        rivals = {name: Times(**times) for name, times in record["rivals"].items()}
        return cls(**{**record, "rivals": rivals, "times": record["times"] and Times(**record["times"])})


def measure(case: Case, device: str, small: bool) -> Result:
    """Check a case, and time it on a GPU."""
    draw = Draw(device, torch.Generator(device).manual_seed(0))
    built = case.build(draw, small)
    spec = REGISTRY[built.call.function]
    checks, ran = _checks(built, spec.reference)
    worst = max(checks, key=lambda check: check.excess)
    cost = spec.cost(*built.call.arguments)
    known = {
        "name": case.name, "ran": ran, "error": worst.error, "eager_error": worst.eager,
        "right": all(check.right for check in checks), "absent": built.absent, "flops": cost.flops,
        "nbytes": cost.bytes_read + cost.bytes_written,
    }  # fmt: skip
    if device == "cpu":
        return Result(**known)
    copies = min(COPIES, 1 + CACHED // max(cost.bytes_read, 1), _room(case, draw, small))
    turns = [built, *(case.build(draw, small) for _ in range(copies - 1))]
    rivals = {name: _times([turn.rivals[name] for turn in turns]) for name in built.rivals}
    bound = roofline.bound(cost, *peaks())
    return Result(
        **known,
        times=_times([turn.call for turn in turns]),
        rivals=rivals,
        bound=1e3 * bound.seconds,
        bound_by=bound.by,
    )


def _room(case: Case, draw: Draw, small: bool) -> int:
    """How many copies a quarter of the free memory holds."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    before = torch.cuda.memory_allocated()
    kept = case.build(draw, small)
    taken = torch.cuda.memory_allocated() - before
    del kept
    return max(1, free // (4 * max(taken, 1)))


# --------------------------------------------------------------------------------------------------- whether it is right


@dataclass(frozen=True)
class Check:
    """Distances to float64 of one result or gradient, and what is allowed."""

    error: float
    eager: float
    rounding: float

    @property
    def excess(self) -> float:
        """Error over what is allowed; infinite for NaN, which no comparison would find to be too large."""
        ratio = self.error / max(2 * self.eager, self.rounding)
        return ratio if ratio == ratio else float("inf")

    @property
    def right(self) -> bool:
        return self.excess <= 1


Values = tuple[list[Tensor], list[Tensor | None]]


def _checks(built: Built, reference: Callable[..., Any]) -> tuple[list[Check], dict[str, str]]:
    call = built.call
    dtype = next(a.dtype for a in call.arguments if _floating(a))
    wide = [a.double() if _floating(a) else a for a in call.arguments]
    with torch.no_grad():
        shapes = _listed(reference(*wide))
    seeds = [torch.randn_like(x) if _floating(x) else None for x in shapes]
    golden = _values(reference, wide, seeds)
    with _Watching() as ran:
        own = _values(call.function, call.arguments, seeds)
    eager = _values(reference, call.arguments, seeds)
    rounding = torch.finfo(dtype).eps
    if built.chooses:
        own, eager, golden = ((outputs, []) for outputs, _ in (own, eager, golden))
    found = [
        Check(_distance(mine, true), _distance(theirs, true), rounding)
        for mine, theirs, true in zip(*([*outputs, *grads] for outputs, grads in (own, eager, golden)), strict=True)
        if true is not None and true.is_floating_point() and true.numel()
    ]
    return found, ran.operators


def _values(function: Callable[..., Any], arguments: Sequence[Any], seeds: Sequence[Tensor | None]) -> Values:
    """Outputs, and gradients of all floating arguments for the given seeds; None for one without influence."""
    leaves = [a.detach().requires_grad_() if _floating(a) else a for a in arguments]
    with torch.enable_grad():
        outputs = _listed(function(*leaves))
        pairs = [(o, s.to(o.dtype)) for o, s in zip(outputs, seeds, strict=True) if s is not None and o.requires_grad]
        if not pairs:
            return outputs, []
        ends, starts = zip(*pairs, strict=True)
        found = torch.autograd.grad(ends, [x for x in leaves if _floating(x)], starts, allow_unused=True)
    return [o.detach() for o in outputs], list(found)


def _distance(found: Tensor | None, golden: Tensor) -> float:
    if found is None:
        return float("inf")
    return float((found.double() - golden).abs().max() / golden.abs().max().clamp(min=1e-30))


def _listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Watching(TorchDispatchMode):
    """Which operators of ours run inside, forward and backward, and what runs for them."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REGISTRY:
            self.operators[REGISTRY[func].name] = _ran(func, args)
        return func(*args, **(kwargs or {}))


def _ran(operator: Any, args: Sequence[Any]) -> str:
    if not any(t.is_cuda for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)):
        return "not on a GPU"
    try:
        with recorded(), torch.no_grad():  # asks what would be started, and starts nothing
            REGISTRY[operator].implementation("cuda")(*args)
    except Unsupported as reason:
        return f"reference: {reason}"
    return "kernel"


# ------------------------------------------------------------------------------------------------------ how fast it is


def _times(calls: Sequence[Call]) -> Times:
    with torch.no_grad():
        forward = milliseconds([call.run for call in calls])
    trained = [_training(call) for call in calls]
    wanted = [step for step in trained if step is not None]
    return Times(forward, milliseconds(wanted) if wanted else None)


def _training(call: Call) -> Callable[[], object] | None:
    """Forward and backward to every floating argument, or None where nothing has a gradient."""
    leaves = [a.detach().requires_grad_() if _floating(a) else a for a in call.arguments]
    wanted = [x for x in leaves if _floating(x)]

    def ends() -> list[Tensor]:
        return [o for o in _listed(call.function(*leaves)) if o.requires_grad]

    try:
        seeds = [torch.ones_like(o) for o in ends()]
        if not seeds:
            return None
        torch.autograd.grad(ends(), wanted, seeds, allow_unused=True)
    except (RuntimeError, NotImplementedError):  # as torch's int4 product: it has no derivative
        return None
    return lambda: torch.autograd.grad(ends(), wanted, seeds, allow_unused=True)


def milliseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of a call on the GPU; the calls take turns."""
    for _ in range(3):  # compiles, picks a configuration, fills the allocator
        calls[0]()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    calls[0]()
    wait = int(CLOCK * min(max(2 * (time.perf_counter() - begin), 1e-4), 0.05))
    spans = []
    for turn in range(max(RUNS, len(calls))):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(wait)
        start.record()
        calls[turn % len(calls)]()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans)


_measured: list[tuple[float, float]] = []


def peaks() -> tuple[float, float]:
    """Bytes and bfloat16 operations per second: of the data sheet where the device is on it, else measured once."""
    chip = sheet()
    if chip is not None:
        return chip.bandwidth, chip.flops
    if not _measured:
        _measured.append(measured_peaks())
    return _measured[0]


def sheet() -> roofline.Chip | None:
    """The data of this device, by its name: an H100 has the instructions of an H200 and another memory."""
    name = torch.cuda.get_device_name()
    return next((chip for chip in roofline.CHIPS.values() if chip.name in name), None)


def measured_peaks() -> tuple[float, float]:
    """By a copy of 1 GiB and a product of 8192³."""
    half = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copied, multiplied = milliseconds([half.clone]), milliseconds([lambda: square @ square])
    work = Cost(2 * 8192**3, half.numel(), half.numel())
    return (work.bytes_read + work.bytes_written) / copied * 1e3, work.flops / multiplied * 1e3


# --------------------------------------------------------------------------------------------------------- the process


def work(device: str, small: bool, names: Sequence[str]) -> Iterator[Result]:
    """Results in the order of the names. An exception fails its case alone, unless it takes the GPU with it."""
    by_name = {case.name: case for case in cases()}
    for name in names:
        print(BEGIN + name, flush=True)
        try:
            result = measure(by_name[name], device, small)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            result = Result(name, failed=f"{type(error).__name__} at {place}: {str(error)[:300]}")
        yield result
        if result.failed and device != "cpu":
            torch.cuda.synchronize()  # raises where the context is lost; who started this process starts another
            torch.cuda.empty_cache()


def main() -> None:
    device, size, names = sys.argv[1:]
    for result in work(device, size == "small", json.loads(names)):
        print(RESULT + json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
