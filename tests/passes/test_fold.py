# SPDX-License-Identifier: Apache-2.0
"""`fold` promises the same function of fewer tensors: the golden run in float64 with gradients, and what is refused.

New weights are rounded once to the dtype of the old ones, so on a float32 model promotion starts from rounded weights;
that the function is the same is shown on float64 models, and on float32 ones that the error does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import kinds
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter.optimized import Optimized
from rewriter.passes import Fold

aten = torch.ops.aten
WIDTH = 6


def fold(model: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.float64, **options: bool) -> Optimized:
    model = model.to(dtype).eval()
    return rewriter.optimize(model, [Fold(**options)], example_inputs=tuple(_as(x, dtype) for x in inputs))


def verified(opt: Optimized) -> Optimized:
    result = rewriter.verify(opt.original_program(), opt.program, opt.original.example)
    result.raise_if_failed()
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10
    return opt


def rules(opt: Optimized) -> list[str]:
    return [site.rule.removeprefix("fold.") for site in opt.plan.sites]


def reasons(opt: Optimized) -> str:
    return "\n".join(str(miss) for miss in opt.plan.misses)


def targets(opt: Optimized) -> list[str]:
    return [str(n.target.__name__).partition(".")[0] for n in opt.program.graph.nodes if n.op == "call_function"]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def general(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with values nobody would guess in every parameter and buffer: no scale of 1, no shift of 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if name.endswith("var") else noise * 2 - 0.8)
    return model


class RMSNorm(nn.Module):
    def __init__(self, offset: bool = False) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(WIDTH)), offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return normed * (1 + self.weight) if self.offset else self.weight * normed


class Read(nn.Module):
    """A norm and the linears that read it."""

    def __init__(self, norm: nn.Module, *linears: nn.Module, also: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm, self.linears, self.also = norm, nn.ModuleList(linears), also

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        results = [linear(y) for linear in self.linears]
        return (*results, self.also(y)) if self.also is not None else tuple(results)


class RepNorm(nn.Module):
    """PRepBN at inference as SLAB writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = self.bn(x) + self.alpha * x
        return x.transpose(1, 2)


def linear(outputs: int = 5, bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, outputs, bias=bias)


X = _normal(3, 4, WIDTH)
ROWS = _normal(7, WIDTH)


# --------------------------------------------------------------------------------------------- norms into linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "norm, rule",
    [
        (lambda: nn.LayerNorm(WIDTH), "layer_norm"),
        (lambda: nn.LayerNorm(WIDTH, bias=False), "layer_norm"),
        (lambda: nn.RMSNorm(WIDTH, eps=1e-3), "rms_norm"),
        (lambda: RMSNorm(), "rms_norm"),
        (lambda: RMSNorm(offset=True), "rms_norm"),
    ],
    ids=["layer", "layer without bias", "rms", "written rms", "offset rms"],
)
def test_scale_and_shift_go_into_the_linears_that_read_the_norm(norm: Any, rule: str, bias: bool) -> None:
    made = norm()
    opt = verified(fold(general(Read(made, linear(5, bias), linear(3, bias))), X))
    assert rules(opt) == [rule, rule]
    shifts = getattr(made, "bias", None) is not None
    expected = {"linears.0.weight_folded", "linears.1.weight_folded"}
    expected |= {f"linears.{i}.bias_folded" for i in (0, 1)} if bias or shifts else set()
    assert set(dict(opt.named_parameters())) == expected
    assert targets(opt).count("linear") == 2 and targets(opt).count(f"{rule}") == 1  # one bare norm for both
    assert "norm.weight" not in dict(opt.named_parameters())
    assert rewriter.plan(opt.program, ["fold"]).sites == ()


def test_a_folded_weight_is_the_product_in_float64_rounded_once() -> None:
    model = general(Read(nn.LayerNorm(WIDTH), linear()))
    opt = fold(model, X, dtype=torch.float32)
    norm, first = model.norm, model.linears[0]
    weight = (first.weight.double() * norm.weight.double()).float()
    bias = (first.weight.double() @ norm.bias.double() + first.bias.double()).float()
    assert torch.equal(opt.get_parameter("linears.0.weight_folded"), weight)
    assert torch.equal(opt.get_parameter("linears.0.bias_folded"), bias)


