# SPDX-License-Identifier: Apache-2.0
"""The command line: ``rewriter inspect | explain | plan | apply | optimize | diff | kernels | verify | passes | export``.

Exit codes: 0 done, 1 refused or a promise broken, 2 usage, 130 interrupted. Results go to stdout, alone and as JSON
with ``--json``; progress and logs go to stderr. Output paths are tried before any work is done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import rewriter
from rewriter import registry
from rewriter.cli import explaining, exports, inspecting, jobs, loading
from rewriter.cli import kernels as kernel_list
from rewriter.cli import options as o
from rewriter.cli.console import json_text, progress_bar, quieten, refusing, show
from rewriter.cli.jobs import Capture, Choice, Data
from rewriter.codegen.implementations import implementations
from rewriter.errors import ExportError, PlanError
from rewriter.files import atomic_file, check_writable
from rewriter.storage import check_target

app = typer.Typer(
    name="rewriter",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Rewrite PyTorch models: find subgraphs, replace them by cheaper ones, see what it cost, export.",
    epilog=o.examples(
        "rewriter inspect examples/tiny_lm",
        "rewriter optimize examples/tiny_lm --passes fuse,shift_add,vq_logits --onnx out.onnx",
        "rewriter optimize --help",
    ),
)


@app.command(epilog=o.examples("rewriter passes", "rewriter passes shift_add"))
def passes(
    name: Annotated[str | None, typer.Argument(metavar="[PASS]", help="Show the options of this one.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """List the passes, or the options of one with their meaning."""
    with refusing():
        known = registry.known()
        if name is not None and name not in known:
            registry.make(name, {})  # raises, naming the nearest
        found = [loading.describe_pass(cls) for key, cls in known.items() if name in (None, key)]
        show(
            inspecting.pass_options(found[0]) if name else inspecting.pass_list(found),
            found[0] if name else found,
            as_json,
        )


@app.command(
    epilog=o.examples(
        "rewriter inspect examples/tiny_lm",
        "rewriter inspect mypackage.models:build --passes shift_add:bits=3",
        "rewriter inspect examples/tiny_lm --site model.layers.0.self_attn",
    )
)
@o.expanded()
def inspect(
    capture: Capture,
    passes: o.Passes = "fuse,shift_add:embeddings=true,vq_logits",
    site: Annotated[
        str | None, typer.Option(metavar="PATH", help="Show the graph nodes of this module instead.")
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Show the module tree with sizes and what each pass could take, or the nodes of one module."""
    with refusing():
        chosen = loading.parse_passes(passes)
        with progress_bar() as tell:
            module, program = jobs.captured(capture, tell)
            kind = type(module).__name__
            found = inspecting.site(program, site) if site else inspecting.overview(kind, program, chosen)
        show(*found, as_json)


@app.command(
    epilog=o.examples(
        "rewriter explain examples/tiny_lm --rule attention --site layers.3",
        "rewriter explain mypackage.models:build --rule fuse.qkv",
    )
)
@o.expanded()
def explain(
    capture: Capture,
    rule: Annotated[
        str,
        typer.Option(metavar="NAME", help="A view (attention), a pass (fuse) or one rule of a pass (fuse.qkv)."),
    ],
    site: Annotated[
        str | None, typer.Option(metavar="PATH", help="Only at or below this module; its last parts are enough.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Reasons to show, nearest misses first.")] = 10,
    as_json: o.AsJson = False,
) -> None:
    """Say where a rule applies and why it does not elsewhere: the step that failed, what it found, your source line."""
    with refusing():
        of = explaining.subject(rule)
        with progress_bar() as tell:
            _, program = jobs.captured(capture, tell)
            path = None if site is None else explaining.site_path(program, site)
            found = explaining.explanation(program, rule, of, path, limit)
        show(*found, as_json)


