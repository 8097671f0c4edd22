# SPDX-License-Identifier: Apache-2.0
"""Every kernel on a GPU, in one command: first whether it is right, then how fast it is against what one would use instead.

.venv/bin/python benchmarks/gpu.py                 # writes benchmarks/results/gpu_<device>.json
.venv/bin/python benchmarks/gpu.py --only shift    # the cases whose name the regular expression finds; writes nothing
.venv/bin/python benchmarks/gpu.py --device cpu --small    # no kernels and no times: that the cases themselves are right

Right: the results and gradients are no further from the reference in float64 than twice what the reference in the case's
own dtype is. Fast: medians of `triton.testing.do_bench`, which empties the L2 cache before every call; bytes and operations
are those of the operator's cost model, the share is of the roofline of the chip's data sheet (`rewriter.codegen.roofline`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_work import Case, cases
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import Tensor

from rewriter.codegen import roofline
from rewriter.kernels.launching import Unsupported
from rewriter.kernels.spec import REGISTRY

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        implementation: "Triton", or why the reference runs.
        error, eager_error: largest error against float64 over all results and gradients, in units of their largest
            magnitude: of the operator, and of the reference in the same dtype.
        right: whether the first is at most twice the second, or one rounding.
        milliseconds: median, forward; None where nothing was timed.
        rivals: medians of the others, by name.
        flops, nbytes: of the cost model.
        share: of the roofline.
    """

    name: str
    implementation: str
    error: float
    eager_error: float
    right: bool
    milliseconds: float | None
    rivals: dict[str, float]
    flops: int
    nbytes: int
    share: float | None


def measure(case: Case, device: str, small: bool) -> Result:
    generator = torch.Generator(device).manual_seed(0)
    built = case.build(device, small, generator)
    spec = REGISTRY[built.operator]
    error, eager = _errors(built.operator, spec.reference, built.arguments)
    dtype = next(a.dtype for a in built.arguments if isinstance(a, Tensor) and a.is_floating_point())
    right = error <= max(2 * eager, torch.finfo(dtype).eps)
    cost = spec.cost(*built.arguments)
    nbytes = cost.bytes_read + cost.bytes_written
    implementation, seconds, rivals, share = "not on a GPU", None, {}, None
    if device != "cpu":
        from triton.testing import do_bench

        try:
            spec.implementation("cuda")(*built.arguments)
            implementation = "Triton"
        except Unsupported as reason:
            implementation = f"reference: {reason}"
        with torch.no_grad():
            seconds = float(do_bench(lambda: built.operator(*built.arguments), return_mode="median"))
            rivals = {name: float(do_bench(call, return_mode="median")) for name, call in built.rivals.items()}
        major, minor = torch.cuda.get_device_capability()
        chip = roofline.CHIPS.get(f"sm_{major}{minor}" if torch.version.hip is None else "gfx942")
        if chip is not None:
            share = 1e3 * roofline.bound(cost, chip.bandwidth, chip.flops).seconds / seconds
    return Result(case.name, implementation, error, eager, right, seconds, rivals, cost.flops, nbytes, share)


def _errors(
    operator: Callable[..., Any], reference: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[float, float]:
    golden = _results(reference, [a.double() if _floating(a) else a for a in arguments], None)
    seeds = [torch.randn_like(x) if _floating(x) else None for x in golden[0]]
    golden = _results(reference, [a.double() if _floating(a) else a for a in arguments], seeds)
    own = _results(operator, arguments, seeds)
    eager = _results(reference, arguments, seeds)
    return _distance(own, golden), _distance(eager, golden)


def _results(
    function: Callable[..., Any], arguments: Sequence[Any], seeds: Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of all floating arguments for the given seeds."""
    leaves = [a.detach().requires_grad_(seeds is not None) if _floating(a) else a for a in arguments]
    with torch.enable_grad():
        out = function(*leaves)
        outputs = list(out) if isinstance(out, tuple) else [out]
        if seeds is None:
            return outputs, []
        pairs = [(o, s.to(o.dtype)) for o, s in zip(outputs, seeds, strict=True) if s is not None and o.requires_grad]
        wanted = [leaf for leaf in leaves if _floating(leaf)]
        ends, starts = zip(*pairs, strict=True)
        found = torch.autograd.grad(ends, wanted, starts, allow_unused=True)
    return [o.detach() for o in outputs], [g for g in found if g is not None]


def _distance(found: tuple[list[Tensor], list[Tensor]], golden: tuple[list[Tensor], list[Tensor]]) -> float:
    pairs = zip([*found[0], *found[1]], [*golden[0], *golden[1]], strict=True)
    return max(
        (
            float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
            for a, b in pairs
            if b.is_floating_point() and b.numel()
        ),
        default=0.0,
    )


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def show(results: Sequence[Result], console: Console) -> None:
    table = Table("case", "runs", "error (eager's)", "time", "rivals", "GB/s", "TFLOP/s", "of roofline")
    for r in results:
        seconds = None if r.milliseconds is None else r.milliseconds / 1e3
        rivals = ", ".join(f"{name} {ms:.3g} ms ({ms / (r.milliseconds or ms):.2f} ×)" for name, ms in r.rivals.items())
        rates = (
            ("–", "–") if seconds is None else (f"{r.nbytes / seconds / 1e9:.0f}", f"{r.flops / seconds / 1e12:.1f}")
        )
        table.add_row(
            r.name,
            r.implementation,
            f"{'' if r.right else 'WRONG '}{r.error:.2g} ({r.eager_error:.2g})",
            "–" if r.milliseconds is None else f"{r.milliseconds:.3g} ms",
            rivals,
            *rates,
            "–" if r.share is None else f"{r.share:.0%}",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="regular expression on the cases' names; nothing is written")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small sizes")
    given = parser.parse_args()
    console = Console(width=200)
    if given.device == "cuda" and not torch.cuda.is_available():
        console.print("no GPU here: nothing is measured, and nothing written")
        return 1
    results = []
    for case in cases():
        if re.search(given.only, case.name):
            results.append(measure(case, given.device, given.small))
            console.print(results[-1].name, results[-1].implementation, results[-1].right, highlight=False)
    show(results, console)
    if given.device == "cuda" and not given.only and not given.small:
        name = torch.cuda.get_device_name().replace(" ", "_").lower()
        record = {"machine": machine(), "device": torch.cuda.get_device_name(), "cases": [asdict(r) for r in results]}
        (RESULTS / f"gpu_{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(r.right for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
