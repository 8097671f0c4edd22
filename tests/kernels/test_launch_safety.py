# SPDX-License-Identifier: Apache-2.0
"""Launch code may run while a CUDA graph is recorded: it never waits for the device, nor brings data to it.

All device implementations run on the meta device here, where there are no values: whoever reads one (`item`, `tolist`,
`nonzero`, a branch on a tensor) or copies to the CPU raises. So sizes of what they allocate cannot depend on data
either. What would pass silently is tensors made from Python values, which are copied to the device: those are watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rewriter
from rewriter.codegen import shipped
from rewriter.codegen.calls import example_of
from rewriter.codegen.emitting import emit
from rewriter.kernels.launching import Shipped, recorded

aten = torch.ops.aten
# What copies between host and device, waits for it, or has a result as large as its values say.
FORBIDDEN = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}


@contextmanager
def watching() -> Iterator[None]:
    """Inside, whatever would wait for the device, or copy from or to the host, raises."""
    with _Functions(), _Operators():
        yield


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in FROM_PYTHON:
            raise AssertionError(f"{func.__name__} copies from Python in launch code")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in FORBIDDEN:
            raise AssertionError(f"{func} in launch code")
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        if len({tensor.device for tensor in tensors if tensor.dim()}) > 1:
            raise AssertionError(f"{func} copies between devices in launch code")
        return result


@pytest.mark.parametrize("case", shipped.cases(), ids=lambda case: case.name)
def test_no_launch_waits_for_the_device(case: Shipped) -> None:
    arguments = case.arguments()
    with recorded() as requests, watching():
        case.function(*arguments)
    assert requests and all(request.start(request.configs[0]).grid for request in requests)


def test_no_emitted_launch_does(tmp_path: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.nn.functional.silu(self.up(x)).half().float())

    program = rewriter.optimize(Block().eval(), ["shift_add"], (torch.randn(2, 32),)).program
    sites = emit(program, folder=tmp_path).sites
    assert len(sites) == 2
    for site in sites:
        values = [example_of(value, "meta") for value in site.values]
        with recorded() as requests, watching():
            site.emitted.module.run(*values)
        assert len(requests) == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
        lambda x: x.copy_(torch.ones(3)),
    ],
    ids=["item", "cpu", "nonzero", "tensor", "mask", "branch", "copy"],
)
def test_what_waits_is_noticed(wait: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), watching():
        wait(torch.ones(3, device="meta"))
