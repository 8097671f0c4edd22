# SPDX-License-Identifier: Apache-2.0
"""The softmax family: its kernels, interpreted, against torch in float64, and its operators as torch operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from torch import Tensor

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.softmax import launch, op
from rewriter.kernels.spec import REGISTRY, decompositions

KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "softmax": (op.softmax, launch.softmax, torch.softmax),
    "log_softmax": (op.log_softmax, launch.log_softmax, torch.log_softmax),
}
# numpy warns of what a device computes silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Widths of one block, of several, and around their borders, for each of the three kinds of tiles.
WIDTHS = [0, 1, 7, 256, 257, 1025, 5000]


def judge(got: Tensor, eagers: list[Tensor], golden: Tensor) -> None:
    """No more than twice what torch loses in that dtype, and a unit in the last place of the largest value.

    ``eagers``: torch's results in that dtype, its sums taken in several orders; some are right by chance.
    """
    assert got.shape == eagers[0].shape and got.dtype == eagers[0].dtype and got.is_contiguous()
    if not got.numel():
        return
    lost = max(float((eager.double() - golden).abs().max()) for eager in eagers)
    unit = torch.finfo(got.dtype).eps * float(golden.abs().max())
    assert float((got.double() - golden).abs().max()) <= 2 * lost + unit


def in_several_orders(function: Callable[..., Tensor], dim: int, *tensors: Tensor) -> list[Tensor]:
    """The function of rows along ``dim``, as they are and with their values permuted."""
    g = torch.Generator().manual_seed(11)
    width = tensors[0].shape[dim]
    orders = [torch.arange(width), *(torch.randperm(width, generator=g) for _ in range(4))]
    return [
        function(*(t.index_select(dim, order) for t in tensors), dim).index_select(dim, order.argsort())
        for order in orders
    ]


@settings(max_examples=15)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    width=st.sampled_from(WIDTHS),
    others=st.sampled_from([(), (1,), (3,), (2, 2), (0,), (19,)]),
    place=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 60.0]),
    seed=st.integers(0, 99),
)
def test_kernels_and_their_gradients_lose_no_more_than_torch(
    kind: str, width: int, others: tuple[int, ...], place: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    dim = place % (len(others) + 1)
    shape = (*others[:dim], width, *others[dim:])
    x, grad = (torch.randn(*reversed(shape), generator=g).mul(s).to(dtype).permute(*range(len(shape))[::-1])
               for s in (scale, 1.0))  # fmt: skip
    _, kernel, eager = KINDS[kind]
    gradient = getattr(launch, f"{kind}_backward")
    with interpreting():
        got = kernel(x, dim)
        to_x = gradient(grad, got, dim - len(shape))
    wide = x.double().requires_grad_()
    golden = eager(wide, dim)
    judge(got, in_several_orders(eager, dim, x), golden.detach())
    # From the rounded result, as torch computes it too.
    wanted = REGISTRY[getattr(torch.ops.rewriter, f"{kind}_backward").default].reference
    judge(to_x, in_several_orders(wanted, dim, grad, got), wanted(grad.double(), got.double(), dim))
    if dtype is torch.float32 and scale <= 1.0:  # and the formula is the gradient
        (found,) = torch.autograd.grad(golden, wide, grad.double())
        torch.testing.assert_close(wanted(grad.double(), golden.detach(), dim), found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_of_a_row_counts_in_its_gradient(kind: str) -> None:
    """Of a row of three blocks with the gradient in the first, which the later ones must not forget."""
    grad = torch.cat((torch.ones(1, 4096), torch.zeros(1, 5000)), 1)
    x = torch.zeros(grad.shape)
    _, kernel, eager = KINDS[kind]
    with interpreting():
        found = getattr(launch, f"{kind}_backward")(grad, kernel(x, 1), 1)
    wide = x.double().requires_grad_()
    (golden,) = torch.autograd.grad(eager(wide, 1), wide, grad.double())
    torch.testing.assert_close(found.double(), golden, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nans_are_those_of_torch(kind: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.zeros(6, 5000)
    x[0, 4500], x[1, 3], x[2] = inf, nan, -inf
    x[3, :4096], x[4, 4096:], x[5, 7] = -inf, -inf, -inf
    _, kernel, eager = KINDS[kind]
    with interpreting():
        torch.testing.assert_close(kernel(x, 1), eager(x, 1), equal_nan=True)


def test_float64_is_left_to_the_reference() -> None:
    with pytest.raises(Unsupported, match="float64"):
        launch.softmax(torch.zeros(2, 2, dtype=torch.float64), 0)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_operator(kind: str, shape: tuple[int, ...]) -> None:
    function, _, eager = KINDS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    torch.library.opcheck(function, (x, -1))
    torch.library.opcheck(getattr(torch.ops.rewriter, f"{kind}_backward"), (x.detach(), eager(x.detach(), -1), -1))
    assert torch.autograd.gradcheck(lambda t: function(t, 0), x)
    assert torch.autograd.gradgradcheck(lambda t: function(t, 0), x)
    torch.testing.assert_close(function(x, 0), eager(x, 0))
    mapped = torch.vmap(lambda t: function(t, 0), in_dims=-1)(torch.stack((x, 2 * x), -1))
    torch.testing.assert_close(mapped, torch.stack((eager(x, 0), eager(2 * x, 0))))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_operator_a_gpu_uses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, _, eager = KINDS[kind]
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(2)).requires_grad_()
    monkeypatch.setattr(op, "on_device", lambda tensor: True)
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        (got,) = torch.autograd.grad(run(x, 1).square().sum(), x)
        torch.testing.assert_close(got, torch.autograd.grad(eager(x, 1).square().sum(), x)[0])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(IndexError, match="dim must lie in"):
        op.softmax(torch.zeros(2), 1)
    with pytest.raises(RuntimeError, match="must be floating"):
        op.log_softmax(torch.zeros(2, dtype=torch.int64), 0)


def test_decomposition_is_aten() -> None:
    class Rows(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = op.softmax(op.log_softmax(x, 1), 0)
            return out

    exported = torch.export.export(Rows(), (torch.zeros(2, 3),), strict=False).run_decompositions(decompositions())
    assert all(str(n.target).startswith("aten") for n in exported.graph.nodes if n.op == "call_function")


def test_cost_counts_each_value_once_each_way() -> None:
    cost = REGISTRY[op.softmax].cost(torch.zeros(3, 7, dtype=torch.bfloat16), 1)
    assert (cost.flops, cost.bytes_read, cost.bytes_written) == (5 * 21, 42, 42)