@settings(max_examples=12)
@given(
    st.sampled_from(["layer", "rms", "offset"]),
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=3),
    st.integers(0, 2**16),
)
def test_any_norm_and_any_readers(kind: str, sizes: Sequence[tuple[int, bool]], seed: int) -> None:
    norm = {"layer": nn.LayerNorm(WIDTH), "rms": nn.RMSNorm(WIDTH), "offset": RMSNorm(offset=True)}[kind]
    opt = verified(fold(general(Read(norm, *(linear(n, b) for n, b in sizes)), seed), _normal(2, 3, WIDTH, seed=seed)))
    assert len(rules(opt)) == len(sizes)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 4e-6), (torch.bfloat16, 6e-2), (torch.float16, 8e-3)], ids=str
)
def test_in_narrow_dtypes_the_error_stays(dtype: torch.dtype, tolerance: float) -> None:
    model = general(Read(RMSNorm(), linear(), linear()))
    golden = [y.detach() for y in model.double()(X.double())]
    before = model.to(dtype)
    opt = fold(before, X, dtype=dtype)
    assert rules(opt) == ["rms_norm"] * 2
    for after, was, truth in zip(opt(X.to(dtype)), before(X.to(dtype)), golden, strict=True):
        scale = truth.abs().max()
        assert (after - truth).abs().max() <= 2 * (was - truth).abs().max() + torch.finfo(dtype).eps * scale
        assert (after - truth).abs().max() <= tolerance * scale


def test_a_norm_that_is_also_read_elsewhere_stays() -> None:
    opt = fold(general(Read(nn.LayerNorm(WIDTH), linear(), also=torch.relu)), X)
    assert rules(opt) == [] and "also read by relu" in reasons(opt)
    opt = fold(general(Read(nn.LayerNorm(WIDTH), linear(), also=lambda y: y)), X)
    assert rules(opt) == [] and "returned" in reasons(opt)


def test_a_frozen_scale_and_a_trained_weight_are_not_merged() -> None:
    model = general(Read(nn.LayerNorm(WIDTH), linear()))
    model.norm.requires_grad_(False)
    opt = fold(model, X)
    assert rules(opt) == [] and "frozen" in reasons(opt)
    model.requires_grad_(False)
    opt = fold(model, X)
    assert rules(opt) == ["layer_norm"] and not opt.get_parameter("linears.0.weight_folded").requires_grad


def test_a_weight_read_elsewhere_stays() -> None:
    class Tied(Read):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.linears[0].weight.sum()

    opt = fold(general(Tied(nn.LayerNorm(WIDTH), linear())), X)
    assert rules(opt) == [] and "linears.0.weight is also read by sum" in reasons(opt)


def test_a_shared_layer_folds_whole_or_not_at_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.linear(self.norm(x))
            return x

    opt = verified(fold(general(Twice()), X))
    assert rules(opt) == ["layer_norm"] and targets(opt).count("layer_norm") == 2

    class Mixed(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(super().forward(x))  # once without the norm

    opt = fold(general(Mixed()), X)
    assert rules(opt) == [] and "read" in reasons(opt)


def test_rows_may_be_chosen_and_rearranged_on_the_way() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(WIDTH), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x)[:, -2:].reshape(-1, WIDTH)).view(x.shape[0], 2, 5)

    opt = verified(fold(general(Last()), X))
    assert rules(opt) == ["layer_norm"]


def test_features_may_not_be_rearranged_on_the_way() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x).transpose(1, 2))  # WIDTH × WIDTH: sizes alone do not tell

    opt = fold(general(Turned()), _normal(2, WIDTH, WIDTH))
    assert rules(opt) == [] and "also read by transpose" in reasons(opt)


# --------------------------------------------------------------------------------------------- batch norms


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "before, shape",
    [
        (lambda bias: nn.Linear(WIDTH, 8, bias=bias), (7, WIDTH)),
        (lambda bias: nn.Conv1d(WIDTH, 8, 3, padding=1, bias=bias), (2, WIDTH, 9)),
        (lambda bias: nn.Conv2d(WIDTH, 8, 3, padding="same", groups=2, bias=bias), (2, WIDTH, 5, 5)),
    ],
    ids=["linear", "conv1d", "conv2d"],
)
def test_a_batch_norm_goes_into_what_computes_its_input(before: Any, shape: Any, bias: bool, affine: bool) -> None:
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](8, affine=affine)
    opt = verified(fold(general(nn.Sequential(before(bias), norm, nn.ReLU())), _normal(*shape)))
    assert rules(opt) == ["batch_norm"] and "batch_norm" not in targets(opt)
    assert set(dict(opt.named_parameters())) == {"0.weight_folded", "0.bias_folded"}
    assert not any("running" in name for name, _ in opt.named_buffers())


