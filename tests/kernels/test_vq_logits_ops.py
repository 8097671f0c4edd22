# SPDX-License-Identifier: Apache-2.0
"""The operators of codebook heads as torch operators: opcheck, gradients, vmap, dtypes, refusals, cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.spec import REGISTRY, decompositions
from rewriter.kernels.vq_logits import codec, op

V, D, K = 13, 6, 5
OPS = {
    "tiers": op.vq_logits_tiers,
    "logsumexp": op.vq_tiers_logsumexp,
    "nll": op.vq_tiers_nll,
    "product": op.vq_logits_product,
    "exact": op.vq_logits_product_exact,
    "residual": op.vq_logits_residual,
}
LOSSES = ("nll", "logsumexp")  # everything else gives logits


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """All operators are called through one code object of torch's, whose recompilations are limited."""
    torch._dynamo.reset()


def arguments(
    name: str, *, bias: bool = True, dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (2, 3)
) -> list[Any]:
    """Small inputs; code 4 of the tiers is used by no token, the product's last group is ragged, its row 0 is exact."""
    g = torch.Generator().manual_seed(7)
    h = torch.randn(*lead, D, generator=g, dtype=torch.float64).to(dtype)
    per_token = torch.randn(V, generator=g, dtype=torch.float64).to(dtype) if bias else None
    if name in ("product", "exact"):
        codebook = torch.randn(2, 3, 4, generator=g, dtype=torch.float64).to(dtype)
        product = [h, codebook, torch.randint(0, 3, (V, 2), generator=g).to(torch.uint8), per_token]
        exact = torch.randn(3, D, generator=g, dtype=torch.float64).to(dtype)
        return product + ([exact, codec.pack_codes(torch.tensor([9, 0, 12]), V)] if name == "exact" else [])
    if name == "residual":
        codebook = torch.randn(2, K, D, generator=g, dtype=torch.float64).to(dtype)
        return [h, codebook, codec.pack_codes(torch.randint(0, K - 1, (V, 2), generator=g), K), per_token]
    codebook = torch.randn(K, D, generator=g, dtype=torch.float64).to(dtype)
    code_of = codec.pack_codes(torch.randint(0, K - 1, (V,), generator=g), K)
    if name != "nll":
        return [h, codebook, code_of, per_token]
    target = torch.randint(0, V, lead, generator=g)
    if target.numel():
        target.view(-1)[0] = -100
    return [h, codebook, code_of, per_token, target]


def trainable(args: list[Any]) -> list[Any]:
    return [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, bias: bool) -> None:
    torch.library.opcheck(OPS[name], tuple(trainable(arguments(name, bias=bias))))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", OPS)
def test_gradients_of_first_and_second_order(name: str, bias: bool) -> None:
    args = trainable(arguments(name, bias=bias, dtype=torch.float64))
    assert torch.autograd.gradcheck(OPS[name], args)
    assert torch.autograd.gradgradcheck(OPS[name], args)