@app.command(
    epilog=o.examples(
        "rewriter plan examples/tiny_lm -p fuse,shift_add --out plan.json",
        "rewriter plan examples/tiny_lm -p shift_add --select lm_head=none --expect shift_add=28",
    )
)
@o.expanded()
def plan(
    choice: Choice,
    capture: Capture,
    data: Data,
    allow_untrained: o.AllowUntrained = True,
    out: o.PlanOut = None,
    as_json: o.AsJson = False,
) -> None:
    """Decide which pass takes which site, and change nothing."""
    with refusing():
        if out is not None:
            check_writable(out)
        with progress_bar() as tell:
            made = jobs.planned(capture, choice, data, tell, allow_untrained=allow_untrained)
        if out is not None:
            _write_json(out, made.to_json())
        show(made, made.to_json(), as_json)


@app.command(epilog=o.examples("rewriter apply examples/tiny_lm --plan plan.json --out rewritten"))
@o.expanded()
def apply(
    capture: Capture,
    data: Data,
    plan: Annotated[Path, typer.Option("--plan", metavar="FILE", help="A plan written by rewriter plan --out.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the rewritten model is written.")],
    as_json: o.AsJson = False,
) -> None:
    """Apply a stored plan to a checkpoint of the same architecture and save the result."""
    with refusing():
        check_target(out)
        with progress_bar() as tell:
            done = jobs.applied(capture, _read_plan(plan), data, tell)
            done.opt.save(out)
        show(done.report, done.report.to_json(), as_json)


@app.command(
    epilog=o.examples(
        "rewriter optimize examples/tiny_lm -p fuse,shift_add:embeddings=true --onnx out/tiny_lm.onnx",
        "rewriter optimize models/lm -p vq_logits --calibration tokens.safetensors --evaluate test.safetensors",
        "rewriter optimize mypackage.models:build -p shift_add:bits=3 --save out/model --json",
        "rewriter optimize models/lm -p shift_add --select lm_head=none --expect shift_add=28",
    )
)
@o.expanded()
def optimize(
    choice: Choice,
    capture: Capture,
    data: Data,
    allow_untrained: o.AllowUntrained = True,
    evaluate: o.Evaluate = None,
    evaluate_rows: o.EvaluateRows = 32,
    target: o.Target = None,
    strict: o.Strict = False,
    keep_original: o.KeepOriginal = True,
    onnx: o.Onnx = None,
    opset: o.Opset = 24,
    save: o.Save = None,
    report: o.ReportFile = None,
    as_json: o.AsJson = False,
) -> None:
    """Rewrite a model, report what it cost, and export."""
    options = {
        "target": target,
        "strict": strict,
        "allow_untrained": allow_untrained,
        "keep_original": keep_original,
    }
    with refusing():
        _check_outputs([p for p in (onnx, report) if p is not None], save)
        tokens = None if evaluate is None else loading.load_tokens(evaluate, evaluate_rows)
        with progress_bar() as tell:
            done = jobs.optimized(capture, choice, data, tell, **options)
            figures = {} if tokens is None else jobs.measured(done, tokens, tell)
            if onnx is not None:
                figures |= jobs.exported(done, onnx, opset, tell)
            if save is not None:
                tell("save", 0, 1)
                done.opt.save(save)
        result = done.report.with_measurements(figures)
        if report is not None:
            _write_json(report, result.to_json())
        show(result, result.to_json(), as_json)


