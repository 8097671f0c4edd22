# SPDX-License-Identifier: Apache-2.0
"""The work behind the commands: capture, plan or rewrite a model as asked, and measure what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewriter
from rewriter.cli import loading
from rewriter.cli import options as o
from rewriter.errors import ExportError
from rewriter.layout import counted
from rewriter.optimized import Optimized
from rewriter.optimizing import carry_out
from rewriter.reports import Measurement, Report
from rewriter.verification import perturbed

Tell = Callable[[str, int, int], None]
RUNS = 7  # of each side, in turn; medians are reported
MAX_PARITY_ERROR = 1e-3  # of the largest output


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Which model, and the call it is captured by. The fields are options of the commands (`options.expanded`)."""

    model: o.Model
    example_inputs: o.ExampleInputs = None
    static_shapes: o.Static = False
    dtype: o.Dtype = "float32"

    @property
    def dynamic_shapes(self) -> str:
        return "static" if self.static_shapes else "auto"


@dataclass(frozen=True, kw_only=True)
class Data:
    """What statistics are made of."""

    calibration: o.Calibration = None
    calibration_rows: o.Rows = 256  # with rows of 256 tokens, 65 536 positions

    def load(self) -> Any:
        """Batches, or saved statistics, or None. Raises LoadError."""
        return loading.load_calibration(self.calibration, self.calibration_rows)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which pass takes which site."""

    passes: o.Passes
    select: o.Select = None
    expect: o.Expect = None
    seed: o.Seed = 0

    def parsed(self) -> dict[str, Any]:
        """The arguments of :func:`rewriter.plan` and :func:`rewriter.optimize`. Raises PlanError."""
        return {
            "passes": loading.parse_passes(self.passes),
            "select": loading.parse_pairs(self.select or [], "--select"),
            "expect": loading.parse_counts(self.expect or []),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Done:
    """The original, and what it became."""

    model: nn.Module
    opt: Optimized

    @property
    def report(self) -> Report:
        assert self.opt.report is not None  # noqa: S101 - optimize always makes one
        return self.opt.report


def captured(capture: Capture, tell: Tell) -> tuple[nn.Module, rewriter.Program]:
    """The model and its program. Raises CaptureError, LoadError."""
    model, how = _loaded(capture, tell)
    tell("capture", 0, 1)
    return model, rewriter.capture(model, **how)


def planned(capture: Capture, choice: Choice, data: Data, tell: Tell, *, allow_untrained: bool) -> rewriter.Plan:
    """Raises what :func:`rewriter.plan` raises."""
    asked, found = choice.parsed(), data.load()
    _, program = captured(capture, tell)
    if isinstance(found, list):
        found = rewriter.calibrate(program, asked["passes"], found, tell)
    tell("plan", 0, 1)
    return rewriter.plan(program, **asked, statistics=found, allow_untrained=allow_untrained)


def optimized(capture: Capture, choice: Choice, data: Data, tell: Tell, **options: Any) -> Done:
    """Load and rewrite; ``options`` are more of :func:`rewriter.optimize`, which says what is raised."""
    asked, found = choice.parsed(), data.load()
    model, how = _loaded(capture, tell)
    return Done(model, rewriter.optimize(model, **asked, **how, calibration=found, progress=tell, **options))


def applied(capture: Capture, plan: rewriter.Plan, data: Data, tell: Tell) -> Done:
    """Load, and rewrite by a plan made before. Raises what `optimizing.carry_out` raises."""
    found = data.load()
    model, how = _loaded(capture, tell)
    return Done(model, carry_out(model, plan, found, tell, **how))


def verified(capture: Capture, choice: Choice, tell: Tell) -> rewriter.Verification:
    """The golden run on the example, with noise where it is floating: zeros would not see the weights."""
    opt = optimized(capture, choice, Data(), tell).opt
    tell("verify", 0, 1)
    return rewriter.verify(opt.original_program(), opt.program, perturbed(opt.program.example))


def _loaded(capture: Capture, tell: Tell) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and how to capture it."""
    example = loading.load_example(capture.example_inputs)
    tell("load", 0, 1)
    model = loading.load_model(capture.model, capture.dtype)
    return model, {"example_kwargs": example, "dynamic_shapes": capture.dynamic_shapes}