@pytest.mark.parametrize("name", OPS)
def test_gradients_equal_those_of_the_reference(name: str) -> None:
    args = trainable(arguments(name, dtype=torch.float64))
    floating = [a for a in args if a.is_floating_point()]
    seed = torch.randn_like(OPS[name](*args))
    got = torch.autograd.grad(OPS[name](*args), floating, seed)
    want = torch.autograd.grad(REGISTRY[OPS[name]].reference(*args), floating, seed)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (1,), (0, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_any_leading_dimensions(name: str, lead: tuple[int, ...]) -> None:
    args = arguments(name, lead=lead)
    out = OPS[name](*args)
    assert out.shape == (lead if name in LOSSES else (*lead, V))
    assert out.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_hidden_states_need_not_be_contiguous(name: str) -> None:
    args = arguments(name, lead=(3, 2))
    want = OPS[name](*args)
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not args[0].is_contiguous()
    out = OPS[name](*args)
    assert out.is_contiguous()  # as the fake kernel says
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("name", OPS)
def test_vmap_over_hidden_states(name: str) -> None:
    args = arguments(name, lead=(4, 3))
    dims = (0, *[None] * (len(args) - 1)) if name != "nll" else (0, None, None, None, 0)
    torch.testing.assert_close(torch.vmap(OPS[name], in_dims=dims)(*args), OPS[name](*args))


def test_vmap_over_hidden_states_with_one_target_for_all() -> None:
    h, codebook, code_of, bias, target = arguments("nll", lead=(4, 3))
    out = torch.vmap(op.vq_tiers_nll, in_dims=(0, None, None, None, None))(h, codebook, code_of, bias, target[0])
    want = torch.stack([op.vq_tiers_nll(x, codebook, code_of, bias, target[0]) for x in h])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("name", OPS)
def test_vmap_over_heads(name: str) -> None:
    args = arguments(name, lead=(3,))
    books = torch.stack([args[1], 2 * args[1]], dim=1)
    rest = (None,) * (len(args) - 2)
    out = torch.vmap(OPS[name], in_dims=(None, 1, *rest))(args[0], books, *args[2:])
    want = torch.stack([OPS[name](args[0], b, *args[2:]) for b in (args[1], 2 * args[1])])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("weights", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_dtype_of_the_output_follows_the_hidden_states(name: str, hidden: torch.dtype, weights: torch.dtype) -> None:
    args = arguments(name, dtype=weights)
    args[0] = args[0].to(hidden)
    want = torch.promote_types(hidden, torch.float32) if name in LOSSES else hidden
    real = OPS[name](*args)
    compiled = torch.compile(OPS[name], backend="aot_eager", fullgraph=True)(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPS[name](*(mode.from_tensor(a) for a in args))
    assert real.dtype == fake.dtype == compiled.dtype == want
    assert real.shape == fake.shape == compiled.shape and real.stride() == fake.stride()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_autocast_in_eager_fake_and_compiled_execution(name: str, autocast: torch.dtype) -> None:
    args = arguments(name)
    want = torch.float32 if name in LOSSES else autocast
    by_hand = OPS[name](args[0].to(autocast), *args[1:])
    compiled = torch.compile(OPS[name], backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=autocast):
        real, through_compile = OPS[name](*args), compiled(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = OPS[name](*(mode.from_tensor(a) for a in args))
    assert real.dtype == fake.dtype == through_compile.dtype == by_hand.dtype == want
    assert torch.equal(real, by_hand)
    torch.testing.assert_close(through_compile, by_hand)


@pytest.mark.parametrize("name", OPS)
def test_training_under_autocast_gives_gradients_in_the_parameters_dtype(name: str) -> None:
    args = trainable(arguments(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        OPS[name](*args).float().square().mean().backward()
    for tensor in (a for a in args if a.requires_grad):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_compiled_with_dynamic_shapes_forward_and_backward(name: str) -> None:
    compiled = torch.compile(OPS[name], backend="aot_eager", fullgraph=True, dynamic=True)
    for lead in ((2, 3), (4, 7)):
        args = trainable(arguments(name, lead=lead))
        floating = [a for a in args if a.requires_grad]
        want = torch.autograd.grad(OPS[name](*args).sum(), floating)
        got = torch.autograd.grad(compiled(*args).sum(), floating)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPS)
def test_decomposition_leaves_aten_only(name: str) -> None:
    class Head(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return OPS[name](*args)

    args = tuple(arguments(name))
    batch = torch.export.Dim("batch")
    dynamic = [{0: batch} if i == 0 or (name == "nll" and i == 4) else None for i in range(len(args))]
    exported = torch.export.export(Head(), args, dynamic_shapes=(tuple(dynamic),), strict=False)
    exported = exported.run_decompositions(decompositions())
    calls = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert calls and all(str(t).startswith(("aten", "<built-in", "<function sym_")) for t in calls), calls
    wider = tuple(arguments(name, lead=(5, 3)))
    torch.testing.assert_close(exported.module()(*wider), OPS[name](*wider))


BROKEN: dict[str, tuple[str, int, Any, str]] = {
    "narrow_codebook": ("tiers", 1, torch.zeros(K, D - 1), "width"),
    "codebook_dims": ("tiers", 1, torch.zeros(K, D, 1), r"\[K, d\]"),
    "wide_codes": ("tiers", 2, torch.zeros(V, 1, dtype=torch.int64), "uint8"),
    "four_bytes": ("logsumexp", 2, torch.zeros(V, 4, dtype=torch.uint8), "1 to 3 bytes"),
    "short_bias": ("nll", 3, torch.zeros(V - 1), "one per token"),
    "integer_hidden": ("tiers", 0, torch.zeros(2, D, dtype=torch.int64), "floating"),
    "target_shape": ("nll", 4, torch.zeros(2, dtype=torch.int64), "target must be"),
    "target_dtype": ("nll", 4, torch.zeros(2, 3, dtype=torch.int32), "int64"),
    "uncovered_width": ("product", 1, torch.zeros(1, 3, 4), "do not cover"),
    "spare_group": ("product", 1, torch.zeros(3, 3, 4), "do not cover"),
    "too_many_codes": ("product", 1, torch.zeros(2, 257, 4), "256"),
    "missing_group": ("product", 2, torch.zeros(V, 1, dtype=torch.uint8), "codes must be"),
    "narrow_rows": ("exact", 4, torch.zeros(3, D - 1), "exact must be"),
    "rows_and_ids": ("exact", 5, torch.zeros(2, 1, dtype=torch.uint8), "exact_of must be"),
    "wide_ids": ("exact", 5, torch.zeros(3, 1, dtype=torch.int64), "uint8"),
    "exact_codes": ("exact", 2, torch.zeros(V, 1, dtype=torch.uint8), "codes must be"),
    "flat_stages": ("residual", 1, torch.zeros(K, D), r"\[S, K, d\]"),
    "narrow_stages": ("residual", 1, torch.zeros(2, K, D - 1), "width"),
    "missing_stage": ("residual", 2, torch.zeros(V, 1, 1, dtype=torch.uint8), "codes must be"),
    "wide_stage_codes": ("residual", 2, torch.zeros(V, 2, 1, dtype=torch.int64), "uint8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_arguments_are_refused_the_same_way_real_and_fake(case: str) -> None:
    name, position, bad, message = BROKEN[case]
    args = arguments(name)
    args[position] = bad
    with pytest.raises(RuntimeError, match=message):
        OPS[name](*args)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        OPS[name](*(mode.from_tensor(a) for a in args))


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    args = arguments("nll")
    args[4][1, 1] = V
    with pytest.raises((IndexError, RuntimeError)):
        op.vq_tiers_nll(*args)


def test_half_precision_losses_are_summed_in_float32() -> None:
    # 4096 equal logits: log Z = log 4096; a sum of 4096 ones in bf16 would stop at 256.
    h = torch.zeros(1, 8, dtype=torch.bfloat16)
    code_of = torch.zeros(4096, 1, dtype=torch.uint8)
    out = op.vq_tiers_nll(h, torch.zeros(1, 8), code_of, torch.zeros(4096), torch.tensor([5]))
    torch.testing.assert_close(out, torch.full((1,), 4096.0).log())


def test_cost_counts_packed_bytes() -> None:
    args = arguments("product", lead=(3,))
    cost = REGISTRY[op.vq_logits_product].cost(*args)
    assert cost.bytes_read == 3 * D * 4 + 2 * 3 * 4 * 4 + V * 2 + V * 4
    assert cost.bytes_written == 3 * V * 4
    assert cost.flops == 2 * 3 * V * D + 3 * V
    dense = 2 * 3 * V * D
    assert REGISTRY[op.vq_logits_tiers].cost(*arguments("tiers", bias=False, lead=(3,))).flops == dense * K // V


def test_cost_of_exact_rows_and_of_stages_counts_what_is_stored() -> None:
    exact = REGISTRY[op.vq_logits_product_exact].cost(*arguments("exact", lead=(3,)))
    product = REGISTRY[op.vq_logits_product].cost(*arguments("product", lead=(3,)))
    assert exact.bytes_read == product.bytes_read + 3 * D * 4 + 3 and exact.flops == product.flops
    residual = REGISTRY[op.vq_logits_residual].cost(*arguments("residual", lead=(3,)))
    assert residual.bytes_read == 3 * D * 4 + 2 * K * D * 4 + V * 2 + V * 4
    assert residual.flops == 2 * 3 * 2 * K * D + 2 * 3 * V  # one addition of stages, one of the bias


def test_cost_of_the_loss_does_not_grow_with_positions_times_vocabulary() -> None:
    one, two = (REGISTRY[op.vq_tiers_nll].cost(*arguments("nll", lead=(n,))) for n in (1, 2))
    assert two.flops - one.flops == 2 * D * K + 4 * K + 2
    assert two.bytes_written == 2 * one.bytes_written == 8


def test_cross_entropy_of_the_logits_equals_the_loss_operator() -> None:
    h, codebook, code_of, bias, target = arguments("nll", dtype=torch.float64)
    logits = op.vq_logits_tiers(h, codebook, code_of, bias)
    want = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    torch.testing.assert_close(op.vq_tiers_nll(h, codebook, code_of, bias, target), want, rtol=1e-12, atol=1e-12)
