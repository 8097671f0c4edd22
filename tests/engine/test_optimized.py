# SPDX-License-Identifier: Apache-2.0
"""`Optimized` as a module: attributes of the model, its own results, and programs made on need."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.errors import PlanError
from rewriter.passes import ShiftAdd

from . import kinds
from .kinds import KINDS, PLANS, tokens

both_plans = pytest.mark.parametrize("plan", PLANS)


def test_unknown_attributes_are_the_models() -> None:
    opt = kinds.optimized("llama", "all")
    assert opt.config.hidden_size == 48 and opt.device == torch.device("cpu") and opt.dtype == torch.float32
    assert copy.deepcopy(opt).half().dtype == torch.float16
    with pytest.raises(AttributeError, match="nonsense"):
        opt.nonsense  # noqa: B018


def test_methods_of_the_model_point_to_the_module() -> None:
    with pytest.raises(
        AttributeError, match=r"generate is a method of LlamaForCausalLM.*opt\.to_module\(\)\.generate"
    ):
        kinds.optimized("llama", "all").generate(tokens(1, 3))


@both_plans
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_module(kind: str, plan: str) -> None:
    opt = kinds.optimized(kind, plan)
    assert isinstance(opt, nn.Module) and not opt.training
    assert all(
        name in dict(opt.named_parameters()) or name in dict(opt.named_buffers())
        for name in opt.state_dict()
        if plan == "all"
    )
    assert f"{len(opt.plan.sites)} rewritten sites" in repr(opt)


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_what_the_design_promises(kind: str) -> None:
    opt = kinds.optimized(kind, "all")
    assert opt.report.to_json()["sites"] and opt.plan.sites and opt.program.graph
    assert opt.diff().to_json()
    assert opt.original_program().run(*opt.original.example)


def test_a_call_is_captured_once() -> None:
    opt = rewriter.optimize(kinds.build("llama"), [])
    opt(tokens(2, 5))
    known = len(opt._programs)
    for batch, length in ((1, 5), (3, 2), (1, 1), (4, 9)):
        opt(tokens(batch, length))
    assert len(opt._programs) == known
    opt(tokens(2, 5), labels=tokens(2, 5))
    assert len(opt._programs) == known + 1


def test_programs_of_several_calls_share_one_set_of_parameters() -> None:
    opt = copy.deepcopy(kinds.optimized("llama", "all"))
    call = kinds.calls("llama")["labels"]
    before = call(opt).loss
    with torch.no_grad():
        opt.get_parameter("lm_head.codebook").mul_(0.5)
    assert not torch.equal(call(opt).loss, before)
    assert torch.equal(call(opt).logits, opt(tokens(3, 9)).logits)


class Optional(nn.Module):
    """A branch, with a layer of its own, that only some calls take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return self.first(x) if extra is None else self.first(x) + self.second(extra)


def test_a_call_that_does_not_use_a_rewritten_layer() -> None:
    model = Optional().eval()
    x = torch.randn(3, 8)
    opt = rewriter.optimize(model, [ShiftAdd(group=8)], example_inputs=(x, x))
    assert len(opt.plan.sites) == 2
    torch.testing.assert_close(opt(x), opt.to_module()(x))
    torch.testing.assert_close(opt(x, x), opt.to_module()(x, x))


def test_a_call_that_uses_a_layer_the_example_did_not() -> None:
    """It is computed as it was: the plan knows nothing of it."""
    model = Optional().eval()
    x = torch.randn(3, 8)
    opt = rewriter.optimize(model, [ShiftAdd(group=8)], example_inputs=(x,))
    assert [site.address.path for site in opt.plan.sites] == ["first"]
    torch.testing.assert_close(opt(x, x), opt(x) + model.second(x))


def test_probabilities_can_still_be_asked_for() -> None:
    """With them returned, no attention can be fused, yet q, k and v stay merged."""
    opt, reference = kinds.optimized("llama", "all"), kinds.reference("llama", "all")
    actual, expected = (f(tokens(2, 6), output_attentions=True) for f in (opt, reference))
    assert len(actual.attentions) == 2
    torch.testing.assert_close(actual.attentions, expected.attentions, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=2e-5)


def test_hidden_states_keep_their_place() -> None:
    opt, reference = kinds.optimized("bert", "all"), kinds.reference("bert", "all")
    actual, expected = (f(tokens(2, 6), output_hidden_states=True) for f in (opt, reference))
    assert isinstance(actual.hidden_states, tuple) and len(actual.hidden_states) == 3
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "tpu"}, "target must be one of"),
        ({"target": "mlir"}, "call export_mlir"),
        ({"budget": 1}, r"budget= is not in this version and needs data"),
        ({"recover": 1}, r"recover= is not in this version"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        rewriter.optimize(kinds.build("sequential"), ["shift_add"], **arguments)


def test_seeds_make_different_codebooks_and_the_same_seed_the_same() -> None:
    found = [
        rewriter.optimize(kinds.build("sequential"), ["vq_logits"], seed=s).get_parameter("4.codebook")
        for s in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_results_of_other_types_survive_pickle() -> None:
    opt = kinds.optimized("bert", "all")
    loaded = pickle.loads(pickle.dumps(opt))
    kinds.assert_same(loaded(tokens(2, 5)), opt(tokens(2, 5)))
    assert loaded.undo("fuse", cascade=True).plan.sites
