# SPDX-License-Identifier: Apache-2.0
"""onnxscript's rewriter, on the same graph in ONNX (opset 24, which has Swish)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

from rivals.workload import ABSENT, PER_HIT, SIZE, blocks, inputs

ONNX = {"sigmoid": "Sigmoid", "mul": "Mul", "add": "Add", "minimum": "Min"}
OPSET = 24


def rule(op_type: str) -> RewriteRule:
    """x·op(x) + y -> swish(x) + y"""

    def searched(op: Any, x: Any, y: Any) -> Any:
        return op.Add(op.Mul(x, getattr(op, op_type)(x)), y)

    def replacement(op: Any, x: Any, y: Any) -> Any:
        return op.Add(op.Swish(x), y)

    return RewriteRule(searched, replacement, name=op_type)


def model(nodes: int) -> ir.Model:
    kind, shape = ir.TensorType(ir.DataType.DOUBLE), ir.Shape([SIZE])
    given = [ir.Input(name, shape=shape, type=kind) for name in "xyz"]
    made: list[ir.Node] = []

    def emit(op: str, *args: ir.Value) -> ir.Value:
        node = ir.node(ONNX[op], list(args))
        made.append(node)
        value = node.outputs[0]
        value.name, value.shape, value.type = f"v{len(made)}", shape, kind
        return value

    result = blocks(nodes // PER_HIT, emit, *given)
    graph = ir.Graph(given, [result], nodes=made, opset_imports={"": OPSET}, name="workload")
    return ir.Model(graph, ir_version=11)


class OnnxScript:
    name = "onnxscript"

    def prepare(self, nodes: int) -> None:
        self.model = model(nodes)
        self.rules = [rule(name) for name in ("Sigmoid", *(f"Absent_{op}" for op in ABSENT))]

    def match(self, dead: int) -> int:
        """What `RewriteRuleSet` does at each node, without the replacement."""
        graph = self.model.graph
        rules = self.rules[: 1 + dead]
        return sum(bool(one.match(self.model, graph, node)) for node in graph for one in rules)

    def rewrite(self) -> int:
        count: int = RewriteRuleSet(self.rules[:1]).apply_to_model(self.model)
        return count

    def run(self) -> Any:
        from onnx.reference import ReferenceEvaluator

        given = dict(zip("xyz", (t.numpy() for t in inputs()), strict=True))
        return ReferenceEvaluator(ir.serde.serialize_model(self.model)).run(None, given)[0]
