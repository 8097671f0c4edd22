# SPDX-License-Identifier: Apache-2.0
"""Inlining replaces operators by aten and nothing else: same values, same gradients, provenance kept."""

from __future__ import annotations

import pytest
import torch
from onnx_sites import BcqEmbedding, BcqLinear, PotLinear, ProductHead, TiersHead
from torch import Tensor, fx, nn

from rewriter.capturing import capture
from rewriter.codegen.decomposition import inline
from rewriter.errors import ExportError


def rewriter_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for module in graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "rewriter"
    ]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(BcqEmbedding(24, 40), PotLinear(24, 20), nn.ReLU(), BcqLinear(20, 24), ProductHead(24, 40))


def test_same_values_and_gradients_at_other_sizes() -> None:
    program = capture(network(), (torch.randint(0, 40, (2, 5)),))
    inlined = inline(program.graph_module)
    assert len(rewriter_nodes(program.graph_module)) == 4 and not rewriter_nodes(inlined)
    ids = torch.randint(0, 40, (3, 7))
    trained = [t for t in program.tensors().values() if t.requires_grad]
    gradients = []
    for module in (program.graph_module, inlined):
        (y,) = module(ids)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_every_new_node_carries_value_and_provenance() -> None:
    program = capture(network(), (torch.randint(0, 40, (2, 5)),))
    before = set(n.name for n in program.graph.nodes)
    replaced = {path for n in rewriter_nodes(program.graph_module) for path, _ in n.meta["nn_module_stack"].values()}
    inlined = inline(program.graph_module)
    new = [n for n in inlined.graph.nodes if n.op == "call_function" and n.name not in before]
    assert len(new) > 40
    for node in new:
        assert "val" in node.meta and "stack_trace" in node.meta
        assert {path for path, _ in node.meta["nn_module_stack"].values()} <= replaced
    shape = inlined.graph.output_node().args[0][0].meta["val"].shape
    assert [isinstance(size, torch.SymInt) for size in shape] == [True, True, False]


def test_composites_stay_whole_and_the_original_is_untouched() -> None:
    program = capture(network(), (torch.randint(0, 40, (2, 5)),))
    code = program.graph_module.code
    targets = {node.target for node in inline(program.graph_module).graph.nodes}
    assert torch.ops.aten.linear.default in targets
    assert program.graph_module.code == code


def test_inlining_twice_is_inlining_once() -> None:
    program = capture(TiersHead(21, 11, 5), (torch.randn(2, 21),))
    once = inline(program.graph_module)
    assert inline(once).code == once.code


def test_an_operator_with_two_results() -> None:
    class Extremes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            values, places = x.max(dim=1)
            return values + 1, places

    program = capture(Extremes(), (torch.randn(3, 4),))
    table = {torch.ops.aten.max.dim: lambda x, dim: (x.amax(dim), x.argmax(dim))}
    inlined = inline(program.graph_module, table)
    assert torch.ops.aten.max.dim not in {node.target for node in inlined.graph.nodes}
    x = torch.randn(5, 6)
    assert all(torch.equal(one, other) for one, other in zip(inlined(x), program.run(x), strict=True))


def test_bodies_of_control_flow_are_inlined() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = BcqLinear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.site(y), lambda y: y - 1, (x,))

    module = Branch()
    program = capture(module, (torch.randn(3, 20),))
    assert rewriter_nodes(program.graph_module)
    inlined = inline(program.graph_module)
    assert not rewriter_nodes(inlined)
    for x in (torch.ones(4, 20), -torch.ones(4, 20)):
        assert torch.allclose(inlined(x)[0], module(x), rtol=1e-5, atol=1e-6)


def test_a_reference_that_cannot_be_traced_is_named() -> None:
    program = capture(BcqLinear(20, 8), (torch.randn(3, 20),))

    def hopeless(*_: object) -> Tensor:
        raise RuntimeError("no such thing")

    with pytest.raises(ExportError, match=r"bcq_linear.*no such thing"):
        inline(program.graph_module, {torch.ops.rewriter.bcq_linear.default: hopeless})


def test_a_node_without_value_is_refused() -> None:
    program = capture(BcqLinear(20, 8), (torch.randn(3, 20),))
    for node in program.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(ExportError, match="carry no meta"):
        inline(program.graph_module)
