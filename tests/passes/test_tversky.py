# SPDX-License-Identifier: Apache-2.0
"""The pass: what each initialisation promises, on small models, through plans, files, modules and dtypes."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rewriter
from rewriter.errors import PlanError, UntrainedWarning
from rewriter.passes import ShiftAdd, Tversky
from rewriter.passes.tversky.modules import TverskyProjection
from rewriter.program import Program

VOCABULARY = 600


class Small(nn.Module):
    """An embedding, two linears, a norm and a head, tied or not."""

    def __init__(self, tied: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)
        self.norm = nn.RMSNorm(16) if norm else nn.Identity()
        self.head = nn.Linear(16, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def small(**options: bool) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small(**options).eval()
        if options.get("norm", True):
            nn.init.normal_(model.norm.weight, 1.0, 0.3)
        return model


def tokens(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(seed))


def rewritten(model: nn.Module, one: Tversky, example: Tensor, **options: Any) -> tuple[Program, Program]:
    program = rewriter.capture(model, (example,))
    return program, rewriter.apply(program, rewriter.plan(program, [one], **options))


def optimised(model: nn.Module, one: Tversky, **options: Any) -> rewriter.Optimized:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        return rewriter.optimize(model, [one], (tokens(),), **options)


def calibration() -> list[Tensor]:
    return [tokens(seed, rows=8) for seed in range(1, 5)]


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "low-rank"}, "unknown init 'low-rank' \\(nearest: low_rank\\)"),
        ({"intersection": "cosine", "init": "single"}, "unknown intersection"),
        ({"features": 0}, "features=0"),
        ({"features": True}, "features=True"),
        ({"features": 8, "init": "signed_pair"}, "fixes its features"),
        ({"features": 7, "init": "single"}, "must be even"),
        ({"max_error": 0.0}, "max_error=0.0"),
        ({"share": "prototypes"}, "unknown share"),
        ({"share": "embeddings"}, "replaces them by their scores"),
        ({"share": "features", "init": "bounded_head"}, "not for bounded_head"),
        ({"share": "features", "init": "single", "features": 8}, 'needs features="auto"'),
        ({"intersection": "min"}, 'only intersection="product"'),
        ({"form": "ratio", "init": "signed_pair"}, 'only form="contrast"'),
        ({"difference": "subtractmatch", "init": "sign_codes"}, 'only difference="ignorematch"'),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Tversky(**options)


def test_the_contract_is_that_of_the_initialisation() -> None:
    kinds = {init: Tversky(init=init).contract.kind for init in ("signed_pair", "sign_codes", "bounded_head")}
    assert set(kinds.values()) == {"EXACT"}
    assert (Tversky().contract.kind, Tversky(init="single").contract.kind) == ("CALIBRATED", "LEARNED")
    for init in (*kinds, "low_rank", "single"):
        one = Tversky(init=init)
        assert [rule.contract for rule in one.rules()] == [one.contract]


# ------------------------------------------------------------------------------------------------------- exact


def sign_coded(by_row: bool) -> Small:
    model = small()
    for layer in (model.up, model.down, model.head):
        size = layer.weight.abs().mean(1, keepdim=True) if by_row else layer.weight.abs().mean(0, keepdim=True)
        layer.weight.data = layer.weight.sign() * size
    return model


EXACT = {
    "signed_pair": (small, Tversky(init="signed_pair"), 3),
    "signed_pair_shared": (small, Tversky(init="signed_pair", share="features"), 3),
    "signed_pair_tied": (lambda: small(tied=True), Tversky(init="signed_pair", share="embeddings"), 3),
    "sign_codes_by_row": (lambda: sign_coded(True), Tversky(init="sign_codes"), 3),
    "sign_codes_by_column": (lambda: sign_coded(False), Tversky(init="sign_codes"), 3),
    "bounded_head": (small, Tversky(init="bounded_head"), 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EXACT)
def test_exact_initialisations_pass_the_golden_run(case: str, dtype: torch.dtype) -> None:
    """Promoted to float64 the same function, gradients included; in its own dtype as good as the dense layer."""
    build, one, sites = EXACT[case]
    before, after = rewritten(build().to(dtype), one, tokens())
    assert sum(n.target is torch.ops.rewriter.tversky.default for n in after.graph.nodes) >= sites
    inputs = [(tokens(1),), (tokens(2, rows=5),)]  # also of another size than it was captured with
    rewriter.verify(before, after, inputs).raise_if_failed()


def test_the_signed_pair_says_that_it_saves_nothing() -> None:
    opt = optimised(small(), Tversky(init="signed_pair"))
    assert opt.report is not None and opt.report.bytes_after > opt.report.bytes_before
    assert all(site.choice["saves"].startswith("nothing") for site in opt.report.sites)


def test_weights_that_are_no_sign_codes_are_left_alone_with_the_reason() -> None:
    program = rewriter.capture(small(), (tokens(),))
    plan = rewriter.plan(program, [Tversky(init="sign_codes")])
    assert not plan.sites
    assert any("no sign code" in miss.reason for miss in plan.misses)


def test_one_bit_shift_add_weights_are_sign_codes() -> None:
    """One binary base with one group is c·S: what shift_add decodes, tversky takes over."""
    binary = rewriter.optimize(small(), [ShiftAdd(bits=1, group=24)], (tokens(),), select={"head": None})
    model = small()
    for name in ("up", "down"):
        dense = binary.to_module().get_submodule(name).weight
        model.get_submodule(name).weight.data = dense.detach().clone()
    before, after = rewritten(model, Tversky(init="sign_codes"), tokens())
    names = [str(n.target) for n in after.graph.find_nodes(op="get_attr")]
    assert {"up.prototypes", "down.prototypes"} <= set(names)
    rewriter.verify(before, after, [(tokens(1),)]).raise_if_failed()


def test_a_head_without_a_norm_before_it_is_not_bounded() -> None:
    plan = rewriter.plan(rewriter.capture(small(norm=False), (tokens(),)), [Tversky(init="bounded_head")])
    assert not plan.sites and any("nothing bounds it" in miss.reason for miss in plan.misses)


def test_an_exact_rule_leaves_a_tied_head_alone_unless_it_may_keep_the_embedding() -> None:
    program = rewriter.capture(small(tied=True), (tokens(),))
    plan = rewriter.plan(program, [Tversky(init="signed_pair")])
    assert {site.address.path for site in plan.sites} == {"up", "down"}
    assert any("read by embedding" in miss.reason for miss in plan.misses)


def test_prototypes_of_a_tied_head_stay_the_embedding_when_it_is_trained() -> None:
    opt = optimised(small(tied=True), Tversky(init="signed_pair", share="embeddings"))
    names = {name for name, _ in opt.named_parameters()}
    assert "head.features" in names and "head.prototypes" not in names
    opt(tokens()).square().mean().backward()
    parameters = dict(opt.named_parameters())
    with torch.no_grad():
        parameters["embed.weight"] += 0.1
    model = small(tied=True)
    with torch.no_grad():
        model.embed.weight += 0.1
    torch.testing.assert_close(opt(tokens()), model(tokens()))
    module = opt.to_module()
    assert module.get_submodule("head").prototypes is module.get_submodule("embed").weight
    torch.testing.assert_close(module(tokens()), opt(tokens()))


# ---------------------------------------------------------------------------------------- low rank, calibrated


def low_rank_model() -> Small:
    """Its layers are of rank 4 where the inputs vary: the embedding spans 4 of 16 dimensions, nearly."""
    model = small()
    g = torch.Generator().manual_seed(1)
    directions = torch.randn(4, 16, generator=g)
    noise = 1e-3 * torch.randn(VOCABULARY, 16, generator=g)
    model.embed.weight.data = torch.randn(VOCABULARY, 4, generator=g) @ directions + noise
    return model


def test_few_features_are_enough_where_inputs_are_of_low_rank() -> None:
    """The whitened fit knows that; the plain one, of weights alone, does not, and leaves the layer alone."""
    model = low_rank_model()
    only = {"re:(down|head)": None}
    opt = optimised(model, Tversky(), calibration=calibration(), select=only)
    assert opt.report is not None
    (site,) = opt.report.sites
    assert site.choice["features"] == 4 and site.figures["output_error"] < 0.01 < 0.3 < site.figures["weight_error"]
    assert site.bytes_after < 0.6 * site.bytes_before
    torch.testing.assert_close(opt(tokens()), model(tokens()), rtol=0.05, atol=0.05)
    plan = rewriter.plan(rewriter.capture(model, (tokens(),)), [Tversky()], select=only)
    assert not plan.sites
    assert any("without calibration" in m.reason and "raise max_error" in m.reason for m in plan.misses)


def test_error_falls_with_features_and_is_the_one_that_was_asked_for() -> None:
    """On calibration inputs, measured: the figure of the report is the error of the layer's outputs."""
    model, data = small(), calibration()
    program = rewriter.capture(model, (tokens(),))
    statistics = rewriter.calibrate(program, [Tversky()], data)
    x = torch.cat([model.embed(ids).flatten(0, 1) for ids in data]).detach()
    dense = x @ model.up.weight.detach().t()
    errors = []
    for count in (2, 5, 9, 14):
        opt = optimised(model, Tversky(features=count), calibration=statistics, select={"re:(down|head)": None})
        figures = opt.report.sites[0].figures
        up = opt.to_module().get_submodule("up")
        measured = float(((up(x) - up.bias) - dense).detach().norm() / dense.norm())
        assert figures["output_error"] == pytest.approx(measured, rel=1e-3)
        errors.append(measured)
    assert errors == sorted(errors, reverse=True)


