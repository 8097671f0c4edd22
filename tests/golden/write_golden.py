# SPDX-License-Identifier: Apache-2.0
"""Writes the golden save of the present format: `python tests/golden/write_golden.py tests/golden/v<N>`.

Run once per format version, before its release; refuses to overwrite. What is in it is stated once more, by
formula, in tests/engine/test_storage.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, fx, nn

import rewriter.kernels.shift_add.op  # registers rewriter.bcq_linear
import rewriter.kernels.vq_logits.op  # noqa: F401  registers rewriter.vq_logits_product
from rewriter.graphio import graph_to_json
from rewriter.storage import write


class Golden(nn.Module):
    """Tied parameters, both kinds of buffer, symbolic sizes, nested graphs, two of the project's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 3, bias=False)
        self.part.weight = nn.Parameter((torch.arange(12, dtype=torch.float32).view(3, 4) - 5) / 8)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.part.weight
        self.register_buffer("table", torch.tensor([1 / 3, -0.0, 65504.0]), persistent=False)
        # bcq: out 2, one bit, group 4 = width; signs + - + - and - - + +; scales 0.5 and 2.
        self.register_buffer("codes", torch.tensor([[[0b0101]], [[0b1100]]], dtype=torch.uint8))
        self.scale = nn.Parameter(torch.tensor([[[0.5]], [[2.0]]]))
        # product codebook: 2 groups of 2 codes of width 2; three tokens.
        self.codebook = nn.Parameter(torch.arange(8, dtype=torch.float32).view(2, 2, 2))
        self.register_buffer("tokens", torch.tensor([[0, 0], [1, 0], [1, 1]], dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = (self.part(x) * 2 + self.table).view(x.shape[0] * 3)
        signed = torch.ops.rewriter.bcq_linear(x, self.codes, self.scale, None, None, 4, 4)
        logits = torch.ops.rewriter.vq_logits_product(x, self.codebook, self.tokens, None)
        branch = torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))
        return flat, signed, logits, branch


def main(path: Path) -> None:
    if path.exists():
        raise SystemExit(f"{path} exists; golden files are never rewritten")
    model = Golden().eval()
    dynamic = {"x": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(model, (torch.zeros(2, 4),), dynamic_shapes=dynamic, strict=False)
    module = program.module(check_guards=False)
    output = module.graph.output_node()
    output.args = (list(output.args[0]),)
    module.graph.set_codegen(fx.graph.CodeGen())
    for body in module.modules():
        for node in body.graph.nodes if isinstance(body, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
            node.meta.pop("nn_module_stack", None)
    linear = module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
    linear.meta["stack_trace"] = 'File "model.py", line 1, in forward\n    return self.part(x)'
    linear.meta["nn_module_stack"] = {"L__self__part": ("part", "torch.nn.modules.linear.Linear")}
    linear.meta["custom"] = {"rewriter": {"rule": "golden"}}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    write(
        path,
        tensors=tensors,
        parameters={name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)},
        persistent={"codes", "tokens"},
        programs=[
            {
                "key": "golden",
                "call": {"tuple": [{"tuple": [{"tensor": 0}]}, {"dict": {}}]},
                "result": {"tuple": [{"tensor": i} for i in range(4)]},
                "graph": graph_to_json(module),
            }
        ],
        plan={"version": 1, "sites": []},
        extra={"note": "golden"},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
