# SPDX-License-Identifier: Apache-2.0
"""The original stays the caller's: nothing reaches it, nothing of its state is disturbed."""

from __future__ import annotations

import copy
import gc
import os
import random
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import rewriter
from rewriter import errors
from rewriter.passes import ShiftAdd, VQLogits

from . import kinds
from .kinds import KINDS, PLANS, TRANSFORMERS, tokens

with_module = pytest.mark.parametrize("kind", [k for k in KINDS if k != "exported"])
both_plans = pytest.mark.parametrize("plan", PLANS)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert now[name].dtype == tensor.dtype and torch.equal(now[name], tensor), name


def zero(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()


def optimised(kind: str, plan: str) -> tuple[nn.Module, rewriter.Optimized]:
    model = kinds.build(kind)
    return model, rewriter.optimize(model, kinds.passes(plan))


def loss_of(kind: str, model: nn.Module) -> Tensor:
    if kind in kinds.CAUSAL:
        return model(input_ids=tokens(4, 9), labels=tokens(4, 9)).loss
    if kind == "vit":
        return kinds.calls(kind)["labels"](model).loss
    output = next(iter(kinds.tensors(kinds.plain(kind)(model)).values()))
    target = torch.sin(torch.arange(output.shape[-1]).float())
    return (output - target).square().mean()


@both_plans
@with_module
def test_training_moves_the_copy_and_writing_moves_the_original(kind: str, plan: str) -> None:
    model, opt = optimised(kind, plan)
    before, call = snapshot(model), kinds.plain(kind)
    expected = call(model)
    optimiser = torch.optim.AdamW(opt.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = loss_of(kind, opt)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    unchanged(model, before)
    kinds.assert_same(call(model), expected)
    assert all(p.grad is None for p in model.parameters())

    trained = call(opt)
    zero(model)
    kinds.assert_same(call(opt), trained)


@both_plans
@pytest.mark.parametrize("kind", ["gpt2", "sequential"])
def test_writing_to_the_original_leaves_tensors_nothing_has_written_yet(kind: str, plan: str) -> None:
    model, opt = optimised(kind, plan)
    expected = kinds.plain(kind)(opt)
    zero(model)
    kinds.assert_same(kinds.plain(kind)(opt), expected)


def test_training_in_training_mode_also_moves_batch_statistics_of_the_copy_only() -> None:
    model, opt = optimised("sequential", "identity")
    before = snapshot(model)
    opt.train()
    for _ in range(3):
        kinds.plain("sequential")(opt).sum().backward()
    unchanged(model, before)
    assert not model.training
    assert int(opt.get_buffer("1.num_batches_tracked")) == 3 and not torch.equal(
        opt.get_buffer("1.running_mean"), before["1.running_mean"]
    )


@both_plans
@pytest.mark.parametrize(
    "change",
    [
        lambda opt: opt.half(),
        lambda opt: opt.double(),
        lambda opt: opt.load_state_dict({n: torch.zeros_like(t) for n, t in opt.state_dict().items()}),
        lambda opt: opt.requires_grad_(False),
        lambda opt: opt.train(),
        lambda opt: [b.zero_() for b in opt.buffers()],
    ],
    ids=["half", "double", "load_state_dict", "freeze", "train", "buffers"],
)
def test_what_is_done_to_the_copy(change: Any, plan: str) -> None:
    model, opt = optimised("sequential", plan)
    before = snapshot(model)
    change(opt)
    unchanged(model, before)
    assert not model.training and all(p.requires_grad for p in model.parameters())


@both_plans
@pytest.mark.parametrize("kind", ["gpt2", "sequential"])
def test_a_state_dict_goes_out_and_in(kind: str, plan: str) -> None:
    other = copy.deepcopy(kinds.optimized(kind, plan))
    zero(other)
    missing, unexpected = other.load_state_dict(kinds.optimized(kind, plan).state_dict())
    assert not missing and not unexpected
    kinds.assert_same(kinds.plain(kind)(other), kinds.plain(kind)(kinds.optimized(kind, plan)))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_identity_state_dict_is_the_models(kind: str) -> None:
    """Ties included: an existing checkpoint loads."""
    model, opt = kinds.build(kind, seed=8), copy.deepcopy(kinds.optimized(kind, "identity"))
    assert opt.state_dict().keys() == model.state_dict().keys()
    opt.load_state_dict(model.state_dict())
    kinds.assert_same(kinds.plain(kind)(opt), kinds.plain(kind)(model), rtol=0, atol=1e-5)
    assert len(list(opt.parameters())) == len(list(model.parameters()))


# -------------------------------------------------------------------------------------------- keep_original


def test_keep_original_false_frees_what_was_replaced() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    opt = rewriter.optimize(model, [ShiftAdd(group=32)], keep_original=False)
    alive = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert alive() is None
    dense = [
        t
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and tuple(t.shape) == (64, 64) and t.untyped_storage().nbytes()
    ]
    assert not [t for t in dense if t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)]
    for action in (lambda: opt.undo("shift_add"), opt.original_program):
        with pytest.raises(errors.PlanError, match="keep_original=False"):
            action()
    assert opt(torch.randn(2, 64)).shape == (2, 64)


def test_kept_originals_are_shared_with_the_model_not_copied() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    opt = rewriter.optimize(model, [ShiftAdd(group=32)])
    assert torch._C._is_cow_tensor(opt.originals()["0.weight"]) and torch._C._is_cow_tensor(model[0].weight)


def test_untouched_tensors_share_memory_until_written() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    opt = rewriter.optimize(model, [])
    weight = opt.get_parameter("0.weight")
    opt(torch.randn(2, 64)).sum().backward()  # reading does not write
    assert torch._C._is_cow_tensor(weight)
    with torch.no_grad():
        weight.add_(1)
    assert not torch._C._is_cow_tensor(weight)
    assert not torch.equal(weight, model[0].weight)


# What is freed goes back to the system at once, so that resident memory is memory in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
MEASURE = """
    import gc, torch, rewriter
    from torch import nn
    from rewriter.passes import ShiftAdd, VQLogits
    torch.set_num_threads(1)

    def status(field):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

    def model(layers, width):
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])

    rewriter.optimize(model(2, 256), [ShiftAdd()])  # what is loaded on first use is no part of the model's memory
    big = model({layers}, {width})
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    before = status("VmRSS")
    opt = rewriter.optimize(big, [ShiftAdd(bits=3)])
    peak = status("VmHWM") - before
    kept = sum(t.numel() * t.element_size() for t in (*opt.parameters(), *opt.buffers()))
    print(peak, kept, {width} * {width} * 4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_peak_memory_is_about_one_site() -> None:
    """Beyond the new parameters themselves, at most 1.2 times the largest site."""
    script = textwrap.dedent(MEASURE).format(layers=2, width=2048)
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | ALLOCATOR
    )
    peak, kept, site = map(int, found.stdout.split())
    assert peak - kept <= 1.2 * site, (
        f"peak {peak / 2**20:.0f} MiB, new parameters {kept / 2**20:.0f}, one site {site / 2**20:.0f}"
    )


# --------------------------------------------------------------------------------------- the caller's state


@contextmanager
def nothing_disturbed(model: nn.Module) -> Iterator[None]:
    """Modes of every submodule, config, hooks, gradients, grad mode and three random number generators."""

    def state() -> Any:
        modes = {name: module.training for name, module in model.named_modules()}
        hooks = {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}
        cache = getattr(getattr(model, "config", None), "use_cache", None)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        identities = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        global_state = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
        )
        return (
            modes,
            hooks,
            cache,
            flags,
            identities,
            global_state,
            type(model),
            vars(model).keys(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
        )

    before, torch_state, tensors = state(), torch.get_rng_state(), snapshot(model)
    yield
    assert state() == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    unchanged(model, tensors)
    assert all(p.grad is None for p in model.parameters())


def disturbed_easily() -> nn.Module:
    """A model in training mode with one frozen, evaluating part and a hook, and the cache on."""
    model = kinds.build("gpt2").train()
    model.transformer.h[0].eval().requires_grad_(False)
    model.transformer.h[1].register_forward_hook(lambda module, args, output: None)
    assert model.config.use_cache
    return model


class Interrupting:
    """A progress callback that raises at the n-th report."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        self.left, self.error = n, error

    def __call__(self, what: str, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error(what)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda g: g.__name__)
def test_state_after_success(grad: Any) -> None:
    model = disturbed_easily()
    with nothing_disturbed(model), grad():
        opt = rewriter.optimize(model, ["fuse", VQLogits(structure="product")], calibration=[tokens(2, 8)])
    # The first block evaluates, so its attention is rewritten; the second one's drops out and is refused.
    assert opt.training and [s.address.path for s in opt.plan.sites] == ["transformer.h.0.attn", "lm_head"]
    with torch.enable_grad():
        opt(input_ids=tokens(2, 8), labels=tokens(2, 8)).loss.backward()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_state_after_an_interruption_anywhere(n: int, error: type[BaseException]) -> None:
    model = disturbed_easily()
    progress = Interrupting(n, error)
    with nothing_disturbed(model), pytest.raises(error):
        rewriter.optimize(model, kinds.passes("all"), calibration=[tokens(2, 8)], progress=progress)
    assert progress.left == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"passes": ["fuse", "vq_logit"]}, errors.PlanError),
        ({"passes": ["fuse"], "expect": {"fuse.attention": 99}}, errors.PlanError),
        ({"passes": ["fuse"], "example_inputs": torch.full((2, 4), 0.5)}, errors.CaptureError),
        ({"passes": ["shift_add"], "select": {"lm_heat": "shift_add"}}, errors.PlanError),
    ],
)
def test_state_after_an_error(arguments: dict[str, Any], error: type[Exception]) -> None:
    model = disturbed_easily()
    with nothing_disturbed(model), pytest.raises(error):
        rewriter.optimize(model, **arguments)


def test_random_numbers_of_a_plan_do_not_depend_on_the_global_generator() -> None:
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(rewriter.optimize(kinds.build("sequential"), kinds.passes("all")).state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@both_plans
def test_later_calls_do_not_disturb_the_generators_either(plan: str) -> None:
    opt = copy.deepcopy(kinds.optimized("llama", plan))
    before = torch.get_rng_state()
    kinds.calls("llama")["labels"](opt)  # captures
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_whose_weights_are_a_mapped_file_is_taken_and_stays_untouched() -> None:
    """torch cannot share such memory until it is written, and says so with an internal error."""
    folder = Path(__file__).parents[2] / "examples" / "tiny_lm"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()  # in its own dtype: nothing was converted
    before = {n: t.clone() for n, t in model.state_dict().items()}
    opt = rewriter.optimize(model, ["fuse"])
    with torch.no_grad():
        for parameter in opt.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
