# SPDX-License-Identifier: Apache-2.0
"""`optimize`: the whole road in one call — capture, plan, apply, report."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from rewriter import inputs, planner, registry, store
from rewriter.applying import Progress, rewrite
from rewriter.calibration import Statistics, calibrate, wanted
from rewriter.capturing import capture_skeleton, example_call, from_exported, share_tensors
from rewriter.errors import PlanError, UntrainedWarning
from rewriter.optimized import Optimized, known_target
from rewriter.program import Program
from rewriter.reports import Report
from rewriter.rules import Pass
from rewriter.sizes import model_bytes
from rewriter.skeleton import Skeleton, check, unwrap


@store.outside_inference_mode
def optimize(
    model: nn.Module | ExportedProgram,
    passes: Sequence[str | Pass],
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: str = "auto",
    select: Mapping[str, str | None] | None = None,
    expect: Mapping[str, int] | None = None,
    calibration: Any = None,
    budget: Any = None,
    recover: Any = None,
    target: str | None = None,
    strict: bool = False,
    seed: int = 0,
    allow_untrained: bool = True,
    keep_original: bool = True,
    progress: Progress | None = None,
) -> Optimized:
    """Rewrite ``model`` with ``passes`` and return what to use in its place; the model itself is never changed.

    Args:
        model: any module ``torch.export`` accepts, or an ``ExportedProgram``.
        passes: names, instances, or a mixture; see ``rewriter.passes.available()``.
        example_inputs, example_kwargs: an example call; inferred where the model says what it takes.
        dynamic_shapes: ``"auto"`` or ``"static"``.
        select: where: ``{"lm_head": "vq_logits", "re:.*mlp.*": "shift_add", "re:layers\\\\.0\\\\..*": None}``.
        expect: ``{"shift_add": 12}``: any other number of sites is an error that prints the nearest misses.
        calibration: iterable of inputs (tensors, tuples or dicts as the model takes them), or :class:`Statistics`.
        seed: every random draw is a function of it, the site and the rule; the global generator is left alone.
        target: where it will run, ``"cpu"``, ``"cuda"`` or ``"hip"``; default: where the model's parameters are. For a
            GPU, kernels are emitted that fuse what stands around the operators (docs/codegen.md); on tensors of another
            device the same operators run unfused. The report lists the code of every site.
        strict: refuse sites that would run their aten reference there, with the reason for each.
        keep_original: False frees replaced tensors; then :meth:`Optimized.undo` refuses.
        progress: called with (what, done, total) while working.

    Raises:
        CaptureError, PlanError, LegalityError: nothing has changed then.
    """
    _check_arguments(budget, recover, target, strict, calibration)
    resolved = registry.resolve(passes)
    tell = progress or (lambda what, done, total: None)
    tell("capture", 0, 1)
    captured = _capture(model, example_inputs, example_kwargs, dynamic_shapes)
    statistics = _statistics(captured.base, resolved, calibration, tell)
    tell("plan", 0, 1)
    plan = planner.plan(
        captured.base,
        resolved,
        select=select,
        expect=expect,
        statistics=statistics,
        seed=seed,
        allow_untrained=allow_untrained,
    )
    opt = _finish(captured, plan, statistics, keep_original, tell, target)
    if strict and opt.report is not None:
        _refuse_fallbacks(opt.report)
    return opt


@store.outside_inference_mode
def carry_out(
    model: nn.Module,
    plan: planner.Plan,
    calibration: Any = None,
    progress: Progress | None = None,
    keep_original: bool = True,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: str = "auto",
) -> Optimized:
    """Like :func:`optimize`, with a plan that was made before (for this or another checkpoint of the same model).

    Raises:
        PlanError: the plan is for another structure, or needs statistics and there is no calibration data.
    """
    tell = progress or (lambda what, done, total: None)
    tell("capture", 0, 1)
    captured = _capture(model, None, example_kwargs, dynamic_shapes)
    resolved = [registry.make(s.pass_name, s.settings) for s in plan.sites]
    statistics = _statistics(captured.base, resolved, calibration, tell)
    return _finish(captured, plan, statistics, keep_original, tell)


def _finish(
    captured: _Captured,
    plan: planner.Plan,
    statistics: Statistics | None,
    keep_original: bool,
    tell: Progress,
    target: str | None = None,
) -> Optimized:
    before = model_bytes(captured.base.root)
    application = rewrite(captured.base.fork(compile=False), plan, statistics, tell)
    opt = Optimized(
        captured.base,
        plan,
        skeleton=captured.skeleton,
        originals=application.originals if keep_original else None,
        names=captured.names,
        optional=captured.optional,
        original_bytes=before,
        target=target,
    )
    tell("lower", 0, 1)
    opt.report = Report.of(opt, application, statistics)
    for rule in dict.fromkeys(result.rule for result in application.results if result.contract == "LEARNED"):
        warnings.warn(
            f"{rule} starts from the weights but needs training to be good, and was given none: train the result "
            "before it is used (allow_untrained=False refuses instead)",
            UntrainedWarning,
            stacklevel=4,
        )
    return opt


def _check_arguments(budget: Any, recover: Any, target: str | None, strict: bool, calibration: Any) -> None:
    if target == "mlir":
        raise PlanError("target='mlir': a rewritten model runs in PyTorch; call export_mlir on it for MLIR")
    known_target(target)
    for name, value in (("budget", budget), ("recover", recover)):
        if value is not None:
            without = "" if calibration is not None else " and needs data (calibration=)"
            raise PlanError(f"{name}= is not in this version{without}; choose settings by hand and read the report")


def _refuse_fallbacks(report: Report) -> None:
    lines = [f"{one.site or 'root'}: {one.operator}: {one.why}" for one in report.code if one.code == "reference"]
    if lines:
        listed = "\n  ".join(lines)
        raise PlanError(
            f"strict=True: {len(lines)} sites would run their aten reference on {report.device}:\n  {listed}\n"
            "choose other settings there, leave them out by select=, or leave strict at False"
        )


@dataclass(frozen=True)
class _Captured:
    """A model's first program, and what is needed to capture more."""

    base: Program
    skeleton: Skeleton | None
    names: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()


def _capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    dynamic_shapes: str,
) -> _Captured:
    if isinstance(model, ExportedProgram):
        return _Captured(from_exported(model), None)
    inner, notes = unwrap(model)
    notes += check(inner)
    args, kwargs = example_call(inner, example_inputs, example_kwargs)
    skeleton = Skeleton(inner)
    base = capture_skeleton(skeleton, share_tensors(inner), args, kwargs, dynamic_shapes)
    base.notes = notes + base.notes
    return _Captured(base, skeleton, *inputs.signature(inner))


def _statistics(base: Program, passes: Sequence[Pass], calibration: Any, tell: Progress) -> Statistics | None:
    if calibration is None or isinstance(calibration, Statistics):
        return calibration
    return calibrate(base, passes, calibration, tell) if wanted(base, passes) else None