def test_the_whitened_fit_beats_the_plain_one_on_its_own_inputs() -> None:
    model = low_rank_model()
    with_data = optimised(model, Tversky(features=3), calibration=calibration(), select={"re:(down|head)": None})
    without = optimised(model, Tversky(features=3), select={"re:(down|head)": None})
    dense = model(tokens(9))
    lost = [float((opt(tokens(9)) - dense).detach().norm()) for opt in (with_data, without)]
    assert lost[0] < 0.8 * lost[1]


def test_as_many_features_as_the_rank_are_no_approximation() -> None:
    plan = rewriter.plan(rewriter.capture(small(), (tokens(),)), [Tversky(features=16)])
    assert not plan.sites and any("signed_pair" in miss.reason for miss in plan.misses)


def test_what_is_left_alone_is_open_to_the_next_pass() -> None:
    plan = rewriter.plan(rewriter.capture(small(), (tokens(),)), [Tversky(), "shift_add"])
    assert {site.pass_name for site in plan.sites} == {"shift_add"} and len(plan.sites) == 3


def test_a_tied_head_is_left_alone_because_nothing_would_be_saved() -> None:
    plan = rewriter.plan(rewriter.capture(small(tied=True), (tokens(),)), [Tversky(max_error=0.9)])
    assert "head" not in {site.address.path for site in plan.sites}
    assert any("nothing would be saved" in miss.reason for miss in plan.misses)