def test_a_batch_norm_of_turned_features_goes_into_the_linear_before() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.linear(x).transpose(1, 2)))

    opt = verified(fold(general(Turned()), X))
    assert rules(opt) == ["batch_norm"]


def test_a_batch_norm_over_another_dimension_stays() -> None:
    opt = fold(general(nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(4))), X)  # channels: the rows
    assert rules(opt) == [] and "not its last dimension" in reasons(opt)


def test_a_batch_norm_without_a_linear_before_goes_into_those_after() -> None:
    opt = verified(fold(general(Read(nn.BatchNorm1d(WIDTH), linear(5, False), linear(3))), ROWS))
    assert rules(opt) == ["batch_norm_next"] * 2 and targets(opt) == ["linear", "linear"]


def test_a_batch_norm_in_training_stays() -> None:
    model = general(nn.Sequential(linear(), nn.BatchNorm1d(5))).train()
    program = rewriter.capture(model, ROWS)
    plan = rewriter.plan(program, ["fold"])
    assert plan.sites == () and "training mode" in "\n".join(map(str, plan.misses))


def test_train_after_a_batch_norm_was_folded_says_what_to_undo() -> None:
    opt = fold(general(nn.Sequential(linear(), nn.BatchNorm1d(5))), ROWS)
    opt.train()
    with pytest.raises(rewriter.errors.PlanError, match=r"undo the site \(opt.undo\('0'\)\)"):
        opt(ROWS.double())


