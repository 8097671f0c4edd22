# SPDX-License-Identifier: Apache-2.0
"""`fuse.gate_up`: the two linears of a gated unit become one, and come apart again, trained values included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kinds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter.optimized import Optimized
from rewriter.passes import Fuse

WIDTH = 6
Activation = Callable[[Tensor], Tensor]


class Gated(nn.Module):
    def __init__(self, activation: Activation = F.silu, bias: bool = False, middle: int = 10, up_first: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, middle, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(middle, WIDTH, bias=bias)
        self.activation, self.up_first = activation, up_first

    def forward(self, x: Tensor) -> Tensor:
        if self.up_first:
            return self.down_proj(self.up_proj(x) * self.activation(self.gate_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = _normal(3, 4, WIDTH)


def fused(model: nn.Module, x: Tensor = X, dtype: torch.dtype = torch.float64) -> Optimized:
    """In float64: one wide product sums in another order than two narrow ones, which in float32 moves single bits."""
    return rewriter.optimize(model.to(dtype).eval(), ["fuse"], example_inputs=x.to(dtype))


def verified(opt: Optimized) -> Optimized:
    rewriter.verify(opt.original_program(), opt.program, opt.original.example).raise_if_failed()
    return opt


def rules(opt: Optimized) -> list[str]:
    return [site.rule for site in opt.plan.sites]


def reasons(opt: Optimized) -> str:
    return "\n".join(str(miss) for miss in opt.plan.misses)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "activation",
    [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu, torch.sigmoid, lambda x: x * torch.sigmoid(x)],
    ids=["silu", "gelu", "gelu tanh", "relu", "sigmoid", "written silu"],
)
def test_gate_and_up_become_one_linear(activation: Activation, bias: bool, request: pytest.FixtureRequest) -> None:
    model = Gated(activation, bias)
    opt = fused(model)
    if "written" in request.node.name and not rules(opt):
        opt = rewriter.optimize(model.eval(), ["canonical", "fuse"], example_inputs=X.double())
    verified(opt)
    assert "fuse.gate_up" in rules(opt)
    merged = opt.get_parameter("gate_up_proj.weight")
    assert torch.equal(merged, torch.cat([model.gate_proj.weight, model.up_proj.weight]))
    assert "gate_proj.weight" not in dict(opt.named_parameters())
    assert sum(p.numel() for p in opt.parameters()) == sum(p.numel() for p in model.parameters())
    assert rewriter.plan(opt.program, ["fuse"]).sites == ()


@settings(max_examples=10)
@given(st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_any_sizes(middle: int, bias: bool, up_first: bool, seed: int) -> None:
    torch.manual_seed(seed)
    opt = verified(fused(Gated(bias=bias, middle=middle, up_first=up_first), _normal(2, 3, WIDTH, seed=seed)))
    assert rules(opt) == ["fuse.gate_up"]


def test_the_way_back() -> None:
    model = Gated(bias=True)
    opt = fused(model)
    with torch.no_grad():
        opt.get_parameter("gate_up_proj.weight").mul_(2)  # trained since
    back = opt.undo("fuse.gate_up")
    assert torch.equal(back.get_parameter("gate_proj.weight"), 2 * model.gate_proj.weight)
    assert torch.equal(back.get_parameter("up_proj.weight"), 2 * model.up_proj.weight)
    module = opt.to_module()
    assert isinstance(module, Gated) and torch.equal(module.up_proj.weight, 2 * model.up_proj.weight)
    torch.testing.assert_close(module(X.double()), opt(X.double()))


def test_save_and_load(tmp_path: Any) -> None:
    opt = fused(Gated(bias=True), dtype=torch.float32)
    opt.save(tmp_path / "model")
    assert torch.equal(rewriter.load(tmp_path / "model")(X), opt(X))


def test_onnx(tmp_path: Any) -> None:
    ort = pytest.importorskip("onnxruntime")
    opt = fused(Gated(bias=True), dtype=torch.float32)
    opt.export_onnx(tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), opt(X).detach())


@pytest.mark.parametrize("passes", [["fuse"], ["canonical", "simplify", "fold", "fuse"]], ids="+".join)
def test_llama(passes: list[str]) -> None:
    model = kinds.build("llama").double()
    opt = verified(rewriter.optimize(model, passes))
    assert rules(opt).count("fuse.gate_up") == 2
    paths = [site.address.path for site in opt.plan.sites if site.rule == "fuse.gate_up"]
    assert paths == [f"model.layers.{i}.mlp.gate_up_proj" for i in (0, 1)]


# ------------------------------------------------------------------------------------------------- left alone


class _Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 20)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return F.silu(gate) * up


class _TwoInputs(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.gate_proj(x)) * self.up_proj(x * 2)


class _OneBias(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 10, bias=True)


class _Same(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.gate_proj(x)) * self.gate_proj(x)


class _ReadElsewhere(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up_proj.weight.sum()


class _Frozen(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj.requires_grad_(False)


class _Returned(Gated):
    """The gate's own value leaves the program: as a view of the merged one it would have other strides."""

    def forward(self, x: Tensor) -> Any:
        gate = self.gate_proj(x)
        return self.activation(gate) * self.up_proj(x), gate


@pytest.mark.parametrize(
    "model, reason",
    [
        (_Packed, ""),
        (_TwoInputs, "different inputs"),
        (_OneBias, "has a bias and one has none"),
        (_Same, ""),
        (_ReadElsewhere, "up_proj.weight is also read outside gate and up"),
        (_Frozen, "frozen"),
        (_Returned, "strides"),
    ],
)
def test_left_alone(model: Callable[[], nn.Module], reason: str) -> None:
    opt = fused(model())
    assert rules(opt) == [] and reason in reasons(opt)


def test_options_leave_it_out() -> None:
    opt = rewriter.optimize(Gated().eval(), [Fuse(gate_up=False)], example_inputs=X)
    assert rules(opt) == []


def test_a_shared_unit_is_one_site() -> None:
    one = Gated()
    opt = verified(fused(nn.Sequential(one, one)))
    assert rules(opt) == ["fuse.gate_up"]