def test_layers_of_equal_width_can_share_their_features() -> None:
    """One parameter under two names, and a report that counts it once; trained, it stays one."""
    own = optimised(small(), Tversky(features=6), calibration=calibration())
    opt = optimised(small(), Tversky(features=6, share="features"), calibration=calibration())
    parameters = dict(opt.named_parameters(remove_duplicate=False))
    assert parameters["up.features"] is parameters["head.features"]
    assert parameters["down.features"] is not parameters["up.features"]
    assert opt.report is not None and own.report is not None
    assert opt.report.bytes_after == own.report.bytes_after - 2 * 6 * 16
    module = opt.to_module()
    assert module.get_submodule("up").features is module.get_submodule("head").features
    torch.testing.assert_close(module(tokens()), opt(tokens()))


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=90, num_hidden_layers=1, initializer_range=0.3, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def test_a_merged_projection_can_be_taken_with_a_number_of_features() -> None:
    """Its weight is made by fuse, while planning without values: nobody can choose a rank then, but it can be told."""
    program = rewriter.capture(llama(), (tokens() % 90,), {"use_cache": False})
    plan = rewriter.plan(program, ["fuse", Tversky()])
    assert any("made by an earlier rule" in miss.reason for miss in plan.misses)
    for share in (None, "features"):
        one = Tversky(features=12, share=share)
        after = rewriter.apply(program, rewriter.plan(program, ["fuse", one]))
        merged = after.tensor("model.layers.0.self_attn.qkv_proj.prototypes")
        bank = after.tensor("model.layers.0.self_attn.qkv_proj.features")
        assert merged.shape == (32, 12) and bank.shape == (12, 16)
        qkv = [program.tensor(f"model.layers.0.self_attn.{n}_proj.weight") for n in "qkv"]
        dense = torch.cat(qkv).detach()
        assert float((merged @ bank - dense).detach().norm() / dense.norm()) < 0.6


