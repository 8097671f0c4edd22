# SPDX-License-Identifier: Apache-2.0
"""Linear attention inlined, and in ONNX Runtime as standard operators and as the contrib one, at other lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import rewriter.kernels.linear_attention.op  # noqa: F401  (importing registers the operators)
from rewriter.capturing import capture
from rewriter.codegen.decomposition import inline
from rewriter.codegen.onnx_export import export_program

ops = torch.ops.rewriter
H, HK, F, DV = 4, 2, 3, 2
STEP = (None,) * 7


RULES = ("sum", "step", "feature", "fixed", "both_directions", "delta", "gated_delta", "hybrid")
STANDARD_ONLY = {"both_directions", "hybrid"}


class Rules(nn.Module):
    """Some of the rules on one input ``[B, T, 32]``: its columns are queries, keys, values, rates and gates."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        def heads(first: int, count: int, width: int) -> Tensor:
            return x[..., first : first + count * width].unflatten(-1, (count, width)).transpose(1, 2)

        q, k, v = heads(0, H, F), heads(12, HK, F), heads(18, HK, DV)
        unit, rate = k / k.norm(dim=-1, keepdim=True), torch.sigmoid(heads(22, HK, 1).squeeze(-1))
        step, feature = -heads(24, HK, 1).squeeze(-1).abs(), -heads(26, HK, F).abs()
        gate, fixed = x[0, 0, :H].abs() + 0.1, -x[0, 0, :H].abs()
        keep, state = x[..., 31] > -0.5, k.mT @ v
        calls = {
            "sum": lambda: ops.linear_attention(q.exp(), k.exp(), v, None, keep, None, None, 0.5, True, "sum", 4),
            "step": lambda: ops.linear_attention(q, k, v, step, None, state, k.sum(2), 0.5, True, "none", 4),
            "feature": lambda: ops.linear_attention(q, k, v, feature, keep, None, None, 0.5, True, "none", 4),
            "fixed": lambda: ops.linear_attention(q, k, v, fixed, None, None, None, 0.5, True, "none", 4),
            "both_directions": lambda: ops.linear_attention(
                q.exp(), k.exp(), v, None, keep, None, None, 0.5, False, "sum", 4
            ),
            "delta": lambda: ops.delta_attention(q, unit, v, rate, None, keep, state, 0.5, 4),
            "gated_delta": lambda: ops.delta_attention(q, unit, v, rate, step, None, None, 0.5, 4),
            "hybrid": lambda: ops.hybrid_attention(
                q, k, v, q.exp(), k.exp(), gate, None, fixed, None, *STEP, 0.5, 3, "sliding", 1, "max", False, 4
            )[:1],
        }
        return tuple(result for name in self.names for result in calls[name]())


# Each case is exported three times over by torch, symbolically: seconds per operator.
CASES = [
    pytest.param(False, ("sum",), id="standard"),
    pytest.param(False, RULES[1:4] + RULES[5:], id="standard-all", marks=pytest.mark.slow),
    pytest.param(True, ("feature", "gated_delta", "both_directions"), id="contrib"),
    pytest.param(True, tuple(name for name in RULES if name != "hybrid"), id="contrib-all", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("contrib", "names"), CASES)
def test_rules_at_other_lengths(contrib: bool, names: tuple[str, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    module = Rules(names).eval()
    program = capture(module, (torch.randn(2, 6, 32, generator=generator),))
    path = tmp_path / "rules.onnx"
    export_program(program.graph_module, path, program.example, contrib=contrib)
    domains = [n.domain for n in onnx.load(path).graph.node]
    expected = len(set(names) - STANDARD_ONLY) if contrib else 0
    assert domains.count("com.microsoft") == expected and set(domains) <= {"", "com.microsoft"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, length in ((3, 1), (1, 5), (2, 19)):
        x = torch.randn(batch, length, 32, generator=generator)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for i, (got, want) in enumerate(zip(found, module(x), strict=True)):
            np.testing.assert_allclose(got, want.numpy(), rtol=2e-4, atol=2e-5, err_msg=f"{batch}x{length}, {i}")


# Other rules: tests/kernels/test_linear_attention_op.py, through the decompositions themselves.
@pytest.mark.parametrize("name", ["hybrid"])
def test_inlined_it_serves_every_length(name: str) -> None:
    generator, module = torch.Generator().manual_seed(0), Rules((name,)).eval()
    inlined = inline(capture(module, (torch.randn(2, 6, 32, generator=generator),)).graph_module)
    assert not any(str(n.target).startswith("rewriter.") for n in inlined.graph.nodes)
    for length in (2, 7, 33):
        x = torch.randn(3, length, 32, generator=generator)
        for got, want in zip(inlined(x), module(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