# --------------------------------------------------------------------------------------------------------- measures


def measured(done: Done, tokens: Tensor, tell: Tell) -> dict[str, Measurement]:
    """Perplexity, KL and agreement on held-out tokens, and latency, before and after. Raises PlanError."""
    tell("evaluate", 0, len(tokens))
    found = rewriter.evaluate(
        done.opt, tokens, reference=done.model, batch=4, progress=lambda n, total: tell("evaluate", n, total)
    )
    before, after = found.reference_perplexity or float("nan"), found.perplexity
    tell("time", 0, 1)
    first, second = latency(done.model, done.opt, tokens[:1, :256])
    size, threads = min(256, tokens.shape[1]), counted(torch.get_num_threads(), "thread")
    note = f"median of {RUNS}, 1 × {size} tokens, {threads}, eager"
    return {
        "perplexity": Measurement(
            before, after, "", f"{100 * (after / before - 1):+.1f} % on {found.tokens:,} held-out tokens"
        ),
        "KL(original ‖ rewritten)": Measurement(None, found.kl or 0.0, "nats", "per token"),
        "top-1 agreement": Measurement(
            None, found.top1 or 0.0, "share", "of tokens have the same most likely successor"
        ),
        "latency": Measurement(first * 1e3, second * 1e3, "ms", note),
    }


def latency(before: Callable[..., object], after: Callable[..., object], ids: Tensor) -> tuple[float, float]:
    """Median seconds per call of both, run in turn after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for run in range(RUNS + 2):
            for side, call in enumerate((before, after)):
                start = time.perf_counter()
                call(input_ids=ids)
                if run >= 2:
                    times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def exported(done: Done, path: Path, opset: int, tell: Tell) -> dict[str, Measurement]:
    """Write ONNX, run it in ONNX Runtime, and compare every output with the rewritten model. Raises ExportError."""
    import onnxruntime

    tell("export ONNX", 0, 1)
    made = rewriter.export_onnx(done.opt, path, opset=opset)
    tell("parity", 0, 1)
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    error = parity(done.opt, session)
    if not error <= MAX_PARITY_ERROR:
        raise ExportError(
            f"{path}: ONNX Runtime differs by {error:.3g} of the largest output, more than {MAX_PARITY_ERROR:g}; "
            "the file is kept for inspection, do not use it"
        )
    return {
        "ONNX file": Measurement(None, made.bytes, "bytes", f"opset {made.opset}"),
        "ONNX parity": Measurement(None, error, "", "max |Δ| as a fraction of the largest output"),
    }


def parity(opt: Optimized, session: object) -> float:
    """Largest difference of any output from ONNX Runtime's, as a fraction of the largest magnitude of that output."""
    worst = 0.0
    for example in _samples(opt):
        feed = dict(zip(opt.program.input_names(), (t.numpy() for t in example), strict=True))
        wanted = [i.name for i in session.get_inputs()]  # type: ignore[attr-defined]
        results = session.run(None, {name: feed[name] for name in wanted})  # type: ignore[attr-defined]
        with torch.no_grad():
            expected = opt.program.run(*example)
        for ours, theirs in zip(expected, results, strict=True):
            reference = ours.double()
            largest = float(reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
            worst = max(worst, float((torch.from_numpy(theirs).double() - reference).abs().max()) / largest)
    return worst


def _samples(opt: Optimized) -> list[tuple[Tensor, ...]]:
    """The example with noise, and for token models other batch and sequence sizes with other tokens."""
    example, names = opt.program.example, opt.program.input_names()
    if "input_ids" not in names or not set(names) <= {"input_ids", "attention_mask"}:
        return [perturbed(example)]
    vocabulary = int(getattr(getattr(opt, "config", None), "vocab_size", 2))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, vocabulary, size, generator=generator) for size in ((1, 1), (2, 12), (3, 33))]
    return [tuple(ids if n == "input_ids" else torch.ones_like(ids) for n in names) for ids in drawn]
