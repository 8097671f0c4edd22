# SPDX-License-Identifier: Apache-2.0
"""A step's graph: which operators may look from token to token without anybody having to remember earlier ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from rewriter.errors import PlanError
from rewriter.stepping import _check

WEIGHT = torch.randn(4, 4)
APART: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, WEIGHT),
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "flat rows": lambda x: (x.reshape(-1, 4) @ WEIGHT).view(x.shape[0], x.shape[1], 4),
    "softmax of features": lambda x: x.softmax(-1),
    "rotation": lambda x: torch.cat([-x[..., 2:], x[..., :2]], -1) * 0.5 + x,
    "gate": lambda x: F.silu(x) * x,
}
TOGETHER: dict[str, Callable[[Tensor], Tensor]] = {
    "scores": lambda x: (x @ x.mT).softmax(-1) @ x,
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "running sum": lambda x: x.cumsum(1),
    "positions": lambda x: x + torch.arange(x.shape[1])[None, :, None],
    "softmax over tokens": lambda x: x.softmax(1),
    "the token before": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
    "roll": lambda x: x.roll(1, 1),
    "convolution": lambda x: F.conv1d(x.mT, WEIGHT[:, None, :3].contiguous(), padding=1, groups=4).mT,
}


def check(function: Callable[[Tensor], Tensor]) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    program = torch.export.export(Module(), (torch.randn(2, 5, 4),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    graph = program.module(check_guards=False).graph  # type: ignore[attr-defined]
    for node in graph.find_nodes(op="call_module"):
        graph.erase_node(node)
    _check(graph, next(n for n in graph.nodes if n.op == "placeholder").meta["val"].shape[1])


@pytest.mark.parametrize("kind", APART)
def test_a_token_at_a_time_is_recognised(kind: str) -> None:
    check(APART[kind])


@pytest.mark.parametrize("kind", TOGETHER)
def test_what_looks_at_other_tokens_is_refused(kind: str) -> None:
    with pytest.raises(PlanError, match="may look from one token to another"):
        check(TOGETHER[kind])


def test_a_fixed_length_is_refused() -> None:
    with pytest.raises(PlanError, match="sequences of 7 tokens"):
        _check(torch.fx.Graph(), 7)