@app.command(
    epilog=o.examples(
        "rewriter diff examples/tiny_lm -p fuse",
        "rewriter diff examples/tiny_lm -p fuse,shift_add --site model.layers.0.self_attn",
    )
)
@o.expanded()
def diff(
    choice: Choice,
    capture: Capture,
    data: Data,
    site: Annotated[str | None, typer.Option(metavar="PATH", help="Only what changed at or below this module.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Show the graph before and after rewriting, side by side."""
    with refusing():
        with progress_bar() as tell:
            found = jobs.optimized(capture, choice, data, tell).opt.diff().below(site)
        show(found, found.to_json(), as_json)


@app.command(
    epilog=o.examples(
        "rewriter kernels examples/tiny_lm -p fuse,shift_add,vq_logits",
        "rewriter kernels examples/tiny_lm -p shift_add --target sm_90",
    )
)
@o.expanded(passes="fuse,shift_add,vq_logits")
def kernels(
    choice: Choice,
    capture: Capture,
    data: Data,
    target: Annotated[
        str, typer.Option(metavar="NAME", help="cpu (timed here), or sm_80, sm_90, sm_100, gfx942 (compiled for).")
    ] = "cpu",
    as_json: o.AsJson = False,
) -> None:
    """Rewrite a model and list the code each site runs: which, why, its source, and the roofline of its work."""
    with refusing():
        with progress_bar() as tell:
            opt = jobs.optimized(capture, choice, data, tell).opt
            tell("kernels", 0, 1)
            found = implementations(opt.program, target)
        show(kernel_list.listing(found, target), [one.to_json() for one in found], as_json)


@app.command(
    epilog=o.examples("rewriter verify examples/tiny_lm", "rewriter verify mypackage.models:build -p fuse:qkv=false")
)
@o.expanded(passes="fuse")
def verify(choice: Choice, capture: Capture, as_json: o.AsJson = False) -> None:
    """Compare the original and the rewritten program by the golden run (float64, gradients included).

    Exit code 1 if they differ by more than rounding, as all passes do that are not EXACT.
    """
    with refusing():
        with progress_bar() as tell:
            verdict = jobs.verified(capture, choice, tell)
        show(verdict, verdict.to_json(), as_json)
        if not verdict.passed:
            raise typer.Exit(1)


@app.command(
    epilog=o.examples(
        "rewriter optimize examples/tiny_lm -p shift_add --save out/model",
        "rewriter export out/model --onnx out/model.onnx",
        "rewriter export out/model --mlir out/model.mlir --dialect stablehlo --static-shapes",
    )
)
def export(
    model: o.ModelOrSaved,
    onnx: Annotated[Path | None, typer.Option(metavar="FILE", help="The ONNX file to write.")] = None,
    opset: o.Opset = 24,
    mlir: o.Mlir = None,
    dialect: o.Dialect = "torch",
    example_inputs: o.ExampleInputs = None,
    static_shapes: o.Static = False,
    dtype: o.Dtype = "float32",
    as_json: o.AsJson = False,
) -> None:
    """Write ONNX that plain ONNX Runtime runs, or MLIR for other compilers, from a saved or an original model."""
    if (onnx is None) == (mlir is None):
        raise typer.BadParameter("give one of --onnx FILE and --mlir FILE")
    with refusing():
        _check_outputs([p for p in (onnx, mlir) if p is not None], None)
        with progress_bar() as tell:
            if loading.is_saved(model):
                source: Any = rewriter.load(model)
            else:
                capture = Capture(model=model, example_inputs=example_inputs, static_shapes=static_shapes, dtype=dtype)
                source = jobs.captured(capture, tell)[1]
            tell("export", 0, 1)
            if onnx is not None:
                found = exports.onnx(source, onnx, opset)
            if mlir is not None:
                found = exports.mlir(source, mlir, dialect, static_shapes)
        show(*found, as_json)


def _check_outputs(files: list[Path], folder: Path | None) -> None:
    """Refuse what could not be written, before hours of work. Raises ExportError."""
    for path in files:
        if path.is_dir():
            raise ExportError(f"cannot write {path}: it is a folder; give the name of a file")
        check_writable(path)
    if folder is not None:
        check_target(folder)


def _read_plan(path: Path) -> rewriter.Plan:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: not a readable plan ({error}); rewriter plan --out writes one") from error
    if not isinstance(data, dict):
        raise PlanError(f"{path}: not a plan; rewriter plan --out writes one")
    return rewriter.Plan.from_json(data)


def _write_json(path: Path, data: Any) -> None:
    with atomic_file(path, ExportError) as temporary:
        temporary.write_text(json_text(data))


def main() -> None:
    """Console entry point."""
    quieten()
    app()
