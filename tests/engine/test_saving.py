# SPDX-License-Identifier: Apache-2.0
"""Save and load: the same outputs from the files alone, further calls with the model at hand."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import rewriter
from rewriter.errors import CaptureError, ExportError, LoadError, PlanError
from rewriter.optimized import Optimized

from . import kinds
from .kinds import KINDS, LANGUAGE, PLANS, Call, padded, tokens

both_plans = pytest.mark.parametrize("plan", PLANS)
all_kinds = pytest.mark.parametrize("kind", KINDS)


def saved(opt: Optimized, path: Path) -> Path:
    opt.save(path)
    return path


def known_call(kind: str) -> Call:
    """The call ``optimize`` captured."""
    if kind in LANGUAGE:
        return Call((), {"input_ids": tokens(3, 9), "attention_mask": padded(3, 9, "left")})
    return kinds.plain(kind)


@both_plans
@all_kinds
def test_loaded_computes_the_same(kind: str, plan: str, tmp_path: Path) -> None:
    opt = kinds.optimized(kind, plan)
    loaded = rewriter.load(saved(opt, tmp_path / "model"))
    kinds.assert_same(known_call(kind)(loaded), known_call(kind)(opt))
    assert loaded.plan == opt.plan
    assert loaded.state_dict().keys() == opt.state_dict().keys()
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in opt.named_parameters()
    }
    for name, tensor in opt.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype and torch.equal(loaded.state_dict()[name], tensor)


@both_plans
def test_every_captured_call_is_saved(plan: str, tmp_path: Path) -> None:
    opt = copy.deepcopy(kinds.optimized("llama", plan))
    wanted = [kinds.calls("llama")[name] for name in ("positional", "labels", "tuple")]
    expected = [call(opt) for call in wanted]
    opt.train()
    opt(tokens(2, 4))
    opt.eval()
    loaded = rewriter.load(saved(opt, tmp_path / "model"))
    for call, result in zip(wanted, expected, strict=True):
        kinds.assert_same(call(loaded), result)
    loaded.train()
    assert not torch.equal(loaded(tokens(2, 4)).logits, loaded(tokens(2, 4)).logits)


def test_another_call_is_refused_with_what_is_known(tmp_path: Path) -> None:
    opt = rewriter.optimize(kinds.build("llama"), ["vq_logits"])
    loaded = rewriter.load(saved(opt, tmp_path / "model"))
    message = (
        r"no program for the call \(input_ids=tensor, labels=tensor\).*this one knows: "
        r"\(input_ids=tensor, attention_mask=tensor\) training=False.*rewriter\.load\(path, model"
    )
    with pytest.raises(CaptureError, match=message):
        loaded(tokens(2, 4), labels=tokens(2, 4))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "exported"])
def test_with_the_model_at_hand_other_calls_are_captured(kind: str, tmp_path: Path) -> None:
    """The weights of the model do not matter, they come from the file."""
    opt = kinds.optimized(kind, "all")
    loaded = rewriter.load(saved(opt, tmp_path / "model"), model=kinds.build(kind, seed=8))
    for call in kinds.calls(kind).values():
        kinds.assert_same(call(loaded), call(opt))


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = saved(kinds.optimized("sequential", "all"), tmp_path / "model")
    with pytest.raises(LoadError, match=r"LlamaForCausalLM|does not fit"):
        rewriter.load(path, model=kinds.build("llama"))


def test_a_loaded_model_cannot_undo_and_says_so(tmp_path: Path) -> None:
    loaded = rewriter.load(saved(kinds.optimized("sequential", "all"), tmp_path / "model"))
    with pytest.raises(PlanError, match=r"freed|no original"):
        loaded.undo("shift_add")
    with pytest.raises(PlanError, match=r"no original program"):
        loaded.diff()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_cast_model_is_saved_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    opt = copy.deepcopy(kinds.optimized("sequential", "all")).to(dtype)
    with pytest.raises(ExportError, match="call it once, then save"):
        opt.save(tmp_path / "early")
    assert not (tmp_path / "early").exists()
    call = kinds.plain("sequential").to(dtype)
    expected = call(opt)
    kinds.assert_same(call(rewriter.load(saved(opt, tmp_path / "model"))), expected)


def test_training_continues_after_loading(tmp_path: Path) -> None:
    model = kinds.build("llama")
    loaded = rewriter.load(saved(kinds.optimized("llama", "all"), tmp_path / "model"), model=model)
    optimiser = torch.optim.AdamW(loaded.parameters(), lr=5e-3)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = loaded(tokens(4, 9), labels=tokens(4, 9)).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    first = saved(kinds.optimized("llama", "all"), tmp_path / "one")
    second = saved(rewriter.load(first), tmp_path / "two")
    assert {p.name for p in first.iterdir()} == {p.name for p in second.iterdir()}
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    tensors = next(first.glob("*.safetensors")).name
    assert (first / tensors).read_bytes() == (second / tensors).read_bytes()


def test_the_files_hold_codes_and_no_dense_weight(tmp_path: Path) -> None:
    path = saved(kinds.optimized("llama", "all"), tmp_path / "model")
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    report = kinds.optimized("llama", "all").report
    assert report.bytes_after <= size <= report.bytes_after + 20_000
    assert not [file for file in path.iterdir() if file.suffix not in (".json", ".safetensors")]


def test_loading_in_another_process_needs_no_model_code(tmp_path: Path) -> None:
    path = saved(kinds.optimized("sequential", "all"), tmp_path / "model")
    x = kinds.plain("sequential").args[0]
    torch.save(x, tmp_path / "x.pt")
    script = f"""
        import json, sys, torch, rewriter
        opt = rewriter.load({str(path)!r})
        x = torch.load({str(tmp_path / "x.pt")!r})
        print(json.dumps([opt(x).double().sum().item(), "transformers" in sys.modules]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    total, imported = json.loads(done.stdout)
    assert (
        total == pytest.approx(kinds.optimized("sequential", "all")(x).double().sum().item(), rel=1e-5)
        and not imported
    )
