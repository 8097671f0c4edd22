# SPDX-License-Identifier: Apache-2.0
"""`optimize(target=…)` as far as the device: what an `Optimized` runs, says it runs, and keeps when it is saved."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import on_device
from rich.console import Console
from test_emitting_models import gpt2, llama, tokens
from torch import Tensor, nn

import rewriter
from rewriter.codegen.emitting import emit
from rewriter.codegen.lowering import lower
from rewriter.errors import LoadError, PlanError
from rewriter.kernels.emitted.loading import LOADED


@functools.cache  # not to be changed
def small(dtype: torch.dtype = torch.float32, target: str | None = "cuda", **options: Any) -> rewriter.Optimized:
    torch.manual_seed(1)
    layers = [nn.Linear(32, 48), nn.GELU(), nn.Dropout(), nn.Linear(48, 32), nn.LayerNorm(32), nn.Linear(32, 8)]
    model = nn.Sequential(*layers).eval().to(dtype)
    return rewriter.optimize(model, ["shift_add"], (torch.randn(2, 32).to(dtype),), target=target, **options)


def emitted(opt: rewriter.Optimized) -> list[str]:
    """Operators of the program that runs, as far as they were made for it."""
    return [str(n.target) for n in opt.lowered.program.graph.nodes if n.target in LOADED]


def loss(value: Tensor, gold: Tensor) -> float:
    return float((value - gold).norm())


@pytest.mark.parametrize(("build", "dtype"), [(gpt2, torch.bfloat16), (llama, torch.float32)])
def test_a_call_on_the_device_runs_what_was_emitted(build: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
    """A whole model, with another batch and length, judged by what its operators lose one by one in that dtype."""
    torch.manual_seed(0)
    model = build(1).eval().to(dtype)
    opt = rewriter.optimize(model, ["fuse", "shift_add"], (tokens(2, 8),), target="cuda", strict=True)
    with torch.no_grad():
        plain, gold = opt(tokens(3, 5)).logits, copy.deepcopy(opt).double()(tokens(3, 5)).logits
        with on_device() as calls:
            ours = opt(tokens(3, 5)).logits
    started = [str(operator) for operator in calls.elements() if operator in LOADED]
    assert sorted(started) == sorted(emitted(opt)) != []
    assert loss(ours, gold) <= 2 * loss(plain, gold)


def test_elsewhere_the_same_operators_run_one_by_one() -> None:
    opt, x = small(), torch.randn(5, 32)
    assert len(emitted(opt)) == 1
    assert torch.equal(opt(x), opt.program.run(x)[0])
    assert not any(node.target in LOADED for node in opt.program.graph.nodes)  # what is exported and compared


def test_a_program_is_lowered_once() -> None:
    with pytest.raises(PlanError, match="lowered already"):
        lower(small().lowered.program, "cuda")


def test_on_the_cpu_nothing_is_emitted() -> None:
    for target in (None, "cpu"):
        opt = small(target=target)
        assert opt.lowered.device == opt.report.device == "cpu" and opt.lowered.program is opt.program
        assert [(one.site, one.code) for one in opt.report.code] == [("0", "native"), ("3", "native"), ("5", "native")]


def test_gradients_and_one_compiled_graph() -> None:
    opt, x = small(), torch.randn(5, 32)

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        opt.zero_grad(set_to_none=True)
        call(x).square().mean().backward()
        return [p.grad.clone() for p in opt.parameters() if p.grad is not None]

    plain = gradients(lambda x: opt.program.run(x)[0])
    ours, compiled = gradients(opt), gradients(torch.compile(opt, fullgraph=True, backend="aot_eager"))
    assert len(plain) == len(ours) == len(compiled) == 8  # scales and biases, and those of the norm
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(plain * 2, ours + compiled, strict=True))


def test_every_way_of_calling_is_lowered_but_training() -> None:
    opt = copy.deepcopy(small())
    first = emitted(opt)
    opt.half()
    opt(torch.randn(3, 32).half())
    half = [low.program for low in opt._lowered.values()][-1]
    assert [str(n.target) for n in half.graph.nodes if n.target in LOADED] not in ([], first)
    opt.float().train()
    opt(torch.randn(3, 32))
    trained = [low for low in opt._lowered.values()][-1]
    assert trained.program.training and trained.emission is None


def test_it_is_kept_by_copies_and_files(tmp_path: Path) -> None:
    opt, x = copy.deepcopy(small()), torch.randn(5, 32)
    opt.save(tmp_path / "model")
    copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), rewriter.load(tmp_path / "model")]
    for other in copies:
        assert other.target == "cuda" and emitted(other) == emitted(opt) and torch.equal(other(x), opt(x))
    with torch.no_grad():
        next(opt.parameters()).mul_(2)
    assert all(not torch.equal(other(x), opt(x)) for other in copies)  # each has its own parameters
    undone = opt.undo("0")
    assert undone.target == "cuda" and not emitted(undone) and [one.site for one in undone.report.code] == ["3", "5"]
    assert not any(p.suffix == ".py" for p in (tmp_path / "model").rglob("*"))  # loading runs nothing that lies there


def test_a_file_with_another_target_is_refused(tmp_path: Path) -> None:
    small().save(tmp_path / "model")
    manifests = [p for p in (tmp_path / "model").glob("*.json") if '"target"' in p.read_text()]
    for path in manifests:
        path.write_text(path.read_text().replace('"cuda"', '"tpu"'))
    with pytest.raises(LoadError):
        rewriter.load(tmp_path / "model")


def test_the_report_says_what_runs_and_why_not_more() -> None:
    report = small().report
    assert report is not None
    (up, down, last) = report.code
    assert (up.code, up.fused, up.why) == ("emitted", ("gelu.default",), "bcq_linear of 3 is in another kernel")
    assert up.source.startswith("emitted/") and up.source.endswith(".py")
    assert (down.site, down.code, down.source) == ("3", "Triton", "shift_add/kernels.py")
    assert down.why == "layer_norm of 4 is not pointwise" and last.why == "it is a result of the program"
    assert json.loads(json.dumps(report.to_json()))["code"][1]["why"] == down.why
    screen = Console(width=100)
    with screen.capture() as shown:
        screen.print(report)
    text = " ".join(shown.get().split())
    assert "runs on cuda" in text and "bcq_linear + gelu" in text
    assert "bcq_linear runs unfused: layer_norm of 4 is not pointwise (3)" in text


def test_a_fallback_is_in_the_report_and_an_error_if_strict() -> None:
    for target, device in ((None, "cpu"), ("cuda", "cuda")):
        report = small(torch.float64, target).report
        assert report is not None and all(one.code == "reference" and "float64" in one.why for one in report.code)
        screen = Console(width=100)
        with screen.capture() as shown:
            screen.print(report)
        assert "bcq_linear runs its reference: " in shown.get()
        with pytest.raises(PlanError, match=rf"(?s)3 sites would run.* on {device}:.*0: bcq_linear: .*float64.*5"):
            small(torch.float64, target, strict=True)


def test_a_cache_that_cannot_be_written_is_an_error_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "file"))
    with pytest.raises(PlanError, match="REWRITER_CACHE"):
        small.__wrapped__()


def test_names_do_not_become_code(tmp_path: Path) -> None:
    """A loaded model brings its module paths along; an emitted file has them in its head."""
    program = small().program
    for node in program.graph.nodes:
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = {"": ("a\nraise SystemExit  # \u2028b", "")}
            node.meta["custom"] = {"rewriter": {"rule": "c\rraise SystemExit", "site": "a"}}
    (site,) = emit(program, folder=tmp_path).sites
    head = site.emitted.path.read_text().partition("import torch")[0]
    assert "raise SystemExit" in head and all(line.startswith("#") for line in head.splitlines() if line)