@pytest.mark.parametrize("turned", [True, False])
def test_a_re_parameterised_norm_goes_into_the_linears_after(turned: bool) -> None:
    class Rows(RepNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.alpha * x + self.bn(x)

    norm, x = (RepNorm(), X) if turned else (Rows(), ROWS)
    opt = verified(fold(general(Read(norm, linear(5, False), linear(3))), x))
    assert rules(opt) == ["rep_norm"] * 2
    assert targets(opt).count("linear") == 2 and "batch_norm" not in targets(opt)


class Form(nn.Module):
    """A batch norm combined with its input in some way."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.bn = form, nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.bn(x), x)


@pytest.mark.parametrize("form", [lambda b, x: b + x, lambda b, x: 0.25 * x + b])
def test_a_re_parameterised_norm_with_a_number(form: Any) -> None:
    opt = verified(fold(general(Read(Form(form), linear())), ROWS))
    assert rules(opt) == ["rep_norm"] and targets(opt) == ["linear"]


@pytest.mark.parametrize(
    "form", [lambda b, x: b - x, lambda b, x: b * x, lambda b, x: torch.add(b, x, alpha=2), lambda b, x: b + x.abs()]
)
def test_other_combinations_with_a_batch_norm_stay(form: Any) -> None:
    assert rules(fold(general(Read(Form(form), linear())), ROWS)) == []


# --------------------------------------------------------------------------------------------- linear ∘ linear


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_two_linears_become_one_where_it_is_smaller(biases: tuple[bool, bool]) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 40, bias=biases[0]), nn.Linear(40, 5, bias=biases[1]))
    opt = verified(fold(general(model), X))
    assert rules(opt) == ["linear"] and targets(opt) == ["linear"]
    assert opt.get_parameter("1.weight_folded").shape == (5, WIDTH)
    assert set(dict(opt.named_parameters())) == {"1.weight_folded"} | ({"1.bias_folded"} if any(biases) else set())


def test_a_low_rank_pair_stays() -> None:
    opt = fold(nn.Sequential(nn.Linear(WIDTH, 2), nn.Linear(2, 5)), X)
    assert rules(opt) == [] and "would have 30 weights, the two of rank 2 have 22" in reasons(opt)


def test_a_middle_that_is_used_stays() -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 40), nn.Linear(40, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y.sum()

    assert rules(fold(Middle(), X)) == []


def test_three_linears_become_one_and_undo_gives_back_each() -> None:
    model = general(nn.Sequential(nn.Linear(WIDTH, 40), nn.Linear(40, 50), nn.Linear(50, 5)))
    opt = verified(fold(model, X))
    assert targets(opt) == ["linear"] and rules(opt) == ["linear", "linear"]
    back = opt.undo("fold", cascade=True)
    assert set(back.state_dict()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_one_linear_twice_stays() -> None:
    one = nn.Linear(WIDTH, WIDTH)
    opt = fold(nn.Sequential(one, one), X)
    assert rules(opt) == [] and ("one" in reasons(opt) or "read" in reasons(opt))


# --------------------------------------------------------------------------------------------- smooth keys


class Attending(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_keys_lose_their_mean_where_asked() -> None:
    q, k, v = (_normal(2, 3, n, 8, seed=n) for n in (5, 7, 7))
    mask = torch.zeros(2, 1, 5, 7)
    mask[0, :, :, :2] = -1e9  # left padding
    assert rules(fold(Attending(), q, k + 30, v, mask)) == []
    opt = verified(fold(Attending(), q, k, v, mask, smooth_k=True))
    assert rules(opt) == ["smooth_k"] and "mean" in targets(opt)
    assert rewriter.plan(opt.program, [Fold(smooth_k=True)]).sites == ()


def test_attention_that_drops_keeps_its_keys() -> None:
    class Dropping(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    q = _normal(2, 3, 5, 8)
    opt = fold(Dropping(), q, q + 1, q + 2, smooth_k=True)
    assert rules(opt) == [] and "random" in reasons(opt)


# --------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    "kind, passes, expected",
    [
        ("llama", ["fold"], {"rms_norm": 11}),
        ("llama", ["canonical", "fold", "fuse", "simplify"], {"rms_norm": 11}),
        ("gpt2", ["fold"], {"layer_norm": 4}),  # the head is tied to the embedding
        ("bert", ["fold"], {}),  # every norm is also the residual
        ("vit", ["fold"], {"layer_norm": 9}),
        ("sequential", ["fold"], {"batch_norm": 1}),
    ],
    ids=str,
)
def test_models(kind: str, passes: list[str], expected: dict[str, int]) -> None:
    model = general(kinds.build(kind).double()) if kind != "sequential" else kinds.build(kind).double()
    inputs = kinds.plain(kind).to(torch.float64)
    opt = rewriter.optimize(model, passes, example_inputs=inputs.args)
    found = [r.removeprefix("fold.") for r in (s.rule for s in opt.plan.sites) if r.startswith("fold.")]
    assert {r: found.count(r) for r in found} == expected
    verified(opt)


@pytest.fixture(scope="module")
def folded() -> Optimized:
    model = general(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 30), nn.Linear(30, 4)))
    return fold(model, X, dtype=torch.float32)


def test_undo_of_one_site(folded: Optimized) -> None:
    assert rules(folded) == ["layer_norm", "linear"]
    back = folded.undo("fold.layer_norm")
    assert rules(back) == ["linear"] and "0.weight" in dict(back.named_parameters())
    torch.testing.assert_close(back(X), folded(X))
    assert torch.equal(folded.undo("fold")(X), rewriter.optimize(_module_of(folded), [], example_inputs=(X,))(X))


def _module_of(opt: Optimized) -> nn.Module:
    return opt.undo("fold").to_module()


def test_save_and_load(folded: Optimized, tmp_path: Any) -> None:
    folded.save(tmp_path / "model")
    assert torch.equal(rewriter.load(tmp_path / "model")(X), folded(X))


def test_to_module_names_the_site(folded: Optimized) -> None:
    with pytest.raises(rewriter.errors.PlanError, match=r"fold.* has no module form; opt.undo"):
        folded.to_module()


def test_onnx(folded: Optimized, tmp_path: Any) -> None:
    path = tmp_path / "model.onnx"
    folded.export_onnx(path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), folded(X).detach())


def test_a_plan_fits_another_checkpoint() -> None:
    def build(seed: int) -> nn.Module:
        return general(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, 5)), seed).double().eval()

    first, second = (rewriter.capture(build(seed), X.double()) for seed in (0, 1))
    plan = rewriter.plan(first, ["fold"])
    rewriter.verify(second, rewriter.apply(second, plan), X.double()[None]).raise_if_failed()


def test_other_passes_go_on_where_folds_end() -> None:
    model = general(Read(nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)))
    opt = rewriter.optimize(model.eval(), ["fold", "shift_add"], example_inputs=_normal(2, 3, 32))
    assert [s.rule for s in opt.plan.sites].count("fold.layer_norm") == 2
    assert {n.rpartition(".")[0] for n, _ in opt.named_parameters()} >= {"linears.0", "linears.1"}
    assert all(torch.isfinite(y).all() for y in opt(_normal(2, 3, 32)))
