# SPDX-License-Identifier: Apache-2.0
"""A captured program for inputs and parameters of other dtypes or another device, without capturing again.

Only for what has no model to capture from: an ``ExportedProgram`` that was cast. The graph stays as it is, literal
dtypes included, which is what ``exported.module().half()`` computes; what it says about its values is derived anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from rewriter.errors import CaptureError
from rewriter.program import Program


def recast(program: Program, example: Sequence[Tensor]) -> Program:
    """``program`` with values described for inputs like ``example`` and the parameters its store holds now.

    Raises:
        CaptureError: an operator of the graph does not take these dtypes.
    """
    new = program.fork()
    new.example = tuple(example)
    describing = _Describing(new)
    try:
        with describing.fake_mode, torch.enable_grad():
            describing.run(*example)
    except Exception as error:  # whatever an operator raises on its arguments
        kinds = ", ".join(sorted({str(t.dtype) for t in example}))
        raise CaptureError(
            f"the exported program does not run on inputs of {kinds} with its present parameters: {error}; "
            "export the model again in that dtype"
        ) from error
    return new


class _Describing(Interpreter):
    """Runs a program on fake tensors and writes down what each value is; sizes stay the symbols they were."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.program = program
        described = [n.meta.get("val") for n in program.graph.nodes]
        self.fake_mode = detect_fake_mode(described) or FakeTensorMode(allow_non_fake_inputs=True)
        self.inputs = iter(program.graph.find_nodes(op="placeholder"))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = value
        return value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = super().placeholder(target, args, kwargs)
        described: Tensor = next(self.inputs).meta["val"]
        return described.to(given.device, given.dtype)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        held = super().get_attr(target, args, kwargs)
        if isinstance(held, GraphModule):
            return held
        fake = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device)
        return fake.requires_grad_(held.requires_grad)
