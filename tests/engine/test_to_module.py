# SPDX-License-Identifier: Apache-2.0
"""`to_module`: the user's own class again, for what works on classes: generate, save_pretrained, trainers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import rewriter
from rewriter.errors import PlanError
from rewriter.passes import ShiftAdd, VQLogits

from . import kinds
from .kinds import CAUSAL, KINDS, PLANS, tokens

both_plans = pytest.mark.parametrize("plan", PLANS)
with_module = pytest.mark.parametrize("kind", [k for k in KINDS if k != "exported"])


@both_plans
@with_module
def test_it_is_the_models_class_and_computes_what_the_optimised_one_does(kind: str, plan: str) -> None:
    opt = kinds.optimized(kind, plan)
    module = opt.to_module()
    assert type(module) is type(kinds.build(kind)) and not module.training
    call = kinds.plain(kind)
    a, b = kinds.tensors(call(module)), kinds.tensors(call(opt))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    if plan == "identity":
        assert module.state_dict().keys() == kinds.build(kind).state_dict().keys()


@both_plans
@with_module
def test_writing_to_the_module_leaves_the_optimised_one_and_the_original(kind: str, plan: str) -> None:
    model, opt = kinds.source(kind, plan), kinds.optimized(kind, plan)
    call = kinds.plain(kind)
    expected, original = call(opt), call(model)
    module = opt.to_module()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.zero_()
    kinds.assert_same(call(opt), expected)
    kinds.assert_same(call(model), original)


@both_plans
@pytest.mark.parametrize("kind", CAUSAL)
def test_generate_equals_the_greedy_loop(kind: str, plan: str) -> None:
    opt = kinds.optimized(kind, plan)
    prompt = tokens(1, 5, 3)
    with torch.no_grad():
        generated = opt.to_module().generate(
            prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1
        )
        current = prompt
        for _ in range(12):
            current = torch.cat([current, opt(current).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert generated.tolist() == current.tolist()


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_cache_is_on_again(kind: str) -> None:
    module = kinds.optimized(kind, "all").to_module()
    assert module.config.use_cache
    assert module(tokens(1, 4)).past_key_values is not None


def test_a_tied_head_is_untied_in_the_module_and_in_its_config() -> None:
    model = kinds.build("gpt2")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.transformer.wte.weight
    opt = rewriter.optimize(model, [VQLogits(structure="product")])
    module = opt.to_module()
    assert not module.config.tie_word_embeddings and "weight" not in dict(module.lm_head.named_parameters())
    assert torch.equal(module.transformer.wte.weight, model.transformer.wte.weight)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.transformer.wte.weight
    tied = rewriter.optimize(model, ["fuse"]).to_module()
    assert tied.config.tie_word_embeddings and tied.lm_head.weight is tied.transformer.wte.weight


def test_save_pretrained_of_an_exact_rewrite_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    opt = kinds.optimized("llama", "fuse")
    opt.to_module().save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    state = kinds.build("llama").state_dict()
    assert again.state_dict().keys() == state.keys() and all(
        torch.equal(t, state[n]) for n, t in again.state_dict().items()
    )


@pytest.mark.parametrize("kind", CAUSAL)
def test_save_pretrained_holds_the_compressed_tensors(kind: str, tmp_path: Path) -> None:
    module = kinds.optimized(kind, "all").to_module()
    module.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    state = module.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in saved)
    assert saved["lm_head.codes"].dtype == torch.uint8 and "lm_head.weight" not in saved
    written = (tmp_path / "model.safetensors").stat().st_size
    assert written < 0.45 * sum(p.numel() * 4 for p in kinds.build(kind).parameters())


def test_the_module_trains() -> None:
    module = kinds.optimized("llama", "all").to_module().train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=5e-3)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(20):
            optimiser.zero_grad()
            loss = module(input_ids=tokens(4, 9), labels=tokens(4, 9)).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("change", ["half", "double", "train"])
@pytest.mark.parametrize("kind", ["llama", "bert", "sequential"])
def test_it_has_the_present_mode_dtype_and_values(kind: str, change: str) -> None:
    opt = copy.deepcopy(kinds.optimized(kind, "all"))
    getattr(opt, change)()
    module = opt.to_module()
    assert module.training == (change == "train")
    assert {m.training for m in module.modules()} == {module.training}
    kinds_of = {p.dtype for p in module.parameters() if p.is_floating_point()}
    assert kinds_of == {{"half": torch.float16, "double": torch.float64}.get(change, torch.float32)}


def test_modes_of_submodules_and_frozen_parameters_survive() -> None:
    model = kinds.build("bert").train()
    model.encoder.layer[0].eval().requires_grad_(False)
    module = rewriter.optimize(model, [ShiftAdd(group=32)]).to_module()
    assert module.training and not module.encoder.layer[0].training and module.encoder.layer[1].training
    assert not any(p.requires_grad for p in module.encoder.layer[0].parameters())


def test_what_has_no_class_says_so(tmp_path: Path) -> None:
    kinds.optimized("sequential", "all").save(tmp_path / "saved")
    for opt in (kinds.optimized("exported", "all"), rewriter.load(tmp_path / "saved")):
        with pytest.raises(PlanError, match=r"no class to go back to.*rewriter\.load\(path, model"):
            opt.to_module()
    loaded = rewriter.load(tmp_path / "saved", model=kinds.build("sequential"))
    kinds.assert_same(kinds.plain("sequential")(loaded.to_module()), kinds.plain("sequential")(loaded))


def test_a_shared_layer_is_one_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.again = self.layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(torch.relu(self.layer(x)))

    x = torch.randn(3, 16)
    opt = rewriter.optimize(Twice().eval(), [ShiftAdd(group=8)], example_inputs=x)
    module = opt.to_module()
    torch.testing.assert_close(module(x), opt(x))
    assert module.layer is module.again