# ----------------------------------------------------------------------------------------------- single, learned


def test_a_single_pass_warns_that_it_is_untrained_and_can_be_refused() -> None:
    with pytest.warns(UntrainedWarning, match="tversky.single"):
        opt = rewriter.optimize(small(), [Tversky(init="single")], (tokens(),), select={"head": None})
    assert opt.report is not None and {site.contract for site in opt.report.sites} == {"LEARNED"}
    with pytest.raises(PlanError, match="allow_untrained=False"):
        rewriter.optimize(small(), [Tversky(init="single")], (tokens(),), allow_untrained=False)


def wide(dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(64, 48)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return layer.to(dtype).eval()


def single_error(one: Tversky) -> float:
    g = torch.Generator().manual_seed(5)
    layer, x = wide(), torch.randn(512, 64, generator=g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        opt = rewriter.optimize(layer, [one], (torch.randn(4, 64, generator=g),))
    target = layer(x) - layer.bias
    return float(((opt(x) - layer.bias - target).norm() / target.norm()).detach())


@pytest.mark.parametrize("intersection", ["product", "min", "gmean", "mean", "max", "softmin"])
def test_a_single_pass_starts_near_the_layer(intersection: str) -> None:
    """35 % with the product and a coefficient per prototype; better than nothing with every other one."""
    error = single_error(Tversky(init="single", intersection=intersection))
    if intersection == "product":
        assert error == pytest.approx(math.sqrt((1 - 2 / math.pi) * (1 - 1 / math.pi) / 2), abs=0.02)
    assert error < 0.9


def test_the_error_on_calibration_inputs_is_reported() -> None:
    """Of inputs that the coefficients were not fitted to."""
    rows = [tokens(seed, rows=200) for seed in range(1, 4)]
    opt = optimised(small(), Tversky(init="single"), calibration=rows)
    assert all(0.1 < site.figures["output_error"] < 0.6 for site in opt.report.sites)


def test_fewer_features_start_further_away() -> None:
    assert single_error(Tversky(init="single", features=32)) > single_error(Tversky(init="single"))


def test_a_ratio_starts_as_the_authors_do() -> None:
    opt = optimised(small(), Tversky(init="single", form="ratio", convention="code"), select={"re:(up|down)": None})
    assert torch.equal(dict(opt.named_parameters())["head.alpha"], torch.full((VOCABULARY,), 0.5))
    share = opt(tokens()) - opt.to_module().get_submodule("head").bias
    assert (share > -1e-6).all() and (share < 1 + 1e-6).all()


def test_a_single_pass_learns() -> None:
    """Sixty steps of distillation take a third off the squared error of one layer."""
    layer, g = wide(), torch.Generator().manual_seed(3)
    with pytest.warns(UntrainedWarning):
        opt = rewriter.optimize(layer, [Tversky(init="single")], (torch.randn(4, 64, generator=g),))
    optimizer = torch.optim.Adam(opt.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        x = torch.randn(128, 64, generator=g)
        loss = (opt(x) - layer(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 2 / 3 * sum(losses[:5])


# ---------------------------------------------------------------------------- files, modules, dtypes, other passes


ROUND = {
    "low_rank": Tversky(features=8),
    "low_rank_shared": Tversky(features=8, share="features"),
    "signed_pair_shared": Tversky(init="signed_pair", share="features"),
    "bounded_head": Tversky(init="bounded_head"),
    "single": Tversky(init="single", intersection="gmean", difference="subtractmatch"),
}


@pytest.mark.parametrize("case", ROUND)
def test_saved_loaded_planned_again_cast_and_undone(case: str, tmp_path: Path) -> None:
    model = small()
    opt = optimised(model, ROUND[case], calibration=calibration())
    assert opt.report is not None and opt.report.sites
    expected = opt(tokens(3))
    opt.save(tmp_path / "model")
    assert torch.equal(rewriter.load(tmp_path / "model")(tokens(3)), expected)
    torch.testing.assert_close(opt.to_module()(tokens(3)), expected)
    half = opt.bfloat16()
    assert half(tokens(3)).dtype == torch.bfloat16
    torch.testing.assert_close(half(tokens(3)).float(), expected, rtol=0.1, atol=0.1)
    back = optimised(model, ROUND[case], calibration=calibration()).undo("tversky")
    torch.testing.assert_close(back(tokens(3)), model(tokens(3)))


def test_a_plan_for_another_checkpoint() -> None:
    """Decisions carry over, tensors do not."""
    first, second = small(), small()
    nn.init.normal_(second.up.weight, generator=torch.Generator().manual_seed(9))
    plan = rewriter.plan(rewriter.capture(first, (tokens(),)), [Tversky(features=12)])
    again = type(plan).from_json(plan.to_json())
    program = rewriter.apply(rewriter.capture(second, (tokens(),)), again)
    assert program.tensor("up.prototypes").shape == (24, 12)
    fresh = rewriter.plan(rewriter.capture(second, (tokens(),)), [Tversky(features=12)])
    direct = rewriter.apply(rewriter.capture(second, (tokens(),)), fresh)
    assert torch.equal(program.tensor("up.prototypes"), direct.tensor("up.prototypes"))


def test_gradients_reach_every_tensor_and_the_original_stays_as_it_was() -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    opt = optimised(model, Tversky(features=8))
    opt(tokens()).square().mean().backward()
    for role in ("features", "prototypes", "theta", "alpha"):
        grad = dict(opt.named_parameters())[f"up.{role}"].grad
        assert grad is not None and grad.isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_of_a_projection_are_those_prototypes() -> None:
    g = torch.Generator().manual_seed(0)
    whole = TverskyProjection(
        torch.randn(6, 5, generator=g), torch.randn(8, 5, generator=g), torch.tensor(1.2), torch.rand(8, generator=g),
        None, torch.tensor(1.0), torch.randn(8, generator=g),
    )  # fmt: skip
    x = torch.randn(3, 5, generator=g)
    torch.testing.assert_close(whole.rows(2, 5)(x), whole(x)[:, 2:5])


def test_memberships_are_what_the_similarity_is_made_of() -> None:
    layer = TverskyProjection.fresh(5, 4, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5)
    u, v = layer.memberships(x), layer.prototype_memberships()
    expected = u @ v.t() - 0.5 * u @ (v <= 0).float().t() - 0.5 * (u <= 0).float() @ v.t()
    torch.testing.assert_close(layer(x), expected)
